"""`delta` with a gate per key channel on a GPU: see `longscan.kernels.delta_keys`."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longscan.ops._kernel_op import DTYPES, kernel_op
from longscan.ops._layout import remembered
from longscan.ops._packed import pieces, segments, starts

WIDEST = 256
"""The widest head, of keys or values, that the launches below are made for."""


class Tile(NamedTuple):
    """Columns at once (of keys or values), warps, stages of the software pipeline, and how many
    registers a thread may take, so that more programs share a multiprocessor."""

    columns: int
    warps: int
    stages: int
    registers: int | None = None

    def options(self) -> dict:
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit}


class Launch(NamedTuple):
    """Tokens of a chunk, and the tiles of each kernel; those of `gradients` are keys, values.
    `decayed` is `prepare` without scores."""

    chunk: int
    prepare: Tile
    decayed: Tile
    forward: Tile
    backward: Tile
    pairs: Tile
    gradients: Tile
    values: int


THREE, FIVE = Tile(32, 4, 1, 168), Tile(32, 4, 1, 96)
"""So many programs share a multiprocessor, which hides that each waits most of the time."""
WIDE = Tile(32, 4, 1)
# (Width of a key rounded up to a power of two, operands in bfloat16) -> launches. `prepare` turns
# round a product of decays, which Triton 3.6 gets wrong on Hopper for tiles of just 64 channels.
LAUNCHES = {
    (64, True): Launch(64, THREE, FIVE, Tile(64, 4, 2), Tile(64, 4, 2), Tile(64, 4, 1), THREE, 64),
    (128, True): Launch(
        64, THREE, FIVE, Tile(128, 8, 3), Tile(128, 8, 3), Tile(64, 4, 1), THREE, 64
    ),
    (256, True): Launch(64, THREE, FIVE, Tile(64, 8, 1), Tile(64, 8, 1), Tile(64, 4, 1), THREE, 64),
    (64, False): Launch(32, WIDE, WIDE, WIDE, WIDE, WIDE, WIDE, 32),
    (128, False): Launch(32, WIDE, WIDE, Tile(16, 4, 1), Tile(32, 8, 1), WIDE, Tile(32, 8, 1), 32),
    (256, False): Launch(16, WIDE, WIDE, Tile(16, 8, 1), Tile(16, 8, 1), WIDE, WIDE, 32),
}
GROUP = 8
"""Chunks of a program that looks for far ones: most often it finds none."""
PROGRAMS = 96
"""Where there would be fewer programs than this, a scan takes narrower tiles of values; where these
are too few as well, sequences are cut into pieces."""
MOST = 132
"""About so many programs, each as wide as a multiprocessor can hold, come of the pieces."""
SHORTEST = 8
"""Chunks of the shortest piece."""


def delta_keys_fits(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_a: Tensor | None = None,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> bool:
    """Whether the kernels compute this case: a gate per key channel, one write per token."""
    del cu_seqlens
    return (
        log_a is not None
        and log_a.ndim == 4
        and k.ndim == 4
        and v.numel() > 0
        and max(k.shape[-1], v.shape[-1]) <= WIDEST
        and {q.dtype, k.dtype, v.dtype, beta.dtype, log_a.dtype} <= DTYPES
        and (state is None or state.dtype in DTYPES)
    )


def delta_keys_fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_a: Tensor,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`delta_chunked` with a gate per key channel, for what `delta_keys_fits`."""
    return _delta_keys(q, k, v, beta, log_a, state, cu_seqlens)[:2]


