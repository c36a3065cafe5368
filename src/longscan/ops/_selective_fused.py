"""`selective` on a GPU: one kernel for a whole forward, one for a whole backward.

A kernel walks through time with the states of its channels in registers. Where sequences and
channels are too few to fill the GPU, sequences are cut into pieces: a first pass gives the states
of each piece from zero, a small one the state that enters each, and then all run at once. The
first pass cuts finer: it is no longer on its way to one state than to many, and has all warps.
The forward keeps one state for CHUNK tokens (as large as u), where the backward starts again.
"""

from __future__ import annotations

from functools import cache, lru_cache, partial
from importlib import import_module
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longscan.ops._kernel_op import DTYPES, device_of, kernel_op
from longscan.ops._layout import check_cu_seqlens, remembered
from longscan.ops._packed import pieces, starts

CHUNK = 16
"""Tokens between kept states, and of a tile of the kernels."""
PARTS = 4
"""Parts of a piece in the first pass."""


class Launch(NamedTuple):
    """Channels and states of a thread, warps, unrolled tokens, warps of a GPU's SM to aim at."""

    channels: int
    states: int
    warps: int
    unroll: int
    occupancy: int

    def width(self, padded: int) -> int:
        """Channels of a program."""
        return self.warps * self.channels * 32 * self.states // padded


# Padded number of states -> launches of forward and backward.
LAUNCHES = {
    4: (Launch(2, 4, 1, 4, 8), Launch(1, 4, 1, 2, 8)),
    8: (Launch(4, 4, 1, 4, 8), Launch(2, 4, 1, 2, 8)),
    16: (Launch(2, 8, 1, 4, 8), Launch(4, 4, 2, 2, 8)),
    32: (Launch(4, 4, 1, 4, 8), Launch(4, 4, 1, 2, 8)),
    64: (Launch(4, 4, 1, 4, 8), Launch(4, 4, 1, 2, 8)),
}


def _padded(n: int) -> int:
    return max(4, 1 << (n - 1).bit_length())


def _groups(x: Tensor) -> int:
    return x.shape[2] if x.ndim == 4 else 1


