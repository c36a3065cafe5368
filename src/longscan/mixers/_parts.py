"""Small modules that several mixers are made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan.ops import _across
from longscan.ops._conv_fused import PARTS, conv_fits, conv_parts, unit_fits
from longscan.ops._projection_fused import projection_fits, projection_fused
from longscan.ops.conv import conv
from longscan.ops.dispatch import by_kernel
from longscan.ops.norm import l2_norm, rms_norm
from longscan.ops.step import is_token, window_step


class RMSNorm(nn.Module):
    """`ops.norm.rms_norm` with its weight.

    Shapes: [..., d]. Precision: statistics in float32, the result in the dtype of the weight, so
    that a float32 residual stream in a bfloat16 model comes out ready for the next product.
    """

    def __init__(self, d: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d))

    def reset_parameters(self) -> None:
        """Weight one."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps).to(self.weight.dtype)


class ShortConv(nn.Module):
    """A causal depthwise convolution over the last `width` tokens (`ops.conv.conv`).

    Parameters: weight [d, 1, width], bias [d] or None, as in the authors' checkpoints; the last
    tap is the current token. State [B, width - 1, d].
    """

    def __init__(self, d: int, width: int, bias: bool = False) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"a convolution needs at least one tap, not {width}")
        self.weight = nn.Parameter(torch.empty(d, 1, width))
        self.bias = nn.Parameter(torch.empty(d)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """U(-1/sqrt(width), 1/sqrt(width)), the default of torch.nn.Conv1d."""
        bound = self.weight.shape[-1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def init_state(self, batch: int) -> Tensor:
        """A window of zeros."""
        return self.weight.new_zeros(batch, self.weight.shape[-1] - 1, self.weight.shape[0])

    def forward(
        self, x: Tensor, state: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        weight, bias = self._taps(x)
        state = self.before(lambda cut: x[:, cut], state)
        return conv(x, weight, bias, state=state, cu_seqlens=cu_seqlens)

    def before(self, x: Callable[[slice], Tensor], state: Tensor | None) -> Tensor | None:
        """The windows that local sequences start from; x: its inputs in a stretch of tokens."""
        return _across.window(x, self.weight.shape[-1] - 1, state)

    def activated(
        self, x: Tensor, state: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """SiLU of the convolution, by one kernel where there is one."""
        (y,), window = self.activated_parts(x, [x.shape[-1]], state, cu_seqlens)
        return y, window

    def activated_parts(
        self,
        x: Tensor,
        sizes: Sequence[int],
        state: Tensor | None,
        cu_seqlens: Tensor | None,
        unit: int = 0,
    ) -> tuple[Sequence[Tensor], Tensor]:
        """`activated`, the result cut into parts of `sizes` channels, which are q and k first if
        there is a `unit`: see `unit_heads`."""
        state = self.before(lambda cut: x[:, cut], state)
        if state is not None and is_token(x, state, cu_seqlens):
            done = window_step(x[:, 0], *self._taps(x), state, silu=True)
            if done is not None:
                return unit_heads(done[0].unsqueeze(1).split(sizes, -1), unit), done[1]
        if self.by_kernel(x) and len(sizes) <= PARTS:
            inside = unit if unit_fits(unit, sizes) else 0
            ys, window = conv_parts(
                x, *self.taps(), list(sizes), state=state, cu_seqlens=cu_seqlens, silu=True,
                unit=inside,
            )  # fmt: skip
            return unit_heads(ys, unit - inside), window
        y, window = conv(x, *self._taps(x), state=state, cu_seqlens=cu_seqlens)
        return unit_heads(F.silu(y).split(sizes, -1), unit), window

    def by_kernel(self, x: Tensor) -> bool:
        """Whether a kernel computes the convolution of x."""
        return by_kernel("conv", x, lambda: conv_fits(x, *self.taps()))

    def taps(self) -> tuple[Tensor, Tensor | None]:
        """Weights [d, width] and bias in their own dtype, which kernels take."""
        return self.weight.squeeze(1), self.bias

    def _taps(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Under autocast a projection may hand over bfloat16 while the taps are float32."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return self.weight.squeeze(1).to(x.dtype), bias


def unit_heads(parts: Sequence[Tensor], unit: int) -> Sequence[Tensor]:
    """q and k, the first two parts, with heads of `unit` channels: heads of q scaled to length
    unit^-0.5, heads of k to 1. Nothing is done where unit is 0."""
    if not unit:
        return parts
    q, k, *rest = parts
    q, k = q.unflatten(-1, (-1, unit)), k.unflatten(-1, (-1, unit))
    return [l2_norm(q, scale=unit**-0.5).flatten(-2), l2_norm(k).flatten(-2), *rest]


def convolved_projection(
    linear: nn.Module,
    conv: ShortConv,
    x: Tensor,
    sizes: Sequence[int],
    inner: Sequence[int],
    *,
    at: int = 0,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    unit: int = 0,
) -> tuple[Sequence[Tensor], Tensor, list[Tensor]]:
    """linear(x) cut into parts of `sizes`, and SiLU(conv(part `at`)) cut into parts of `inner`,
    the first two of them of unit length (`unit_heads`).

    One function where kernels run and `linear` is nothing but a product (`projection_fits`).
    Returns: the convolved parts, the window, the projection's other parts.
    """
    eager = not torch.compiler.is_compiling()  # compilers pad and fuse by themselves
    if eager and len(inner) <= PARTS and projection_fits(linear, x) and conv.by_kernel(x):
        assert isinstance(linear, nn.Linear)
        inside = unit if unit_fits(unit, inner) else 0
        state = conv.before(lambda cut: linear(x[:, cut]).split(sizes, -1)[at], state)
        ys, window, parts = projection_fused(
            x, linear.weight, *conv.taps(), sizes=sizes, at=at, inner=inner, state=state,
            cu_seqlens=cu_seqlens, unit=inside,
        )  # fmt: skip
        return unit_heads(ys, unit - inside), window, parts
    parts = list(linear(x).split(sizes, -1))
    ys, window = conv.activated_parts(parts.pop(at), inner, state, cu_seqlens, unit)
    return ys, window, parts


def softplus_inverse(y: Tensor) -> Tensor:
    """x with softplus(x) = y > 0, stable for small y."""
    return y + torch.log(-torch.expm1(-y))


@torch.no_grad()
def init_dt_bias_(
    bias: Tensor, low: float = 1e-3, high: float = 0.1, floor: float = 1e-4
) -> Tensor:
    """Fill a bias so that softplus(bias) is log-uniform in [low, high], as Mamba does."""
    span = torch.rand_like(bias, dtype=torch.float32) * (math.log(high) - math.log(low))
    dt = (span + math.log(low)).exp().clamp(min=floor)
    return bias.copy_(softplus_inverse(dt))


@torch.no_grad()
def init_a_log_(a_log: Tensor, low: float, high: float) -> Tensor:
    """Fill with the logarithm of U(low, high), drawn away from an exact zero."""
    tiny = torch.finfo(torch.float32).tiny
    return a_log.copy_(torch.empty_like(a_log).uniform_(low, high).clamp(min=tiny).log())


def softplus_gate(raw: Tensor, a_log: Tensor, dt_bias: Tensor) -> Tensor:
    """The log decay -exp(A_log) softplus(raw + dt_bias) of Mamba-2, in float32 or wider.

    Shapes: raw [..., H] or [..., H, K]; a_log, dt_bias broadcast against it.
    """
    wide = torch.promote_types(raw.dtype, a_log.dtype)
    return -a_log.exp() * F.softplus(raw.to(wide) + dt_bias)
