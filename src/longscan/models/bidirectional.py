"""Any mixer in both directions of time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from longscan.mixers.base import Mixer
from longscan.models.block import build_mixer
from longscan.ops._layout import check_cu_seqlens, remembered
from longscan.state import State

_NO_STATE = (
    "a bidirectional mixer has no state: what it reads backwards begins at the end of the "
    "sequence. Pass whole sequences (many of them packed, with cu_seqlens)"
)


class Bidirectional(Mixer):
    """A mixer that reads a sequence forwards beside one that reads it backwards.

        y = combine(left_to_right(x), reversed(right_to_left(reversed(x))))

    Shapes: x, y [B, T, d_model]; with cu_seqlens every packed sequence is reversed by itself, so
    rows of different lengths are handled, padding apart, by packing them.
    It has no state: what is read backwards begins at the end, so a sequence must come whole.
    mixer: a registered name, for two with parameters of their own; or the two mixers.
    combine: add | mean (half of the sum) | concat (out_proj, a Linear, on both side by side).
    settings: of the mixers, by keyword, where `mixer` is a name.
    Raises: ValueError for a state, an unknown name or setting, mixers of another width.
    Source: Schuster and Paliwal, Bidirectional Recurrent Neural Networks, 1997.
    """

    bidirectional = True

    def __init__(
        self,
        d_model: int,
        mixer: str | tuple[Mixer, Mixer] = "gated_deltanet",
        *,
        combine: str = "add",
        **settings: Any,
    ) -> None:
        super().__init__()
        if combine not in ("add", "mean", "concat"):
            raise ValueError(f"combine must be add, mean or concat, not {combine!r}")
        self.d_model, self.combine = d_model, combine
        if isinstance(mixer, str):
            mixer = build_mixer(mixer, d_model, settings), build_mixer(mixer, d_model, settings)
        elif settings:
            raise ValueError(f"{', '.join(settings)}: mixers that are given have settings already")
        self.left_to_right, self.right_to_left = mixer
        for m in mixer:
            if m.d_model != d_model:
                raise ValueError(f"d_model is {d_model}, but a mixer has width {m.d_model}")
        shares = {m.shares_value for m in mixer}
        if len(shares) > 1:
            raise ValueError("either both mixers share the first layer's value, or none")
        self.shares_value = shares.pop()  # type: ignore[misc]
        norms = {m.owns_norm for m in mixer}
        if len(norms) > 1:
            raise ValueError("either both mixers normalise their input themselves, or none")
        self.owns_norm = norms.pop()  # type: ignore[misc]
        if combine == "concat":
            self.out_proj = nn.Linear(2 * d_model, d_model, bias=False)

    def reset_parameters(self) -> None:
        """Both mixers by their own rules; out_proj as torch.nn.Linear."""
        self.left_to_right.reset_parameters()
        self.right_to_left.reset_parameters()
        if self.combine == "concat":
            self.out_proj.reset_parameters()

    def init_state(self, batch: int) -> State:
        """ValueError: there is none."""
        raise ValueError(_NO_STATE)

    def mix(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        first: tuple[Any, Any] | None = None,
    ) -> tuple[Tensor, State, tuple[Any, Any] | None]:
        """As forward, with what the two mixers of the first layer share, each in its own order."""
        self._check_input(x)
        if state is not None:
            raise ValueError(_NO_STATE)
        ahead, back = self.left_to_right, self.right_to_left
        turned = reverse(x, cu_seqlens)
        if self.shares_value:
            f, b = first or (None, None)
            y, _, f = ahead.mix(x, None, cu_seqlens=cu_seqlens, first=f)  # type: ignore[operator]
            z, _, b = back.mix(turned, None, cu_seqlens=cu_seqlens, first=b)  # type: ignore[operator]
            first = f, b
        else:
            y, _ = ahead(x, None, cu_seqlens=cu_seqlens)
            z, _ = back(turned, None, cu_seqlens=cu_seqlens)
        z = reverse(z, cu_seqlens)
        if self.combine == "concat":
            return self.out_proj(torch.cat([y, z], -1)), State(), first
        y = y + z
        return (0.5 * y if self.combine == "mean" else y), State(), first

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        y, state, _ = self.mix(x, state, cu_seqlens=cu_seqlens)
        return y, state


def reverse(x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """x [B, T, ...] with time reversed, each packed sequence by itself and in its place."""
    if cu_seqlens is None:
        return x.flip(1)
    bounds = check_cu_seqlens(cu_seqlens, x.shape[0], x.shape[1])

    def index() -> Tensor:
        ends = torch.tensor(bounds)
        sums = (ends[:-1] + ends[1:]).repeat_interleave(ends.diff())
        return (sums - 1 - torch.arange(bounds[-1])).to(x.device)

    return x[:, remembered(cu_seqlens, "reversed", index)]


__all__ = ["Bidirectional", "reverse"]
