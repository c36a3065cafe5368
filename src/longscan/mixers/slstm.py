"""The sLSTM layer of xLSTM: scalar memories that mix within a head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from longscan.mixers._blockdiag import HeadLayerNorm, HeadwiseLinear, small_init_
from longscan.mixers._parts import ShortConv
from longscan.mixers.base import Mixer
from longscan.ops._check import compute_dtype
from longscan.ops.slstm import slstm
from longscan.state import State

_PARTS = ("y", "c", "n", "m")


class SLSTM(Mixer):
    """An LSTM with exponential input gates and a normaliser, whose heads mix their own memories.

    u = silu(conv(x))                                            u = x without a convolution
    i, f, z, o = i_proj(u), f_proj(u), z_proj(x), o_proj(x)      block-diagonal maps, one per head
    h, state = slstm(i | f | z | o, R, gate_bias, state)         see `longscan.ops.slstm`
    y = norm(h),   norm = LayerNorm of each head

    It has no output projection; heads meet in the MLP behind the mixer.

    Shapes: x, y [B, T, d_model]; heads of D = d_model / n_heads; recurrent R
    [n_heads, D (from), 4, D (to)] and gate_bias [n_heads, 4, D], gates in the order i, f, z, o;
    state: conv [B, d_conv - 1, d_model] (absent without a convolution), y, c, n, m
    [B, n_heads, D].
    n_heads: heads, within which memories see each other.
    d_conv: taps of the convolution that the input and forget gates see; 0: none.
    recurrent_init: zeros, or standard, U(-1/sqrt(d_model), 1/sqrt(d_model)).
    bias_init: of the forget gates: powerlaw or small, see Initialisation.
    layer: which of the model's n_layers sLSTM layers this is, from 0; shapes the powerlaw.
    n_layers: how many there are.
    norm_eps: added to the variance in the norm of the heads.
    Precision: the recurrence, gate_bias and the state float32.
    Source: arXiv 2405.04517, section 2.2; the block with post up-projection.
    Differs: norm.weight is the weight, which the authors store minus one; the parameters that
    feed the input gate are named after it, which the authors call fgate, and the other way
    round; layer counts sLSTM layers, where the authors count all blocks; n = 0 is looked for in
    each channel, not in the whole batch at once.
    Reference: NX-AI/xlstm, Apache-2.0.
    """

    keep_float32 = ("gate_bias",)
    no_weight_decay = ("gate_bias", "recurrent")

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 4,
        d_conv: int = 4,
        recurrent_init: str = "zeros",
        bias_init: str = "powerlaw",
        layer: int = 0,
        n_layers: int = 1,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if n_heads < 1 or d_model % n_heads:
            raise ValueError(f"n_heads ({n_heads}) must divide d_model ({d_model})")
        if recurrent_init not in ("zeros", "standard"):
            raise ValueError(f"recurrent_init must be zeros or standard, not {recurrent_init!r}")
        if bias_init not in ("powerlaw", "small"):
            raise ValueError(f"bias_init must be powerlaw or small, not {bias_init!r}")
        if not 0 <= layer < n_layers:
            raise ValueError(f"layer ({layer}) must lie in 0..n_layers - 1 ({n_layers - 1})")
        d = d_model // n_heads
        self.d_model, self.n_heads, self.d_head = d_model, n_heads, d
        self.recurrent_init, self.bias_init = recurrent_init, bias_init
        self.layer, self.n_layers = layer, n_layers
        self.conv1d = ShortConv(d_model, d_conv, bias=True) if d_conv else None
        self.i_proj, self.f_proj, self.z_proj, self.o_proj = (
            HeadwiseLinear(d_model, n_heads) for _ in range(4)
        )
        self.recurrent = nn.Parameter(torch.empty(n_heads, d, 4, d))
        self.gate_bias = nn.Parameter(torch.empty(n_heads, 4, d))
        self.norm = HeadLayerNorm(d_model, norm_eps)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Block-diagonal maps N(0, 2 / (5 d_model)); R by recurrent_init; biases 0, but those of
        the forget gates fall in each head from 5 to -7 as 5 - 12 s^(0.3 + 1.3 l), s the channel's
        and l the layer's place from 0 to 1 (powerlaw), or rise from 3 to 6 (small); the
        convolution as torch.nn.Conv1d; norm 1."""
        for p in (self.i_proj, self.f_proj, self.z_proj, self.o_proj):
            small_init_(p.weight, self.d_model)
        if self.conv1d is not None:
            self.conv1d.reset_parameters()
        bound = self.d_model**-0.5 if self.recurrent_init == "standard" else 0.0
        nn.init.uniform_(self.recurrent, -bound, bound)
        nn.init.zeros_(self.gate_bias)
        if self.bias_init == "small":
            self.gate_bias[:, 1] = torch.linspace(3, 6, self.d_head)
        else:
            power = 0.3 + 1.3 * self.layer / max(1, self.n_layers - 1)
            self.gate_bias[:, 1] = 5 - 12 * torch.linspace(0, 1, self.d_head) ** power
        self.norm.reset_parameters()

    def init_state(self, batch: int) -> State:
        w = self.gate_bias
        zeros = w.new_zeros(batch, self.n_heads, self.d_head, dtype=compute_dtype(w))
        conv = {} if self.conv1d is None else {"conv": self.conv1d.init_state(batch)}
        return State(conv, **{k: zeros.clone() for k in _PARTS})

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        self._check_input(x)
        u, carried = x, {}
        if self.conv1d is not None:
            window = None if state is None else state.tensor("conv")
            u, carried["conv"] = self.conv1d.activated(x, window, cu_seqlens)
        gates = (self.i_proj(u), self.f_proj(u), self.z_proj(x), self.o_proj(x))
        h, s = slstm(
            torch.stack([g.unflatten(-1, (self.n_heads, -1)) for g in gates], -2),
            self.recurrent,
            self.gate_bias,
            state=None if state is None else torch.stack([state.tensor(k) for k in _PARTS], 1),
            cu_seqlens=cu_seqlens,
        )
        carried.update(zip(_PARTS, s.unbind(1), strict=True))
        return self.norm(h).to(x.dtype), State(carried)
