"""One layer of a model: a mixer and, where the architecture has one, an MLP, each on a residual."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan import registry
from longscan.mixers._parts import RMSNorm
from longscan.mixers.base import Mixer
from longscan.state import State


class SwiGLU(nn.Module):
    """A gated MLP: down(silu(gate(x)) * up(x)), no biases.

    Shapes: [..., d_model]; gate_up holds the rows [gate d_ff | up d_ff].
    Source: Shazeer, arXiv 2002.05202; initialised as torch.nn.Linear, as in Mamba's GatedMLP.
    """

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(d_model, 2 * d_ff, bias=False)
        self.down = nn.Linear(d_ff, d_model, bias=False)

    def reset_parameters(self) -> None:
        """U(-1/sqrt(n), 1/sqrt(n)) for n inputs."""
        for linear in (self.gate_up, self.down):
            nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


def build_mixer(name: str, d_model: int, settings: Mapping[str, Any]) -> Mixer:
    """The mixer called `name`.

    Raises: ValueError for an unknown mixer or setting, naming the nearest; what the mixer itself
    finds wrong with a value.
    """
    cls = registry.mixer_class(name)
    parameters = inspect.signature(cls.__init__).parameters
    known = [p for p in list(parameters)[1:] if p != "d_model"]
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for key in settings:
        if key not in known and not takes_any:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known) or 'none'}"
            raise ValueError(f"the mixer {name} has no setting {key!r}; {hint}")
    return cls(d_model, **settings)


class Block(nn.Module):
    """A pre-norm residual block.

        x <- x + mixer(norm(x))
        x <- x + mlp(mlp_norm(x))          if the block has an MLP

    Shapes: x [B, T, d_model]; state: the mixer's.
    Precision: x is the residual stream and stays float32 (float64 in a float64 model) when
    weights or autocast are narrower.
    Source: the blocks of Mamba (arXiv 2312.00752, figure 3) and of pre-norm Transformers.
    """

    def __init__(
        self,
        mixer: Mixer,
        d_model: int,
        d_ff: int | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.norm = RMSNorm(d_model, norm_eps)
        self.mixer = mixer
        self.mlp_norm = RMSNorm(d_model, norm_eps) if d_ff else None
        self.mlp = SwiGLU(d_model, d_ff) if d_ff else None

    @property
    def n_residuals(self) -> int:
        """Branches added to the residual stream."""
        return 1 if self.mlp is None else 2

    def reset_parameters(self) -> None:
        """All parts anew, each by its own rule."""
        for part in (self.norm, self.mixer, self.mlp_norm, self.mlp):
            if part is not None:
                part.reset_parameters()

    @torch.no_grad()
    def scale_outputs(self, factor: float) -> None:
        """Multiply the last projection of each branch (a mixer's `out_proj`, if it has one)."""
        out = getattr(self.mixer, "out_proj", None)
        for linear in (out, None if self.mlp is None else self.mlp.down):
            if isinstance(linear, nn.Linear):
                linear.weight.mul_(factor)

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        y, carried = self.mixer(self.norm(x), state, cu_seqlens=cu_seqlens)
        x = x + y
        if self.mlp is not None and self.mlp_norm is not None:
            x = x + self.mlp(self.mlp_norm(x))
        return x, carried


__all__ = ["Block", "RMSNorm", "SwiGLU", "build_mixer"]
