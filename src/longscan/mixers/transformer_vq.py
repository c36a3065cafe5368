"""Transformer-VQ: softmax attention in linear time, by keys from a codebook."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan.mixers._codebook import Codebook, recomputing
from longscan.mixers.base import Mixer
from longscan.ops._check import widen
from longscan.ops.norm import rms_norm
from longscan.ops.vq import init_vq_state, vq_attention
from longscan.state import State


class TransformerVQ(Mixer):
    """A gated unit of attention whose keys are codewords: near tokens are read one by one, with
    relative positions, and far ones as the mean value and the number of those with equal keys.

    q, k, v, g = in_proj(x)        q, k = RMS(q), RMS(k), per head, over d_key^1/4; v = silu(v)
    k'_j = c_s + (k_j - sg k_j),   s = argmin_s |k_j - c_s|^2              sg: without gradient
    s_ij = (q_i + a) . k'_j + (q_i + b) . r_{i-j}          the second term for i - j <= block only
    o_i = sum_j softmax_j(s_ij) v_j,   y = out_proj(o silu(g))

    r_d = r_proj(sinusoid(d)); a, b, r are over d_key^1/4 too. It equals a softmax over all tokens,
    but tokens before the previous block are kept as a count and a mean value per codeword.

    Shapes: x, y [B, T, d_model]; rows of in_proj q, k (n_heads d_key each), v, g (n_heads d_value
    each), heads the slower index; bias_u (a), bias_v (b) [n_heads, d_key]; codebook: see
    `mixers._codebook.Codebook`; state: that of `ops.vq.vq_attention`: k, v, codes
    [B, W, n_heads, ...] of at most 2 block - 1 tokens, counts [B, n_heads, n_codes], means
    [B, n_heads, n_codes, d_value], length [B].
    n_heads: heads, each with a codebook.
    d_key: width of a head's queries and keys; None: d_model / n_heads, at most 128.
    d_value: width of a head's values; None: 2 d_model / n_heads.
    n_codes: codewords per head. block: tokens of a block, counted from the start of a sequence;
    the window is a token's own block up to itself, and the previous one. The paper has 512 of
    both.
    commitment: weight of the mean over tokens of sum_heads |k - c_s|^2, which is added to the loss
    in training (`penalty`).
    codebook_decay: of the moving averages that are the codebook, per training forward.
    carry_gradient: pass gradients on to tokens of earlier blocks.
    norm_eps: added to the mean square of queries and keys.
    Precision: queries, keys, codebook, scores and state float32.
    Raises: ValueError for settings that do not fit.
    Source: arXiv 2309.16354, sections 3 and 4.
    Differs: the norm of the input is the block's, without the additive bias of the authors'; their
    layer is two of these. The codebook starts with keys of the first batch, codewords that no keys
    come to are replaced by keys, and it follows the keys of every training forward, where the
    authors update it once per optimiser step. Packed sequences never share a cache. No dropout.
    Reference: transformer-vq/transformer_vq, MIT.
    """

    reads_by_product = True
    keep_float32 = ("sinusoid",)
    no_weight_decay = ("bias_u", "bias_v")

    sinusoid: Tensor

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 1,
        d_key: int | None = None,
        d_value: int | None = None,
        n_codes: int = 128,
        block: int = 64,
        commitment: float = 1e-4,
        codebook_decay: float = 0.99,
        carry_gradient: bool = True,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if n_heads < 1:
            raise ValueError(f"n_heads must be at least 1, not {n_heads}")
        if block < 1:
            raise ValueError(f"block must be at least 1, not {block}")
        if not commitment >= 0:
            raise ValueError(f"commitment must be at least 0, not {commitment}")
        self.d_model, self.n_heads = d_model, n_heads
        self.d_key = d_key or min(128, max(1, d_model // n_heads))
        self.d_value = d_value or max(1, 2 * d_model // n_heads)
        self.block, self.commitment, self.norm_eps = block, commitment, norm_eps
        self.carry_gradient = carry_gradient
        self._scale = self.d_key**-0.25
        keys, values = n_heads * self.d_key, n_heads * self.d_value
        self._split = [keys, keys, values, values]
        self.in_proj = nn.Linear(d_model, sum(self._split), bias=False)
        self.r_proj = nn.Linear(d_model, keys, bias=False)
        self.bias_u = nn.Parameter(torch.empty(n_heads, self.d_key))
        self.bias_v = nn.Parameter(torch.empty(n_heads, self.d_key))
        # Keys have d_key entries of mean square `scale`^2.
        self.codebook = Codebook(
            n_heads, n_codes, self.d_key, decay=codebook_decay, scale=self._scale
        )
        self.register_buffer("sinusoid", torch.empty(block + 1, d_model), persistent=False)
        self.out_proj = nn.Linear(values, d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Projections N(0, 1 / fan-in), biases 0; codewords N(0, d_key^-1/2) until the first batch
        in training gives the codebook keys."""
        for p in (self.in_proj, self.r_proj, self.out_proj):
            nn.init.normal_(p.weight, std=p.in_features**-0.5)
        nn.init.zeros_(self.bias_u)
        nn.init.zeros_(self.bias_v)
        self.codebook.reset_parameters()
        half = torch.arange(0, self.d_model, 2, device=self.sinusoid.device) / self.d_model
        angle = torch.arange(self.block + 1, device=half.device)[:, None] / 10000**half
        self.sinusoid.copy_(torch.cat([angle.sin(), angle.cos()], -1)[:, : self.d_model])

    def init_state(self, batch: int) -> State:
        return init_vq_state(batch, self.codebook.book(), self.d_value)

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        self._check_input(x)
        q, k, v, g = self.in_proj(x).split(self._split, -1)
        q, k = (
            rms_norm(widen(z).unflatten(-1, (self.n_heads, -1)), None, self.norm_eps) * self._scale
            for z in (q, k)
        )
        v = F.silu(v).unflatten(-1, (self.n_heads, -1))
        keys = self.codebook(k)
        if not recomputing():
            self.penalty = None if keys.commit is None else self.commitment * keys.commit
        r = widen(self.r_proj(self.sinusoid.to(self.bias_u.dtype))) * self._scale
        o, state = vq_attention(
            q + self.bias_u * self._scale,
            keys.k_hat,
            keys.codes,
            v,
            keys.book,
            block=self.block,
            bias=r.unflatten(-1, (self.n_heads, -1)).transpose(0, 1),
            q_bias=q + self.bias_v * self._scale,
            state=state,
            cu_seqlens=cu_seqlens,
            carry_gradient=self.carry_gradient,
        )
        return self.out_proj((o.flatten(-2) * F.silu(g)).to(x.dtype)), state


__all__ = ["TransformerVQ"]
