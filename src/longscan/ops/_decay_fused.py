"""`decay` without a gate or with one number per head on a GPU: see `longscan.kernels.decay`."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longscan.ops._kernel_op import kernel_op
from longscan.ops._layout import check_cu_seqlens
from longscan.ops._packed import pieces, starts

WIDTH = 256
"""Largest head of keys or values that the kernels compute."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Launch(NamedTuple):
    """Tokens at once, width of a tile, warps, stages of the software pipeline."""

    chunk: int
    tile: int
    warps: int
    stages: int


class Launches(NamedTuple):
    """One case's launches: outputs forward and backward in time, states alone, gradients.

    The chunk of `gradients` is the piece at whose borders the backward keeps states.
    """

    forward: Launch
    reverse: Launch
    states: Launch
    gradients: Launch


# (bytes of an operand, padded key size up to) -> launches.
LAUNCHES = {
    (2, 64): Launches(
        Launch(64, 64, 4, 2), Launch(64, 64, 4, 2), Launch(64, 64, 4, 3), Launch(64, 64, 4, 2)
    ),
    (2, 128): Launches(
        Launch(64, 64, 4, 2), Launch(64, 64, 4, 2), Launch(64, 64, 4, 3), Launch(64, 64, 4, 2)
    ),
    (2, 256): Launches(
        Launch(32, 32, 4, 2), Launch(32, 32, 4, 2), Launch(32, 32, 4, 2), Launch(64, 64, 8, 1)
    ),
    (4, 64): Launches(
        Launch(16, 32, 4, 2), Launch(16, 32, 4, 2), Launch(32, 32, 4, 2), Launch(64, 32, 8, 1)
    ),
    (4, 128): Launches(
        Launch(16, 32, 4, 2), Launch(16, 32, 4, 2), Launch(32, 32, 4, 2), Launch(64, 32, 8, 1)
    ),
    (4, 256): Launches(
        Launch(16, 32, 8, 1), Launch(16, 32, 8, 1), Launch(16, 32, 8, 1), Launch(64, 32, 8, 1)
    ),
}
SHORTEST = 256
"""Tokens of a segment, at least: below, what a cut costs is more than what it brings."""


def decay_fits(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor | None) -> bool:
    """Whether the kernels compute this case."""
    return (
        all(x.dtype in DTYPES for x in (q, k, v))
        and (log_a is None or (log_a.ndim == 3 and log_a.dtype in DTYPES))
        and q.shape[3] <= WIDTH
        and v.shape[3] <= WIDTH
        and v.numel() > 0
        and q.numel() > 0
    )


def decay_fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_a: Tensor | None = None,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`decay_chunked` where `decay_fits`; o in v's dtype, states float32."""
    out = v.dtype
    if not q.dtype == k.dtype == out:
        dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), out)
        q, k, v = (x.to(dtype) for x in (q, k, v))
    if state is not None:
        state = state.float()
    # How many segments there are is not known before lengths are: a compiler cannot keep them.
    keep = not torch.compiler.is_compiling() and torch.is_grad_enabled()
    o, final, _, _ = _decay(q, k, v, log_a, state, cu_seqlens, keep)
    return o.to(out), final


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_a: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o, the states at the ends; sums of gates and, if `keep`, segments' states for later."""
    call = _Call(q, k, v, log_a, cu_seqlens)
    o, final, sums = torch.empty_like(call.v), call.states(call.rows), call.nothing()
    if log_a is not None:
        sums = call.sums(call.launches.forward.chunk)
    enters, kept = _contiguous(state), call.nothing()
    if call.split:
        enters = call.entering(call.k, call.v, enters, reverse=False)
        kept = enters if keep else kept
    call.scan(call.q, call.k, call.v, enters, out=o, ends=final)
    return o, final, sums, kept


