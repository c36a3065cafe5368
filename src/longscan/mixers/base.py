"""What every mixer is: a module `(x, state) -> (y, state)`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from longscan.state import State


class Mixer(nn.Module):
    """Base of all sequence mixers.

    A mixer is built from `d_model` alone (everything else has a default) and called as
    `y, state = mixer(x, state, cu_seqlens=...)`:
      x [B, T, d_model]; state None (start of a sequence) or what an earlier call returned;
      cu_seqlens [n + 1] marks n packed sequences on one row (B = 1), states then have n rows.
    Decoding is the same call with T = 1. forward(whole) equals forward(part 1), forward(part 2,
    state 1), ... for any cut.

    keep_float32: parameters and buffers that stay float32 after `.to(bfloat16)` or `.half()`.
    no_weight_decay: parameters that must not be decayed, beyond those with fewer than two axes.
    lr_limit: parameter -> the largest learning rate it may get, whatever the model's is.
    owns_norm: True if the mixer normalises its input itself and wants the residual stream as it is.
    reads_by_product: True if products are all that reads the input, so that it may come rounded to
    what autocast would round it to there.
    shardable: True if all that crosses from token to token goes through ops that know of shards
    (`longscan.ops._across`); else a sequence on several devices passes them one after another.
    penalty: what the last forward in training adds to the model's loss (a scalar), or None.
    shares_value: True if the mixer has `mix(..., first=) -> (y, state, first)`, where `first` is
    what the first such mixer of a model made of the same tokens (RWKV-7's value residual).
    """

    keep_float32: ClassVar[tuple[str, ...]] = ()
    no_weight_decay: ClassVar[tuple[str, ...]] = ()
    owns_norm: ClassVar[bool] = False
    shares_value: ClassVar[bool] = False
    reads_by_product: ClassVar[bool] = False
    shardable: ClassVar[bool] = False
    penalty: Tensor | None = None
    lr_limit: Mapping[str, float] = MappingProxyType({})

    d_model: int

    def init_state(self, batch: int) -> State:
        """The state before the first token, explicitly. Passing None to forward is the same."""
        raise NotImplementedError(f"{type(self).__name__} is abstract")

    def reset_parameters(self) -> None:
        """Initialise all parameters as the paper's code does."""
        raise NotImplementedError(f"{type(self).__name__} is abstract")

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        raise NotImplementedError(f"{type(self).__name__} is abstract")

    def __getstate__(self) -> dict[str, Any]:
        # A penalty belongs to the graph of one forward, and can be neither copied nor saved.
        return {k: v for k, v in self.__dict__.items() if k != "penalty"}

    def _check_input(self, x: Tensor) -> None:
        if x.ndim != 3 or x.shape[-1] != self.d_model or x.shape[1] == 0:
            raise ValueError(
                f"{type(self).__name__} expects x of shape [batch, time >= 1, {self.d_model}], "
                f"got {tuple(x.shape)}"
            )

    def _apply(self, fn, recurse: bool = True):
        parameters = [self._parameters.get(name) for name in self.keep_float32]
        kept = [(p, p.data) for p in parameters if p is not None]
        buffers = {n: b for n in self.keep_float32 if (b := self._buffers.get(n)) is not None}
        super()._apply(fn, recurse)
        narrow = (torch.float16, torch.bfloat16)
        for p, data in kept:
            if p.dtype in narrow:
                p.data = data.to(p.device, torch.float32)
        for name, data in buffers.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype in narrow:
                self._buffers[name] = data.to(moved.device, torch.float32)
        return self
