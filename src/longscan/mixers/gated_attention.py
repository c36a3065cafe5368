"""Softmax attention with a learned gate."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan.mixers.attention import Attention
from longscan.ops.attention import attention, attention_weights
from longscan.state import State

POSITIONS = ("sdpa", "value", "key", "query", "output")

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": F.sigmoid,
    "silu": F.silu,
    "identity": lambda x: x,
    "ns_sigmoid": lambda x: 0.5 + 0.5 * F.sigmoid(x),
}


class GatedAttention(Attention):
    """Softmax attention with a gate computed from the layer's input.

    Y' = Y * sigmoid(x W),   Y the output of attention, head by head, before out_proj

    Shapes, state, precision and other arguments: as `Attention`; in_proj has the gate's rows
    behind q | k | v, heads being the slower index.
    gate: what is gated. "sdpa" (G1, the recommended one) attention's output; "value" (G2), "key"
    (G3), "query" (G4) the projections, before norm and rotary positions; "output" (G5) the layer's
    output.
    gate_per: "element", or "head" for one number per head ("output" has no heads).
    gate_shared: the same scores for all heads. gate_form: "multiply" Y act(x W), or "add"
    Y + act(x W). gate_activation: sigmoid | silu | identity | ns_sigmoid (0.5 + 0.5 sigmoid).
    gate_input: False replaces x W by a parameter that starts at zero.
    Raises: ValueError for unknown options, and for gates that could have no effect.
    Source: arXiv 2505.06708, sections 2 and 3.
    Differs: queries and keys are gated before their norm, where the paper does not say; one
    factor per head would be lost there and is refused.
    Reference: Hugging Face transformers (Qwen3-Next), Apache-2.0; the authors' demonstration is
    qiuzh20/gated_attention.
    """

    no_weight_decay = ("gate_logits",)

    def __init__(
        self,
        d_model: int,
        *,
        gate: str = "sdpa",
        gate_per: str = "element",
        gate_shared: bool = False,
        gate_form: str = "multiply",
        gate_activation: str = "sigmoid",
        gate_input: bool = True,
        n_heads: int = 4,
        n_kv_heads: int | None = None,
        d_head: int | None = None,
        window: int | None = None,
        rope_theta: float | None = 10000.0,
        rotary_fraction: float = 1.0,
        qk_norm: bool = True,
        norm_eps: float = 1e-6,
        bias: bool = False,
    ) -> None:
        for name, value, known in (
            ("gate", gate, POSITIONS),
            ("gate_per", gate_per, ("element", "head")),
            ("gate_form", gate_form, ("multiply", "add")),
            ("gate_activation", gate_activation, tuple(ACTIVATIONS)),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")
        if gate == "output" and (gate_per == "head" or gate_shared):
            raise ValueError(
                'gate="output" acts behind out_proj, where there are no heads: it takes '
                'gate_per="element" and gate_shared=False only'
            )
        if gate in ("query", "key") and gate_per == "head" and gate_form == "multiply" and qk_norm:
            raise ValueError(
                f'a factor per head on "{gate}" is undone by the norm behind it: '
                'pass qk_norm=False or gate_per="element"'
            )
        super().__init__(
            d_model,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            d_head=d_head,
            window=window,
            rope_theta=rope_theta,
            rotary_fraction=rotary_fraction,
            qk_norm=qk_norm,
            norm_eps=norm_eps,
            bias=bias,
        )
        self.gate, self.gate_form, self.gate_activation = gate, gate_form, gate_activation
        if gate == "output":
            self._gate_shape = (d_model,)
        else:
            heads = self.n_kv_heads if gate in ("key", "value") else n_heads
            self._gate_shape = (
                1 if gate_shared else heads,
                1 if gate_per == "head" else self.d_head,
            )
        if gate_input:
            rows = self.in_proj.out_features + math.prod(self._gate_shape)
            self.in_proj = nn.Linear(d_model, rows, bias=bias)
            self.gate_logits = None
        else:
            self.gate_logits = nn.Parameter(torch.zeros(self._gate_shape))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Linear weights, the gate's too, N(0, 0.02), biases 0, norms 1; a gate without input 0."""
        super().reset_parameters()
        # The parent's constructor calls this before there is a gate.
        logits = self._parameters.get("gate_logits")
        if logits is not None:
            nn.init.zeros_(logits)

    def gate_scores(self, x: Tensor) -> Tensor:
        """What the gate multiplies by or adds, for an input x, to look at it.

        Shapes: [B, T, heads or 1, d_head or 1]; [B, T, d_model] for gate="output". A gate without
        input has no [B, T].
        """
        self._check_input(x)
        return self._scores(self.in_proj(x)[..., self._rows :])

    def _scores(self, logits: Tensor) -> Tensor:
        if self.gate_logits is None:
            logits = logits.unflatten(-1, self._gate_shape)
        else:
            logits = self.gate_logits.to(logits.dtype)
        return ACTIVATIONS[self.gate_activation](logits)

    def _gated(self, y: Tensor, scores: Tensor) -> Tensor:
        return y * scores if self.gate_form == "multiply" else y + scores

    def _projected(self, x: Tensor) -> Tensor:
        """in_proj's output, with gated queries or keys where the gate is there."""
        y = self.in_proj(x)
        if self.gate not in ("query", "key"):
            return y
        sizes = [h * self.d_head for h in (self.n_heads, self.n_kv_heads, self.n_kv_heads)]
        parts = list(y.split([*sizes, y.shape[-1] - self._rows], -1))
        i = 0 if self.gate == "query" else 1
        heads = parts[i].unflatten(-1, (-1, self.d_head))
        parts[i] = self._gated(heads, self._scores(parts[3])).flatten(-2)
        return torch.cat(parts, -1)

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        self._check_input(x)
        q, k, v, logits = self._heads(self._projected(x), state, cu_seqlens)
        if self.gate == "value":
            v = self._gated(v, self._scores(logits))
        o, state = attention(q, k, v, window=self.window, state=state, cu_seqlens=cu_seqlens)
        if self.gate == "sdpa":
            o = self._gated(o, self._scores(logits))
        y = self.out_proj(o.flatten(-2))
        if self.gate == "output":
            y = self._gated(y, self._scores(logits))
        return y, state

    def weights(self, x: Tensor) -> Tensor:
        self._check_input(x)
        q, k, _, _ = self._heads(self._projected(x), None, None)
        return attention_weights(q, k, window=self.window)


__all__ = ["GatedAttention"]