def _fake(q, k, v, log_a, state, cu_seqlens, keep):
    rows = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = v.new_empty((rows, v.shape[2], k.shape[3], v.shape[3]), dtype=torch.float32)
    sums = v.shape[0] * v.shape[1] * v.shape[2] * 2 if log_a is not None else 0
    return v.new_empty(v.shape), final, final.new_empty(sums), final.new_empty(0)


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_a: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    sums: Tensor,
    kept: Tensor,
    do: Tensor | None,
    dfinal: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, log_a and state; empty ones for what is not there."""
    call = _Call(q, k, v, log_a, cu_seqlens, sums)
    do = torch.zeros_like(call.v) if do is None else do.to(v.dtype).contiguous()
    dfinal = None if dfinal is None else dfinal.float().contiguous()
    dv = torch.empty_like(call.v)
    dstate = call.nothing() if state is None else call.states(call.rows)
    left, right = call.borders(), call.borders()
    enters = _contiguous(state)
    if call.split:
        enters = kept if len(kept) else call.entering(call.k, call.v, enters, reverse=False)
    call.scan(None, call.k, call.v, enters, borders=left)
    if call.split:
        dfinal = call.entering(call.q, do, dfinal, reverse=True)
    ends = None if state is None else dstate
    call.scan(call.k, call.q, do, dfinal, out=dv, borders=right, ends=ends, reverse=True)
    dq, dk, dg = call.gradients(do, left, right)
    return dq, dk, dv, dg, dstate


def _fake_backward(q, k, v, log_a, state, cu_seqlens, sums, kept, do, dfinal):
    dg = sums.new_empty(0) if log_a is None else log_a.new_empty(log_a.shape)
    dstate = sums.new_empty(0 if state is None else state.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dg, dstate


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:6], *output[2:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, run, do, dfinal, *_):
    _, _, _, log_a, state, *_ = saved = ctx.saved_tensors
    dq, dk, dv, dg, dstate = run(*saved, do, dfinal)
    dg = None if log_a is None else dg
    return dq, dk, dv, dg, None if state is None else dstate, None, None


_decay = kernel_op("decay", _forward, _fake, _keep, _backward, _fake_backward, _differentiate)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


@lru_cache(maxsize=16)
def slots(device: torch.device) -> int:
    """Programs that a device runs side by side, two on each of its processors."""
    if device.type != "cuda":
        return 264
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


def _padded(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


class _Plan(NamedTuple):
    """Where a case's sequences lie and how its kernels are launched."""

    launches: Launches
    rows: int
    split: bool
    segments: Tensor
    first: Tensor
    pieces: Tensor
    first_piece: Tensor
    begins: Tensor