def _wide(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether operands of products are float32: for all but bfloat16."""
    narrow = torch.bfloat16
    return q.dtype is not narrow or k.dtype is not narrow or v.dtype is not narrow


def _launch(d_key: int, wide: bool) -> Launch:
    return LAUNCHES[max(1 << (d_key - 1).bit_length(), 64), not wide]


def _tile(size: int, most: int) -> int:
    """A power of two that products take, no wider than the axis needs."""
    return min(most, max(16, 1 << (size - 1).bit_length()))


class _Shape:
    """What launches for heads of one shape share: kernels, and constants and options of each."""

    def __init__(
        self,
        heads: int,
        key_heads: int,
        d_key: int,
        d_value: int,
        wide: bool,
        gates: torch.dtype,
        device: torch.device,
    ) -> None:
        self.kernels: Any = import_module("longscan.kernels.delta_keys")
        self.reverse: Any = import_module("longscan.kernels.delta_keys_gradients")
        tl, launch = self.kernels.tl, _launch(d_key, wide)
        self.launch, self.chunk, self.d_value = launch, launch.chunk, d_value
        # What kernels pass on to each other. float16 could not hold all of it.
        self.kept = torch.float32 if wide else torch.bfloat16
        # 1 where the column is the row or a later one; sums over tokens by it.
        ones = torch.ones(self.chunk + 1, self.chunk, dtype=torch.bfloat16).triu()
        self.ones = ones.to(device)
        numbers = {
            "H": heads, "C": self.chunk, "OPERAND": tl.float32 if wide else tl.bfloat16,
            "PRECISION": "tf32x3" if wide else "tf32",
        }  # fmt: skip
        # Sums of gates need no parts of these if they come in bfloat16.
        gated = {
            **numbers, "HK": key_heads, "K": d_key,
            "PARTS": 1 if gates is torch.bfloat16 else 3 if wide else 2,
        }  # fmt: skip
        widest = _tile(d_key, WIDEST)
        far = {"KP": widest, "LEVELS": self.chunk.bit_length() - 1, "WIDE": wide, "GROUP": GROUP}
        self.prepare, self.decayed = (
            {
                "KP": widest, "BK": _tile(d_key, tile.columns), "SCORES": scores, **gated,
                **tile.options(),
            }
            for tile, scores in ((launch.prepare, True), (launch.decayed, False))
        )  # fmt: skip
        tile = launch.prepare._replace(registers=None)
        self.far_scores = {"BK": _tile(d_key, tile.columns), **gated, **far, **tile.options()}
        self.scans = {**numbers, "K": d_key, "V": d_value, "BK": widest}
        self.forward, self.backward = {}, {}  # for tiles of so many values
        self.across = _tile(d_value, 16)
        self.combine = {
            "H": heads, "K": d_key, "KP": widest, "V": d_value, "BK": _tile(d_key, 32),
            "BV": self.across, "PRECISION": "tf32x3", "num_warps": 8, "num_stages": 2,
        }  # fmt: skip
        tile = launch.pairs
        self.pairs = {
            "V": d_value, "BV": _tile(d_value, tile.columns), **numbers, **tile.options()
        }  # fmt: skip
        tile, self.width = launch.gradients, _tile(d_key, launch.gradients.columns)
        gradients = {
            "V": d_value, "BK": self.width, "BV": _tile(d_value, launch.values), **gated, **far
        }  # fmt: skip
        self.gradients = {**gradients, "FAR": False, **tile.options()}
        self.far_gradients = {**gradients, "FAR": True, **tile._replace(registers=None).options()}

    def scan(self, known: dict, tile: Tile, many: int) -> tuple[int, dict]:
        """Tiles of values in a scan of so many sequences and heads, narrower ones where programs
        are few, and its constants."""
        size, width = _tile(self.d_value, tile.columns), self.d_value
        while size > 32 and -(-width // size) * many < PROGRAMS:
            size //= 2
        if size not in known:
            known[size] = {**self.scans, "BV": size, **tile.options()}
        return -(-width // size), known[size]


_shape = lru_cache(maxsize=64)(_Shape)


class _Places(NamedTuple):
    """Chunks as `_packed.pieces` has them; where sequences begin, for scans, and their first
    chunks. Pieces are sequences to scans; then also how many there are, or at most, the first
    piece of each sequence, and the end; and which pieces are first ones, and last ones."""

    table: Tensor
    starts: Tensor
    before: Tensor
    rows: int
    pieces: int = 0
    first: Any = None
    begin: Any = None
    end: Any = None


def _place(
    batch: int,
    length: int,
    heads: int,
    d_value: int,
    chunk: int,
    device: torch.device,
    cu_seqlens: Tensor | None = None,
) -> _Places:
    where = cu_seqlens, device
    table, before = pieces(batch, length, chunk, *where)
    bounds = starts(batch, length, *where)
    rows = bounds.shape[0] - 1
    size, count = _pieces(batch, length, heads, d_value, chunk, cu_seqlens)
    if not count:
        return _Places(table, bounds, before, rows)
    cut = segments(batch, length, size, chunk, *where)
    return _Places(table, *cut[:2], rows, count, pieces(batch, length, size, *where)[1], *cut[2:])


_place_equal = lru_cache(maxsize=64)(_place)


class _Call:
    """What the launches of a call share; rows are those of scans, which may be pieces."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, cu_seqlens: Tensor | None
    ) -> None:
        batch, length, heads, d_value = v.shape
        _, _, key_heads, d_key = k.shape
        device = self.device = v.device
        shape = _shape(heads, key_heads, d_key, d_value, _wide(q, k, v), log_a.dtype, device)
        given = batch, length, heads, d_value, shape.chunk, device
        if cu_seqlens is None:
            at = _place_equal(*given)
        else:  # its values may change
            name = f"delta_keys {given[:5]}"
            at = remembered(cu_seqlens, name, lambda: _place(*given, cu_seqlens))
        self.shape, self.at, self.kernels, self.kept = shape, at, shape.kernels, shape.kept
        self.heads, self.k_dim, self.v_dim = heads, d_key, d_value
        self.pieces, self.chunks = at.pieces, at.table.shape[0]
        self.many, self.rows = self.chunks * heads, at.starts.shape[0] - 1

    def prepare(self, q, k, beta, log_a, ends, scores, inner) -> tuple[Tensor, ...]:
        """Decayed q and k; with scores given, writes P and N as well."""
        shape, table, many, kept = self.shape, self.at.table, self.many, self.kept
        read = torch.empty_like(log_a, dtype=kept)
        decayed = read, torch.empty_like(read), torch.empty_like(read), ends
        if scores is None:
            self.kernels.prepare[(many,)](
                q, k, beta, log_a, *decayed, ends, ends, shape.ones, table, **shape.decayed
            )
            return decayed
        self.kernels.prepare[(many,)](
            q, k, beta, log_a, *decayed, scores, inner, shape.ones, table, **shape.prepare
        )
        self.kernels.far_scores[(-(-many // GROUP),)](
            q, k, beta, log_a, ends, scores, inner, table, many, **shape.far_scores
        )
        return decayed

    def empty(self, *size: int) -> Tensor:
        return torch.empty(size, dtype=torch.float32, device=self.device)

    def forward(self, decayed, v, beta, scores, inner, state, o, final, states, written) -> None:
        """Without o: states and written; without written as well: maps, which are `states`."""
        shape, at = self.shape, self.at
        many = self.rows * self.heads
        tiles, constants = shape.scan(shape.forward, shape.launch.forward, many)
        read, maps = o is not None, o is None and written is None
        if maps:
            tiles += -(-self.k_dim // constants["BV"])
        if read:
            outputs = o, final, final, o
        else:
            outputs = (v, final, states, v) if maps else (written, states, states, written)
        self.kernels.forward[(many * tiles,)](
            *decayed, v, beta, scores, inner, decayed[3] if state is None else state, *outputs,
            at.starts, at.before, int(state is not None), READ=read, MAP=maps, **constants,
        )  # fmt: skip

    def backward(
        self, decayed, beta, scores, inner, do, dfinal, dv, error, dstates, dstate
    ) -> None:
        """Without dv: dstate alone."""
        shape, at, maps = self.shape, self.at, dv is None
        many = self.rows * self.heads
        tiles, constants = shape.scan(shape.backward, shape.launch.backward, many)
        shape.reverse.backward[(many * tiles,)](
            *decayed, beta, scores, inner, do, dstate if dfinal is None else dfinal,
            *((do, do, do) if maps else (dv, error, dstates)), dstate,
            at.starts, at.before, int(dfinal is not None), MAP=maps, **constants,
        )  # fmt: skip

    def combine(self, maps, added, start, states, reverse: bool) -> None:
        shape, at = self.shape, self.at
        self.kernels.combine[(-(-self.v_dim // shape.across) * at.rows * self.heads,)](
            maps, added, added if start is None else start, states, at.first,
            int(start is not None), REVERSE=reverse, **shape.combine,
        )  # fmt: skip

    def pairs(self, *tensors: Tensor) -> None:
        shape = self.shape
        shape.reverse.pairs[(self.many,)](*tensors, self.at.table, **shape.pairs)

    def gradients(self, *tensors: Tensor) -> None:
        shape, many = self.shape, self.many
        given = *tensors, shape.ones, self.at.table, many
        launch, tiles = shape.reverse.gradients, -(-self.k_dim // shape.width)
        launch[(tiles * many,)](*given, **shape.gradients)
        launch[(-(-many // GROUP),)](*given, **shape.far_gradients)


def _same(*tensors: Tensor) -> list[Tensor]:
    """The tensors, contiguous and in their widest type."""
    dtype = tensors[0].dtype
    for x in tensors[1:]:
        if x.dtype is not dtype:
            dtype = torch.promote_types(dtype, x.dtype)
    return [_as(x, dtype).contiguous() for x in tensors]


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype is dtype else x.to(dtype)


def _pieces(
    batch: int, length: int, heads: int, d_value: int, chunk: int, cu_seqlens: Tensor | None
) -> tuple[int, int]:
    """Tokens of the pieces that sequences are cut into, and how many there are; 0 if none is cut.

    Of packed sequences only the ends tell; then no fewer, as shapes must not depend on these.
    """
    rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if rows * heads * -(-d_value // 32) >= PROGRAMS:
        return length, 0
    wanted = max(1, MOST // (heads * -(-d_value // 128)))
    size = max(SHORTEST, -(-batch * length // (wanted * chunk))) * chunk
    if length < 2 * size:
        return length, 0
    return size, batch * -(-length // size) if cu_seqlens is None else length // size + rows


def _float(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_a: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(o, final state); for the backward P, N, states before pieces, and their maps."""
    out = v.dtype
    q, k, v = _same(q, k, v)
    beta, log_a = beta.contiguous(), log_a.contiguous()
    call = _Call(q, k, v, log_a, cu_seqlens)
    scores = v.new_empty(*v.shape[:3], call.shape.chunk, dtype=call.kept)
    inner = torch.empty_like(scores)
    ends = call.empty(call.chunks, call.heads, call.k_dim)
    decayed = call.prepare(q, k, beta, log_a, ends, scores, inner)
    o, state = torch.empty_like(v, dtype=out), _float(state)
    square, tall = (call.heads, call.k_dim, call.k_dim), (call.heads, call.k_dim, call.v_dim)
    enter, maps = call.empty(call.pieces, *tall), call.empty(call.pieces, *square)
    final = torch.empty_like(enter) if call.pieces else call.empty(call.at.rows, *tall)
    if call.pieces:
        call.forward(decayed, v, beta, scores, inner, None, None, final, maps, None)
        call.combine(maps, final, state, enter, False)
        state = enter
    call.forward(decayed, v, beta, scores, inner, state, o, final, None, None)
    if call.pieces:
        final = final.index_select(0, call.at.end)
    return o, final, scores, inner, enter, maps


def _fake(q, k, v, beta, log_a, state, cu_seqlens):
    batch, length, heads, d_value = v.shape
    rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    wide = _wide(q, k, v)
    chunk, kept = _launch(k.shape[3], wide).chunk, torch.float32 if wide else torch.bfloat16
    scores = v.new_empty(batch, length, heads, chunk, dtype=kept)
    final = v.new_empty(rows, heads, k.shape[3], d_value, dtype=torch.float32)
    many = _pieces(batch, length, heads, d_value, chunk, cu_seqlens)[1]
    enter, maps = (final.new_empty(many, heads, k.shape[3], n) for n in (d_value, k.shape[3]))
    return v.new_empty(v.shape), final, scores, torch.empty_like(scores), enter, maps


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_a: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scores: Tensor,
    inner: Tensor,
    enter: Tensor,
    maps: Tensor,
    do: Tensor | None,
    dfinal: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients by q, k, v, beta, log_a and the initial state (float32 if there is none)."""
    kinds = q.dtype, k.dtype, v.dtype
    do = torch.zeros_like(v) if do is None else do
    q, k, v = _same(q, k, v)
    beta, log_a, do = beta.contiguous(), log_a.contiguous(), do.contiguous()
    call = _Call(q, k, v, log_a, cu_seqlens)
    many, heads, d_key, d_value = call.chunks, call.heads, call.k_dim, call.v_dim
    ends = call.empty(many, heads, d_key)
    decayed = call.prepare(q, k, beta, log_a, ends, None, None)
    states = v.new_empty(many, heads, d_value, d_key, dtype=call.kept)
    dstates, written = torch.empty_like(states), torch.empty_like(v, dtype=call.kept)
    state_in = enter if call.pieces else _float(state)
    call.forward(decayed, v, beta, scores, inner, state_in, None, None, states, written)
    dv, error = torch.empty_like(v), torch.empty_like(written)
    dfinal = _float(dfinal)
    dstate = call.empty(call.rows, heads, d_key, d_value)
    if call.pieces:
        leave = torch.empty_like(dstate)
        call.backward(decayed, beta, scores, inner, do, None, None, None, None, dstate)
        call.combine(maps, dstate, dfinal, leave, True)
        dfinal = leave
    call.backward(decayed, beta, scores, inner, do, dfinal, dv, error, dstates, dstate)
    if call.pieces:
        dstate = dstate.index_select(0, call.at.begin)
    del decayed
    dscores, dlower = torch.empty_like(scores), torch.empty_like(scores)
    dself = call.empty(*v.shape[:3])
    dbeta, dlog_a = torch.empty_like(beta), torch.empty_like(log_a)
    call.pairs(beta, do, error, written, dscores, dlower, dself, dbeta)
    # Heads that share a key are summed in float32, in the order of the heads.
    group = heads // k.shape[2]
    dq = torch.empty_like(log_a, dtype=q.dtype if group == 1 else torch.float32)
    dk = torch.empty_like(dq)
    call.gradients(
        q, k, beta, log_a, ends, do, error, written, states, dstates, dscores, dlower, dself,
        dq, dk, dlog_a,
    )  # fmt: skip
    if group > 1:
        dq, dk = (x.unflatten(2, (-1, group)).sum(3) for x in (dq, dk))
    dq, dk, dv = map(_as, (dq, dk, dv), kinds)
    return dq, dk, dv, dbeta, dlog_a, dstate if state is None else _as(dstate, state.dtype)


def _fake_backward(
    q, k, v, beta, log_a, state, cu_seqlens, scores, inner, enter, maps, do, dfinal
):  # fmt: skip
    rows = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    kind = torch.float32 if state is None else state.dtype
    dstate = v.new_empty(rows, v.shape[2], k.shape[3], v.shape[3], dtype=kind)
    return *(x.new_empty(x.shape) for x in (q, k, v, beta, log_a)), dstate


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, *output[2:])
    ctx.set_materialize_grads(False)  # else zeros are made for the factors as well


def _differentiate(ctx, run, do, dfinal, *_):
    kept = ctx.saved_tensors
    *grads, dstate = run(*kept, do, dfinal)
    return *grads, None if kept[5] is None else dstate, None


_delta_keys = kernel_op(
    "delta_keys", _forward, _fake, _keep, _backward, _fake_backward, _differentiate
)
