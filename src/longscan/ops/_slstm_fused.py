"""`slstm` on a GPU: see `longscan.kernels.slstm`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from importlib import import_module
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longscan.ops._check import full_precision
from longscan.ops._kernel_op import DTYPES, kernel_op
from longscan.ops._layout import check_cu_seqlens, remembered
from longscan.ops._packed import starts


class Launch(NamedTuple):
    """Sequences of a program, warps, stages of the software pipeline.

    With fewer sequences a step has less to do, but its products take as long.
    """

    rows: int
    warps: int
    stages: int


# (bytes of a gate, channels of a head up to) -> launches of forward and backward.
LAUNCHES = {
    (2, 16): (Launch(8, 2, 3), Launch(8, 2, 3)),
    (2, 32): (Launch(8, 4, 3), Launch(8, 4, 3)),
    (2, 64): (Launch(4, 4, 3), Launch(4, 4, 3)),
    (2, 128): (Launch(4, 8, 2), Launch(4, 8, 2)),
    (4, 16): (Launch(8, 2, 3), Launch(8, 2, 3)),
    (4, 32): (Launch(8, 4, 3), Launch(8, 4, 3)),
    (4, 64): (Launch(4, 4, 2), Launch(4, 4, 2)),
}


class Split(NamedTuple):
    """Where a head's channels are cut among programs: sequences of a program, and where not all
    programs run at once so; its channels in the forward and in the backward; warps."""

    rows: int
    many: int
    forward: int
    backward: int
    warps: int


SPLIT_LAUNCHES = {
    (2, 256): Split(16, 32, 16, 16, 8),
    (2, 512): Split(16, 32, 16, 16, 8),
    (4, 128): Split(16, 32, 16, 16, 8),
    (4, 256): Split(16, 16, 16, 16, 8),
}
PARTS = 8
"""Into which a sum over 4 D gradients is cut; the kernel counts on this number."""


def slstm_fits(gates: Tensor, r: Tensor, bias: Tensor) -> bool:
    """Whether the kernels compute this case."""
    return (
        all(x.dtype in DTYPES for x in (gates, r, bias))
        and gates.numel() > 0
        and (_key(gates) in LAUNCHES or _splits(gates))
    )


def _splits(gates: Tensor) -> bool:
    """Whether programs share a head's channels, all of which must run at once."""
    launch = SPLIT_LAUNCHES.get(_key(gates))
    if launch is None:
        return False
    programs = -(-gates.shape[4] // min(launch.forward, launch.backward))
    return torch.compiler.is_compiling() or programs <= _processors(gates.device)


def slstm_fused(
    gates: Tensor,
    r: Tensor,
    bias: Tensor,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`slstm_fast` where `slstm_fits`; y in the dtype of gates, the state float32."""
    out = gates.dtype
    if out == torch.float16:  # exponents and gradients go beyond its range
        gates = gates.float()
    inputs = (gates, r.float(), bias.float(), None if state is None else state.float())
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    y, final, *_ = _slstm(*inputs, cu_seqlens, keep)
    return y.to(out), final


def _key(gates: Tensor) -> tuple[int, int]:
    return _size(gates.dtype), _padded(gates.shape[4])


def _size(dtype: torch.dtype) -> int:
    """Bytes of a number inside; float16 becomes float32."""
    return 2 if dtype == torch.bfloat16 else 4


def _padded(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def _forward(
    gates: Tensor,
    r: Tensor,
    bias: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, the final state, and what the backward reads: see the kernel."""
    batch, length, heads, _, d = gates.shape
    begins, order = _rows(gates, cu_seqlens)
    rows, tokens = len(order), batch * length
    y = torch.empty((batch, length, heads, d), dtype=gates.dtype, device=gates.device)
    final = torch.empty((rows, 4, heads, d), dtype=torch.float32, device=gates.device)
    size = tokens * heads * d if keep else 0
    exact, rough = final.new_empty(2 * size + final.numel() // 4), y.new_empty(3 * size)
    own = (rows if keep else 0, heads, d)
    carried = final.new_empty(own)
    last = torch.empty(own, dtype=torch.int32, device=gates.device)
    tensors = (
        gates.contiguous(), r.contiguous(), bias.contiguous(), _or(state, final), y, final, exact,
        rough, carried, last,
    )  # fmt: skip
    if _key(gates) in LAUNCHES:
        launch = LAUNCHES[_key(gates)][0]
        _kernels().forward[(-(-rows // launch.rows) * heads,)](
            *tensors, begins, order, rows, tokens, heads, STATE=state is not None, KEEP=keep,
            **_constants(d, launch),
        )  # fmt: skip
        return y, final, exact, rough, carried, last
    cut = _Cut(gates, cu_seqlens, rows, SPLIT_LAUNCHES[_key(gates)].forward)
    kind = torch.float16 if gates.dtype == torch.bfloat16 else torch.float32
    sent = torch.empty((2, rows, heads, d), dtype=kind, device=y.device)
    lows = final if cut.meets else final.new_empty((rows, heads, d))
    for group, programs, counters in cut.launches():
        for begin in range(1 if cut.meets else cut.longest):
            _kernels().forward_split[(programs,)](
                *tensors, lows, sent, counters, begins, order, rows, tokens, heads, group, begin,
                STATE=state is not None, KEEP=keep, **cut.constants,
            )  # fmt: skip
    return y, final, exact, rough, carried, last


def _fake(gates, r, bias, state, cu_seqlens, keep):
    batch, length, heads, _, d = gates.shape
    rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    y = gates.new_empty(batch, length, heads, d)
    final = gates.new_empty((rows, 4, heads, d), dtype=torch.float32)
    size = batch * length * heads * d if keep else 0
    own = (rows if keep else 0, heads, d)
    last = final.new_empty(own, dtype=torch.int32)
    exact, rough = final.new_empty(2 * size + final.numel() // 4), y.new_empty(3 * size)
    return y, final, exact, rough, final.new_empty(own), last


def _backward(
    r: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    y: Tensor,
    final: Tensor,
    exact: Tensor,
    rough: Tensor,
    carried: Tensor,
    last: Tensor,
    dy: Tensor | None,
    dfinal: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of gates, r, bias and state; an empty one for a state that is not there."""
    batch, length, heads, d = y.shape
    begins, order = _rows(y, cu_seqlens)
    rows, tokens = len(order), batch * length
    dgates = torch.empty((batch, length, heads, 4, d), dtype=y.dtype, device=y.device)
    dstate = torch.empty_like(final) if state is not None else final.new_empty(0)
    dy = torch.zeros_like(y) if dy is None else dy.to(y.dtype).contiguous()
    end = dfinal is not None
    tensors = (
        r.contiguous(), _or(state, final), final, exact, rough, carried, last, dy,
        dfinal.float().contiguous() if dfinal is not None else final, dgates, dstate,
    )  # fmt: skip
    if _key(dgates) in LAUNCHES:
        launch = LAUNCHES[_key(dgates)][1]
        _kernels().backward[(-(-rows // launch.rows) * heads,)](
            *tensors, begins, order, rows, tokens, heads, STATE=state is not None, END=end,
            **_constants(d, launch),
        )  # fmt: skip
    else:
        cut = _Cut(dgates, cu_seqlens, rows, SPLIT_LAUNCHES[_key(dgates)].backward)
        moved = final if cut.meets else final.new_empty((5, rows, heads, d))
        for group, programs, counters in cut.launches():
            for last_token in range(0 if cut.meets else cut.longest, -1, -1):
                _kernels().backward_split[(programs,)](
                    *tensors, moved, counters, begins, order, rows, tokens, heads, group,
                    last_token, STATE=state is not None, END=end, PARTS=PARTS, **cut.constants,
                )  # fmt: skip
    # What each token's head had put out before it.
    before = torch.empty_like(y)
    flat = before.view(tokens, heads, d)
    flat[1:] = y.view(tokens, heads, d)[:-1]
    flat[begins[:-1]] = 0 if state is None else state[:, 0].to(y.dtype)
    each = dgates.view(tokens, heads, 4 * d)
    with full_precision(y):
        dr = torch.bmm(flat.permute(1, 2, 0), each.transpose(0, 1), **_wide(y))
    dbias = each.sum(0, dtype=torch.float32).view(heads, 4, d)
    return dgates, dr.float().view(heads, d, 4, d), dbias, dstate


def _fake_backward(r, state, cu_seqlens, y, final, exact, rough, carried, last, dy, dfinal):
    batch, length, heads, d = y.shape
    dstate = final.new_empty(0) if state is None else torch.empty_like(final)
    dgates = y.new_empty(batch, length, heads, 4, d)
    return dgates, torch.empty_like(r), final.new_empty(heads, 4, d), dstate


def _keep(ctx, inputs, output) -> None:
    _, r, _, state, cu_seqlens, _ = inputs
    ctx.save_for_backward(r, state, cu_seqlens, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, run, dy, dfinal, *_):
    saved = ctx.saved_tensors  # asked for once: blocks that are computed anew allow no more
    state = saved[1]
    *grads, dstate = run(*saved, dy, dfinal)
    return *grads, None if state is None else dstate, None, None


_slstm = kernel_op("slstm_fused", _forward, _fake, _keep, _backward, _fake_backward, _differentiate)


def _or(x: Tensor | None, other: Tensor) -> Tensor:
    """x contiguous; `other` for what is not there, whose pointer is not followed."""
    return other if x is None else x.contiguous()


def _wide(x: Tensor) -> dict:
    """cuBLAS adds up in float32; only there can it also return that from bfloat16."""
    return {"out_dtype": torch.float32} if x.is_cuda and x.dtype == torch.bfloat16 else {}


def _rows(x: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where sequences begin, and their numbers, longest first: a program has similar ones."""
    begins = starts(x.shape[0], x.shape[1], cu_seqlens, x.device)
    if cu_seqlens is None:
        return begins, _count(x.shape[0], x.device)
    bounds = check_cu_seqlens(cu_seqlens, x.shape[0], x.shape[1])
    return begins, remembered(cu_seqlens, "longest first", lambda: _sorted(bounds, x.device))


@lru_cache(maxsize=64)
def _count(rows: int, device: torch.device) -> Tensor:
    return torch.arange(rows, device=device)


def _sorted(bounds: list[int], device: torch.device) -> Tensor:
    lengths = [b - a for a, b in pairwise(bounds)]
    return torch.tensor(sorted(range(len(lengths)), key=lambda i: -lengths[i]), device=device)


class _Cut:
    """How programs share the channels of each group, a head of a few sequences.

    meets: whether the groups' programs walk through all tokens together; else, in Triton's
    interpreter, which runs one program after the other, a launch is one token.
    """

    def __init__(self, gates: Tensor, cu_seqlens: Tensor | None, rows: int, width: int) -> None:
        launch, heads, d = SPLIT_LAUNCHES[_key(gates)], gates.shape[2], gates.shape[4]
        self.meets, self.longest = gates.is_cuda, gates.shape[1]
        if cu_seqlens is not None:
            bounds = check_cu_seqlens(cu_seqlens, gates.shape[0], gates.shape[1])
            self.longest = max(b - a for a, b in pairwise(bounds))
        self.programs = -(-d // width)
        self.at_once = _processors(gates.device) // self.programs
        few = -(-rows // launch.rows) * heads <= self.at_once
        self.rows = launch.rows if few else launch.many
        self.groups = -(-rows // self.rows) * heads
        self.device = gates.device
        self.constants = {
            "D": d, "P": _padded(d), "ROWS": self.rows, "SLICE": width,
            "PROGRAMS": self.programs, "PRECISION": "tf32x3", "MEET": self.meets,
            "num_warps": launch.warps, "num_stages": 1, "launch_cooperative_grid": self.meets,
        }  # fmt: skip

    def launches(self) -> Iterator[tuple[int, int, Tensor]]:
        """The first group of each, its programs, and a count of arrivals for each group."""
        counters = torch.zeros(self.groups, dtype=torch.int32, device=self.device)
        for group in range(0, self.groups, self.at_once):
            yield group, min(self.at_once, self.groups - group) * self.programs, counters


@lru_cache(maxsize=16)
def _processors(device: torch.device) -> int:
    """Programs that certainly run side by side: one on each of a device's processors."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def _constants(d: int, launch: Launch) -> dict:
    return {
        "D": d, "P": _padded(d), "ROWS": launch.rows, "PRECISION": "tf32x3",
        "STAGES": launch.stages, "num_warps": launch.warps, "num_stages": launch.stages,
    }  # fmt: skip


@lru_cache(maxsize=1)
def _kernels() -> Any:
    return import_module("longscan.kernels.slstm")