def _planned(
    launches: Launches,
    slots: int,
    d_value: int,
    heads: int,
    shape: tuple[int, int],
    cu_seqlens: Tensor | None,
    device: torch.device,
) -> _Plan:
    rows, longest = shape
    if cu_seqlens is not None:
        bounds = check_cu_seqlens(cu_seqlens, *shape)
        rows, longest = len(bounds) - 1, max(b - a for a, b in pairwise(bounds))
    piece = launches.gradients.chunk
    # Segments enough to fill the device, and none where it is full.
    tile = min(launches.forward.tile, _padded(d_value))
    long = -(-shape[0] * shape[1] // longest)  # as many sequences of the longest one's length
    cuts = slots // (long * heads * -(-d_value // tile))
    size, multiple = longest, max(128, piece)
    if cuts > 1:
        size = max(SHORTEST, -(-longest // (cuts * multiple)) * multiple)
    split = size < longest
    segments, first = pieces(*shape, size if split else shape[1], cu_seqlens, device)
    cut, first_piece = pieces(*shape, piece, cu_seqlens, device)
    begins = starts(*shape, cu_seqlens, device)
    return _Plan(launches, rows, split, segments, first, cut, first_piece, begins)


_plan = lru_cache(maxsize=64)(_planned)


class _Call:
    """One call's tensors and the launches of the kernels."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_a: Tensor | None,
        cu_seqlens: Tensor | None,
        sums: Tensor | None = None,
    ):
        self.q, self.k, self.v = q.contiguous(), k.contiguous(), v.contiguous()
        self.log_a, self.cu_seqlens = _contiguous(log_a), cu_seqlens
        batch, length, self.heads, self.d_value = v.shape
        self.groups, self.d_key = k.shape[2:]
        self.shape, self.tokens, self.device = (batch, length), batch * length, v.device
        self.kernels = _kernels()
        # Products of float16 could overflow; in TF32 they have as many digits and do not.
        self.wide = v.dtype == torch.float16
        width = 4 if self.wide else v.element_size()
        self.precision = "tf32x3" if v.dtype == torch.float32 else "tf32"
        self.border = torch.float32 if width == 4 else v.dtype
        launches = LAUNCHES[width, max(64, _padded(self.d_key))]
        # A packed batch remembers its own tables; those of equal rows are found by their size.
        plan = (_plan if cu_seqlens is None else _planned)(
            launches, slots(v.device), self.d_value, self.heads, self.shape, cu_seqlens, v.device
        )
        self.plan, self.launches = plan, launches
        self.rows, self.split = plan.rows, plan.split
        self.summed = {} if sums is None else {launches.forward.chunk: sums}

    def nothing(self) -> Tensor:
        return torch.empty(0, dtype=torch.float32, device=self.device)

    def states(self, rows: int) -> Tensor:
        size = (rows, self.heads, self.d_key, self.d_value)
        return torch.empty(size, dtype=torch.float32, device=self.device)

    def borders(self) -> Tensor:
        size = (len(self.plan.pieces), self.heads, self.d_key, self.d_value)
        return torch.empty(size, dtype=self.border, device=self.device)

    def sums(self, chunk: int) -> Tensor:
        """The gates summed inside chunks."""
        if self.log_a is None:  # nobody looks
            return self.v
        if chunk not in self.summed:
            size, block = 2 * self.tokens * self.heads, 16
            sums = torch.empty(size, dtype=torch.float32, device=self.device)
            cut, _ = pieces(*self.shape, chunk, self.cu_seqlens, self.device)
            self.kernels.gates[(len(cut) * -(-self.heads // block),)](
                self.log_a, sums, cut, self.heads, self.tokens, C=chunk, BLOCK=block, num_warps=4
            )
            self.summed[chunk] = sums
        return self.summed[chunk]

    def entering(self, b: Tensor, c: Tensor, state: Tensor | None, *, reverse: bool) -> Tensor:
        """The state that enters each segment."""
        ends = self.states(len(self.plan.segments))
        decay = torch.empty(ends.shape[:2], dtype=torch.float32, device=self.device)
        self.scan(None, b, c, None, ends=ends, decay=decay, reverse=reverse)
        size, block = self.d_key * self.d_value, 1024
        self.kernels.combine[(self.rows * self.heads * -(-size // block),)](
            ends, decay, ends if state is None else state, self.plan.first, self.heads,
            SIZE=size, BLOCK=block, REVERSE=reverse, GATED=self.log_a is not None,
            STARTED=state is not None, num_warps=4,
        )  # fmt: skip
        return ends

    def scan(
        self,
        a: Tensor | None,
        b: Tensor,
        c: Tensor,
        enters: Tensor | None,
        *,
        out: Tensor | None = None,
        ends: Tensor | None = None,
        decay: Tensor | None = None,
        borders: Tensor | None = None,
        reverse: bool = False,
    ) -> None:
        """ends: of the sequences, or, with decay, what each segment alone adds."""
        launches, plan, heads = self.launches, self.plan, self.heads
        launch = launches.reverse if reverse else launches.forward
        if a is None:
            launch = launches.states
        tile = min(launch.tile, _padded(self.d_value))
        chunk, every = launch.chunk, 0
        if borders is not None:
            chunk = min(chunk, launches.gradients.chunk)
            every = launches.gradients.chunk // chunk

        def there(x: Tensor | None) -> Tensor:  # the kernel does not touch what is not there
            return b if x is None else x

        grid = len(plan.segments) * heads * -(-self.d_value // tile)
        self.kernels.scan[(grid,)](
            there(a), b, c, self.sums(chunk), there(enters), there(out), there(ends), there(decay),
            there(borders), plan.segments, plan.first_piece, plan.begins, heads, self.tokens,
            R=heads // self.groups, DA=self.d_key, DC=self.d_value, BA=_padded(self.d_key),
            BC=tile, C=chunk, EVERY=every, REVERSE=reverse, GATED=self.log_a is not None,
            STARTED=enters is not None, READ=a is not None, ENDS=ends is not None,
            ALONE=decay is not None, WIDE=self.wide, PRECISION=self.precision,
            num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip

    def gradients(self, do: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        launch, cut, heads = self.launches.gradients, self.plan.pieces, self.heads
        tile = min(launch.tile, _padded(self.d_key))
        tiles, group = -(-self.d_key // tile), heads // self.groups
        # Few programs with many heads each: several sums per group, added up afterwards.
        parts, programs = 1, len(cut) * self.groups * tiles * 2
        while programs * parts < slots(self.device) and group % (2 * parts) == 0:
            parts *= 2
        gated = self.log_a is not None
        dq, dk, terms, inner = torch.empty_like(self.q), torch.empty_like(self.k), left, left
        if parts > 1:
            size = (2, parts, *self.q.shape)
            dq, dk = torch.empty(size, dtype=torch.float32, device=self.device).unbind()
        if gated:
            size = tiles * heads * (3 * self.tokens)
            terms = torch.empty(size, dtype=torch.float32, device=self.device)
            size = tiles * heads * len(cut)
            inner = torch.empty(size, dtype=torch.float32, device=self.device)
        self.kernels.gradients[(programs * parts,)](
            self.q, self.k, self.v, do, self.sums(launch.chunk), left, right, dq, dk, terms, inner,
            cut, heads, self.tokens,
            R=group, PARTS=parts, K=self.d_key, V=self.d_value, BK=tile, BV=_padded(self.d_value),
            L=launch.chunk, GATED=gated, WIDE=self.wide, PRECISION=self.precision,
            num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip
        if parts > 1:
            dq, dk = dq.sum(0).to(self.q.dtype), dk.sum(0).to(self.k.dtype)
        if self.log_a is None:
            return dq, dk, self.nothing()
        dg, block = torch.empty_like(self.log_a), 16
        self.kernels.flows[(len(cut) * -(-heads // block),)](
            terms, inner, dg, cut, heads, self.tokens, TILES=tiles, L=launch.chunk, BLOCK=block,
            num_warps=4,
        )  # fmt: skip
        return dq, dk, dg


@lru_cache(maxsize=1)
def _kernels() -> Any:
    return import_module("longscan.kernels.decay")
