"""Gated Associative Memory, as published and with a memory that the sequence writes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan.mixers._parts import ShortConv
from longscan.mixers.base import Mixer
from longscan.ops._check import compute_dtype, widen
from longscan.ops.slots import slots, slots_read
from longscan.state import State


class GAM(Mixer):
    """A short convolution and a softmax read of a learned bank of slots, added by two gates.

    local = conv(x),   global = softmax(scale x P^T) P          P the memory bank
    g | h = gate(x),   y = sigmoid(g) local + sigmoid(h) global

    The bank is a parameter and each token reads it with its own vector alone: the "global" path is
    a token-wise layer, a feed-forward layer with softmax and tied weights, through which nothing
    passes from one token to another. Tokens meet only in the convolution. L such layers with k
    taps see the last 1 + L (k - 1) tokens, 13 in the paper's model, whatever its training; copying
    or recall over a longer distance is impossible. For a memory of the sequence see `WrittenGAM`.

    Shapes: x, y [B, T, d_model]; memory_bank (and memory_values) [n_slots, d_model], of which each
    head reads its d_model / n_heads columns; state conv [B, d_conv - 1, d_model].
    n_slots: slots of the bank.
    d_conv: taps of the convolution, k.
    n_heads: softmax reads side by side, each of its own columns of x and of all slots; it must
    divide d_model, 1 as published.
    tied: whether what is read is the bank itself, as published, or memory_values, a second one.
    scale: None, as published, or sqrt: the scores are divided by the root of a head's width.
    Precision: the softmax and its products float32; the scores are not kept for the backward.
    Source: arXiv 2509.00605.
    Differs: heads, scale and separate values are not in the paper; there, as here with the
    defaults, is no projection of the output. The convolution's parameters are conv1d, not
    causal_conv.
    Reference: rishiraj/gam, Apache-2.0.
    """

    shardable = True

    def __init__(
        self,
        d_model: int,
        *,
        n_slots: int = 512,
        d_conv: int = 3,
        n_heads: int = 1,
        tied: bool = True,
        scale: str | None = None,
    ) -> None:
        super().__init__()
        if n_slots < 1:
            raise ValueError(f"a bank needs at least one slot, not {n_slots}")
        if n_heads < 1 or d_model % n_heads:
            raise ValueError(f"n_heads ({n_heads}) must divide d_model ({d_model})")
        if scale not in (None, "sqrt"):
            raise ValueError(f"scale must be None or sqrt, not {scale!r}")
        self.d_model, self.n_slots, self.n_heads = d_model, n_slots, n_heads
        self.d_head = d_model // n_heads
        self.scale = self.d_head**-0.5 if scale == "sqrt" else 1.0
        self.conv1d = ShortConv(d_model, d_conv, bias=True)
        self.memory_bank = nn.Parameter(torch.empty(n_slots, d_model))
        self.memory_values = None if tied else nn.Parameter(torch.empty(n_slots, d_model))
        self.gate = nn.Linear(d_model, 2 * d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Banks Xavier uniform; linear maps as torch.nn.Linear, the convolution as
        torch.nn.Conv1d."""
        for bank in (self.memory_bank, self.memory_values):
            if bank is not None:
                nn.init.xavier_uniform_(bank)
        for part in self.children():
            part.reset_parameters()  # type: ignore[operator]

    def init_state(self, batch: int) -> State:
        return State(conv=self.conv1d.init_state(batch))

    def bank(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the learned slots [n_heads, n_slots, d_head]."""
        keys = self._heads(self.memory_bank).transpose(0, 1)
        if self.memory_values is None:
            return keys, keys
        return keys, self._heads(self.memory_values).transpose(0, 1)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_heads, -1))

    def _scaled(self, q: Tensor) -> Tensor:
        return q if self.scale == 1.0 else q * self.scale

    def recall(
        self, x: Tensor, state: State | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The global path [B, T, d_model], and its part of the state."""
        o = slots_read(self._scaled(self._heads(x)), *self.bank())
        return o.flatten(-2), {}

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        self._check_input(x)
        window = None if state is None else state.tensor("conv")
        near, window = self.conv1d(x, window, cu_seqlens)
        far, carried = self.recall(x, state, cu_seqlens)
        g, h = self.gate(x).sigmoid().chunk(2, -1)
        return torch.addcmul(g * near, h, far).to(x.dtype), State({"conv": window, **carried})


class WrittenGAM(GAM):
    """GAM with a bank that the sequence writes: a memory, where the published one is a parameter.

    q | k | v | f = in_proj(x),   a_t = sigmoid(f_t)^(1 / gate_temperature)
    S_t = diag(a_t) S_{t-1} + (1 - a_t) k_t^T,   Z_t = diag(a_t) Z_{t-1} + (1 - a_t) v_t^T
    global_t = (P + Z_t)^T softmax(scale (P + S_t) q_t)         P the learned bank
    g | h = gate(x),   y = out_proj(sigmoid(g) conv(x) + sigmoid(h) global)

    This layer is ours, not published: the block of GAM, whose slots are written as those of Gated
    Slot Attention. They start from the learned bank (S_0 = Z_0 = 0) and return to it as they
    forget. While all gates a are 1 nothing is written and it reads what GAM reads; with P = 0 it
    reads what Gated Slot Attention reads. Its reach has no limit.

    Shapes: x, y [B, T, d_model]; heads of d_head = d_model / n_heads; f and a
    [B, T, n_heads, n_slots]; state conv [B, d_conv - 1, d_model] and bank
    [B, n_heads, n_slots, 2 d_head], what is written: S and Z side by side.
    n_slots: slots of each head.
    d_conv: taps of the convolution of the local path; the global path sees x itself.
    n_heads: memories side by side; it must divide d_model.
    tied: whether keys and values of the slots have one learned bank or two, the second
    memory_values.
    scale: None, or sqrt: the scores are divided by the root of a head's width.
    gate_temperature: the larger, the longer a slot remembers and the less it is written.
    Precision: gates, state, softmax and products of the memory float32.
    Source: Gated Slot Attention (arXiv 2409.07146) within GAM (arXiv 2509.00605).
    Differs: from Gated Slot Attention, by the learned bank, by scaled scores, and by the absence
    of SiLU on q, k, v and of SiLU and a norm on what is read; from GAM, by the written part of
    the bank, by projections for q, k, v and the output, and by heads.
    Reference: none: no code was published. For the parts: fla-org/flash-linear-attention, MIT, and
    rishiraj/gam, Apache-2.0.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_slots: int = 64,
        d_conv: int = 3,
        n_heads: int = 4,
        tied: bool = True,
        scale: str | None = "sqrt",
        gate_temperature: float = 8.0,
    ) -> None:
        if gate_temperature <= 0:
            raise ValueError(f"gate_temperature must be positive, not {gate_temperature}")
        super().__init__(
            d_model, n_slots=n_slots, d_conv=d_conv, n_heads=n_heads, tied=tied, scale=scale
        )
        self.gate_temperature = gate_temperature
        self._split = [d_model] * 3 + [n_heads * n_slots]
        self.in_proj = nn.Linear(d_model, sum(self._split), bias=False)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)

    def init_state(self, batch: int) -> State:
        shape = (batch, self.n_heads, self.n_slots, 2 * self.d_head)
        bank = self.memory_bank.new_zeros(shape, dtype=compute_dtype(self.memory_bank))
        return State(conv=self.conv1d.init_state(batch), bank=bank)

    def recall(
        self, x: Tensor, state: State | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        q, k, v, f = (self._heads(part) for part in self.in_proj(x).split(self._split, -1))
        log_a = F.logsigmoid(widen(f)) / self.gate_temperature
        o, written = slots(
            self._scaled(q),
            k,
            v,
            -torch.expm1(log_a),
            log_a,
            torch.cat(self.bank(), -1),
            state=None if state is None else state.tensor("bank"),
            cu_seqlens=cu_seqlens,
        )
        return o.flatten(-2), {"bank": written}

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        y, state = super().forward(x, state, cu_seqlens=cu_seqlens)
        return self.out_proj(y), state
