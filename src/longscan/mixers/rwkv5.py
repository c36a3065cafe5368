"""RWKV-5 "Eagle"."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan.mixers._blockdiag import HeadLayerNorm
from longscan.mixers._rwkv import TokenShiftMixer, head_size
from longscan.ops import _across
from longscan.ops._check import check_state, compute_dtype
from longscan.ops.decay import decay, decay_segment
from longscan.state import State


class RWKV5(TokenShiftMixer):
    """Linear attention with a learned constant decay, and a bonus for the current token.

    x^c_t = x_t + (x_{t-1} - x_t) mu_c
    r, k, v, g = W_r x^r_t, W_k x^k_t, W_v x^v_t, silu(W_g x^g_t)
    o_t = (S_{t-1} + diag(u) k v^T)^T r,   S_t = diag(exp(-exp(time_decay))) S_{t-1} + k v^T
    y_t = W_out (g * norm_per_head(o_t))

    Shapes: x, y [B, T, d_model]; H = d_model / d_head heads; mu rows [r | k | v | g], g only with
    an output gate; time_decay and u [H, d_head], or [H]; state: shift [B, 1, d_model], the last
    token, s [B, H, d_head, d_head].
    d_head: channels of a head; None: 64, or the largest power of two below that divides d_model.
    decay_per_channel: whether decay and bonus have a number per key channel (RWKV-5.2), not one
    per head (RWKV-5.1, which has no output gate either).
    layer: which of the model's RWKV-5 layers this is, from 0; only the initialisation asks.
    n_layers: how many there are; None, as for layer: not known.
    norm_eps: added to the variance in the norm.
    Precision: time_decay, u, norm and state float32.
    Source: arXiv 2404.05892, Eagle.
    Differs: mu is the share of the previous token, as in RWKV-7; the checkpoints store 1 - mu.
    The authors divide o by 8 before a norm with eps 1e-5, which is eps 64e-5 without.

    Reference: BlinkDL/RWKV-LM, Apache-2.0.
    """

    keep_float32 = ("time_decay", "u")
    no_weight_decay = ("mu", "time_decay", "u")

    def __init__(
        self,
        d_model: int,
        *,
        d_head: int | None = None,
        decay_per_channel: bool = True,
        output_gate: bool = True,
        layer: int | None = None,
        n_layers: int | None = None,
        norm_eps: float = 64e-5,
    ) -> None:
        super().__init__(d_model, 4 if output_gate else 3, layer, n_layers)
        self.d_head = head_size(d_model, d_head)
        self.n_heads = d_model // self.d_head
        self.r_proj, self.k_proj, self.v_proj = (
            nn.Linear(d_model, d_model, bias=False) for _ in range(3)
        )
        self.g_proj = nn.Linear(d_model, d_model, bias=False) if output_gate else None
        shape = (self.n_heads, self.d_head) if decay_per_channel else (self.n_heads,)
        self.time_decay = nn.Parameter(torch.empty(shape))
        self.u = nn.Parameter(torch.empty(shape))
        self.norm = HeadLayerNorm(d_model, norm_eps, bias=True)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """W_r, W_v orthogonal, W_k and W_g at a tenth of that, W_out zero; decays from
        exp(-exp(-6)) to exp(-exp(-1)) over the channels, mixes and bonuses as the authors'."""
        for linear, gain in (
            (self.r_proj, 1.0), (self.k_proj, 0.1), (self.v_proj, 1.0), (self.g_proj, 0.1),
        ):  # fmt: skip
            if linear is not None:
                nn.init.orthogonal_(linear.weight, gain)
        nn.init.zeros_(self.out_proj.weight)
        fall, n = self._fall, len(self.mu)
        self._init_mu([fall / 2, fall, fall, fall / 2][:n], [0.0, 0.0, 0.3 * self._rise, 0.0][:n])
        at = self._channels(self.time_decay)
        self.time_decay.copy_(-6 + 5 * at ** (0.7 + 1.3 * self._rise))
        zigzag = (torch.arange(1, at.numel() + 1, device=at.device) % 3 - 1).view_as(at)
        self.u.copy_(self._rise * (1 - at) + 0.1 * zigzag)
        depth = 1.0 if self.layer is None else (1 + self.layer) / (self.n_layers or 1)
        self.norm.reset_parameters(depth**0.7)

    def init_state(self, batch: int) -> State:
        shape = (batch, self.n_heads, self.d_head, self.d_head)
        s = self.u.new_zeros(shape, dtype=compute_dtype(self.u))
        return State(shift=self._no_shift(batch), s=s)

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        (xr, xk, xv, *xg), shift = self._mixes(x, state, cu_seqlens)
        r, k, v = (
            p(t).unflatten(-1, (self.n_heads, self.d_head))
            for p, t in ((self.r_proj, xr), (self.k_proj, xk), (self.v_proj, xv))
        )
        log_a = (-self.time_decay.exp()).expand(*x.shape[:2], *self.time_decay.shape)
        s = None if state is None else state.tensor("s")
        s = _across.entering(
            lambda cut: decay_segment(k[:, cut], v[:, cut], log_a[:, cut].to(compute_dtype(v))), s
        )
        with _across.within(None):
            o, s = _decay_before(r, k, v, log_a, s, cu_seqlens)
        u = self.u.unsqueeze(-1) if self.u.ndim == 1 else self.u
        y = self.norm(o + (r * k * u).sum(-1, keepdim=True) * v)
        if self.g_proj is not None:
            y = y * F.silu(self.g_proj(xg[0]))
        return self.out_proj(y.to(x.dtype)), State(shift=shift, s=s)


def _decay_before(
    r: Tensor, k: Tensor, v: Tensor, log_a: Tensor, state: Tensor | None, cu: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`decay` that reads each token's state before the token is written: o_t = S_{t-1}^T r_t.

    The state before a token is that after the token before it: the reads move one token back, and
    the first reads the state that enters.
    """
    reads = F.pad(r[:, 1:], (0, 0, 0, 0, 0, 1))
    if cu is not None:
        # The last token of a sequence must not read for the first one of the next.
        reads = reads.index_fill(1, cu[1:].long() - 1, 0.0)
    o, after = decay(reads, k, v, log_a, state=state, cu_seqlens=cu)
    o = F.pad(o[:, :-1], (0, 0, 0, 0, 1, 0))
    if state is None:
        return o, after
    check_state("state", state, tuple(after.shape), "[rows, H, K, V]")
    at = r[:, 0] if cu is None else r[0, cu[:-1].long()]
    first = (at.unsqueeze(-2).to(state.dtype) @ state).squeeze(-2).to(o.dtype)
    if cu is None:
        return torch.cat([first.unsqueeze(1), o[:, 1:]], 1), after
    return o.index_copy(1, cu[:-1].long(), first.unsqueeze(0)), after
