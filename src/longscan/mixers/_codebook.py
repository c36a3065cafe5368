"""A codebook that follows the keys it stands for, learnt by moving averages, not by gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from longscan.ops import _relayed
from longscan.ops._check import widen
from longscan.ops.vq import codewords, quantise


class Quantised(NamedTuple):
    """Keys and what the codebook made of them.

    k_hat [B, T, H, K]: codewords with the gradient of the keys; codes [B, T, H]; book [H, S, K]:
    the codebook they come from; commit: mean over tokens of sum_heads |k - c_z|^2, the pull of
    the keys towards their codewords, in training only.
    """

    k_hat: Tensor
    codes: Tensor
    book: Tensor
    commit: Tensor | None


def recomputing() -> bool:
    """Whether this forward repeats an earlier one for its backward (activation checkpointing)."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _across_ranks() -> bool:
    return distributed.is_available() and distributed.is_initialized()


class Codebook(nn.Module):
    """S codewords for each head, c_s = c_sum_s / max(c_count_s, 0.01).

    In training, with gradients enabled, each forward notes the sums and counts of its keys by
    code, over all ranks; the next such forward folds them in before it quantises its own keys:

        c_sum <- decay c_sum + (1 - decay) sum of keys,   c_count <- decay c_count + (1 - decay) n

    So one forward, its backward and its recomputation see one codebook. Forwards in evaluation or
    without gradients change nothing. The first training forward starts the codebook with S of its
    keys, evenly spread over the batch (that of all ranks), unless one was loaded. A codeword
    whose c_count was below 0.01 of the mean for `patience` updates in a row is replaced by one of
    the keys noted, likewise spread.

    Shapes: k [B, T, H, K]; buffers c_sum [H, S, K], c_count [H, S]; pending [H, S, 2 K + 1]: the
    sums, S spread keys and counts to be folded in; unused [H, S]: updates in a row with too few
    keys; started: whether keys or a checkpoint have given the codebook.
    scale: standard deviation of the random codewords before that.
    Precision: all buffers stay float32 in narrower models.
    With several ranks every rank must run its training forwards in step with the others. Where a
    sequence is spread over ranks, keys are noted when the last rank has run, and a codebook without
    keys starts with those noted, in the second forward: in the first one its words are random.
    """

    def __init__(
        self,
        n_heads: int,
        n_codes: int,
        d_key: int,
        *,
        decay: float = 0.99,
        patience: int = 1000,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        if n_codes < 1:
            raise ValueError(f"n_codes must be at least 1, not {n_codes}")
        if not 0 <= decay < 1:
            raise ValueError(f"the codebook's decay must lie in [0, 1), not {decay}")
        self.decay, self.patience, self.scale = decay, patience, scale
        self.register_buffer("c_sum", torch.empty(n_heads, n_codes, d_key))
        self.register_buffer("c_count", torch.empty(n_heads, n_codes))
        self.register_buffer("pending", torch.empty(n_heads, n_codes, 2 * d_key + 1))
        self.register_buffer("unused", torch.empty(n_heads, n_codes, dtype=torch.int64))
        self.register_buffer("started", torch.empty((), dtype=torch.bool))
        self.reset_parameters()

    c_sum: Tensor
    c_count: Tensor
    pending: Tensor
    unused: Tensor
    started: Tensor

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Codewords N(0, scale^2) with count 1, until the first training forward."""
        self.c_sum.normal_(std=self.scale)
        self.c_count.fill_(1)
        for x in (self.pending, self.unused, self.started):
            x.zero_()
        self._surely_started = False

    def _apply(self, fn, recurse: bool = True):
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in kept.items():
            moved = self._buffers[name]
            assert old is not None
            assert moved is not None
            if moved.dtype in (torch.float16, torch.bfloat16):
                self._buffers[name] = old.to(moved.device, torch.float32)
        return self

    def _load_from_state_dict(self, *args, **more) -> None:
        super()._load_from_state_dict(*args, **more)
        self._surely_started = False

    def book(self) -> Tensor:
        """The codewords [H, S, K]."""
        return self.c_sum / self.c_count.clamp(min=0.01).unsqueeze(-1)

    def forward(self, k: Tensor) -> Quantised:
        learns = self.training and torch.is_grad_enabled() and not recomputing()
        k, spread = widen(k), None
        if learns:
            with torch.no_grad():
                if not _relayed.relaying():  # the keys of other ranks depend on what leaves here
                    spread = self._spread(k.detach().flatten(0, 1))
                self._fold()
                if spread is not None:
                    self._start(spread)
        book = self.book()
        codes = quantise(k, book)
        c = codewords(codes, book).to(k.dtype)
        commit = None
        if self.training:
            commit = _relayed.mean(
                self, (k - c).square().sum((-2, -1)).mean(), k[..., 0, 0].numel()
            )
        if learns:
            seen = k.detach().flatten(0, 1), codes.flatten(0, 1)
            if spread is None:
                _relayed.later(self._note, *seen)
            else:
                self._note(*seen, spread)
        return Quantised(c + (k - k.detach()), codes, book, commit)

    def _spread(self, k: Tensor) -> Tensor:
        """S of the keys [N, H, K] of all ranks, evenly spread -> [H, S, K].

        Each rank fills in its own, and leaves zeros to be summed with those of the others.
        """
        k = k.to(self.c_sum.dtype)
        n, place = k.shape[0], torch.arange(self.c_sum.shape[1], device=k.device)
        if not _across_ranks():
            return k[place * n // place.numel()].transpose(0, 1)
        rank = distributed.get_rank()
        sizes = place.new_zeros(distributed.get_world_size())
        sizes[rank] = n
        distributed.all_reduce(sizes)
        place = place * sizes.sum() // place.numel() - sizes[:rank].sum()
        mine = (place >= 0) & (place < n)
        return (k[place.clamp(0, n - 1)] * mine[:, None, None]).transpose(0, 1)

    def _start(self, spread: Tensor) -> None:
        """Take keys as codewords if there are none yet; without a look at the device's memory."""
        if self._surely_started:
            return
        if _across_ranks():
            spread = spread.contiguous().clone()
            distributed.all_reduce(spread)
        self.c_sum.copy_(torch.where(self.started, self.c_sum, spread))
        self.c_count.copy_(torch.where(self.started, self.c_count, 1.0))
        self.started.fill_(True)
        self._surely_started = True

    @torch.no_grad()
    def _note(self, k: Tensor, codes: Tensor, spread: Tensor | None = None) -> None:
        """Keep what this forward teaches. Shapes: k [N, H, K]; codes [N, H]; spread [H, S, K]."""
        spread = self._spread(k) if spread is None else spread
        hot = F.one_hot(codes.T, self.c_sum.shape[1]).to(spread.dtype)
        sums = hot.mT @ k.transpose(0, 1).to(spread.dtype)
        noted = torch.cat([sums, spread, hot.sum(1).unsqueeze(-1)], -1)
        if _across_ranks():
            distributed.all_reduce(noted)
        self.pending.copy_(noted)

    def _fold(self) -> None:
        """Let the codebook follow the keys noted by the last training forward, or start with them
        if it has none."""
        d_key = self.c_sum.shape[-1]
        sums, spread, n = self.pending.split([d_key, d_key, 1], -1)
        n = n.squeeze(-1)
        some = n.sum() > 0  # nothing is pending before the first
        share = some.to(n.dtype) * (1 - self.decay)
        c_sum = torch.lerp(self.c_sum, sums, share)
        c_count = torch.lerp(self.c_count, n, share)
        few = c_count < 0.01 * c_count.mean(-1, keepdim=True)
        unused = torch.where(few, self.unused + some, 0)
        dead = unused >= self.patience
        dead = dead | (some & ~self.started)
        self.started.logical_or_(some)
        self.c_sum.copy_(torch.where(dead.unsqueeze(-1), spread, c_sum))
        self.c_count.copy_(torch.where(dead, 1.0, c_count))
        self.unused.copy_(torch.where(dead, 0, unused))
        self.pending.zero_()
