"""One layer of a model: a mixer and, where the architecture has one, an MLP, each on a residual."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan import registry
from longscan.mixers._parts import RMSNorm
from longscan.mixers.base import Mixer
from longscan.models.config import StackConfig
from longscan.ops._check import cast, compute_dtype
from longscan.ops.glu import glu
from longscan.ops.norm import add_rms_norm, rms_norm
from longscan.state import State

if TYPE_CHECKING:
    from longscan.parallel import Shards

Stream = Tensor | tuple[Tensor, Tensor | None]
"""The residual stream between blocks: x, or a pair for the sum of both."""


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


def enter(
    norm: RMSNorm | LayerNorm | None, x: Tensor, branch: Tensor | None, *, narrow: bool = False
) -> tuple[Tensor, Tensor]:
    """What a part of a model reads, norm(x + branch), and the stream x + branch.

    norm: None for parts with a norm of their own; branch: None for nothing to add.
    narrow: the part's products read what comes out and nothing else: under autocast on a GPU an
    RMSNorm hands it over in autocast's dtype, in which the products would read it anyway.
    """
    if norm is None or not _plain(norm):
        x = x if branch is None else x + branch
        return (x if norm is None else norm(x)), x
    dtype = norm.weight.dtype
    if narrow and x.is_cuda and dtype is torch.float32 and torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
    if branch is None:
        return rms_norm(x, norm.weight, norm.eps, dtype=dtype), x
    return add_rms_norm(x, branch, norm.weight, norm.eps, dtype=dtype)


def _plain(norm: nn.Module) -> TypeGuard[RMSNorm]:
    """Whether a module is an RMSNorm and nothing else: not so sharded ones and those with hooks."""
    hooks = norm._forward_hooks or norm._forward_pre_hooks
    more = norm._backward_hooks or norm._backward_pre_hooks
    return type(norm) is RMSNorm and not (hooks or more)


class GatedMLP(nn.Module):
    """A gated MLP: down(activation(gate(x)) * up(x)), no biases.

    Shapes: [..., d_model]; gate_up holds the rows [gate d_ff | up d_ff].
    activation: silu (SwiGLU) or gelu (GEGLU, with the exact error function).
    Source: Shazeer, arXiv 2002.05202; initialised as torch.nn.Linear, as in Mamba's GatedMLP.
    """

    def __init__(self, d_model: int, d_ff: int, activation: str = "silu") -> None:
        super().__init__()
        self.activation = activation
        self.gate_up = nn.Linear(d_model, 2 * d_ff, bias=False)
        self.down = nn.Linear(d_ff, d_model, bias=False)

    def reset_parameters(self) -> None:
        """U(-1/sqrt(n), 1/sqrt(n)) for n inputs."""
        for linear in (self.gate_up, self.down):
            nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(glu(self.gate_up(x), self.activation))


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
    x may be a pair (x, branch) that stands for x + branch, branch None for nothing; then such a
    pair is returned. Each sum is then made with the norm that follows it, in one kernel.
    shards: how the sequences lie on the ranks that hold parts of them (`longscan.parallel`).
    Precision: x is the residual stream and stays float32 (float64 in a float64 model) when
    weights or autocast are narrower. Under autocast on a GPU the MLP, and a mixer that
    `reads_by_product`, get it in autocast's dtype; others, which mix tokens before any product
    as RWKV's shift does, in the norm's own.
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
        x: Stream,
        state: State | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        first: Any = None,
        shards: Shards | None = None,
    ) -> tuple[Stream, State, Any]:
        pair = isinstance(x, tuple)
        x, branch = x if pair else (x, None)
        u, x = enter(self.norm, x, branch, narrow=self.mixer.reads_by_product)

        def mix(u: Tensor, state: State | None, cu_seqlens: Tensor | None) -> tuple[Tensor, State]:
            nonlocal first
            if not self.mixer.shares_value:
                return self.mixer(u, state, cu_seqlens=cu_seqlens)
            shared: Any = self.mixer.mix
            y, after, first = shared(u, state, cu_seqlens=cu_seqlens, first=first)
            return y, after

        if shards is None:
            y, carried = mix(u, state, cu_seqlens)
        else:
            y, carried = shards.mix(self.mixer, mix, u, state)
        branch = self.dropout(y)
        if self.mlp is not None:
            u, x = enter(self.mlp_norm, x, branch, narrow=True)
            branch = self.dropout(self.mlp(u))
        return ((x, branch) if pair else x + branch), carried, first


def last_linears(mixer: Mixer) -> list[nn.Linear]:
    """The `out_proj` of a mixer, or those of the mixers that it is made of."""
    out = getattr(mixer, "out_proj", None)
    if isinstance(out, nn.Linear):
        return [out]
    parts = [m for m in mixer.children() if isinstance(m, Mixer)]
    return [linear for part in parts for linear in last_linears(part)]


__all__ = [
    "Block",
    "GatedMLP",
    "LayerNorm",
    "RMSNorm",
    "build_mixer",
    "build_norm",
    "enter",
    "last_linears",
]
