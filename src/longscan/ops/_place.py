"""Gradients of the parts of a tensor, each computed where it belongs.

The backward of a cut copies the gradients of all parts once more, side by side. A function that
cuts its own result hands a `Whole` to its graph node (`ctx.whole`); functions behind it whose
kernels can write between other numbers ask `place_of` in their forward, and write there in their
backward. Nobody has to: gradients from elsewhere are copied, as before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

_this_pass = getattr(torch._C, "_current_graph_task_id", lambda: -1)
RESHAPES = ("ViewBackward0", "UnsafeViewBackward0")


class Whole:
    """The gradient of a tensor [..., N] that is cut along its last axis into parts of `sizes`.

    parts: which part is which output of the function that cuts. Each backward pass has a buffer of
    its own, from the first question to `take`.
    """

    def __init__(self, whole: Tensor, sizes: Sequence[int], parts: Mapping[int, int]) -> None:
        self.shape, self.dtype, self.device = whole.shape, whole.dtype, whole.device
        self.sizes, self.parts = list(sizes), parts
        self._buffer: tuple[Tensor, list[Tensor]] | None = None
        self._of, self._given = -1, set[int]()

    def _here(self) -> tuple[Tensor, list[Tensor]]:
        now = _this_pass()
        if self._buffer is None or self._of != now:
            buffer = torch.empty(self.shape, dtype=self.dtype, device=self.device)
            self._buffer, self._of = (buffer, list(buffer.split(self.sizes, -1))), now
            self._given.clear()
        return self._buffer

    def place(self, output: int, like: Tensor) -> Tensor | None:
        """Where the gradient of this output may be written, as a view like `like`.

        None for all who ask but the first, whose gradients are added to that one's by autograd;
        where there is no backward pass; where the view would not lie as `like` does.
        """
        if _this_pass() < 0 or output not in self.parts:
            return None
        _, slices = self._here()
        if output in self._given:
            return None
        out = slices[self.parts[output]].view(like.shape)
        if out.stride() != like.stride() or out.dtype != like.dtype:
            return None
        self._given.add(output)
        return out

    def take(self, grads: Sequence[Tensor | None]) -> tuple[Tensor, list[Tensor]]:
        """The buffer and its parts, which belong to the caller from here on.

        grads: those of all outputs, by number. Where one has a place but is not there, autograd
        added something to what is there, and that may be somebody's still: then all are new.
        """
        buffer, slices = self._here()
        self._buffer = None
        for output in self._given:
            g = grads[output]
            if g is None or not is_at(g, slices[self.parts[output]]):
                buffer = torch.empty_like(buffer)
                return buffer, list(buffer.split(self.sizes, -1))
        return buffer, slices


def place_of(x: Tensor) -> Callable[[Tensor], Tensor | None] | None:
    """`Whole.place` for x, if x is a part of a whole in another shape; None if it is not."""
    node: Any = x.grad_fn
    output = x.output_nr
    while node is not None and node.name() in RESHAPES:
        node, output = node.next_functions[0]
    whole = getattr(node, "whole", None)
    return partial(whole.place, output) if isinstance(whole, Whole) else None


def is_at(x: Tensor, place: Tensor) -> bool:
    """Whether x is the tensor at that place."""
    return (
        x.data_ptr() == place.data_ptr()
        and x.shape == place.shape
        and x.stride() == place.stride()
        and x.dtype == place.dtype
    )
