"""`decay` without a gate or with one number per head on a GPU: see `longscan.kernels.decay`."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longscan.ops._kernel_op import DTYPES, kernel_op
from longscan.ops._layout import check_cu_seqlens
from longscan.ops._packed import pieces, starts

WIDTH = 256
"""Largest head of keys or values that the kernels compute."""


class Launch(NamedTuple):
    """Tokens at once, width of a tile, warps, stages of the software pipeline."""

    chunk: int
    tile: int
    warps: int
    stages: int


class Launches(NamedTuple):
    """One case's launches: outputs forward and backward in time, states alone, gradients.

    The chunk of `gradients` is the piece at whose borders the backward keeps states. near, far: its
    two parts, apart where heads share keys. alone: of heads with keys of their own.
    """

    forward: Launch
    reverse: Launch
    states: Launch
    gradients: Launch
    near: Launch | None = None
    far: Launch | None = None
    alone: Launch | None = None


# (bytes of an operand, padded key size up to) -> launches.
LAUNCHES = {
    (2, 64): Launches(
        Launch(64, 64, 4, 2), Launch(64, 64, 4, 2), Launch(64, 64, 4, 3), Launch(64, 64, 4, 2),
        Launch(64, 128, 4, 3), Launch(64, 64, 4, 3), Launch(64, 64, 4, 1),
    ),
    (2, 128): Launches(
        Launch(64, 64, 4, 2), Launch(64, 64, 4, 2), Launch(64, 64, 4, 4), Launch(64, 64, 4, 2),
        Launch(64, 128, 4, 3), Launch(64, 64, 4, 3), Launch(64, 64, 4, 1),
    ),
    (2, 256): Launches(
        Launch(32, 32, 4, 2), Launch(32, 32, 4, 2), Launch(32, 32, 4, 2), Launch(64, 64, 8, 1),
        Launch(64, 64, 8, 1), Launch(64, 64, 8, 1),
    ),
    (4, 64): Launches(
        Launch(16, 32, 4, 2), Launch(16, 32, 4, 2), Launch(32, 32, 4, 2), Launch(64, 32, 8, 1),
    ),
    (4, 128): Launches(
        Launch(16, 32, 4, 2), Launch(16, 32, 4, 2), Launch(32, 32, 4, 2), Launch(64, 32, 8, 1),
    ),
    (4, 256): Launches(
        Launch(16, 32, 8, 1), Launch(16, 32, 8, 1), Launch(16, 32, 8, 1), Launch(64, 32, 8, 1),
    ),
}  # fmt: skip
PADDING = 64
"""Numbers behind the sums of gates: pieces are read whole."""
WAVES = 1
"""How often time is cut, against what fills the device: more spare memory in the backward."""
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
    scale: Tensor | None = None,
    skip: Tensor | None = None,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`decay` where `decay_fits`; o in v's dtype, states float32.

    scale and skip: only beside log_a.
    """
    out = v.dtype
    if not q.dtype == k.dtype == out:
        dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), out)
        q, k, v = (x.to(dtype) for x in (q, k, v))
    if state is not None:
        state = state.float()
    # How many segments there are is not known before lengths are: a compiler cannot keep them.
    keep = not torch.compiler.is_compiling() and torch.is_grad_enabled()
    o, final, _, _ = _decay(q, k, v, log_a, scale, skip, state, cu_seqlens, keep)
    return o.to(out), final


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_a: Tensor | None,
    scale: Tensor | None,
    skip: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o, the states at the ends; sums of gates and, if `keep`, segments' states for later."""
    call = _Call(q, k, v, log_a, scale, skip, cu_seqlens)
    o, final, enters = torch.empty_like(call.v), call.states(call.rows), _contiguous(state)
    sums = call.nothing() if log_a is None else call.sums(call.launches.forward.chunk)
    if call.split:
        enters = call.entering(call.k, call.v, enters, reverse=False)
    kept = enters if call.split and keep else call.nothing()
    assert kept is not None
    call.scan(call.q, call.k, call.v, enters, out=o, ends=final)
    return o, final, sums, kept