def selective_fits(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
) -> bool:
    """Whether the kernel computes this case."""
    given = [x for x in (u, dt, A, B, C, state, D, z, dt_bias) if x is not None]
    n, groups = A.shape[1], _groups(B)
    if (
        any(x.dtype not in DTYPES for x in given)
        or B.ndim == 2
        or C.ndim == 2
        or groups != _groups(C)
        or n > 64
        or A.numel() >= 2**31
    ):
        return False
    widths = [launch.width(_padded(n)) for launch in LAUNCHES[_padded(n)]]
    return groups == 1 or all(u.shape[2] // groups % width == 0 for width in widths)


def selective_fused(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """`selective`, with what Mamba does around it: y <- (y + D u) silu(z), dt <- softplus(dt +
    dt_bias). D, dt_bias [E]; z [B, T, E]. y in u's dtype, the final state in float32."""
    given = (u, dt, A, B, C, D, z, dt_bias, state)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
    return _selective(u, dt, A, B, C, D, z, dt_bias, state, cu_seqlens, softplus, keep)[:2]


@cache
def _kernels() -> Any:
    return import_module("longscan.kernels.selective")


def _flat(x: Tensor) -> tuple[Tensor, int]:
    """A tensor whose token i of all begins at i stride, and stride; a copy only if need be."""
    inner = x.shape[2] if x.ndim == 3 else x.shape[2] * x.shape[3]
    if x.is_contiguous():
        return x, inner
    row = x.stride(1) if x.shape[1] > 1 else x.stride(0)
    whole = x[:1, :1].is_contiguous()
    if x.shape[0] > 1 and x.shape[1] > 1:
        whole = whole and x.stride(0) == x.shape[1] * row
    if not whole or row < inner:
        return x.contiguous(), inner
    return x, row


@lru_cache(maxsize=8)
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _size(tokens: int, longest: int, channels: int, width: int, warps: int, aim: int) -> int:
    """Tokens of a piece, such that about `aim` warps run; `longest` where cutting gains little."""
    wanted = aim / (-(-channels // width) * warps)
    count = round(longest / max(256, tokens / wanted))
    if count < 2:
        return longest
    return min(longest, -(-longest // count // (CHUNK * PARTS)) * CHUNK * PARTS)


class _Plan(NamedTuple):
    """How a batch is cut: the tables of `pieces` for the pieces and their parts, where sequences
    begin and their kept states do, the last piece of each, sequences, tokens of a piece, whether
    there are several."""

    table: Tensor
    first: Tensor
    part_table: Tensor
    first_part: Tensor
    begin: Tensor
    slots: Tensor
    last: Tensor
    rows: int
    size: int
    split: bool
    flags: dict[str, int]
    blocks: int


def _cut(
    batch: int, length: int, channels: int, n: int, launch: Launch, device: torch.device,
    cu_seqlens: Tensor | None, processors: int,
) -> _Plan:  # fmt: skip
    bounds = [i * length for i in range(batch + 1)]
    if cu_seqlens is not None:
        bounds = check_cu_seqlens(cu_seqlens, batch, length)
    longest = max(b - a for a, b in pairwise(bounds))
    width = launch.width(_padded(n))
    aim = launch.occupancy * processors
    size = _size(batch * length, longest, channels, width, launch.warps, aim)
    whole = pieces(batch, length, size, cu_seqlens, device)
    parts = whole if size >= longest else pieces(batch, length, size // PARTS, cu_seqlens, device)
    counts = (-(-(b - a) // CHUNK) for a, b in pairwise(bounds))
    slots = torch.tensor([0, *accumulate(counts)][:-1], device=device)
    flags = {
        "N": n, "NP": _padded(n), "W": launch.warps, "RE": launch.channels, "RN": launch.states,
        "BT": CHUNK, "UNROLL": launch.unroll, "num_warps": launch.warps,
    }  # fmt: skip
    return _Plan(
        *whole, *parts, starts(batch, length, cu_seqlens, device), slots, whole[1][1:] - 1,
        len(bounds) - 1, size, size < longest, flags, -(-channels // width),
    )  # fmt: skip


_cut_equal = lru_cache(maxsize=64)(_cut)


def _plan(u: Tensor, n: int, launch: Launch, cu_seqlens: Tensor | None) -> _Plan:
    args = (*u.shape, n, launch, u.device)
    if cu_seqlens is None:
        return _cut_equal(*args, None, _processors(u.device))
    make = partial(_cut, *args, cu_seqlens, _processors(u.device))
    return remembered(cu_seqlens, f"selective {args[:5]} {PARTS}", make)


class _Call:
    """What the launches of a forward or backward share."""

    def __init__(self, u, dt, A, B, C, D, z, dt_bias, cu_seqlens, softplus, way) -> None:
        self.n, self.channels = A.shape[1], u.shape[2]
        self.plan = _plan(u, self.n, LAUNCHES[_padded(self.n)][way], cu_seqlens)
        self.rate = A.contiguous()
        self.u, self.dt, self.B, self.C = _flat(u), _flat(dt), _flat(B), _flat(C)
        self.z = self.u if z is None else _flat(z)
        self.D = self.rate if D is None else D.contiguous()
        self.bias = self.rate if dt_bias is None else dt_bias.contiguous()
        self.group = self.channels // _groups(B)
        self.has_d, self.has_z = D is not None, z is not None
        self.flags = {**self.plan.flags, "HAS_BIAS": dt_bias is not None, "SOFTPLUS": softplus}

    def states(self, count: int) -> Tensor:
        """`count` states [E, N]."""
        return self.u[0].new_empty(count, self.channels, self.n, dtype=torch.float32)

    def scan(self, u, B, enter, y, end, keep, total, mode) -> None:
        """The kernel `scan`; None stands for what a mode does not need."""
        plan, any_ = self.plan, self.rate
        table = plan.table if mode == 0 else plan.part_table
        _kernels().scan[(plan.blocks * table.shape[0],)](
            u[0], self.dt[0], self.rate, B[0], self.C[0], self.D, self.z[0], self.bias,
            any_ if enter is None else enter, u[0] if y is None else y, end,
            any_ if keep is None else keep, end if total is None else total,
            table, plan.begin, plan.slots, u[1], self.dt[1], B[1], self.C[1], self.z[1],
            self.channels, self.group, plan.size, MODE=mode, KEEP=keep is not None,
            ENTER=enter is not None, HAS_D=self.has_d and mode == 0,
            HAS_Z=self.has_z and mode != 1, **self.flags,
        )  # fmt: skip

    def enter(self, ends: Tensor | None, u, B, mode: int) -> Tensor | None:
        """The states that enter pieces (mode 1), or gradients of those that leave them (mode 2),
        from the ones at the ends of sequences."""
        plan = self.plan
        if not plan.split:
            return ends
        out, count = self.states(plan.table.shape[0]), plan.part_table.shape[0]
        parts, total = self.states(count), out.new_empty(count, self.channels)
        self.scan(u, B, None, None, parts, None, total, mode)
        size, block = self.channels * self.n, 256
        _kernels().combine[(plan.rows, -(-size // block))](
            self.rate, total, parts, plan.first, plan.first_part,
            self.rate if ends is None else ends, out, size, N=self.n, PARTS=PARTS,
            ENDS=ends is not None, REVERSE=mode == 2, BLOCK=block,
        )  # fmt: skip
        return out


def _slots(tokens: int, rows: int) -> int:
    """How many states are kept, at most: known without the lengths of the rows."""
    return rows + (tokens - rows) // CHUNK


def _fake(u, dt, A, B, C, D, z, dt_bias, state, cu_seqlens, softplus, keep):
    """y, the final state, and states that are kept: no wider than u, but where float16 could
    overflow."""
    rows = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    slots = _slots(u.shape[0] * u.shape[1], rows) if keep else 0
    kind = torch.bfloat16 if u.dtype == torch.bfloat16 else torch.float32
    return (
        u.new_empty(u.shape),
        A.new_empty(rows, *A.shape, dtype=torch.float32),
        A.new_empty(slots, *A.shape, dtype=kind),
    )


def _forward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    softplus: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> y, final state, states kept for the backward (if keep)."""
    call = _Call(u, dt, A, B, C, D, z, dt_bias, cu_seqlens, softplus, 0)
    y, end, kept = _fake(u, dt, A, B, C, D, z, dt_bias, state, cu_seqlens, softplus, keep)
    enter = None if state is None else state.contiguous()
    with device_of(u):
        enter = call.enter(enter, call.u, call.B, 1)
        ends = call.states(call.plan.table.shape[0]) if call.plan.split else end
        call.scan(call.u, call.B, enter, y, ends, kept if keep else None, None, 0)
    if call.plan.split:
        torch.index_select(ends, 0, call.plan.last, out=end)
    return y, end, kept


def _backward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    kept: Tensor,
    dy: Tensor,
    dend: Tensor | None,
    softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, dt, A, B, C, D, z, dt_bias and the initial state."""
    call = _Call(u, dt, A, B, C, D, z, dt_bias, cu_seqlens, softplus, 1)
    plan, dyf = call.plan, _flat(dy)
    after = None if dend is None else dend.contiguous()
    du, ddt = u.new_empty(u.shape), dt.new_empty(dt.shape)
    dz = du if z is None else z.new_empty(z.shape)
    m, tokens = plan.table.shape[0], u.shape[0] * u.shape[1]
    dA, before = call.states(m), call.states(plan.rows)
    weights = dA.new_empty(2, plan.blocks, tokens, call.n)  # of B and C
    numbers = dA.new_empty(2, m if call.has_d or dt_bias is not None else 0, call.channels)
    with device_of(u):
        after = call.enter(after, dyf, call.C, 2)
        _kernels().backward[(plan.blocks * m,)](
            call.u[0], call.dt[0], call.rate, call.B[0], call.C[0], call.D, call.z[0], call.bias,
            kept, dyf[0], before if after is None else after, du, ddt, dz, weights[0], weights[1],
            dA, numbers[0], numbers[1], before, plan.table, plan.begin, plan.slots,
            call.u[1], call.dt[1], call.B[1], call.C[1], call.z[1], dyf[1],
            call.channels, call.group, tokens, HAS_D=call.has_d, HAS_Z=call.has_z,
            AFTER=after is not None, **call.flags,
        )  # fmt: skip
    dA = (dA[0] if m == 1 else dA.sum(0)).to(A.dtype)
    groups = _groups(B)
    weights = weights.view(2, groups, -1, tokens, call.n).sum(2)
    if groups > 1:
        weights = weights.transpose(1, 2)
    dB, dC = (
        w.reshape(x.shape).to(x.dtype, copy=True) for w, x in zip(weights, (B, C), strict=True)
    )
    numbers = numbers.sum(1)
    dD, dbias = (
        dA.new_empty(0, dtype=torch.float32) if x is None else w.to(x.dtype, copy=True)
        for w, x in zip(numbers, (D, dt_bias), strict=True)
    )
    return du, ddt, dA, dB, dC, dD, u.new_empty(0) if z is None else dz, dbias, before


def _fake_backward(u, dt, A, B, C, D, z, dt_bias, cu_seqlens, kept, dy, dend, softplus):
    def like(x, other):
        return other.new_empty(0) if x is None else x.new_empty(x.shape)

    rows = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    wide = A.new_empty(0, dtype=torch.float32)
    return (
        *(x.new_empty(x.shape) for x in (u, dt, A, B, C)),
        like(D, wide), like(z, u), like(dt_bias, wide), wide.new_empty(rows, *A.shape),
    )  # fmt: skip


def _keep(ctx, inputs, output) -> None:
    *tensors, state, cu_seqlens, softplus, _ = inputs
    ctx.save_for_backward(*tensors, cu_seqlens, output[2])
    ctx.softplus, ctx.state = softplus, None if state is None else state.dtype
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, run, dy: Tensor | None, dend: Tensor | None, _):
    *tensors, cu_seqlens, kept = ctx.saved_tensors
    dy = torch.zeros_like(tensors[0]) if dy is None else dy
    *grads, dstate = run(*tensors, cu_seqlens, kept, dy, dend, ctx.softplus)
    grads = [None if x is None else g for x, g in zip(tensors, grads, strict=True)]
    return (*grads, None if ctx.state is None else dstate.to(ctx.state), None, None, None)


_selective = kernel_op(
    "selective_fused", _forward, _fake, _keep, _backward, _fake_backward, _differentiate
)
