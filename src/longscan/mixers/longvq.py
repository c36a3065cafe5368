"""LongVQ: the gated attention of Mega with keys from a codebook, in linear time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from longscan.mixers._codebook import Codebook, recomputing
from longscan.mixers._ema import AveragedAttention, Entries
from longscan.ops.vq import init_vq_state, vq_attention
from longscan.state import State


class LongVQ(AveragedAttention):
    """Attention of one head, on features from a damped moving average, whose keys are replaced by
    codewords, so that far tokens are summed by code and near ones are read one by one.

    n = norm(x);   m = EMA(n);   u, z, r, hx = mx_proj(m)        u sigmoid, z and r SiLU
    q = gamma_0 z + beta_0,   k = gamma_1 z + beta_1,   v = SiLU(v_proj(n))
    k'_j = c_s + (k_j - sg k_j),   s = argmin_s |k_j - c_s|^2       sg: without gradient
    s_ij = q_i . k'_j / sqrt(d_key) + b(i - j) if j is in the window of i, else without b
    o_i = sum_j softmax_j(s_ij) v_j
    y = u (SiLU(hx + h_proj(r o)) - x)

    The EMA and the part of x, which is the residual stream itself, are those of `Mega`. The window
    of a token is its own block and the previous one, up to itself, or if bidirectional the
    previous, own and next block. Tokens outside of it are counted and their values averaged code
    by code.

    Shapes: x, y [B, T, d_model]; rows of mx_proj u | z | r | hx; gamma, beta [2, d_key]; rel_bias
    [4 block + 1], entry i - j + 2 block; codebook: see `mixers._codebook.Codebook`; state:
    h [B, d_model, d_state], and that of `ops.vq.vq_attention`: k, v, codes [B, W, 1, ...] of at
    most 2 block - 1 tokens, counts [B, 1, n_codes], means [B, 1, n_codes, d_value], length [B].
    d_key: width of queries and keys; None: half of d_model, even. d_value: width of values; None:
    2 d_model.
    d_state: averages per channel.
    n_codes: codewords.
    block: tokens of a block, counted from the start of the sequence.
    bidirectional: all tokens of the sequence are read and the average runs both ways; then no
    state and no decoding.
    commitment: weight of mean |k - c_s|^2, which is added to the loss in training (`penalty`).
    codebook_decay: of the moving averages that are the codebook, per training step.
    cache_straight_through: pass the gradient of k' on to k from far tokens too, which is exact but
    costs d_key d_value numbers per code and block.
    norm: of the input, layer (LayerNorm) or rms. norm_eps: added to its variance or mean square.
    Precision: the average, distances to codewords, the codebook, scores and sums float32.
    Raises: ValueError for settings that do not fit.
    Source: arXiv 2404.11163; Mega (arXiv 2209.10655); Transformer-VQ (arXiv 2309.16354).
    Differs: no code was published, and how its parts are put together is our reading of the paper;
    dropout is the block's, on y. The codebook starts with keys of the first batch; codewords that
    no keys come to are replaced by keys.
    Reference: none for the whole; facebookresearch/mega (MIT) and transformer-vq/transformer_vq
    (MIT) for its parts.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_key: int | None = None,
        d_value: int | None = None,
        d_state: int = 16,
        n_codes: int = 256,
        block: int = 64,
        bidirectional: bool = False,
        commitment: float = 1e-4,
        codebook_decay: float = 0.99,
        cache_straight_through: bool = False,
        norm: str = "layer",
        norm_eps: float = 1e-5,
    ) -> None:
        if block < 1:
            raise ValueError(f"block must be at least 1, not {block}")
        if not commitment >= 0:
            raise ValueError(f"commitment must be at least 0, not {commitment}")
        super().__init__(
            d_model, d_key=d_key, d_value=d_value, d_state=d_state, bidirectional=bidirectional,
            norm=norm, norm_eps=norm_eps,
        )  # fmt: skip
        self.block, self.commitment = block, commitment
        self.cache_straight_through = cache_straight_through
        # Keys are as small as their gains at first.
        self.codebook = Codebook(1, n_codes, self.d_key, decay=codebook_decay, scale=0.02)
        self.rel_bias = nn.Parameter(torch.empty(4 * block + 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As AveragedAttention; rel_bias N(0, 0.02); the codebook N(0, 0.02) until the first batch
        gives it keys."""
        super().reset_parameters()
        nn.init.normal_(self.rel_bias, std=0.02)
        self.codebook.reset_parameters()

    def init_state(self, batch: int) -> State:
        if self.bidirectional:
            return State()
        cache = init_vq_state(
            batch, self.codebook.book(), self.d_value,
            cache_straight_through=self.cache_straight_through,
        )  # fmt: skip
        return State(self.move.init_state(batch), **cache)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, state: State | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Entries]:
        keys = self.codebook(k.unsqueeze(2))
        if not recomputing():
            self.penalty = None if keys.commit is None else self.commitment * keys.commit
        bias = self.rel_bias if self.bidirectional else self.rel_bias[2 * self.block :]
        if state is not None:
            state = State({name: x for name, x in state.items() if name != "h"})
        o, after = vq_attention(
            q.unsqueeze(2) * self.d_key**-0.5,
            keys.k_hat,
            keys.codes,
            v.unsqueeze(2),
            keys.book,
            block=self.block,
            bias=bias.unsqueeze(0),
            state=state,
            cu_seqlens=cu_seqlens,
            causal=not self.bidirectional,
            cache_straight_through=self.cache_straight_through,
        )
        return o.squeeze(2), lambda: dict(after)


__all__ = ["LongVQ"]