def _fake(q, k, v, log_a, scale, skip, state, cu_seqlens, keep):
    rows = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = v.new_empty((rows, v.shape[2], k.shape[3], v.shape[3]), dtype=torch.float32)
    planes = 2 if scale is None else 3
    sums = v.shape[0] * v.shape[1] * v.shape[2] * planes + PADDING if log_a is not None else 0
    return v.new_empty(v.shape), final, final.new_empty(sums), final.new_empty(0)


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_a: Tensor | None,
    scale: Tensor | None,
    skip: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    sums: Tensor,
    kept: Tensor,
    do: Tensor | None,
    dfinal: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, log_a, scale, skip and state; empty ones for what is not there."""
    call = _Call(q, k, v, log_a, scale, skip, cu_seqlens, sums)
    do = torch.zeros_like(call.v) if do is None else do.to(v.dtype).contiguous()
    dfinal = None if dfinal is None else dfinal.float().contiguous()
    dv = torch.empty_like(call.v)
    dstate = call.nothing() if state is None else call.states(call.rows)
    left, right = call.borders(), call.borders()
    enters = _contiguous(state)
    if call.split:
        enters = kept if kept.shape[0] else call.entering(call.k, call.v, enters, reverse=False)
        dfinal = call.entering(call.q, do, dfinal, reverse=True)
    ends = None if state is None else dstate

    def fill(slab: _Slab) -> None:
        call.scan(None, call.k, call.v, enters, borders=left, slab=slab)
        call.scan(
            call.k, call.q, do, dfinal, out=dv, borders=right, ends=ends, reverse=True, slab=slab
        )

    dq, dk, dg, dscale, dskip = call.gradients(do, left, right, fill)
    return dq, dk, dv, dg, dscale, dskip, dstate


def _fake_backward(q, k, v, log_a, scale, skip, state, cu_seqlens, sums, kept, do, dfinal):
    def like(x):
        return sums.new_empty(0) if x is None else x.new_empty(x.shape)

    return tuple(map(like, (q, k, v, log_a, scale, skip, state)))


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:8], *output[2:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, run, do, dfinal, *_):
    saved = ctx.saved_tensors
    found = run(*saved, do, dfinal)
    return *(None if x is None else g for x, g in zip(saved[:7], found, strict=True)), None, None


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


def _wide(launch: Launch, d_value: int) -> Launch:
    """`far`'s launch: of states with wide values, registers and shared memory hold few."""
    if d_value <= 64:
        return launch
    return launch._replace(warps=8, stages=min(launch.stages, 2 if d_value <= 128 else 1))


class _Slab(NamedTuple):
    """Segments that the backward does at a time: it keeps the states at the borders of pieces."""

    start: int
    stop: int
    segments: Tensor
    pieces: Tensor
    first_piece: Tensor  # of each sequence, counted from the slab's first


