"""What the xLSTM mixers share: a linear map and a LayerNorm per head, an initialisation."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan.ops._check import widen


def small_init_(weight: Tensor, d_model: int) -> None:
    """N(0, 2 / (5 d_model)), the xLSTM authors' small_init."""
    nn.init.normal_(weight, std=(2 / (5 * d_model)) ** 0.5)


class HeadwiseLinear(nn.Module):
    """A linear map whose matrix is block-diagonal: block j of the output sees block j of the input.

    Shapes: [..., d] -> [..., d]; weight [n_blocks, d / n_blocks (out), d / n_blocks (in)].
    """

    def __init__(self, d: int, n_blocks: int, bias: bool = False) -> None:
        super().__init__()
        if n_blocks < 1 or d % n_blocks:
            raise ValueError(f"{d} channels cannot be cut into {n_blocks} equal blocks")
        self.in_features = self.out_features = d  # what adapters ask of a linear map
        self.weight = nn.Parameter(torch.empty(n_blocks, d // n_blocks, d // n_blocks))
        self.bias = nn.Parameter(torch.empty(d)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight N(0, 2 / (5 d_in)) of a block's inputs, bias 0."""
        nn.init.normal_(self.weight, std=(2 / (5 * self.weight.shape[2])) ** 0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        # Merging costs more than it saves a few tokens.
        weight = _merged(self.weight) if x.numel() > 16 * x.shape[-1] else self.weight
        blocks = x.flatten(0, -2).unflatten(-1, (len(weight), -1)).transpose(0, 1)
        y = torch.bmm(blocks, weight.mT).transpose(0, 1).reshape(x.shape)
        return y if self.bias is None else y + self.bias


def _merged(weight: Tensor, width: int = 16) -> Tensor:
    """The same map as fewer blocks of about `width` channels, zeros between the small ones.

    A product with blocks of 4 channels wastes a processor's vectors: with 16 it takes a third of
    the time, although it multiplies four times as much.
    """
    n, d_out, _ = weight.shape
    together = math.gcd(n, max(1, width // d_out))
    if together == 1:
        return weight
    blocks = weight.unflatten(0, (-1, together)).permute(0, 2, 3, 1)
    return torch.diag_embed(blocks).permute(0, 3, 1, 4, 2).flatten(3).flatten(1, 2)


class HeadLayerNorm(nn.Module):
    """LayerNorm of each head by itself (torch.nn.GroupNorm), a weight and bias per channel.

    Shapes: [..., H, d_head] -> [..., H * d_head]; weight, bias [H * d_head].
    Precision: statistics in float32, the result in the dtype of the weight.
    """

    def __init__(self, d: int, eps: float = 1e-5, bias: bool = False) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d))
        self.bias = nn.Parameter(torch.zeros(d)) if bias else None

    def reset_parameters(self, weight: float = 1.0) -> None:
        """All weights alike, biases 0."""
        nn.init.constant_(self.weight, weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(widen(x), x.shape[-1:], eps=self.eps).flatten(-2)
        y = y * self.weight if self.bias is None else torch.addcmul(self.bias, y, self.weight)
        return y.to(self.weight.dtype)
