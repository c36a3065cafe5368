"""`decay` with a gate per key channel on a GPU: one scan forward, three back, states on chip."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longscan.ops._kernel_op import DTYPES, kernel_op
from longscan.ops._layout import remembered
from longscan.ops._packed import pieces, starts

WIDEST = 256
BORDER = 128
"""Tokens between the states that the backward stores. The gradient of the gates starts anew there,
so that rounding adds up over so many tokens at most."""
PROGRAMS = 264
"""Time is split until there are about so many programs of 64 columns: two for each multiprocessor
of an H100, or one of twice the width."""


class Launch(NamedTuple):
    """Columns of the state in a program, warps, stages of loads."""

    tile: int
    warps: int
    stages: int


# (bytes of an operand, padded rows of the state up to) -> launches of contract, of expand and of
# expand reversed.
LAUNCHES = {
    (2, 64): (Launch(64, 4, 3), Launch(64, 4, 3), Launch(64, 4, 3)),
    (2, 128): (Launch(128, 8, 3), Launch(64, 4, 3), Launch(64, 4, 3)),
    (2, 256): (Launch(64, 8, 2), Launch(64, 8, 2), Launch(64, 8, 2)),
    (4, 64): (Launch(32, 4, 2), Launch(64, 4, 1), Launch(64, 4, 1)),
    (4, 128): (Launch(32, 4, 1), Launch(64, 8, 1), Launch(64, 8, 1)),
    (4, 256): (Launch(32, 8, 1), Launch(64, 8, 1), Launch(64, 8, 1)),
}
PRODUCTS = torch.float32
"""Of q dq, which the gates' gradients sum with k dk: roundings of bfloat16 would add up."""
FEW = 16
"""Keys of a head, at most, with which products of bfloat16 numbers are made in TF32."""
CHUNK = 16
"""Tokens of a chunk, the same in all kernels; with 32, scans spill registers."""
GROUP = 16
"""Chunks that a program of `halves` looks after: most often it finds nothing to do."""


def decay_keys_fits(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor | None) -> bool:
    """Whether the kernel computes this case."""
    return (
        log_a is not None
        and log_a.ndim == 4
        and {q.dtype, k.dtype, v.dtype, log_a.dtype} <= DTYPES
        and v.numel() > 0
        and 1 <= k.shape[3] <= WIDEST
        and v.shape[3] <= WIDEST
    )


