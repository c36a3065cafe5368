"""`delta` with no gate or one gate per head, on a GPU: see `longscan.kernels.delta`."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longscan.ops._kernel_op import DTYPES, kernel_op
from longscan.ops._layout import remembered
from longscan.ops._packed import pieces, starts


class Launch(NamedTuple):
    """Columns of v at once (`solve`: rows by substitution), warps, stages; columns of k at once.

    registers: how many a thread may take, so that more programs share a multiprocessor.
    """

    tile: int
    warps: int
    stages: int
    keys: int = 0
    registers: int | None = None


class Launches(NamedTuple):
    """Rows of a chunk, chunks (1 or 2) of a piece, precision of the merges in `solve`; launches.

    together: whether both scans of the backward are one launch. maps: the maps of segments, where a
    scan of whole sequences has at most `few` programs; None: sequences are never cut. Its limit of
    registers is for the forward: the maps of the backward lose by it.

    The backward keeps states between pieces, and takes the gradients of a piece at once.
    """

    chunk: int
    every: int
    merge: str
    solve: Launch
    scan: Launch
    passes: Launch
    gradients: Launch
    together: bool = True
    maps: Launch | None = None
    few: int = 64


# (K up to, V up to, whether in bfloat16) -> launches; compiled for an H100 without heavy spills.
LAUNCHES = {
    (128, 256, True): Launches(
        32, 2, "tf32", Launch(16, 1, 1, registers=128), Launch(64, 4, 3), Launch(64, 4, 3),
        Launch(32, 4, 3, 64), maps=Launch(64, 4, 3, registers=168),
    ),
    (256, 256, True): Launches(
        32, 2, "tf32", Launch(16, 1, 1), Launch(32, 4, 2), Launch(32, 8, 2), Launch(32, 4, 3, 64)
    ),
    (256, 256, False): Launches(
        32, 1, "ieee", Launch(16, 4, 1), Launch(32, 4, 1), Launch(32, 4, 1), Launch(32, 4, 1, 32)
    ),
}  # fmt: skip

# Scans take half as many columns of v where their programs would leave half an H100 idle.
FEW = 66

# So many programs of a scan of all segments, and ROOM of their maps, an H100 runs at once, two and
# three on a multiprocessor; a few more would wait for all these.
# Maps cost about as much as the scan itself, and a launch more: fewer segments of a sequence than
# LEAST, or of fewer chunks than SHORTEST, gain nothing.
FULL = 264
ROOM = 396
LEAST = 4
SHORTEST = 16

# `reverse` has one program for a sequence, or segment, and head, of which a multiprocessor holds
# one: with half an H100 busy it is still ahead.
ENOUGH = 64


def launches(d_key: int, d_value: int, dtype: torch.dtype) -> Launches:
    """The launches for heads of these sizes: the first that fits."""
    narrow = dtype is torch.bfloat16
    return next(
        launch
        for (k, v, kind), launch in LAUNCHES.items()
        if d_key <= k and d_value <= v and narrow is kind
    )


def delta_fits(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_a: Tensor | None = None,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> bool:
    """Whether the kernels compute this case; not whether there is a device for them."""
    given = [x for x in (q, k, v, beta, log_a, state) if x is not None]
    return (
        all(x.dtype in DTYPES for x in given)
        and k.shape[-1] <= 256
        and v.shape[-1] <= 256
        and (log_a is None or log_a.ndim == 3)
        and (k.ndim == 4 or k.shape[2] <= 16)
        and v.numel() > 0
    )


def delta_fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_a: Tensor | None = None,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`delta_chunked` by kernels: o in v's dtype, the final state in float32.

    With n steps per token k, v, beta are [B, T, n, ...]. bfloat16 is multiplied in bfloat16; the
    others as three products in tf32, one of which is too little for float16 over long times.
    """
    dtype, out = q.dtype, v.dtype
    if k.dtype is not dtype or out is not dtype:
        dtype = torch.promote_types(torch.promote_types(dtype, k.dtype), out)
        q, k, v = (x if x.dtype is dtype else x.to(dtype) for x in (q, k, v))
    o, final = _delta(q, k, v, beta, log_a, state, cu_seqlens)[:2]
    return o if dtype is out else o.to(out), final


class _Cut(NamedTuple):
    """Segments: the launch of their maps; what kernels read of each (see `_cut`); the first of each
    sequence, with their number and without."""

    launch: Launch
    codes: Tensor
    first: Tensor
    begins: Tensor


