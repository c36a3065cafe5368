"""WERSA: random-feature attention behind a wavelet filter bank."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan import algebra
from longscan.algebra import SegmentMap
from longscan.mixers._parts import ShortConv
from longscan.mixers._wavelet import (
    ahead,
    block_haar,
    of_each,
    running_max,
    taps_of,
    to_each,
    trailing_haar,
)
from longscan.mixers.base import Mixer
from longscan.ops import _across
from longscan.ops._check import compute_dtype, full_precision
from longscan.ops._layout import layout
from longscan.ops.decay import decay
from longscan.state import State

_EPS = 1e-6  # of the normaliser, as published
_TINY = 1e-30  # the same behind exponentials, which are relative to the largest
_LOWEST = -1e4  # where the running maximum of exponents begins
_LEAKS = {
    "global": "the filters are made of the mean over the whole sequence",
    "local": "the filters are made of a convolution that reads (d_conv - 1) / 2 tokens ahead",
}


class WERSA(Mixer):
    """Linear attention with random features of queries and keys that pass a wavelet filter bank.

    q | k | v = in_proj(x);   q, k = gelu(q), gelu(k)
    f_t = sigmoid(filter_out(relu(filter_in(pool(x)_t))));   g = scale_weights * f
    q~, k~ = sum_{j=1..J} g_{j-1} (a_{j-1} - a_j) + g_J a_J   of q and k alike
    a_0[t] = q_t,   a_j[t] = (a_{j-1}[t] + a_{j-1}[t - 2^(j-1)]) / 2
    S_t = S_{t-1} + phi(k~_t) v_t^T,   z_t = z_{t-1} + phi(k~_t)
    o_t = S_t^T phi(q~_t) / (z_t . phi(q~_t) + 1e-6)
    y_t = out_proj(norm(o_t)),   norm = LayerNorm of each head, one weight for all

    Not causal and with filters global or local, this is the encoder as published. Then a_j is the
    mean over the block of 2^j tokens that holds t, as a decimated Haar transform has it, the gains
    are those of the first token of the block, and S and z are sums over the whole sequence. An
    encoder has no state and takes whole sequences, many of them packed by cu_seqlens.

    Shapes: x, y [B, T, d_model]; f [B, T, J + 1], for all heads; state conv [B, d_conv - 1,
    d_model], shift [B, 2^J - 1, 2 n_heads d_head] (the last gelu(q) | gelu(k)), s [B, n_heads,
    n_features, d_head + 1], whose last column is z (both for phi without its constant factors),
    and for favor m [B, n_heads], the largest exponent of a key so far.
    d_head: channels of a head; None: d_model / n_heads.
    levels: J, levels of the transform.
    n_features: random features m of a head; None: 2 d_head, at least 64 (few of them leave dead
    rows behind a ReLU).
    filters: pool(x): trailing, a causal convolution, before the transform that looks back only;
    local, a symmetric convolution, or global, the mean over the sequence, before the decimated
    transform.
    d_conv: taps of the convolution.
    causal: whether o_t sums over the past alone; it needs filters that do so too.
    feature_map: relu: phi(u) = relu(u R / bw) / m^0.5, R of N(0, 1 / d_head), the arc-cosine
    kernel of order 1; favor: exp(u' R - |u'|^2 / 2) / m^0.5, u' = u / (bw d_head^0.25), R of
    orthogonal N(0, 1) columns: on average the softmax kernel exp(q~ . k~ / (bw^2 d_head^0.5)),
    with a relative variance of about (exp(|q~' + k~'|^2) - 1) / m.
    bw = softplus(log_bandwidth) + 0.1.
    split: a matrix R each for q and k, after which phi(q) . phi(k) does not depend on the angle
    between q and k but for its noise.
    norm_eps: added to the variance in the norm.
    Precision: filters, means, features, sums, division and norm float32. Behind a ReLU bw cancels
    but for the 1e-6, and is taken there: what reaches log_bandwidth is tiny, yet exact.
    Raises: ValueError for causal=True with filters that see the future, or a state for an encoder.
    Source: arXiv 2507.08637; favor: arXiv 2009.14794, lemma 1.
    Differs: causal filters and the undecimated transform are ours, as the published ones leak the
    future; one R for q and k; the transform pads to a multiple of 2^J, not to a power of two; no
    dropout between the layers of the filters; exponents of favor are taken relative to the
    largest so far, and need no 1e-6.
    Reference: vincenzodentamaro/wersa, Apache-2.0, of which only the description was to be had;
    GELU, the network of the filters, the norm and initial values are those of an integration by
    others that carries the author's names.
    """

    shardable = True
    keep_float32 = ("log_bandwidth", "scale_weights", "random_matrix")

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 4,
        d_head: int | None = None,
        levels: int = 2,
        n_features: int | None = None,
        filters: str = "trailing",
        d_conv: int = 33,
        causal: bool = True,
        feature_map: str = "relu",
        split: bool = False,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if d_head is None and (n_heads < 1 or d_model % n_heads):
            raise ValueError(f"n_heads ({n_heads}) must divide d_model ({d_model}), or give d_head")
        if levels < 1:
            raise ValueError(f"levels must be at least 1, not {levels}")
        if filters not in ("trailing", *_LEAKS):
            raise ValueError(f"filters must be trailing, local or global, not {filters!r}")
        if causal and filters in _LEAKS:
            raise ValueError(
                f"causal=True with filters={filters!r} would leak the future: {_LEAKS[filters]}, "
                f"and the decimated transform mixes blocks of {2**levels} tokens, so that one sees "
                f"up to {2**levels - 1} tokens ahead. Choose filters='trailing', or causal=False "
                "for an encoder"
            )
        if feature_map not in ("relu", "favor"):
            raise ValueError(f"feature_map must be relu or favor, not {feature_map!r}")
        d_head = d_head or d_model // n_heads
        n_features = n_features or max(2 * d_head, 64)
        self.d_model, self.n_heads, self.d_head = d_model, n_heads, d_head
        self.levels, self.n_features, self.d_conv = levels, n_features, d_conv
        self.filters, self.causal, self.feature_map = filters, causal, feature_map
        inner = n_heads * d_head
        hidden = max(1, d_model // 4)
        self.in_proj = nn.Linear(d_model, 3 * inner, bias=False)
        self.conv1d = None if filters == "global" else ShortConv(d_model, d_conv, bias=True)
        self.filter_in = nn.Linear(d_model, hidden)
        self.filter_out = nn.Linear(hidden, levels + 1)
        self.scale_weights = nn.Parameter(torch.empty(levels + 1))
        self.log_bandwidth = nn.Parameter(torch.empty(1))
        self.norm = nn.LayerNorm(d_head, eps=norm_eps)
        self.out_proj = nn.Linear(inner, d_model, bias=False)
        shape = (1 + split, d_head, n_features)
        self.register_buffer("random_matrix", torch.empty(shape, dtype=torch.float32))
        self.random_matrix: Tensor
        self.register_buffer("taps", torch.empty(levels + 1, 2**levels), persistent=False)
        self.taps: Tensor
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Linear maps as torch.nn.Linear, the convolution as torch.nn.Conv1d; scale_weights 0.5;
        log_bandwidth 0; norm 1; the random matrix drawn anew."""
        for m in (self.in_proj, self.filter_in, self.filter_out, self.out_proj, self.norm):
            m.reset_parameters()
        if self.conv1d is not None:
            self.conv1d.reset_parameters()
        nn.init.constant_(self.scale_weights, 0.5)
        nn.init.zeros_(self.log_bandwidth)
        self.taps.copy_(taps_of(self.levels))
        r = self.random_matrix.normal_()
        if self.feature_map == "relu":
            r.mul_(self.d_head**-0.5)
            return
        # Columns of Gaussian length, orthogonal within groups of d_head; uniform directions need
        # the signs that a QR decomposition moves into R.
        turned = []
        for part in torch.empty_like(r).normal_().split(self.d_head, -1):
            q, upper = torch.linalg.qr(part)
            turned.append(q * upper.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2))
        r.copy_(torch.cat(turned, -1) * r.norm(dim=1, keepdim=True))

    @property
    def bidirectional(self) -> bool:
        """Whether tokens see later ones: an encoder."""
        return not self.causal

    def init_state(self, batch: int) -> State:
        if not self.causal:
            return State()
        assert self.conv1d is not None
        w, heads = self.out_proj.weight, self.n_heads
        zeros = w.new_zeros(batch, heads, self.n_features, self.d_head + 1, dtype=compute_dtype(w))
        state = {
            "conv": self.conv1d.init_state(batch),
            "shift": w.new_zeros(batch, 2**self.levels - 1, 2 * heads * self.d_head),
            "s": zeros,
        }
        if self.feature_map == "favor":
            state["m"] = zeros.new_full((batch, heads), _LOWEST)
        return State(state)

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        self._check_input(x)
        if not self.causal and state is not None and len(state):
            raise ValueError("an encoder (causal=False) carries no state: give it whole sequences")

        def old(key: str) -> Tensor | None:
            return None if state is None or not self.causal else state.tensor(key)

        inner = self.n_heads * self.d_head
        qk, v = self.in_proj(x).split([2 * inner, inner], -1)
        gains, window = self._gains(x, old("conv"), cu_seqlens)
        qk = F.gelu(qk)
        with full_precision(x):
            if self.filters == "trailing":
                past = self.taps.shape[1] - 1
                before = _across.window(lambda cut: qk[:, cut], past, old("shift"))
                qk, shift = trailing_haar(qk, gains, before, cu_seqlens, self.taps)
            else:
                qk, shift = block_haar(qk, gains, cu_seqlens), None
            qk = qk.unflatten(-1, (2, self.n_heads, self.d_head))
            v = v.to(qk.dtype).unflatten(-1, (self.n_heads, self.d_head))
            v = F.pad(v, (0, 1), value=1.0)
            bw = F.softplus(self.log_bandwidth.to(qk.dtype)) + 0.1
            if self.feature_map == "relu":
                q, k = self._products(qk).relu_().unbind(2)
                log_a, m = None, None
                # phi(q) . phi(k) is that of the unscaled features over bw^2 m.
                eps = _EPS * self.n_features * bw.square()
            else:
                q, k, log_a, m = self._exponentials(qk, bw, old("m"), cu_seqlens)
                eps = _TINY
            new = State()
            if self.causal:
                assert window is not None
                assert shift is not None
                o, s = decay(q, k, v, log_a, state=old("s"), cu_seqlens=cu_seqlens)
                new = State(conv=window, shift=shift, s=s)
                new = new if m is None else State(new, m=m)
            else:
                o = _whole(q, k, v, cu_seqlens)
            o, total = o.split([self.d_head, 1], -1)
            weight, bias = self.norm.weight.to(o.dtype), self.norm.bias.to(o.dtype)
            o = F.layer_norm(o / (total + eps), (self.d_head,), weight, bias, self.norm.eps)
        return self.out_proj(o.flatten(-2).to(x.dtype)), new

    def _gains(
        self, x: Tensor, window: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """g [B, T, J + 1], in float32 or wider, and the convolution's new window."""
        if self.conv1d is None:
            pooled = of_each(lambda part: part.mean(1), x, cu_seqlens)
        elif self.filters == "local":
            taps = self.d_conv
            wide, bounds, later = ahead(x, taps - 1 - (taps - 1) // 2, cu_seqlens)
            pooled = self.conv1d(wide, None, bounds)[0].index_select(1, later)
        else:
            pooled, window = self.conv1d(x, window, cu_seqlens)
        f = self.filter_out(F.relu(self.filter_in(pooled)))
        g = torch.sigmoid(f.to(compute_dtype(f))) * self.scale_weights
        return (to_each(g, x.shape[1], cu_seqlens) if self.conv1d is None else g), window

    def _products(self, qk: Tensor) -> Tensor:
        """q R and k R. Shapes: [B, T, 2, H, D] -> [B, T, 2, H, m]."""
        r = self.random_matrix.to(qk.dtype)
        if len(r) == 1:
            return qk @ r[0]
        return torch.stack([x @ r[i] for i, x in enumerate(qk.unbind(2))], 2)

    def _exponentials(
        self, qk: Tensor, bw: Tensor, m: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Positive features of q and k relative to their largest: of a token for q; for k of the
        sequence, or so far, with the log decay that is due when it rises, and the last one."""
        u = qk / (bw * self.d_head**0.25)
        e = self._products(u) - 0.5 * u.square().sum(-1, True)
        top_q, top_k = e.detach().amax(-1).unbind(2)
        log_a, last = None, None
        if self.causal:
            rows = len(e) if cu_seqlens is None else cu_seqlens.numel() - 1
            first = e.new_full((rows, self.n_heads), _LOWEST) if m is None else m
            first = _entering_max(top_k, first)
            top_k, log_a, last = running_max(top_k, first, cu_seqlens)
        else:
            top = of_each(lambda part: part.amax(1), top_k, cu_seqlens)
            top_k = to_each(top, qk.shape[1], cu_seqlens)
        q, k = (e - torch.stack([top_q, top_k], 2).unsqueeze(-1)).exp().unbind(2)
        return q, k, log_a, last


def _entering_max(x: Tensor, first: Tensor) -> Tensor:
    """The largest values that a shard of tokens starts from: the log scale of a state that decays
    by nothing, of which only the scale is wanted.

    Shapes: x [B, T, H]; first [rows, H].
    """

    def segment(cut: slice) -> SegmentMap:
        top = x[:, cut].amax(1).unsqueeze(-1)
        return SegmentMap(
            "diagonal", torch.zeros_like(top), torch.zeros_like(top).unsqueeze(-1), top
        )

    m = first.unsqueeze(-1)
    return _across.entering(segment, (torch.zeros_like(m).unsqueeze(-1), m))[1].squeeze(-1)


def _whole(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Linear attention to all tokens of a sequence: o_t = (sum_s k_s v_s^T)^T q_t.

    Shapes: q, k [B, T, H, K]; v, o [B, T, H, V].
    """
    if cu_seqlens is None:
        s = k.permute(0, 2, 3, 1) @ v.transpose(1, 2)
        return (q.transpose(1, 2) @ s).transpose(1, 2)
    plan = layout(1, v.shape[1], 64, cu_seqlens)
    q, k, v = (plan.split(x).transpose(1, 2) for x in (q, k, v))
    u = k.mT @ v
    empty = torch.zeros_like(u[: plan.rows])
    _, s = algebra.scan(SegmentMap("identity", None, u), empty, plan.counts)
    o = q @ torch.cat([s[:n] for n in plan.counts])
    return plan.join(o.transpose(1, 2))
