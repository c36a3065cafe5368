"""`memory` of two layers with a norm on a GPU: a kernel that goes through all chunks of a row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import import_module
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from longscan.ops._memory_net import first_order_only
from longscan.ops._memory_rule import Rule
from longscan.ops._memory_tokens import Tokens

if TYPE_CHECKING:
    from longscan.ops._memory import Walk

BIASES = {"l2": 0, "squared": 1, "huber_coord": 2, "huber_norm": 3, "huber_mix": 4}
"""The biases that the kernel knows, by its numbers."""
TAUGHT = ("q", "k", "v", "delta", "d", "beta", "f", "w", "s")
"""The tokens' tensors that the kernel reads, in its order."""


class Inputs(NamedTuple):
    """What all launches of a call read: tokens, the norm of each row and head, where chunks lie.

    first [chunks]: rows of all chunks before; steps [rows]: chunks that a row has.
    """

    x: Tokens
    gamma: Tensor
    shift: Tensor
    first: Tensor
    steps: Tensor


class Launch(NamedTuple):
    """Hidden units at once, warps, stages of the software pipeline."""

    block: int
    warps: int
    stages: int


# Width of a head -> launches of forward and backward; measured on an H100, see docs/LOG.md.
LAUNCHES = {
    16: (Launch(32, 4, 1), Launch(32, 4, 1)),
    32: (Launch(32, 4, 1), Launch(32, 4, 1)),
    64: (Launch(16, 4, 2), Launch(32, 8, 2)),
}


def fits(walk: Walk, x: Tokens, norm: object | None, state: Sequence[Tensor]) -> bool:
    """Whether the kernel computes this case."""
    rule = walk.rule
    return (
        walk.matrices == 2
        and norm is not None
        and rule.map.linear
        and not rule.decay_first
        and rule.bias in BIASES
        and x.fresh is None
        and x.d is not None
        and x.d.ndim == 4
        and x.k.dtype == torch.float32
        and x.k.shape[-2] in (16, 32, 64)
        and x.k.shape[-1] in LAUNCHES
        and state[0].shape[1] % 32 == 0  # a multiple of every block
    )


