"""A function made of kernels, differentiable, in eager mode and under torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from longscan.ops._memory_net import first_order_only
from longscan.ops._rehearsal import Stage, here

DTYPES = frozenset((torch.float32, torch.float16, torch.bfloat16))
"""Of the tensors that kernels take."""


def kernel_op(
    name: str,
    forward: Callable,
    fake: Callable,
    keep: Callable,
    backward: Callable,
    fake_backward: Callable,
    differentiate: Callable,
) -> Callable:
    """forward(*inputs) with gradients, as `longscan::name` where a compiler looks.

    In eager mode it is an autograd function: the machinery of torch's custom ops takes 0.2 ms a
    call and 0.5 ms in a backward, as long as the kernels. Its kernels compile together, see
    `_rehearsal`.

    forward, backward: functions of tensors, None and numbers, typed as custom ops must be, that
    launch kernels; fake, fake_backward: empty results of the right shapes. keep(ctx, inputs,
    output) saves what differentiate(ctx, run, *grads) gives to `run`, which is the backward, and
    returns one gradient or None for each input.
    """
    op = torch.library.custom_op(f"longscan::{name}", forward, mutates_args=())
    op.register_fake(fake)
    op_backward = torch.library.custom_op(f"longscan::{name}_backward", backward, mutates_args=())
    op_backward.register_fake(fake_backward)
    op.register_autograd(
        lambda ctx, *grads: differentiate(ctx, op_backward, *grads), setup_context=keep
    )
    op_backward.register_autograd(_no_second)

    def dry(inputs: tuple, needs: tuple[bool, ...]) -> None:
        output = forward(*inputs)
        if any(needs):
            keep(stage := Stage(needs), inputs, output)
            differentiate(stage, backward, *stage.gradients(output))

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            here.call = partial(dry, inputs, ctx.needs_input_grad)
            try:
                output = forward(*inputs)
            finally:
                here.call = None
            keep(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            first_order_only()
            return differentiate(ctx, backward, *grads)

    # Function.apply is made for transforms of functions too, which takes it some microseconds.
    plain = super(torch.autograd.Function, Eager).apply  # type: ignore[misc]

    def call(*inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            return op(*inputs)
        return (Eager.apply if _transformed() else plain)(*inputs)

    return call


_transformed = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
_anywhere = nullcontext()
_current_device = getattr(torch._C, "_cuda_getDevice", lambda: -1)


def device_of(x: Tensor) -> AbstractContextManager:
    """As torch.cuda.device_of, and cheap where x is on the current device."""
    return _anywhere if x.get_device() == _current_device() else torch.cuda.device_of(x)


def _no_second(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        "kernels have no second derivatives (create_graph=True): pass backend='reference' to the "
        "op, or set LONGSCAN_BACKEND=reference"
    )
