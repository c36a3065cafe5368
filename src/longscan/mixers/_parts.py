"""Small modules that several mixers are made of."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan.ops._conv_fused import conv_fits, conv_fused
from longscan.ops.conv import conv
from longscan.ops.dispatch import by_kernel
from longscan.ops.norm import rms_norm
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
        return conv(x, weight, bias, state=state, cu_seqlens=cu_seqlens)

    def activated(
        self, x: Tensor, state: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """SiLU of the convolution, by one kernel where there is one."""
        weight, bias = self._taps(x)
        if state is not None and is_token(x, state, cu_seqlens):
            done = window_step(x[:, 0], weight, bias, state, silu=True)
            if done is not None:
                return done[0].unsqueeze(1), done[1]
        if by_kernel("conv", x, lambda: conv_fits(x, weight, bias)):
            return conv_fused(x, weight, bias, state=state, cu_seqlens=cu_seqlens, silu=True)
        y, window = conv(x, weight, bias, state=state, cu_seqlens=cu_seqlens)
        return F.silu(y), window

    def _taps(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Under autocast a projection may hand over bfloat16 while the taps are float32."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return self.weight.squeeze(1).to(x.dtype), bias


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