def _padded(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


def _operand(v: Tensor, d_key: int) -> torch.dtype:
    """The type of operands of products, and of what a kernel leaves to the next.

    With few keys nothing evens out the roundings of bfloat16 in the gates' gradients.
    """
    return torch.bfloat16 if v.dtype is torch.bfloat16 and d_key > FEW else torch.float32


def _launch(operand: torch.dtype, rows: int, columns: int, which: int) -> Launch:
    """The launch for states of so many rows; a tile is not wider than the columns."""
    size = operand.itemsize
    found = next(v for k, v in LAUNCHES.items() if k[0] == size and _padded(rows) <= k[1])
    return found[which]._replace(tile=min(found[which].tile, _padded(columns)))


class _Plan:
    """Constants and options of all launches for heads of one shape.

    How the kernels multiply: operands, precision, how many bfloat16 a gate is taken apart into. Of
    float32 gates beside bfloat16 operands, 17 bits are kept: an error of 3e-4 in the smallest
    weight of a near chunk, 2^-64.
    """

    def __init__(
        self,
        heads: int,
        key_heads: int,
        d_key: int,
        d_value: int,
        narrow: torch.dtype,
        values: torch.dtype,
        gates: torch.dtype,
    ) -> None:
        self.kernels: Any = import_module("longscan.kernels.decay_keys")
        tl, half = self.kernels.tl, narrow is torch.bfloat16
        wide_key, wide = _padded(d_key), _padded(d_value)
        sizes = {"H": heads, "K": d_key, "V": d_value}
        numbers = {
            **sizes, "HK": key_heads, "C": CHUNK, "OPERAND": tl.bfloat16 if half else tl.float32,
            "PRECISION": "tf32x3" if values is torch.float32 else "tf32",
            "PARTS": 1 if gates is torch.bfloat16 else 3 - (half or gates is torch.float16),
        }  # fmt: skip
        self.survey = {"H": heads, "K": d_key, "KP": wide_key, "C": CHUNK, "num_warps": 4}
        self.halves = {
            **numbers, "KP": wide_key, "VP": wide, "LEVELS": CHUNK.bit_length() - 1,
            "GROUP": GROUP, "num_warps": 8,
        }  # fmt: skip
        launch = _launch(narrow, d_key, d_value, 0)
        self.columns = -(-d_value // launch.tile)
        self.contract = {
            **numbers, "KP": wide_key, "BV": launch.tile, "TILES": self.columns,
            "num_warps": launch.warps, "num_stages": launch.stages,
        }  # fmt: skip
        block = max(1, 1024 // wide)
        self.blocks = -(-d_key // block)
        self.combine = {**sizes, "VP": wide, "BK": block, "TILES": self.blocks, "num_warps": 4}
        self.expand = []
        for reverse in (False, True):
            launch = _launch(narrow, d_value, d_key, 1 + reverse)
            self.expand.append({
                **numbers, "VP": wide, "BK": launch.tile, "TILES": -(-d_key // launch.tile),
                "EVERY": BORDER // CHUNK, "REVERSE": reverse, "PRODUCTS": 2 if half else 3,
                "num_warps": launch.warps, "num_stages": launch.stages,
            })  # fmt: skip


_plan = lru_cache(maxsize=64)(_Plan)


class _Places(NamedTuple):
    """Pieces, chunks and the stretches between borders as `_packed.pieces` has them, and where
    sequences begin."""

    table: Tensor
    first: Tensor
    chunk_table: Tensor
    lead: Tensor
    borders: Tensor
    border: Tensor
    begins: Tensor


def _place(
    batch: int, length: int, size: int, device: torch.device, cu_seqlens: Tensor | None = None
) -> _Places:
    cuts = [pieces(batch, length, n, cu_seqlens, device) for n in (size, CHUNK, BORDER)]
    return _Places(*cuts[0], *cuts[1], *cuts[2], starts(batch, length, cu_seqlens, device))


_place_equal = lru_cache(maxsize=64)(_place)


class _Call:
    """One call's tensors, where its sequences and their pieces lie, and the launches of kernels.

    Pieces are whole sequences where these keep the device busy, else parts of them. kept [m, H, K]:
    what each chunk leaves of a state; far [m, H]: chunks whose scores are built by halves; near:
    these scores [N, H, C].
    """

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, cu_seqlens: Tensor | None
    ) -> None:
        self.q, self.k, self.v, self.log_a, self.device = q, k, v, log_a, v.device
        batch, length, self.heads, self.d_value = v.shape
        _, _, key_heads, self.d_key = k.shape
        size, self.chunks, self.pieces = _counts(v, cu_seqlens)
        given = batch, length, size, v.device
        if cu_seqlens is None:
            at = _place_equal(*given)
        else:  # its values may change
            name = f"decay_keys {given[:3]}"
            at = remembered(cu_seqlens, name, lambda: _place(*given, cu_seqlens))
        self.at, self.count, self.rows = at, at.table.shape[0], at.first.shape[0] - 1
        self.split, self.many = self.count > self.rows, at.chunk_table.shape[0] * self.heads
        narrow = self.narrow = _operand(v, self.d_key)
        self.plan = _plan(
            self.heads, key_heads, self.d_key, self.d_value, narrow, v.dtype, log_a.dtype
        )
        self.kernels = self.plan.kernels
        self.near = self.empty(batch * length, self.heads, CHUNK, dtype=narrow)

    def empty(self, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device=self.device)

    def survey(self) -> None:
        self.kept = self.empty(self.chunks, self.heads, self.d_key)
        self.far = self.empty(self.chunks, self.heads, dtype=torch.int32)
        self.kernels.survey[(self.many,)](
            self.log_a, self.kept, self.far, self.at.chunk_table, **self.plan.survey
        )

    def halves(self, do: Tensor, near_q: Tensor, near_k: Tensor, gradients: bool) -> None:
        """Writes near and, for a backward, the parts of dq and dk from inside far chunks."""
        self.kernels.halves[(-(-self.many // GROUP),)](
            self.q, self.k, self.v, do, self.log_a, self.far, self.near, near_q, near_k,
            self.at.chunk_table, self.many, GRADIENTS=gradients, **self.plan.halves,
        )  # fmt: skip

    def contract(
        self,
        x: Tensor,
        y: Tensor,
        v: Tensor,
        enter: Tensor | None,
        reverse: bool,
        states: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """-> out and the state behind each sequence.

        With `states`, each piece's map instead: what it leaves of a state, and adds to it there.
        """
        at, many, read = self.at, self.count, states is None
        if states is None:
            out, leave = torch.empty_like(v), self.states(self.rows)
        else:
            out, leave = self.empty(many, self.heads, self.d_key), states
        self.kernels.contract[(many * self.heads * self.plan.columns,)](
            x, y, v, self.log_a, self.kept, self.far, self.near, leave if enter is None else enter,
            out if read else v, leave, leave if read else out,
            at.table, at.first, at.begins, at.lead, int(enter is not None), int(self.split),
            REVERSE=reverse, READ=read, **self.plan.contract,
        )  # fmt: skip
        return out, leave

    def states(self, rows: int) -> Tensor:
        return self.empty(rows, self.heads, self.d_key, self.d_value)

    def entering(
        self, y: Tensor, v: Tensor, start: Tensor | None, states: Tensor, reverse: bool
    ) -> None:
        """The states that enter the pieces of sequences that are cut, into `states`."""
        left, _ = self.contract(y, y, v, None, reverse, states)
        self.kernels.combine[(self.rows * self.heads * self.plan.blocks,)](
            states, left, states if start is None else start, self.at.first,
            int(start is not None), REVERSE=reverse, **self.plan.combine,
        )  # fmt: skip

    def expand(
        self,
        x: Tensor,
        y: Tensor,
        v: Tensor,
        own: Tensor,
        enter: Tensor | None,
        near: Tensor,
        scratch: tuple[Tensor, Tensor],
        dlog_a: Tensor | None = None,
    ) -> Tensor:
        """-> dq, or reversed and with the gradient by log_a where that is given, dk.

        near: the part from inside far chunks. scratch: products, borders.
        """
        at, constants = self.at, self.plan.expand[dlog_a is not None]
        # Heads that share a key are summed in float32.
        dtype = y.dtype if y.shape[2] == self.heads else torch.float32
        out = torch.empty_like(self.log_a, dtype=dtype)
        products, borders = scratch
        self.kernels.expand[(self.count * self.heads * constants["TILES"],)](
            x, y, v, own, self.log_a, self.kept, self.far, near,
            self.kept if enter is None else enter, out, products, borders,
            products if dlog_a is None else dlog_a, at.table, at.begins, at.lead, at.border,
            int(enter is not None), int(self.split), **constants,
        )  # fmt: skip
        return out


def _counts(v: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int, int]:
    """Tokens of a piece; how many chunks and pieces there are, or at most, 0 if none is cut.

    With packed sequences only their ends tell; shapes must not depend on these.
    """
    batch, length, heads, d_value = v.shape
    cuts = PROGRAMS // (batch * heads * -(-d_value // 64))
    size = length
    if cuts > 1:
        size = max(4 * BORDER, -(-length // (cuts * BORDER)) * BORDER)
    if cu_seqlens is None:
        return size, batch * -(-length // CHUNK), batch * -(-length // size) if size < length else 0
    rows = cu_seqlens.shape[0] - 1
    return size, length // CHUNK + rows, length // size + rows if size < length else 0


def _contiguous(*tensors: Tensor | None) -> list:
    return [None if x is None else x.contiguous() for x in tensors]


def _forward(
    q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> o, the states behind the sequences; for the backward kept, far, states before pieces."""
    q, k, v, log_a, state = _contiguous(q, k, v, log_a, state)
    call = _Call(q, k, v, log_a, cu_seqlens)
    call.survey()
    call.halves(v, call.near, call.near, False)
    pieces = call.states(call.pieces)
    if call.split:
        call.entering(k, v, state, pieces, False)
    o, final = call.contract(q, k, v, pieces if call.split else state, False)
    return o, final, call.kept, call.far, pieces


def _fake(q, k, v, log_a, state, cu_seqlens):
    rows = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    heads, d_key, d_value = v.shape[2], k.shape[3], v.shape[3]
    _, chunks, pieces = _counts(v, cu_seqlens)
    return (
        torch.empty_like(v, memory_format=torch.contiguous_format),
        v.new_empty(rows, heads, d_key, d_value, dtype=torch.float32),
        v.new_empty(chunks, heads, d_key, dtype=torch.float32),
        v.new_empty(chunks, heads, dtype=torch.int32),
        v.new_empty(pieces, heads, d_key, d_value, dtype=torch.float32),
    )


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_a: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    kept: Tensor,
    far: Tensor,
    pieces: Tensor,
    do: Tensor,
    dfinal: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> gradients of q, k, v, log_a and state; the last is empty where there is none."""
    q, k, v, log_a, state, do, dfinal = _contiguous(q, k, v, log_a, state, do, dfinal)
    call = _Call(q, k, v, log_a, cu_seqlens)
    call.kept, call.far = kept, far
    near_q = torch.empty_like(log_a, dtype=call.narrow)
    near_k = torch.empty_like(near_q)
    products = torch.empty_like(log_a, dtype=PRODUCTS)
    call.halves(do, near_q, near_k, True)
    borders = call.empty(
        call.at.borders.shape[0], call.heads, call.d_key, call.d_value, dtype=call.narrow
    )
    scratch = products, borders
    dq = call.expand(do, k, v, q, pieces if call.split else state, near_q, scratch)
    enter = dfinal
    if call.split:
        enter = torch.empty_like(pieces)
        call.entering(q, do, dfinal, enter, True)
    dlog_a = torch.empty_like(log_a)
    dk = call.expand(v, q, do, k, enter, near_k, scratch, dlog_a)
    del scratch, products, borders, near_q, near_k
    dv, dstate = call.contract(k, q, do, enter, True)
    if k.shape[2] != v.shape[2]:
        dq, dk = (x.unflatten(2, (k.shape[2], -1)).sum(3).to(k.dtype) for x in (dq, dk))
    return dq, dk, dv, dlog_a, call.empty(0) if state is None else dstate


def _fake_backward(q, k, v, log_a, state, cu_seqlens, kept, far, pieces, do, dfinal):
    return (
        *(x.new_empty(x.shape) for x in (q, k, v, log_a)),
        kept.new_empty(0 if state is None else state.shape),
    )


def _keep(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output[2:])


def _differentiate(ctx, run, do, dfinal, *_):
    saved = ctx.saved_tensors  # asked for once: blocks that are computed anew allow no more
    v, state = saved[2], saved[4]
    if do is None:
        do = torch.zeros_like(v)
    *grads, dstate = run(*saved, do, dfinal)
    return *grads, None if state is None else dstate, None


_decay = kernel_op("decay_keys", _forward, _fake, _keep, _backward, _fake_backward, _differentiate)


def decay_keys_fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_a: Tensor,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`decay_chunked` with a gate per key channel, where `decay_keys_fits`."""
    dtype, out = q.dtype, v.dtype
    if k.dtype is not dtype or out is not dtype:
        dtype = torch.promote_types(torch.promote_types(dtype, k.dtype), out)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if state is not None:
        state = state.float()
    o, final = _decay(q, k, v, log_a, state, cu_seqlens)[:2]
    return o if dtype is out else o.to(out), final