class _Case(NamedTuple):
    """What all launches of a call share. Scans take segments, if any, for sequences."""

    heads: int
    rows: int
    common: dict[str, Any]
    launch: Launches
    starts: Tensor
    chunks: Tensor  # where chunks lie, then pieces, as `_packed.pieces` says
    table: Tensor
    first: Tensor
    cut: _Cut | None = None


def _padded(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


@lru_cache(maxsize=4)
def _kernels(part: str = "") -> Any:
    return import_module(f"longscan.kernels.delta{part}")


@lru_cache(maxsize=64)
def _plan(
    d_key: int,
    d_value: int,
    heads: int,
    key_heads: int,
    steps: int,
    dtype: torch.dtype,
    gated: bool,
) -> tuple[Launches, dict[str, Any]]:
    """Launches, and the constants of all kernels."""
    launch, tl = launches(d_key, d_value, dtype), _kernels().tl
    return launch, {
        "K": d_key, "BK": _padded(d_key), "C": launch.chunk, "STEPS": steps, "GATED": gated,
        "DT": tl.bfloat16 if dtype is torch.bfloat16 else tl.float32,
        "PRECISION": "tf32" if dtype is torch.bfloat16 else "tf32x3", "H": heads, "HK": key_heads,
    }  # fmt: skip


def _case(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor | None, cu: Tensor | None) -> _Case:
    shape, n = k.shape, k.shape[2] if k.ndim == 5 else 1
    heads, d_value = v.shape[-2:]
    gated, device = log_a is not None, q.device
    launch, common = _plan(shape[-1], d_value, heads, shape[-2], n, v.dtype, gated)
    batch, length = q.shape[:2]
    tokens = launch.chunk // n
    table, first = pieces(batch, length, tokens * launch.every, cu, device)
    chunks = table if launch.every == 1 else pieces(batch, length, tokens, cu, device)[0]
    begins, cut = starts(batch, length, cu, device), None
    size, count = _segments(launch, batch, length, heads, shape[-1], d_value, n, cu)
    if count and launch.maps is not None:
        given = launch.maps, batch, length, size, tokens * launch.every, cu, device
        if cu is None:
            begins, first, cut = _cut(*given)
        else:  # the values of cu_seqlens may change
            begins, first, cut = remembered(
                cu, f"cut {given[:5]}", lambda: _cut.__wrapped__(*given)
            )
    return _Case(heads, batch * length * n, common, launch, begins, chunks, table, first, cut)


def _segments(
    launch: Launches,
    batch: int,
    length: int,
    heads: int,
    d_key: int,
    d_value: int,
    steps: int,
    cu_seqlens: Tensor | None,
) -> tuple[int, int]:
    """Tokens of a segment and how many segments there are, at most; 0 for sequences left whole.

    Shapes must not depend on the borders of packed sequences, so these play no part.
    """
    if launch.maps is None:
        return 0, 0
    rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    own, keys = -(-d_value // launch.maps.tile), -(-d_key // launch.maps.tile)
    if rows * heads * own > launch.few:
        return 0, 0
    # A last segment has neither U nor A, a first no A.
    mapped = (ROOM // heads + rows * (own + 2 * keys)) // (own + keys)
    most = max(min(FULL // (heads * own), mapped), LEAST * rows)
    # Each of the packed sequences but one may end in a segment that is not full.
    most = most // rows * rows if cu_seqlens is None else most - rows + 1
    unit = launch.chunk // steps * launch.every
    size = -(-SHORTEST // launch.every) * unit
    size = max(size, -(-batch * length // (most * unit)) * unit)
    if length <= (LEAST - 1) * size:
        return 0, 0
    return size, batch * -(-length // size) if cu_seqlens is None else length // size + rows


@lru_cache(maxsize=64)
def _cut(
    launch: Launch,
    batch: int,
    length: int,
    size: int,
    unit: int,
    cu: Tensor | None,
    device: torch.device,
) -> tuple[Tensor, Tensor, _Cut]:
    """Where segments begin, their first pieces of `unit` tokens, and the rest about them.

    The code of a segment is 4 times its sequence, + 1 if it is the first there, + 2 if the last.
    """
    table, first = pieces(batch, length, size, cu, device)
    bounds, (_, before) = starts(batch, length, cu, device), pieces(batch, length, unit, cu, device)
    row, begin, end = table.unbind(1)
    codes = row * 4 + (begin == bounds[row]) + 2 * (end == bounds[row + 1])
    return (
        torch.cat([begin, end[-1:]]),
        before[row] + (begin - bounds[row]) // unit,
        _Cut(launch, codes, first, first[:-1]),
    )


def _scratch(v: Tensor) -> torch.dtype:
    return torch.bfloat16 if v.dtype is torch.bfloat16 else torch.float32


def _options(launch: Launch) -> dict[str, int]:
    limit = {} if launch.registers is None else {"maxnreg": launch.registers}
    return {"num_warps": launch.warps, "num_stages": launch.stages, **limit}


def _columns(case: _Case, d_value: int, launch: Launch, scans: int = 1) -> tuple[int, int]:
    """Columns of v at once in `scans` scans, and the number of programs of each."""
    rows, tile = (case.starts.shape[0] - 1) * case.heads, min(_padded(d_value), launch.tile)
    while case.cut is None and tile > 32 and scans * rows * -(-d_value // tile) <= FEW:
        tile //= 2
    return tile, rows * -(-d_value // tile)


def _solve(case: _Case, k, beta, log_a, g, factors, launch: Launch) -> None:
    _kernels().solve[(case.chunks.shape[0] * case.heads,)](
        k, beta, beta if log_a is None else log_a, g, factors, case.chunks, case.rows,
        MERGE=case.launch.merge, BLOCK=launch.tile,
        **case.common, **_options(launch),
    )  # fmt: skip


def _scan(case: _Case, q, k, v, g, factors, state, o, final, launch: Launch) -> None:
    d_value = v.shape[-1]
    tile, programs = _columns(case, d_value, launch)
    codes = case.starts if case.cut is None else case.cut.codes
    _kernels().scan[(programs,)](
        q, k, v, g, factors, k if state is None else state, o, final, case.starts, codes, case.rows,
        V=d_value, BV=tile, ENTERS=state is not None, CUT=case.cut is not None, **case.common,
        **_options(launch),
    )  # fmt: skip


def _maps(case: _Case, cut: _Cut, q, k, v, g, factors, state, do, sums, a, reverse: bool) -> None:
    """U and A of segments, or backward W; state is what enters the sequences, from that side."""
    d_key, d_value = k.shape[-1], v.shape[-1]
    launch = cut.launch._replace(registers=None) if reverse else cut.launch
    tile, count = min(_padded(d_value), launch.tile), cut.codes.shape[0]
    tiles = -(-d_value // tile) + (0 if reverse else -(-d_key // tile))
    _kernels().maps[(count * case.heads * tiles,)](
        q, k, v, g, factors, k if state is None else state, do, sums, a, case.starts,
        cut.codes, case.rows, V=d_value, BV=tile, ENTERS=state is not None, REVERSE=reverse,
        **case.common, **_options(launch),
    )  # fmt: skip


def _combine(case: _Case, cut: _Cut, a, sums, start, out, reverse: bool) -> None:
    d_key, d_value = a.shape[-1], sums.shape[-1]
    _kernels().combine[(cut.begins.shape[0] * case.heads * -(-d_value // 32),)](
        a, sums, sums if start is None else start, out, cut.first, H=case.heads, K=d_key,
        V=d_value, BK=_padded(d_key), BV=32, ENTERS=start is not None, REVERSE=reverse,
        num_warps=8, num_stages=3,
    )  # fmt: skip


def _passes(
    case: _Case, q, k, v, g, factors, state, do, d_final, e, states, zs, leaving, d_state,
    launch: Launch, roles: tuple[int, ...],
) -> None:  # fmt: skip
    """Both scans of the backward: roles (2,) in one launch, (0, 1) one after the other."""
    d_value = v.shape[-1]
    for role in roles:
        tile, programs = _columns(case, d_value, launch, 2 if role == 2 else 1)
        _kernels().passes[(programs * (2 if role == 2 else 1),)](
            q, k, v, g, factors, k if state is None else state, do,
            k if d_final is None else d_final, e, states, zs, leaving, d_state, case.starts,
            case.first, case.rows, V=d_value, BV=tile, ENTERS=state is not None,
            ENDS=d_final is not None, EVERY=case.launch.every, ROLE=role,
            **case.common, **_options(launch),
        )  # fmt: skip


def _last(
    case: _Case, q, k, beta, factors, do, e, zs, states, leaving, log_a, launch: Launch
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients: dq, dk, dv, d_beta, d_log_a (empty if there is no gate)."""
    d_key, d_value = k.shape[-1], do.shape[-1]
    # For narrower keys too: wgmma takes no products of fewer than 64 rows, and those would read in
    # registers what it reads as well (see the kernels' module).
    tile = launch.keys
    tiles = -(-d_key // tile)
    dq, dk = torch.empty_like(q), torch.empty_like(k)
    dv = k.new_empty(*k.shape[:-2], *do.shape[-2:])
    d_beta = torch.empty_like(beta)
    count, every, rows = case.table.shape[0], case.launch.every, case.launch.chunk
    rows *= every
    gated = log_a is not None
    step = count * case.heads * rows
    parts = factors.new_empty(4 * tiles * step) if gated else factors
    constants = {**case.common, "BK": tile, "C": rows}
    _kernels("_gradients").gradients[(count * k.shape[-2] * tiles * 2,)](
        q, k, factors, do, e, zs, states, leaving, dq, dk, dv, d_beta, parts, case.table,
        case.rows, step, V=d_value, BV=min(_padded(d_value), launch.tile), EVERY=every,
        **constants, **_options(launch),
    )  # fmt: skip
    if not gated:
        return dq, dk, dv, d_beta, factors.new_empty(0, *do.shape[:-1])
    d_log_a = torch.empty_like(log_a, memory_format=torch.contiguous_format)
    _kernels("_gradients").decays[(count * case.heads,)](
        parts, d_log_a, case.table, step, H=case.heads, TILES=tiles, BK=tile, C=rows,
        STEPS=case.common["STEPS"], num_warps=1,
    )  # fmt: skip
    return dq, dk, dv, d_beta, d_log_a


@lru_cache(maxsize=64)
def _hopper(device: torch.device) -> bool:
    """Whether it has the products of `reverse`."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def _reverses(case: _Case, q, k, do) -> bool:
    """Whether `reverse` takes this case: wide heads with keys of their own, one write a token, rows
    of whole 16 bytes, many programs."""
    d_key, d_value = k.shape[-1], do.shape[-1]
    return (
        32 < d_key <= 128
        and 64 < d_value <= 128
        and d_key % 8 == d_value % 8 == 0
        and k.dtype is torch.bfloat16
        and k.shape[-2] == case.heads
        and case.common["STEPS"] == 1
        and (case.launch.chunk, case.launch.every) == (32, 2)
        and (case.starts.shape[0] - 1) * case.heads >= ENOUGH
        and (q.data_ptr() | k.data_ptr() | do.data_ptr()) % 16 == 0
        and _hopper(k.device)
    )


def _reverse(
    case: _Case, q, k, beta, log_a, g, factors, do, d_final, e, states, d_state
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `_last`, from the states and errors alone; and d_state."""
    gated, d_value = log_a is not None, do.shape[-1]
    dq, dk, d_beta = (torch.empty_like(x) for x in (q, k, beta))
    dv = k.new_empty(*k.shape[:-2], *do.shape[-2:])
    d_log_a = factors.new_empty(0, *do.shape[:-1])
    if gated:
        d_log_a = torch.empty_like(log_a, memory_format=torch.contiguous_format)
    _kernels("_reverse").reverse[((case.starts.shape[0] - 1) * case.heads,)](
        q, k, g, factors, do, states if d_final is None else d_final, e, states, dq, dk, dv,
        d_beta, d_log_a if gated else factors, d_state, case.starts, case.first, case.rows,
        H=case.heads, K=case.common["K"], V=d_value, BK=case.common["BK"], GATED=gated,
        ENDS=d_final is not None, num_warps=8,
    )  # fmt: skip
    return dq, dk, dv, d_beta, d_log_a


def _contiguous(*tensors: Tensor | None) -> list:
    return [None if x is None else x.contiguous() for x in tensors]


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_a: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> o, final states, G and the factors of rows (see `solve`); of segments, the states that
    enter and the maps.
    """
    q, k, v, beta, log_a, state = _contiguous(q, k, v, beta, log_a, state)
    case = _case(q, k, v, log_a, cu_seqlens)
    o, final, g, factors, enter, a = _fake(q, k, v, beta, log_a, state, cu_seqlens)
    launch, cut = case.launch, case.cut
    _solve(case, k, beta, log_a, g, factors, launch.solve)
    if cut is None:
        _scan(case, q, k, v, g, factors, state, o, final, launch.scan)
        return o, final, g, factors, enter, a
    sums = torch.empty_like(enter)
    _maps(case, cut, q, k, v, g, factors, state, o, sums, a, False)
    _combine(case, cut, a, sums, state, enter, False)
    _scan(case, q, k, v, g, factors, enter, o, final, launch.scan)
    return o, final, g, factors, enter, a


def _fake(q, k, v, beta, log_a, state, cu_seqlens):
    batch, length = q.shape[:2]
    heads, d_value = v.shape[-2:]
    rows = batch * length * (v.shape[2] if v.ndim == 5 else 1)
    launch = launches(k.shape[-1], d_value, v.dtype)
    _, count = _segments(
        launch, batch, length, heads, k.shape[-1], d_value, rows // (batch * length), cu_seqlens
    )
    if cu_seqlens is not None:
        batch = cu_seqlens.shape[0] - 1
    o = v.new_empty(*q.shape[:2], heads, d_value)
    final = v.new_empty(batch, heads, k.shape[-1], d_value, dtype=torch.float32)
    g = v.new_empty(rows, heads, launch.chunk, dtype=_scratch(v))
    factors = final.new_empty(1 if log_a is None else 2, heads, rows)
    enter = final.new_empty(count, *final.shape[1:])
    # In two parts, see `maps`.
    a = g.new_empty(count, heads, 2, k.shape[-1], k.shape[-1])
    return o, final, g, factors, enter, a


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_a: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    g: Tensor,
    factors: Tensor,
    enter: Tensor,
    a: Tensor,
    do: Tensor | None,
    d_final: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, beta, log_a (empty if not given) and the entering state."""
    kind = torch.float32 if state is None else state.dtype
    do = v.new_zeros(*q.shape[:2], *v.shape[-2:]) if do is None else do
    q, k, v, beta, state, do, d_final = _contiguous(q, k, v, beta, state, do, d_final)
    case = _case(q, k, v, log_a, cu_seqlens)
    cut, d_key, d_value = case.cut, k.shape[-1], v.shape[-1]
    d_state = factors.new_empty(case.starts.shape[0] - 1, case.heads, d_key, d_value)
    if cut is not None:
        state, leave = enter, torch.empty_like(d_state)
        _maps(case, cut, q, k, v, g, factors, d_final, do, d_state, a, True)
        _combine(case, cut, a, d_state, d_final, leave, True)
        d_final = leave
    grads, d_state = gradients(case, q, k, v, beta, log_a, g, factors, state, do, d_final, d_state)
    if cut is not None:
        d_state = d_state[cut.begins]
    return *grads, d_state.to(kind)


def gradients(
    case: _Case, q, k, v, beta, log_a, g, factors, state, do, d_final, d_state
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Of all inputs, and of the states that enter sequences (or segments) into d_state; from those
    that enter and the gradients of those that leave."""
    d_key, d_value, launch = k.shape[-1], v.shape[-1], case.launch
    # The errors and the states that enter pieces, forward.
    e = torch.empty_like(v, dtype=_scratch(v))
    states = e.new_empty(case.table.shape[0], case.heads, d_value, d_key)
    if _reverses(case, q, k, do):
        _passes(
            case, q, k, v, g, factors, state, do, d_final, e, states, e, states, d_state,
            launch.passes, (0,),
        )  # fmt: skip
        grads = _reverse(case, q, k, beta, log_a, g, factors, do, d_final, e, states, d_state)
    else:  # Z and the states' gradients between pieces, backward, and then all gradients
        zs, leaving = torch.empty_like(e), torch.empty_like(states)
        _passes(
            case, q, k, v, g, factors, state, do, d_final, e, states, zs, leaving, d_state,
            launch.passes, (2,) if launch.together else (0, 1),
        )  # fmt: skip
        grads = _last(
            case, q, k, beta, factors, do, e, zs, states, leaving, log_a, launch.gradients
        )
    return grads, d_state


def _fake_backward(q, k, v, beta, log_a, state, cu_seqlens, g, factors, enter, a, do, d_final):
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    d_log_a = factors.new_empty(0, *q.shape[:2], v.shape[-2])
    if log_a is not None:
        d_log_a = log_a.new_empty(log_a.shape)
    kind = torch.float32 if state is None else state.dtype
    d_state = v.new_empty(rows, v.shape[-2], k.shape[-1], v.shape[-1], dtype=kind)
    return *(x.new_empty(x.shape) for x in (q, k, v, beta)), d_log_a, d_state


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, *output[2:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, run, do, d_final, *_):
    kept = ctx.saved_tensors
    grads = run(*kept, do, d_final)
    return *(None if x is None else d for x, d in zip(kept[:6], grads, strict=True)), None


_delta = kernel_op("delta", _forward, _fake, _keep, _backward, _fake_backward, _differentiate)
