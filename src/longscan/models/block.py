"""One layer of a model: a mixer and, where the architecture has one, an MLP, each on a residual."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan import registry
from longscan.mixers._parts import RMSNorm
from longscan.mixers.base import Mixer
from longscan.models.config import StackConfig
from longscan.ops._check import cast, compute_dtype
from longscan.state import State

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu}


class LayerNorm(nn.Module):
    """Layer normalisation, (x - mean) / sqrt(variance + eps) * weight + bias.

    Shapes: [..., d]. Precision: as RMSNorm: statistics in float32, the result in the dtype of the
    weight. Source: Ba et al., arXiv 1607.06450.
    """

    def __init__(self, d: int, eps: float = 1e-5, bias: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d))
        self.bias = nn.Parameter(torch.zeros(d)) if bias else None

    def reset_parameters(self) -> None:
        """Weight one, bias zero."""
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        x, weight, bias = cast(compute_dtype(x), x, self.weight, self.bias)
        return F.layer_norm(x, weight.shape, weight, bias, self.eps).to(self.weight.dtype)


def build_norm(config: StackConfig) -> RMSNorm | LayerNorm:
    """A norm of the kind that a configuration asks for."""
    if config.norm == "rms":
        return RMSNorm(config.d_model, config.norm_eps)
    return LayerNorm(config.d_model, config.norm_eps, config.norm_bias)


class GatedMLP(nn.Module):
    """A gated MLP: down(activation(gate(x)) * up(x)), no biases.

    Shapes: [..., d_model]; gate_up holds the rows [gate d_ff | up d_ff].
    activation: silu (SwiGLU) or gelu (GEGLU, with the exact error function).
    Source: Shazeer, arXiv 2002.05202; initialised as torch.nn.Linear, as in Mamba's GatedMLP.
    """

    def __init__(self, d_model: int, d_ff: int, activation: str = "silu") -> None:
        super().__init__()
        self.activate = ACTIVATIONS[activation]
        self.gate_up = nn.Linear(d_model, 2 * d_ff, bias=False)
        self.down = nn.Linear(d_ff, d_model, bias=False)

    def reset_parameters(self) -> None:
        """U(-1/sqrt(n), 1/sqrt(n)) for n inputs."""
        for linear in (self.gate_up, self.down):
            nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(self.activate(gate) * up)


def build_mixer(
    name: str, d_model: int, settings: Mapping[str, Any], *, place: tuple[int, int] | None = None
) -> Mixer:
    """The mixer called `name`.

    place: which of a model's mixers of this name it is, from 0, and how many there are. Mixers
    with settings `layer` and `n_layers`, whose initialisation or parameters change with depth, are
    told so, unless `settings` say otherwise.
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
    if place is not None and {"layer", "n_layers"} <= set(known):
        settings = {"layer": place[0], "n_layers": place[1], **settings}
    return cls(d_model, **settings)


class Block(nn.Module):
    """A pre-norm residual block.

        x <- x + dropout(mixer(norm(x)))             without the norm if the mixer owns one
        x <- x + dropout(mlp(mlp_norm(x)))          if the block has an MLP

    Shapes: x [B, T, d_model]; state: the mixer's. `first` is None, or for mixers with
    `shares_value` what the first of them in the model made of these tokens (see Mixer).
    Precision: x is the residual stream and stays float32 (float64 in a float64 model) when
    weights or autocast are narrower.
    Source: the blocks of Mamba (arXiv 2312.00752, figure 3) and of pre-norm Transformers.
    """

    def __init__(self, mixer: Mixer, config: StackConfig, *, mlp: bool) -> None:
        super().__init__()
        self.norm = None if mixer.owns_norm else build_norm(config)
        self.mixer = mixer
        self.mlp_norm = build_norm(config) if mlp else None
        c = config
        self.mlp = GatedMLP(c.d_model, c.ff_width, c.activation) if mlp else None
        self.dropout = nn.Dropout(c.dropout)

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
        for linear in (*last_linears(self.mixer), None if self.mlp is None else self.mlp.down):
            if linear is not None:
                linear.weight.mul_(factor)

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        first: Any = None,
    ) -> tuple[Tensor, State, Any]:
        u = x if self.norm is None else self.norm(x)
        if self.mixer.shares_value:
            mix: Any = self.mixer.mix
            y, carried, first = mix(u, state, cu_seqlens=cu_seqlens, first=first)
        else:
            y, carried = self.mixer(u, state, cu_seqlens=cu_seqlens)
        x = x + self.dropout(y)
        if self.mlp is not None and self.mlp_norm is not None:
            x = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return x, carried, first


def last_linears(mixer: Mixer) -> list[nn.Linear]:
    """The `out_proj` of a mixer, or those of the mixers that it is made of."""
    out = getattr(mixer, "out_proj", None)
    if isinstance(out, nn.Linear):
        return [out]
    parts = [m for m in mixer.children() if isinstance(m, Mixer)]
    return [linear for part in parts for linear in last_linears(part)]


__all__ = [
    "ACTIVATIONS",
    "Block",
    "GatedMLP",
    "LayerNorm",
    "RMSNorm",
    "build_mixer",
    "build_norm",
    "last_linears",
]
