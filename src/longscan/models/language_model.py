"""A causal language model over any mixer, or any pattern of mixers."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan.models.config import LanguageModelConfig
from longscan.models.stack import Stack, check_ids
from longscan.ops.loss import linear_cross_entropy
from longscan.state import State

if TYPE_CHECKING:
    from longscan.parallel import Shards


class LanguageModel(Stack):
    """Embedding, blocks, final norm, head.

        x = embedding[ids];  x = block_i(x) for each block;  logits = norm(x) @ head^T

    Its state is State({"0": state of block 0's mixer, "1": ...}); a call continues what an earlier
    call returned, so model(a) then model(b, state) is model(a | b), for any cut.

    Shapes: ids [B, T] int64; logits [B, T, vocab_size]; or one row B = 1 of n packed sequences
    with cu_seqlens [n + 1], and then states have n rows.
    Precision, initialisation of the blocks: as Stack. Embeddings, and an untied head, N(0, 0.02).
    Raises: ValueError, TypeError for ids out of range, wrong shapes, a state of another model.
    """

    architecture: ClassVar[str] = "longscan.LanguageModel"
    config_class = LanguageModelConfig
    config: LanguageModelConfig
    embedding: nn.Embedding

    def __init__(self, config: LanguageModelConfig) -> None:
        c = config
        super().__init__(c, entry={"embedding": nn.Embedding(c.vocab_rows, c.d_model)})
        self.head = None if c.tie_embeddings else nn.Linear(c.d_model, c.vocab_rows, bias=False)
        self._init_tables()

    def _init_tables(self) -> None:
        for table in (self.embedding, self.head):
            if table is not None:
                nn.init.normal_(table.weight, std=0.02)

    def reset_parameters(self) -> None:
        """All parameters anew, as a fresh model has them."""
        super().reset_parameters()
        self._init_tables()

    @property
    def head_weight(self) -> Tensor:
        """The table [vocab_rows, d_model] that turns hidden states into logits."""
        return self.embedding.weight if self.head is None else self.head.weight

    def num_parameters(self, *, embeddings: bool = True) -> int:
        """Parameters, tied ones counted once; without the embedding and head tables if asked."""
        total = sum(p.numel() for p in self.parameters())
        if not embeddings:
            tables = (self.embedding, self.head)
            total -= sum(t.weight.numel() for t in tables if t is not None)
        return total

    def hidden(
        self,
        ids: Tensor,
        state: State | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        shards: Shards | None = None,
    ) -> tuple[Tensor, State]:
        """Hidden states [B, T, d_model] after the final norm, and the state."""
        check_ids(ids, self.config.vocab_size)
        return self.features(self.embedding(ids), state, cu_seqlens=cu_seqlens, shards=shards)

    def logits(self, h: Tensor) -> Tensor:
        """Logits [..., vocab_size] of hidden states [..., d_model]."""
        logits = F.linear(h, self.head_weight)[..., : self.config.vocab_size]
        cap = self.config.logit_cap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def forward(
        self,
        ids: Tensor,
        state: State | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        shards: Shards | None = None,
    ) -> tuple[Tensor, State]:
        """Logits [B, T, vocab_size] and the state.

        shards: ids, and so the logits, are this rank's part (`longscan.parallel`).

        attention_mask [B, T]: 1 for tokens, 0 for padding on the left or on the right of a row.
        Padding is taken out before the blocks (the rows are packed) and has logits 0; states have
        B rows and know nothing of it.
        """
        if attention_mask is None:
            h, state = self.hidden(ids, state, cu_seqlens=cu_seqlens, shards=shards)
            return self.logits(h), state
        if cu_seqlens is not None or shards is not None:
            raise ValueError("pass attention_mask or cu_seqlens or shards, not both")
        keep, bounds = _unpad(ids, attention_mask)
        h, state = self.hidden(ids[keep][None], state, cu_seqlens=bounds)
        logits = self.logits(h[0])
        out = logits.new_zeros(*ids.shape, logits.shape[-1])
        return out.masked_scatter(keep[..., None], logits), state

    def loss(
        self,
        ids: Tensor,
        targets: Tensor,
        state: State | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        reduction: str = "mean",
        shards: Shards | None = None,
    ) -> tuple[Tensor, State]:
        """Cross entropy of targets [B, T] (-100: none) and the state; logits are never whole.

        reduction: mean over tokens with a target (0 if there are none) | sum | none ([B, T]). In
        training the mean contains the penalties of mixers that have some (see Mixer).
        shards: ids and targets are this rank's part. The mean is then that over all ranks, and its
        gradient on a rank that of the rank's own tokens: sums over ranks make the whole. sum and
        none are of this rank's tokens.
        """
        if targets.shape != ids.shape:
            raise ValueError(
                f"targets {list(targets.shape)} must have the shape of ids {list(ids.shape)}"
            )
        h, state = self.hidden(ids, state, cu_seqlens=cu_seqlens, shards=shards)
        spread = shards is not None and reduction == "mean"
        loss = linear_cross_entropy(
            h.flatten(0, 1),
            self.head_weight,
            targets.flatten(),
            reduction="sum" if spread else reduction,
            n_classes=self.config.vocab_size,
            logit_cap=self.config.logit_cap,
        )
        penalty = self.penalty() if reduction == "mean" else None
        if shards is not None and spread:
            loss = shards.mean(loss, (targets != -100).sum())
            if penalty is not None:
                tokens = torch.tensor(targets.numel(), device=loss.device)
                penalty = shards.mean(penalty * tokens, tokens)
        if penalty is not None:
            loss = loss + penalty
        return (loss.view_as(targets) if reduction == "none" else loss), state


def _unpad(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Where the tokens are [B, T] bool, and the boundaries [B + 1] of the rows when packed."""
    if mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask {list(mask.shape)} must have the shape of ids {list(ids.shape)}"
        )
    keep = mask.bool()
    # One run of tokens per row: exactly one rise, counting a rise at the edge.
    rises = (keep & ~F.pad(keep, (1, 0))[:, :-1]).sum(1)
    if (rises != 1).any():
        row = int((rises != 1).nonzero()[0])
        what = "masks every token" if rises[row] == 0 else "has padding between tokens"
        raise ValueError(
            f"row {row} of attention_mask {what}; padding may lie on the left and on the right of "
            "at least one token"
        )
    with torch.inference_mode(False):
        lengths = keep.clone().sum(1)
        return keep, F.pad(lengths.cumsum(0), (1, 0))


__all__ = ["LanguageModel", "LanguageModelConfig"]
