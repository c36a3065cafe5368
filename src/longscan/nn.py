"""Mixers with the face of torch.nn.LSTM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from longscan import registry
from longscan.models.bidirectional import reverse
from longscan.models.config import StackConfig
from longscan.models.stack import Stack, parameter_groups
from longscan.state import State


class Recurrent(nn.Module):
    """Any mixer where a torch.nn.LSTM was: `output, state = rnn(input, state)`.

    Layers are the blocks of a longscan.models.Stack (norm, mixer, residual, and the MLP of the
    architecture where it has one), with a norm at the end.

    Shapes: input [T, B, input_size], [B, T, input_size] if batch_first, [T, input_size] of one
    sequence, or a PackedSequence; output likewise with hidden_size, twice that if bidirectional.
    input_size, hidden_size: where they differ, a Linear goes before the blocks.
    num_layers: number of blocks.
    mixer: a registered name.
    batch_first: the batch is the first axis of input and output.
    dropout: on what every residual branch adds, in training (the LSTM's is between layers).
    bidirectional: a second stack reads backwards; its output is the second half of the width.
    stack: further fields of a StackConfig, such as {"mlp": "none", "norm": "layer"}.
    settings: of the mixer, by keyword.
    Differs: from torch.nn.LSTM. The state is a longscan.State, not (h, c): batch first whatever
    the layout, of one row for a sequence without a batch axis, in the caller's order for a
    PackedSequence. Pass back what a call returned, or None. The two directions meet only in the
    output, so output[..., :hidden_size] never sees the future; a bidirectional model takes no
    state, because it begins at both ends, and returns an empty one. There is no proj_size.
    Raises: ValueError, TypeError for wrong shapes, settings, states.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        mixer: str = "gated_deltanet",
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        stack: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        registry.entry(mixer)
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.batch_first, self.dropout, self.bidirectional = batch_first, dropout, bidirectional
        own = {
            "d_model": hidden_size,
            "n_layers": num_layers,
            "pattern": mixer,
            "mixers": {mixer: settings},
            "dropout": dropout,
        }
        taken = ", ".join(sorted(own.keys() & (stack or {}).keys()))
        if taken:
            raise ValueError(f"{taken}: not in `stack`; they follow from arguments of their own")
        config = StackConfig.from_dict({**(stack or {}), **own})

        def one_way() -> Stack:
            if input_size == hidden_size:
                return Stack(config)
            return Stack(config, entry={"in_proj": nn.Linear(input_size, hidden_size)})

        self.ahead = one_way()
        self.back = one_way() if bidirectional else None

    def reset_parameters(self) -> None:
        """All parameters anew, as a fresh model has them."""
        for part in (self.ahead, self.back):
            if part is not None:
                if self.input_size != self.hidden_size:
                    part.in_proj.reset_parameters()  # type: ignore[operator]
                part.reset_parameters()

    def parameter_groups(self, *, weight_decay: float, lr: float) -> list[dict[str, Any]]:
        """`longscan.models.parameter_groups` of this module, for an optimiser."""
        return parameter_groups(self, weight_decay=weight_decay, lr=lr)

    def init_state(self, batch: int) -> State:
        """The state before the first step; passing None is the same."""
        return State() if self.bidirectional else self.ahead.init_state(batch)

    def forward(
        self, input: Tensor | PackedSequence, state: State | None = None
    ) -> tuple[Any, State]:
        if state is not None and not isinstance(state, State):
            raise TypeError(
                f"state must be what an earlier call returned, a longscan.State, not "
                f"{type(state).__name__}"
            )
        if isinstance(input, PackedSequence):
            return self._packed(input, state)
        if input.ndim not in (2, 3) or input.shape[-1] != self.input_size:
            layout = "batch, time" if self.batch_first else "time, batch"
            raise ValueError(
                f"input must have shape [{layout}, {self.input_size}] or [time, "
                f"{self.input_size}], not {list(input.shape)}"
            )
        if input.ndim == 2:
            y, state = self._run(input[None], state)
            return y[0], state
        if self.batch_first:
            return self._run(input, state)
        y, state = self._run(input.transpose(0, 1), state)
        return y.transpose(0, 1), state

    def _packed(self, input: PackedSequence, state: State | None) -> tuple[PackedSequence, State]:
        x, order, back = input.data, input.sorted_indices, input.unsorted_indices
        if x.shape[-1] != self.input_size:
            raise ValueError(f"input must have {self.input_size} features, not {x.shape[-1]}")
        with torch.inference_mode(False):
            # Step t holds row b at starts[t] + b while b < sizes[t]; wanted: row by row.
            sizes = input.batch_sizes
            rows = torch.arange(int(sizes[0]))[:, None]
            there = rows < sizes
            index = (rows + sizes.cumsum(0) - sizes)[there]
            bounds = nn.functional.pad(there.sum(1).cumsum(0), (1, 0)).to(x.device)
            inverse, index = index.argsort().to(x.device), index.to(x.device)
        if state is not None and order is not None:
            state = state.select(order)
        y, state = self._run(x[index][None], state, bounds)
        if back is not None:
            state = state.select(back)
        return PackedSequence(y[0][inverse], input.batch_sizes, order, back), state

    def _run(
        self, x: Tensor, state: State | None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """One direction or both on x [B, T, input_size]."""
        if self.back is None:
            return self._through(self.ahead, x, state, cu_seqlens)
        if state is not None:
            raise ValueError(
                "a bidirectional model takes no state: it begins at both ends of a sequence, so "
                "sequences must come whole"
            )
        y, _ = self._through(self.ahead, x, None, cu_seqlens)
        z, _ = self._through(self.back, reverse(x, cu_seqlens), None, cu_seqlens)
        return torch.cat([y, reverse(z, cu_seqlens)], -1), State()

    def _through(
        self, stack: Stack, x: Tensor, state: State | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, State]:
        if self.input_size != self.hidden_size:
            x = stack.in_proj(x)  # type: ignore[operator]
        return stack.features(x, state, cu_seqlens=cu_seqlens)

    def extra_repr(self) -> str:
        """Sizes, as torch.nn.LSTM prints them."""
        return f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}"


__all__ = ["Recurrent"]