class Fused(torch.autograd.Function):
    """apply(walk, *tokens, gamma, beta, *state) gives (y, *state after), as `_memory.Walk.run`.

    As `_memory._Segments` does, it keeps the states before every few chunks only, and finds those
    between them again in the backward.
    """

    @staticmethod
    def forward(ctx, walk: Walk, *tensors):
        few = len(Tokens._fields)
        x = Tokens._make(None if t is None else t.contiguous() for t in tensors[:few])
        gamma, shift = (t.squeeze(1).contiguous() for t in tensors[few : few + 2])
        momentum = walk.rule.algorithm == "momentum"
        memory = [t.clone() for t in tensors[few + 2 : few + 4 + 2 * momentum]]
        chunks, rows, device = len(walk.counts), walk.counts[0], x.k.device
        first = torch.tensor([0, *accumulate(walk.counts[:-1])], device=device)
        steps = torch.tensor([sum(n > r for n in walk.counts) for r in range(rows)], device=device)
        size = max(1, math.isqrt(chunks))
        starts = memory[0].new_empty(
            -(-chunks // size), len(gamma), len(memory), memory[0][0].numel()
        )
        y, before_last = torch.empty_like(x.v), [torch.empty_like(t) for t in memory[:2]]
        ctx.walk, ctx.size = walk, size
        ctx.save_for_backward(*x, gamma, shift, first, steps, starts)
        inputs = Inputs(x, gamma, shift, first, steps)
        _forward(walk.rule, inputs, memory, before_last, y, starts, (0, chunks, size))
        return (y, *memory, *before_last)

    @staticmethod
    def backward(ctx, dy, *dends):
        first_order_only()
        few, rule = len(Tokens._fields), ctx.walk.rule
        saved = ctx.saved_tensors  # asked for once: blocks that are computed anew allow no more
        x, (*rest, starts) = Tokens._make(saved[:few]), saved[few:]
        inputs = Inputs(x, *rest)
        parts, chunks, dy = starts.shape[2], len(ctx.walk.counts), dy.contiguous()
        dmemory = [d.clone(memory_format=torch.contiguous_format) for d in dends[:parts]]
        dbefore = [d.contiguous() for d in dends[parts:]]
        grads = {
            name: torch.zeros_like(t) for name in TAUGHT if (t := getattr(x, name)) is not None
        }
        norms = [torch.zeros_like(inputs.gamma), torch.zeros_like(inputs.shift)]
        inner = starts.new_empty(min(ctx.size, chunks), *starts.shape[1:])
        for i in reversed(range(len(starts))):
            span = (i * ctx.size, min(chunks, (i + 1) * ctx.size))
            memory = [starts[i, :, j].clone().view_as(d) for j, d in enumerate(dmemory)]
            _forward(rule, inputs, memory, None, None, inner, (*span, 1))
            _backward(rule, inputs, inner, dy, dmemory, dbefore, grads, norms, span)
        return (
            None,
            *(grads.get(name) for name in Tokens._fields),
            *(t.unsqueeze(1) for t in norms),
            *dmemory, None, None,
        )  # fmt: skip


def _kernels() -> Any:
    return import_module("longscan.kernels.memory")


def _constants(rule: Rule, x: Tokens, hidden: int, launch: Launch) -> dict:
    tokens, width = x.k.shape[2:]
    return {
        "C": tokens, "D": width, "E": hidden, "BLOCK": launch.block,
        "KIND": BIASES[rule.bias], "MOMENTUM": rule.algorithm == "momentum",
        "num_warps": launch.warps, "num_stages": launch.stages,
    }  # fmt: skip


def _pointers(tensors: dict, other: Tensor) -> list[Tensor]:
    """What the kernel reads or writes; it does not follow the pointers of what is not there."""
    return [other if tensors.get(name) is None else tensors[name] for name in TAUGHT]


def _forward(
    rule: Rule,
    inputs: Inputs,
    memory: list[Tensor],
    before_last: list[Tensor] | None,
    y: Tensor | None,
    starts: Tensor,
    span: tuple[int, int, int],
) -> None:
    """Chunks begin .. end - 1, from `memory`, which changes; writes the states before every
    `every`-th of them to `starts`; y where it is wanted."""
    x, gamma, shift, first, steps = inputs
    before_last = before_last or [torch.empty_like(t) for t in memory[:2]]
    _kernels().forward[(len(gamma),)](
        *_pointers(x._asdict(), x.k), gamma, shift, *memory[:2], *(memory[2:] or memory),
        *before_last, x.v if y is None else y, starts, first, steps, *span,
        rule.sharpness, x.k.shape[1], len(gamma), READ=y is not None,
        **_constants(rule, x, memory[0].shape[1], LAUNCHES[x.k.shape[3]][0]),
    )  # fmt: skip


def _backward(
    rule: Rule,
    inputs: Inputs,
    starts: Tensor,
    dy: Tensor,
    dmemory: list[Tensor],
    dbefore: list[Tensor],
    grads: dict,
    norms: list[Tensor],
    span: tuple[int, int],
) -> None:
    """Chunks end - 1 .. begin; dmemory, grads and norms change."""
    x, gamma, shift, first, steps = inputs
    hidden = dmemory[0].shape[1]
    scratch = dy.new_empty(len(gamma), x.k.shape[2], hidden)
    _kernels().backward[(len(gamma),)](
        *_pointers(x._asdict(), x.k), gamma, shift, starts, dy, *dmemory[:2],
        *(dmemory[2:] or dmemory), *dbefore, scratch, *_pointers(grads, dy), *norms,
        first, steps, *span, rule.sharpness, x.k.shape[1], len(gamma),
        **_constants(rule, x, hidden, LAUNCHES[x.k.shape[3]][1]),
    )  # fmt: skip
