"""Two ways to spread softmax attention that `longscan bench parallel` sets beside ours.

    ring       keys and values go from rank to rank, each rank attends to what lies with it and
               merges by the logarithms of its sums; backward the same round, with dK and dV going
               along (arXiv 2310.01889; causal blocks that nobody reads are skipped, shards are
               contiguous, so the last rank works most)
    ulysses    an all-to-all gives each rank all tokens of some heads, another turns them back
               (arXiv 2309.14509); ranks must divide heads

A model does not know them either: shards made here answer its attention in place of ours.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from longscan.parallel import SequenceParallel, Shards
from longscan.parallel.wire import Wire
from longscan.state import State

PEERS = ("ring", "ulysses")


class PeerShards(Shards):
    """Equal shards of a batch whose softmax layers are spread by `peer`; no states come out."""

    def __init__(self, over: SequenceParallel, length: int, peer: str) -> None:
        if peer not in PEERS:
            raise ValueError(f"unknown peer {peer!r}; known: {', '.join(PEERS)}")
        if length % over.size:
            raise ValueError(f"{over.size} ranks cannot have equal parts of {length} tokens")
        lengths = [length // over.size] * over.size
        super().__init__(over, lengths, None, device=over.wire.device, final_states=False)
        self.peer = peer

    def attention(self, q: Tensor, k: Tensor, v: Tensor, **more: Any) -> tuple[Tensor, State]:
        if more.get("window") is not None or q.shape[2] != k.shape[2]:
            raise ValueError(f"{self.peer} here is for whole sequences and as many k as q heads")
        if self.peer == "ring":
            return _Ring.apply(self.wire, q, k, v), State()  # type: ignore[return-value]
        q, k, v = _Turn.apply(self.wire, True, torch.stack([q, k, v])).unbind()  # type: ignore[attr-defined]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return _Turn.apply(self.wire, False, o.transpose(1, 2)[None])[0], State()  # type: ignore[index]


# --- all-to-all -----------------------------------------------------------------------------


def turn(wire: Wire, x: Tensor, to_heads: bool) -> Tensor:
    """[n, B, T/P, H, D] of all heads <-> [n, B, T, H/P, D] of all tokens."""
    p = wire.size
    cut, joined = (3, 2) if to_heads else (2, 3)
    if x.shape[cut] % p:
        raise ValueError(f"{p} ranks must divide {x.shape[cut]} heads")
    sent = torch.stack(x.chunk(p, cut))
    got = torch.empty_like(sent)
    dist.all_to_all_single(got, sent, group=wire.group)
    wire.traffic.add("heads", "messages", p - 1, (p - 1) * got[0].numel() * got.element_size())
    return torch.cat(got.unbind(), joined)


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, wire: Wire, to_heads: bool, x: Tensor) -> Tensor:
        ctx.wire, ctx.to_heads = wire, to_heads
        return wire.run(lambda x: turn(wire, x, to_heads), x)

    @staticmethod
    def backward(ctx, d: Tensor):  # type: ignore[override]
        return None, None, ctx.wire.run(lambda d: turn(ctx.wire, d, not ctx.to_heads), d)


# --- a ring ---------------------------------------------------------------------------------


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention [B, T, H, D] of one block and the log of each query's sum [B, H, T]: by a fused
    kernel in half precision on a GPU, else written out."""
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    o, lse = KERNELS[_kernel(q)][0](*heads, causal)
    return o.transpose(1, 2), lse.view(lse.shape[:3])


def attend_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, ...]:
    """Gradients that one block of keys causes and gets; o, lse: those over all blocks."""
    heads = [x.transpose(1, 2) for x in (do, q, k, v, o)]
    grads = KERNELS[_kernel(q)][1](*heads, lse, causal)
    return tuple(g.transpose(1, 2) for g in grads)


def _kernel(q: Tensor) -> str:
    half = q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)
    return fused(q.device, q.shape[-1]) if half else "plain"


@cache
def fused(device: torch.device, dim: int) -> str:
    """The kernel that gives what the definition gives, cuDNN's if it does: its backward is asked
    for blocks with sums that are not their own.

    Raises: RuntimeError if none does.
    """
    problems = []
    x = torch.randn(4, 1, 2, 256, dim, device=device, generator=torch.Generator(device))
    do, q, k, v = (0.5 * x).bfloat16().unbind()
    for name in ("cudnn", "flash"):
        try:
            far = 0.0
            for causal in (True, False):
                lse = KERNELS["plain"][0](q, k, v, causal)[1] + 0.5
                o = 0.6 * KERNELS["plain"][0](q, k, v, causal)[0]
                want = [*KERNELS["plain"][0](q, k, v, causal)]
                got = [*KERNELS[name][0](q, k, v, causal)]
                want += KERNELS["plain"][1](do, q, k, v, o, lse, causal)
                got += KERNELS[name][1](do, q, k, v, o, lse, causal)
                far = max(
                    far,
                    *(((a.view_as(b) - b).norm() / b.norm()).item()
                      for a, b in zip(got, want, strict=True)),
                )  # fmt: skip
            if far < 0.02:
                return name
            problems.append(f"{name} is off by {far:.2g}")
        except RuntimeError as problem:
            problems.append(f"{name}: {problem}")
    raise RuntimeError(f"no fused attention kernel serves a ring: {'; '.join(problems)}")