class _Plan(NamedTuple):
    """Where a case's sequences lie and how its kernels are launched."""

    launches: Launches
    rows: int
    split: bool
    segments: Tensor
    first: Tensor
    span: int  # tokens of a segment
    parts: Tensor  # of segments, for what each adds to the state
    first_part: Tensor
    parted: int  # into how many parts segments are cut
    slabs: list[_Slab]
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
    piece = launches.gradients.chunk
    rows, longest = shape
    if cu_seqlens is not None:
        bounds = check_cu_seqlens(cu_seqlens, *shape)
        rows, longest = len(bounds) - 1, max(b - a for a, b in pairwise(bounds))
    # Segments enough to fill the device, and none where it is full.
    tile = min(launches.forward.tile, _padded(d_value))
    long = -(-shape[0] * shape[1] // longest)  # as many sequences of the longest one's length
    cuts = WAVES * slots // (long * heads * -(-d_value // tile))
    size, multiple = longest, max(128, piece)
    if cuts > 1:
        size = max(SHORTEST, -(-longest // (cuts * multiple)) * multiple)
    split = size < longest
    segments, first = pieces(*shape, size if split else shape[1], cu_seqlens, device)
    tile = min(launches.states.tile, _padded(d_value))
    many = (len(segments) - rows) * heads * -(-d_value // tile)
    parted = _parted(many, slots, size) if split else 1
    parts, first_part = segments, first
    if parted > 1:
        parts, first_part = pieces(*shape, size // parted, cu_seqlens, device)
    cut, first_piece = pieces(*shape, piece, cu_seqlens, device)
    slabs = [_Slab(0, len(segments), segments, cut, first_piece)]
    n = round(len(segments) * heads * -(-d_value // tile) / slots)
    if n > 1 and cu_seqlens is None:
        slabs = _slabs(slabs[0], n, longest, size, piece)
    begins = starts(*shape, cu_seqlens, device)
    return _Plan(
        launches, rows, split, segments, first, size, parts, first_part, parted, slabs, begins
    )


def _slabs(whole: _Slab, n: int, length: int, size: int, piece: int) -> list[_Slab]:
    """`whole` in at most n slabs; rows of `length` tokens, cut into segments of `size`."""
    per_row, pieces_per_row = -(-length // size), -(-length // piece)
    cuts = sorted({i * whole.stop // n for i in range(n + 1)})
    slabs = []
    for start, stop in pairwise(cuts):
        a, b = (
            i // per_row * pieces_per_row + i % per_row * (size // piece) for i in (start, stop)
        )
        segments, cut = whole.segments[start:stop].clone(), whole.pieces[a:b].clone()
        slabs.append(_Slab(start, stop, segments, cut, whole.first_piece - a))
    return slabs


def _parted(programs: int, slots: int, size: int) -> int:
    """Into how many parts to cut segments of `size` tokens, so that all slots have work."""
    best, least = 1, -(-programs // slots)
    for n in (2, 3, 4, 6, 8):
        time = -(-programs * n // slots) / n
        if size % (n * 128) == 0 and size >= n * SHORTEST and time < 0.9 * least:
            best, least = n, time
    return best


_plan = lru_cache(maxsize=64)(_planned)


class _Call:
    """One call's tensors and the launches of the kernels."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_a: Tensor | None,
        scale: Tensor | None,
        skip: Tensor | None,
        cu_seqlens: Tensor | None,
        sums: Tensor | None = None,
    ):
        self.q, self.k, self.v = q.contiguous(), k.contiguous(), v.contiguous()
        self.log_a, self.cu_seqlens = _contiguous(log_a), cu_seqlens
        self.scale, self.skip = _contiguous(scale), _contiguous(skip)
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
        # What makes the gradients: one kernel, or, where heads share keys, near and far.
        self.made: list[Launch] = [launches.gradients]
        if self.heads > self.groups and launches.near is not None and launches.far is not None:
            self.made = [launches.near, _wide(launches.far, self.d_value)]
        plain = self.heads == self.groups and scale is None and skip is None
        alone = launches.alone if plain and self.d_value <= 128 else None
        self.alone = alone is not None
        if alone is not None:
            self.made = [alone]
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
        count = max(slab.pieces.shape[0] for slab in self.plan.slabs)
        size = (count, self.heads, self.d_key, self.d_value)
        return torch.empty(size, dtype=self.border, device=self.device)

    def sums(self, chunk: int) -> Tensor:
        """The gates summed inside chunks, and the factors of tokens."""
        if self.log_a is None:  # nobody looks
            return self.v
        if chunk not in self.summed:
            scale, block = self.scale, 16
            size = (2 if scale is None else 3) * self.tokens * self.heads + PADDING
            sums = torch.empty(size, dtype=torch.float32, device=self.device)
            cut, _ = pieces(*self.shape, chunk, self.cu_seqlens, self.device)
            self.kernels.gates[(cut.shape[0] * -(-self.heads // block),)](
                self.log_a, self.log_a if scale is None else scale, sums, cut, self.heads,
                self.tokens, SCALED=scale is not None, C=chunk, BLOCK=block, num_warps=4,
            )  # fmt: skip
            self.summed[chunk] = sums
        return self.summed[chunk]

    def entering(self, b: Tensor, c: Tensor, state: Tensor | None, *, reverse: bool) -> Tensor:
        """The state that enters each segment."""
        plan = self.plan
        enters = self.states(plan.segments.shape[0])
        ends = self.states(plan.parts.shape[0])
        decay = torch.empty(ends.shape[:2], dtype=torch.float32, device=self.device)
        self.scan(None, b, c, None, ends=ends, decay=decay, reverse=reverse)
        size, block = self.d_key * self.d_value, 1024
        self.kernels.combine[(self.rows * self.heads * -(-size // block),)](
            ends, decay, ends if state is None else state, enters, plan.first, plan.first_part,
            plan.parted, self.heads,
            SIZE=size, BLOCK=block, REVERSE=reverse, GATED=self.log_a is not None,
            STARTED=state is not None, num_warps=4,
        )  # fmt: skip
        return enters

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
        slab: _Slab | None = None,
    ) -> None:
        """ends: of the sequences, or, with decay, what each part of a segment alone adds."""
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

        segments, first_piece = plan.segments if decay is None else plan.parts, plan.begins
        if slab is not None:
            segments, first_piece = slab.segments, slab.first_piece
            if enters is not None and enters.shape[0] != slab.stop - slab.start:
                enters = enters[slab.start : slab.stop]
        grid = segments.shape[0] * heads * -(-self.d_value // tile)
        self.kernels.scan[(grid,)](
            there(a), b, c, self.sums(chunk), there(self.skip), there(enters), there(out),
            there(ends), there(decay), there(borders), segments, first_piece, plan.begins,
            plan.span, heads, self.tokens,
            R=heads // self.groups, DA=self.d_key, DC=self.d_value, BA=_padded(self.d_key),
            BC=tile, C=chunk, EVERY=every, REVERSE=reverse, GATED=self.log_a is not None,
            SCALED=self.scale is not None, SKIPPED=self.skip is not None and a is not None,
            STARTED=enters is not None, READ=a is not None, ENDS=ends is not None,
            ALONE=decay is not None, WIDE=self.wide, PRECISION=self.precision,
            num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip

    def gradients(
        self, do: Tensor, left: Tensor, right: Tensor, fill: Callable[[_Slab], None]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Of q, k, log_a, scale and skip; empty ones for what is not there.

        `fill` makes the states at the borders of a slab, left and right.
        """
        heads, groups, slabs = self.heads, self.groups, self.plan.slabs
        group, gated = heads // groups, self.log_a is not None
        scaled, skipped = self.scale is not None, self.skip is not None
        near, far = self.made[0], self.made[-1]
        apart, chunk = near is not far, near.chunk
        near_tiles, tiles = (-(-self.d_key // launch.tile) for launch in (near, far))
        # Into how many sums each kernel's go; if it has but one, the last adds those before.
        programs = slabs[0].pieces.shape[0] * groups * 2
        of_near = self.parts(programs * near_tiles)
        of_far = self.parts(programs * tiles) if apart else 0
        direct = (of_far if apart else of_near) == 1
        dq, dk = torch.empty_like(self.q), torch.empty_like(self.k)
        all_dq, all_dk = dq, dk
        if of_near + of_far > 1:
            size = (2, of_near + of_far - direct, *self.q.shape)
            all_dq, all_dk = torch.empty(size, dtype=torch.float32, device=self.device).unbind()
        # No two are the same tensor, for a compiler's sake.
        dg, dscale = (
            self.nothing() if x is None else torch.empty_like(x) for x in (self.log_a, self.scale)
        )
        dskip, block, done, terms, inner = self.nothing(), 16, 0, left, left
        if skipped:  # of each piece
            size = (sum(slab.pieces.shape[0] for slab in slabs), heads)
            dskip = torch.empty(size, dtype=torch.float32, device=self.device)
        rows = (3 if scaled else 2) * near_tiles + skipped
        more = terms
        if gated:
            size = (rows + 2 * tiles, heads, self.tokens)
            terms = torch.empty(size, dtype=torch.float32, device=self.device)
            more = terms[rows:]
            size = (tiles, left.shape[0], heads)
            inner = torch.empty(size, dtype=torch.float32, device=self.device)
        inputs = self.q, self.k, self.v, do, self.sums(chunk)
        common = {
            "R": group, "K": self.d_key, "V": self.d_value, "BV": _padded(self.d_value),
            "GATED": gated, "SCALED": scaled,
        }  # fmt: skip
        kernels, width = _kernels("_gradients"), _padded(self.d_key)
        for slab in slabs:
            fill(slab)
            cut, count = slab.pieces, slab.pieces.shape[0]
            if self.alone:
                kernels.alone[(count * heads * tiles,)](
                    *inputs, left, right, dq, dk, terms, inner, cut, heads, self.tokens,
                    K=self.d_key, V=self.d_value, BK=min(near.tile, width),
                    BV=_padded(self.d_value), L=chunk, GATED=gated,
                    num_warps=near.warps, num_stages=near.stages,
                )  # fmt: skip
            else:
                kernels.gradients[(2 * count * groups * near_tiles * of_near,)](
                    *inputs, left, right, all_dq, all_dk, terms, inner, cut, heads, self.tokens,
                    PARTS=of_near, FAR=not apart, BK=min(near.tile, width), L=chunk,
                    SKIPPED=skipped, WIDE=self.wide, PRECISION=self.precision, **common,
                    num_warps=near.warps, num_stages=near.stages,
                )  # fmt: skip
            if apart:
                into = (dq, dk) if direct else (all_dq[of_near:], all_dk[of_near:])
                kernels.far[(count * groups * tiles * of_far,)](
                    *inputs, left, right, *into, all_dq, all_dk, more, inner, cut, heads,
                    self.tokens,
                    PARTS=of_far, FROM=of_near if direct else 0, BK=min(far.tile, width),
                    L=chunk, **common, num_warps=far.warps, num_stages=far.stages,
                )  # fmt: skip
            if gated:
                kernels.flows[(count * -(-heads // block),)](
                    terms, inner, inputs[-1], dg, dscale, dskip[done:] if done else dskip, cut,
                    heads, self.tokens,
                    NEAR=near_tiles, TILES=tiles, SCALED=scaled, SKIPPED=skipped, L=chunk,
                    BLOCK=block, num_warps=4,
                )  # fmt: skip
            done += count
        if not direct:
            dq, dk = all_dq.sum(0).to(self.q.dtype), all_dk.sum(0).to(self.k.dtype)
        if self.skip is not None:
            dskip = dskip.sum(0).to(self.skip.dtype)
        return dq, dk, dg, dscale, dskip

    def parts(self, programs: int) -> int:
        """How many sums make a group's, where there are few programs of many heads each."""
        n, group = 1, self.heads // self.groups
        while programs * n < slots(self.device) and group % (2 * n) == 0:
            n *= 2
        return n


@lru_cache(maxsize=2)
def _kernels(part: str = "") -> Any:
    return import_module(f"longscan.kernels.decay{part}")
