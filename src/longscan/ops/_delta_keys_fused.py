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
    """Columns at once (of keys or values), warps, stages of the software pipeline."""

    columns: int
    warps: int
    stages: int


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
        64, Tile(32, 4, 1), Tile(64, 4, 2), Tile(64, 4, 2), Tile(64, 4, 2), Tile(64, 4, 1), 64
    ),
    (128, True): Launch(
        64, Tile(32, 4, 1), Tile(128, 8, 2), Tile(128, 8, 2), Tile(64, 4, 2), Tile(64, 4, 1), 64
    ),
    (256, True): Launch(
        64, Tile(32, 4, 1), Tile(64, 8, 1), Tile(64, 8, 1), Tile(64, 4, 2), Tile(64, 4, 1), 64
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
PROGRAMS = 96
"""Where there would be fewer programs than this, a scan takes narrower tiles of values."""


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

    def prepare(self, q, k, beta, log_a, ends, far, scores, inverse) -> tuple[Tensor, ...]:
        """Decayed q and k; with scores given, writes these, the inverses and which are far."""
        tile = self.launch.prepare
        decayed = [torch.empty_like(log_a, dtype=self.kept) for _ in range(3)]
        launch = _kernels().prepare[(self.chunks * self.heads,)]
        for is_far in (False, True) if scores is not None else (False,):
            launch(
                q, k, beta, log_a, *decayed, ends, ends if far is None else far,
                *((ends, ends) if scores is None else (scores, inverse)), self.table,
                BK=_tile(self.k_dim, tile.columns), **self.numbers, **self.gates,
                SCORES=scores is not None, FAR=is_far,
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
        return *decayed, ends

    def scan(self, tile: Tile) -> tuple[tuple[int], dict]:
        """Grid and constants of a scan: narrower tiles of values where programs are few."""
        size = _tile(self.v_dim, tile.columns)
        while size > 32 and -(-self.v_dim // size) * self.rows * self.heads < PROGRAMS:
            size //= 2
        return (-(-self.v_dim // size) * self.rows * self.heads,), {
            **self.numbers, "K": self.k_dim, "V": self.v_dim, "BK": _tile(self.k_dim, WIDEST),
            "BV": size, "num_warps": tile.warps, "num_stages": tile.stages,
        }  # fmt: skip

    def forward(self, decayed, v, scores, inverse, state, o, final, states, written) -> None:
        """Without o and final: states and written."""
        grid, constants = self.scan(self.launch.forward)
        read = o is not None
        _kernels().forward[grid](
            *decayed, v, scores, inverse, v if state is None else state,
            *((o, final, final, o) if read else (written, states, states, written)),
            self.starts, self.before, ENTERS=state is not None, READ=read, **constants,
        )  # fmt: skip

    def backward(self, decayed, scores, inverse, do, dfinal, dv, dstates, dstate) -> None:
        grid, constants = self.scan(self.launch.backward)
        _kernels().backward[grid](
            *decayed, scores, inverse, do, dstate if dfinal is None else dfinal, dv, dstates,
            dstate, self.starts, self.before, ENTERS=dfinal is not None, **constants,
        )  # fmt: skip

    def pairs(self, beta, do, dv, written, dscores, dlower, dself, dbeta) -> None:
        tile = self.launch.pairs
        _kernels().pairs[(self.chunks * self.heads,)](
            beta, do, dv, written, dscores, dlower, dself, dbeta, self.table,
            V=self.v_dim, BV=_tile(self.v_dim, tile.columns), **self.numbers,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    def gradients(self, *tensors: Tensor) -> None:
        tile = self.launch.gradients
        bk = _tile(self.k_dim, tile.columns)
        launch = _kernels().gradients[(-(-self.k_dim // bk) * self.chunks * self.heads,)]
        for is_far in (False, True):
            launch(
                *tensors, self.table, V=self.v_dim, BK=bk,
                BV=_tile(self.v_dim, self.launch.values), **self.numbers, **self.gates, FAR=is_far,
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip


def _same(*tensors: Tensor) -> list[Tensor]:
    """The tensors, contiguous and in their widest type."""
    dtype = tensors[0].dtype
    if any(x.dtype is not dtype for x in tensors):
        for x in tensors[1:]:
            dtype = torch.promote_types(dtype, x.dtype)
        tensors = tuple(x.to(dtype) for x in tensors)
    return [x.contiguous() for x in tensors]


def _most(v: Tensor, chunk: int, cu_seqlens: Tensor | None) -> int:
    """The number of chunks; of packed sequences, whose lengths shapes don't tell, no fewer."""
    if cu_seqlens is None:
        return v.shape[0] * -(-v.shape[1] // chunk)
    return v.shape[1] // chunk + cu_seqlens.shape[0] - 1


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(o, final state, P, A, which chunks are far); the last three are for the backward."""
    out = v.dtype
    q, k, v = _same(q, k, v)
    beta, log_a = beta.contiguous(), log_a.contiguous()
    call = _Call(q, k, v, log_a, cu_seqlens)
    scores = v.new_empty(*v.shape[:3], call.launch.chunk, dtype=call.kept)
    inverse = torch.empty_like(scores)
    most = _most(v, call.launch.chunk, cu_seqlens)
    far = v.new_empty(most, call.heads, dtype=torch.int32)
    ends = v.new_empty(call.chunks, call.heads, call.k_dim, dtype=torch.float32)
    decayed = call.prepare(q, k, beta, log_a, ends, far, scores, inverse)
    o = torch.empty_like(v, dtype=out)
    final = v.new_empty(call.rows, call.heads, call.k_dim, call.v_dim, dtype=torch.float32)
    call.forward(decayed, v, scores, inverse, _float(state), o, final, None, None)
    return o, final, scores, inverse, far


def _fake(q, k, v, beta, log_a, state, cu_seqlens):
    batch, length, heads, d_value = v.shape
    rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    chunk = _launch(q, k, v).chunk
    kept = torch.float32 if _wide(q, k, v) else torch.bfloat16
    scores = v.new_empty(batch, length, heads, chunk, dtype=kept)
    final = v.new_empty(rows, heads, k.shape[3], d_value, dtype=torch.float32)
    far = v.new_empty(_most(v, chunk, cu_seqlens), heads, dtype=torch.int32)
    return v.new_empty(v.shape), final, scores, torch.empty_like(scores), far


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_a: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scores: Tensor,
    inverse: Tensor,
    far: Tensor,
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
    decayed = call.prepare(q, k, beta, log_a, ends, None, None, None)
    states = v.new_empty(many, heads, d_value, d_key, dtype=call.kept)
    dstates, written = torch.empty_like(states), torch.empty_like(v, dtype=call.kept)
    call.forward(decayed, v, scores, inverse, _float(state), None, None, states, written)
    dstate = v.new_empty(call.rows, heads, d_key, d_value, dtype=torch.float32)
    dv = torch.empty_like(written)
    call.backward(decayed, scores, inverse, do, _float(dfinal), dv, dstates, dstate)
    del decayed
    dscores, dlower = torch.empty_like(scores), torch.empty_like(scores)
    dself = v.new_empty(v.shape[:3], dtype=torch.float32)
    dbeta, dlog_a = torch.empty_like(beta), torch.empty_like(log_a)
    call.pairs(beta, do, dv, written, dscores, dlower, dself, dbeta)
    # Heads that share a key are summed in float32, in the order of the heads.
    group = heads // k.shape[2]
    dq, dk = (
        torch.empty_like(log_a, dtype=q.dtype if group == 1 else torch.float32) for _ in range(2)
    )
    call.gradients(
        q, k, log_a, do, dv, written, states, dstates, dscores, dlower, dself, far, dq, dk, dlog_a
    )
    if group > 1:
        dq, dk = (x.unflatten(2, (-1, group)).sum(3) for x in (dq, dk))
    dq, dk, dv = (x.to(kind) for x, kind in zip((dq, dk, dv), kinds, strict=True))
    return dq, dk, dv, dbeta, dlog_a, dstate if state is None else dstate.to(state.dtype)


def _fake_backward(q, k, v, beta, log_a, state, cu_seqlens, scores, inverse, far, do, dfinal):
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