def _plain(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    s = _scores(q, k, causal)
    lse = s.logsumexp(-1)
    return ((s - lse.unsqueeze(-1)).exp() @ v.to(s.dtype)).to(q.dtype), lse


def _plain_backward(do, q, k, v, o, lse, causal: bool) -> tuple[Tensor, ...]:
    p = (_scores(q, k, causal) - lse.unsqueeze(-1)).exp()
    do, o, kw, qw = (x.to(p.dtype) for x in (do, o, k, q))
    ds = p * (do @ v.mT.to(p.dtype) - (do * o).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
    return tuple(g.to(q.dtype) for g in (ds @ kw, ds.mT @ qw, p.mT @ do))


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[:2]


def _flash_backward(do, q, k, v, o, lse, causal: bool) -> tuple[Tensor, ...]:
    unused = torch.empty(2, dtype=torch.uint64, device=q.device)  # seeds of a dropout of 0
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        do, q, k, v, o, lse.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, causal,
        unused, unused[:0],
    )  # fmt: skip


def _cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal)[:2]


def _cudnn_backward(do, q, k, v, o, lse, causal: bool) -> tuple[Tensor, ...]:
    unused = torch.empty((), dtype=torch.int64, device=q.device)
    return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        do, q, k, v, o, lse.unsqueeze(-1).contiguous(), unused, unused, None, None, None,
        q.shape[2], k.shape[2], 0.0, causal,
    )  # fmt: skip


KERNELS: dict[str, tuple[Callable, Callable]] = {
    "plain": (_plain, _plain_backward),
    "flash": (_flash, _flash_backward),
    "cudnn": (_cudnn, _cudnn_backward),
}
"""Forward and backward on [B, H, T, D], with the logs of sums [B, H, T] or [B, H, T, 1]."""


def _scores(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    s = (q.to(wide) @ k.mT.to(wide)) * q.shape[-1] ** -0.5
    n = s.shape[-1]
    hidden = torch.ones(n, n, dtype=torch.bool, device=s.device).triu(1)
    return s.masked_fill(hidden, -torch.inf) if causal else s


def pass_on(wire: Wire, *parts: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Begin to send tensors to the next rank of the ring and receive those of the one before."""
    after, before = (wire.rank + 1) % wire.size, (wire.rank - 1) % wire.size
    if wire.size == 1:
        return lambda: parts

    def work(*parts: Tensor) -> tuple[Tensor, ...]:
        got = []
        for x in parts:
            into = torch.empty_like(x, memory_format=torch.contiguous_format)
            wire.trade({after: x}, {before: into}, "ring")
            got.append(into)
        return tuple(got)

    return wire.start(work, *parts).wait


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx, wire: Wire, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        kv = torch.stack([k, v])
        total, lse = torch.zeros_like(q, dtype=wide), None
        for step in range(wire.size):
            more = step + 1 < wire.size
            coming = pass_on(wire, kv) if more else None
            if step <= wire.rank:  # these keys lie with or before our queries
                o, sums = attend(q, kv[0], kv[1], causal=step == 0)
                if lse is None:
                    total, lse = o.to(wide), sums
                else:
                    both = torch.logaddexp(lse, sums)
                    total = total * _weight(lse - both) + o * _weight(sums - both)
                    lse = both
            if coming is not None:
                (kv,) = coming()
        o = total.to(q.dtype)
        ctx.wire = wire
        ctx.save_for_backward(q, k, v, o, lse)
        return o

    @staticmethod
    def backward(ctx, do: Tensor):  # type: ignore[override]
        wire: Wire = ctx.wire
        q, k, v, o, lse = ctx.saved_tensors
        wide = torch.promote_types(q.dtype, torch.float32)
        kv = torch.stack([k, v])
        dq, dkv = torch.zeros_like(q, dtype=wide), None
        arriving: Callable[[], tuple[Tensor, ...]] | None = None
        for step in range(wire.size):
            coming = pass_on(wire, kv) if step + 1 < wire.size else None
            mine = None
            if step <= wire.rank:
                parts = attend_backward(do, q, kv[0], kv[1], o, lse, causal=step == 0)
                dq += parts[0]
                mine = torch.stack(parts[1:]).to(wide)
            if arriving is not None:
                (dkv,) = arriving()
                dkv = dkv if mine is None else dkv + mine
            else:
                dkv = mine
            assert dkv is not None
            if coming is not None:
                (kv,) = coming()
            # Gradients follow their keys, and after the last step they are one hop from home.
            arriving = pass_on(wire, dkv)
        assert arriving is not None
        (dkv,) = arriving()
        return None, dq.to(q.dtype), dkv[0].to(k.dtype), dkv[1].to(v.dtype)


def _weight(x: Tensor) -> Tensor:
    """exp of [B, H, T] for [B, T, H, D]."""
    return x.exp().transpose(1, 2).unsqueeze(-1)
