"""`delta` with a gate per key channel on a GPU: see `longscan.kernels.delta_keys`."""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longscan.ops._kernel_op import kernel_op
from longscan.ops._packed import pieces, starts

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
    """Tokens of a chunk, and the tiles of each kernel; those of `gradients` are keys, values."""

    chunk: int
    prepare: Tile
    forward: Tile
    backward: Tile
    pairs: Tile
    gradients: Tile
    values: int


# (Width of a key rounded up to a power of two, operands in bfloat16) -> launches. `prepare` turns
# round a product of decays, which Triton 3.6 gets wrong on Hopper for tiles of just 64 channels.
LAUNCHES = {
    (64, True): Launch(
        64, Tile(32, 4, 1), Tile(64, 4, 2), Tile(64, 4, 2), Tile(64, 4, 1), Tile(64, 4, 1), 64
    ),
    (128, True): Launch(
        64, Tile(32, 4, 1), Tile(128, 8, 2), Tile(128, 8, 2), Tile(64, 4, 1), Tile(64, 4, 1), 64
    ),
    (256, True): Launch(
        64, Tile(32, 4, 1), Tile(64, 8, 1), Tile(64, 8, 1), Tile(64, 4, 1), Tile(64, 4, 1), 64
    ),
    (64, False): Launch(
        32, Tile(32, 4, 1), Tile(32, 4, 1), Tile(32, 4, 1), Tile(32, 4, 1), Tile(32, 4, 1), 32
    ),
    (128, False): Launch(
        32, Tile(32, 4, 1), Tile(16, 4, 1), Tile(32, 8, 1), Tile(32, 4, 1), Tile(32, 8, 1), 32
    ),
    (256, False): Launch(
        16, Tile(32, 4, 1), Tile(16, 8, 1), Tile(16, 8, 1), Tile(32, 4, 1), Tile(32, 4, 1), 32
    ),
}
FAR = 32
"""Columns at once in far chunks: more would take longer to compile, and spill registers."""
GROUP = 4
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
    tensors = [x for x in (q, k, v, beta, log_a, state) if x is not None]
    return (
        log_a is not None
        and log_a.ndim == 4
        and k.ndim == 4
        and v.numel() > 0
        and max(k.shape[-1], v.shape[-1]) <= WIDEST
        and all(x.dtype in (torch.float32, torch.bfloat16, torch.float16) for x in tensors)
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


def _kernels() -> Any:
    return import_module("longscan.kernels.delta_keys")


def _wide(*tensors: Tensor) -> bool:
    """Whether operands of products are float32: for all but bfloat16."""
    return any(x.dtype != torch.bfloat16 for x in tensors)


def _launch(q: Tensor, k: Tensor, v: Tensor) -> Launch:
    width = 1 << (k.shape[-1] - 1).bit_length()
    return LAUNCHES[max(width, 64), not _wide(q, k, v)]


def _tile(size: int, most: int) -> int:
    """A power of two that products take, no wider than the axis needs."""
    return min(most, max(16, 1 << (size - 1).bit_length()))


class _Call:
    """What the launches of a call share: sizes, tables, the type of what they keep."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, cu_seqlens: Tensor | None
    ) -> None:
        tl = import_module("triton.language")
        batch, length, self.heads, self.v_dim = v.shape
        self.k_dim = k.shape[3]
        wide, self.launch = _wide(q, k, v), _launch(q, k, v)
        chunk = self.launch.chunk
        self.table, self.before = pieces(batch, length, chunk, cu_seqlens, v.device)
        self.starts = starts(batch, length, cu_seqlens, v.device)
        self.rows, self.chunks = self.starts.shape[0] - 1, self.table.shape[0]
        size, self.pieces = _pieces(v, chunk, cu_seqlens)
        if self.pieces:
            # Scans take pieces for sequences.
            cut, self.first = pieces(batch, length, size, cu_seqlens, v.device)
            self.last = self.first[1:] - 1
            begins, row = cut[:, 1], cut[:, 0]
            self.before = self.before[row] + (begins - self.starts[row]) // chunk
            self.starts = torch.cat([begins, self.starts[-1:]])
        # What kernels pass on to each other. float16 could not hold all of it.
        self.kept = torch.float32 if wide else torch.bfloat16
        self.numbers = {
            "H": self.heads, "C": chunk, "OPERAND": tl.float32 if wide else tl.bfloat16,
            "PRECISION": "tf32x3" if wide else "tf32",
        }  # fmt: skip
        # Sums of gates need no parts of these if they come in bfloat16.
        self.gates = {
            "HK": k.shape[2], "K": self.k_dim, "LEVELS": chunk.bit_length() - 1, "WIDE": wide,
            "PARTS": 1 if log_a.dtype is torch.bfloat16 else 3 if wide else 2,
        }  # fmt: skip

    def prepare(self, q, k, beta, log_a, ends, scores, inner) -> tuple[Tensor, ...]:
        """Decayed q and k; with scores given, writes P and N as well."""
        tile = self.launch.prepare
        decayed = [torch.empty_like(log_a, dtype=self.kept) for _ in range(3)]
        written = (ends, ends) if scores is None else (scores, inner)
        _kernels().prepare[(self.chunks * self.heads,)](
            q, k, beta, log_a, *decayed, ends, *written, self.table,
            BK=_tile(self.k_dim, tile.columns), **self.numbers, **self.gates,
            SCORES=scores is not None, **tile.options(),
        )  # fmt: skip
        return *decayed, ends

    def scan(self, tile: Tile) -> tuple[int, dict]:
        """Programs and constants of a scan: narrower tiles of values where programs are few."""
        size, many = _tile(self.v_dim, tile.columns), (self.starts.shape[0] - 1) * self.heads
        while size > 32 and -(-self.v_dim // size) * many < PROGRAMS:
            size //= 2
        return many, {
            **self.numbers, "K": self.k_dim, "V": self.v_dim, "BK": _tile(self.k_dim, WIDEST),
            "BV": size, **tile.options(),
        }  # fmt: skip

    def empty(self, *size: int) -> Tensor:
        return torch.empty(size, dtype=torch.float32, device=self.starts.device)

    def forward(self, decayed, v, beta, scores, inner, state, o, final, states, written) -> None:
        """Without o: states and written; without written as well: maps, which are `states`."""
        many, constants = self.scan(self.launch.forward)
        read, maps = o is not None, o is None and written is None
        tiles = -(-self.v_dim // constants["BV"])
        if maps:
            tiles += -(-self.k_dim // constants["BV"])
        outputs = (o, final, final, o) if read else (v, final, states, v)
        _kernels().forward[(many * tiles,)](
            *decayed, v, beta, scores, inner, decayed[3] if state is None else state,
            *(outputs if read or maps else (written, states, states, written)),
            self.starts, self.before, int(state is not None), READ=read, MAP=maps, **constants,
        )  # fmt: skip

    def backward(
        self, decayed, beta, scores, inner, do, dfinal, dv, error, dstates, dstate
    ) -> None:
        """Without dv: dstate alone."""
        many, constants = self.scan(self.launch.backward)
        maps = dv is None
        _kernels().backward[(many * -(-self.v_dim // constants["BV"]),)](
            *decayed, beta, scores, inner, do, dstate if dfinal is None else dfinal,
            *((do, do, do) if maps else (dv, error, dstates)), dstate,
            self.starts, self.before, int(dfinal is not None), MAP=maps, **constants,
        )  # fmt: skip

    def combine(self, maps, added, start, states, reverse: bool) -> None:
        tile = _tile(self.v_dim, 16)
        _kernels().combine[(-(-self.v_dim // tile) * self.rows * self.heads,)](
            maps, added, added if start is None else start, states, self.first,
            int(start is not None), H=self.heads, K=self.k_dim, KP=_tile(self.k_dim, WIDEST),
            V=self.v_dim, BK=_tile(self.k_dim, 32), BV=tile, PRECISION="tf32x3", REVERSE=reverse,
            num_warps=8, num_stages=2,
        )  # fmt: skip

    def pairs(self, beta, do, error, written, dscores, dlower, dself, dbeta) -> None:
        tile = self.launch.pairs
        _kernels().pairs[(self.chunks * self.heads,)](
            beta, do, error, written, dscores, dlower, dself, dbeta, self.table,
            V=self.v_dim, BV=_tile(self.v_dim, tile.columns), **self.numbers,
            **tile.options(),
        )  # fmt: skip

    def gradients(self, *tensors: Tensor) -> None:
        tile, many = self.launch.gradients, self.chunks * self.heads
        for far in (False, True):
            bk = _tile(self.k_dim, min(tile.columns, FAR) if far else tile.columns)
            grid = -(-many // GROUP) if far else -(-self.k_dim // bk) * many
            _kernels().gradients[(grid,)](
                *tensors, self.table, many, KP=_tile(self.k_dim, WIDEST), V=self.v_dim, BK=bk,
                BV=_tile(self.v_dim, self.launch.values), **self.numbers, **self.gates, FAR=far,
                GROUP=GROUP, **tile.options(),
            )  # fmt: skip


def _same(*tensors: Tensor) -> list[Tensor]:
    """The tensors, contiguous and in their widest type."""
    dtype = tensors[0].dtype
    if any(x.dtype is not dtype for x in tensors):
        for x in tensors[1:]:
            dtype = torch.promote_types(dtype, x.dtype)
        tensors = tuple(x.to(dtype) for x in tensors)
    return [x.contiguous() for x in tensors]


def _pieces(v: Tensor, chunk: int, cu_seqlens: Tensor | None) -> tuple[int, int]:
    """Tokens of the pieces that sequences are cut into, and how many there are; 0 if none is cut.

    Of packed sequences only the ends tell; then no fewer, as shapes must not depend on these.
    """
    batch, length, heads, d_value = v.shape
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
    scores = v.new_empty(*v.shape[:3], call.launch.chunk, dtype=call.kept)
    inner = torch.empty_like(scores)
    ends = v.new_empty(call.chunks, call.heads, call.k_dim, dtype=torch.float32)
    decayed = call.prepare(q, k, beta, log_a, ends, scores, inner)
    o, state = torch.empty_like(v, dtype=out), _float(state)
    square, tall = (call.heads, call.k_dim, call.k_dim), (call.heads, call.k_dim, call.v_dim)
    enter, maps = call.empty(call.pieces, *tall), call.empty(call.pieces, *square)
    final = torch.empty_like(enter) if call.pieces else call.empty(call.rows, *tall)
    if call.pieces:
        call.forward(decayed, v, beta, scores, inner, None, None, final, maps, None)
        call.combine(maps, final, state, enter, False)
        state = enter
    call.forward(decayed, v, beta, scores, inner, state, o, final, None, None)
    if call.pieces:
        final = final[call.last]
    return o, final, scores, inner, enter, maps


def _fake(q, k, v, beta, log_a, state, cu_seqlens):
    batch, length, heads, d_value = v.shape
    rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    chunk = _launch(q, k, v).chunk
    kept = torch.float32 if _wide(q, k, v) else torch.bfloat16
    scores = v.new_empty(batch, length, heads, chunk, dtype=kept)
    final = v.new_empty(rows, heads, k.shape[3], d_value, dtype=torch.float32)
    many = _pieces(v, chunk, cu_seqlens)[1]
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
    ends = v.new_empty(many, heads, d_key, dtype=torch.float32)
    decayed = call.prepare(q, k, beta, log_a, ends, None, None)
    states = v.new_empty(many, heads, d_value, d_key, dtype=call.kept)
    dstates, written = torch.empty_like(states), torch.empty_like(v, dtype=call.kept)
    state_in = enter if call.pieces else _float(state)
    call.forward(decayed, v, beta, scores, inner, state_in, None, None, states, written)
    dv, error = torch.empty_like(v), torch.empty_like(written)
    dfinal = _float(dfinal)
    dstate = call.empty(call.starts.shape[0] - 1, heads, d_key, d_value)
    if call.pieces:
        leave = torch.empty_like(dstate)
        call.backward(decayed, beta, scores, inner, do, None, None, None, None, dstate)
        call.combine(maps, dstate, dfinal, leave, True)
        dfinal = leave
    call.backward(decayed, beta, scores, inner, do, dfinal, dv, error, dstates, dstate)
    if call.pieces:
        dstate = dstate[call.first[:-1]]
    del decayed
    dscores, dlower = torch.empty_like(scores), torch.empty_like(scores)
    dself = v.new_empty(v.shape[:3], dtype=torch.float32)
    dbeta, dlog_a = torch.empty_like(beta), torch.empty_like(log_a)
    call.pairs(beta, do, error, written, dscores, dlower, dself, dbeta)
    # Heads that share a key are summed in float32, in the order of the heads.
    group = heads // k.shape[2]
    dq, dk = (
        torch.empty_like(log_a, dtype=q.dtype if group == 1 else torch.float32) for _ in range(2)
    )
    call.gradients(
        q, k, beta, log_a, ends, do, error, written, states, dstates, dscores, dlower, dself,
        dq, dk, dlog_a,
    )  # fmt: skip
    if group > 1:
        dq, dk = (x.unflatten(2, (-1, group)).sum(3) for x in (dq, dk))
    dq, dk, dv = (x.to(kind) for x, kind in zip((dq, dk, dv), kinds, strict=True))
    return dq, dk, dv, dbeta, dlog_a, dstate if state is None else dstate.to(state.dtype)


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
