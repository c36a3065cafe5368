"""Memories that learn at test time: one mixer, and the architectures that are settings of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan.mixers._heads import HeadMixer
from longscan.mixers._memory import ROWS, Row, moved_on
from longscan.mixers._parts import softplus_inverse
from longscan.ops._biases import WITH_THRESHOLD
from longscan.ops._cache import counts
from longscan.ops._check import compute_dtype, widen
from longscan.ops._memory_rule import Carry
from longscan.ops.memory import Rule, memory
from longscan.ops.norm import l2_norm
from longscan.ops.rotary import rotary, rotary_factors
from longscan.state import State

MAX_DEPTH = 8
_WEIGHTS = tuple(f"w{i}" for i in range(MAX_DEPTH))
_GATES = ("eta", "alpha", "delta", "momentum")
_LOGITS = ("kl", "bregman", "f_chi2", "f_reverse_kl", "f_hellinger")  # accumulators are logits

# Least logit of a gate, sigmoid(-10) = 4.5e-5. Were a memory that has forgotten all to learn
# nothing, A would be 0, where Moneta's map A / |A|_q^(q-2) has a pole.
_LEAST = -10.0

# Where neither a row nor the call says anything; for how the memory learns, see `Rule`.
_DEFAULTS: Mapping[str, Any] = {
    "memory": "mlp", "residual_norm": True, "gates": "scalar", "eta_gate": True, "eta_max": 1.0,
    "init_std": None,
}  # fmt: skip


class TestTimeMemory(HeadMixer):
    """A net per head whose weights are the state: every token changes them by a step of descent.

    q | k | v = silu(conv(in_proj(x)));  q, k = unit(q), unit(k), turned by their positions
    A_t = alpha_t A_{t-1} - eta_t G_t,   W_t = map(A_t),   y_t = M(W_t; q_t)
    G_t = gradient of bias(M(W; k_t) - v_t) at W = map(A before the chunk of token t)
    M(W; x) = x + norm(W_2 gelu(W_1 x));   with momentum A_t = alpha_t A_{t-1} + S_t,
    S_t = mu_t S_{t-1} - eta_t G_t;   out = out_proj(norm_per_head(y) * silu(g))

    The bias (the loss), the retention (alpha and the map), the algorithm and the net are chosen
    freely; `ROWS` has the choices that are known under a name. See `longscan.ops.memory`.

    Shapes: x, y [B, T, d_model]; heads of d_head = d_model / n_heads; the weights before the
    first token w0, w1, ... [n_heads, out, in] in the order they are applied; state: conv
    [B, d_conv - 1, 3 n_heads d_head], a0, a1, ... [B, n_heads, out, in], with momentum m0, ...
    alike, with chunk > 1 also g0, ..., what a0, ... were before the running chunk, and at [B],
    the tokens in it; with rope_theta length [B].
    memory: linear, one matrix, or mlp; None, here and below: as the row says.
    depth: matrices of an mlp, 1 to 8, with GELU between them; None: 2.
    expand: hidden width of the mlp as a multiple of d_head.
    residual_norm: M(x) = x + norm(net(x)) with a LayerNorm per head; otherwise M is the net.
    bias: the loss, dot, l1, l2, squared, lp, huber_coord, huber_norm, huber_mix or value_shift.
    retention: none, l2, lq_paper, lq_mirror, kl, elastic_net, elastic_net_smooth,
    elastic_net_proximal, bregman, f_chi2, f_reverse_kl or f_hellinger.
    algorithm: gd, momentum, or implicit (a linear memory with the l2 bias only).
    decay_first: the gradient is taken at alpha_t A instead of A.
    chunk: tokens whose gradients are taken at the same weights; it changes the result, 1 being
    the recurrence as such. The attribute may be set at any time, `mixer.chunk = 1`.
    read: exact, or frozen, the map's scale held within a chunk.
    gates: scalar, a number per head, or channel, one per channel of the head.
    channels: those of gates channel: value (rows of the last matrix, and columns of the first of
    an mlp), or, of a linear memory, key (columns).
    gate_rank: width of the bottleneck of each gate.
    eta_max: the step is eta_max sigmoid(.). eta_gate: False: the step is eta_max.
    init_std: standard deviation of w0, w1, ... at first; None: 1 for logits, 0.5 with
    residual_norm, which makes steps on smaller weights larger, and 0.02 without.
    p: exponent of the bias lp. q: of the retentions lq_paper and lq_mirror.
    sharpness: of the smooth sign in l1, lp and huber_mix. total: what rows sum to with kl and f_*.
    threshold: of the elastic nets.
    rope_theta: base of the rotary positions of q and k, None for none.
    output_gate: silu, sigmoid, or None.
    Precision: gates, their biases, w0, ..., ln_weight, ln_bias and the state float32.
    Raises: ValueError for settings that do not exist or do not fit together.
    Source: arXiv 2504.13173, sections 3 to 5; chunks section 5.4 there and arXiv 2407.04620.
    Differs: no rotary positions unless asked for, which the paper's backbone lists; gates are at
    least 4.5e-5; where the paper is silent: SiLU behind the convolution, an output gate, the
    initialisation.
    Reference: none: no code of Miras or Titans was published; norm and residual connection of
    the memory as in test-time-training/ttt-lm-pytorch, MIT.
    """

    row: ClassVar[Row | None] = None
    keep_float32 = (*_WEIGHTS, "ln_weight", "ln_bias", *(f"{g}_bias" for g in _GATES))
    # Starting weights are a state, and what pulls a state back is its retention.
    no_weight_decay = keep_float32

    shardable = False  # a step of descent is not an affine map

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 4,
        d_head: int | None = None,
        memory: str | None = None,
        depth: int | None = None,
        expand: int = 4,
        residual_norm: bool | None = None,
        bias: str | None = None,
        retention: str | None = None,
        algorithm: str | None = None,
        decay_first: bool | None = None,
        chunk: int | None = None,
        read: str | None = None,
        gates: str | None = None,
        channels: str | None = None,
        gate_rank: int = 32,
        eta_gate: bool | None = None,
        eta_max: float | None = None,
        init_std: float | None = None,
        p: float | None = None,
        q: float | None = None,
        sharpness: float | None = None,
        total: float | None = None,
        threshold: float | None = None,
        d_conv: int = 4,
        rope_theta: float | None = None,
        output_gate: str | None = "silu",
        norm_eps: float = 1e-5,
    ) -> None:
        given = {
            "memory": memory, "residual_norm": residual_norm, "bias": bias,
            "retention": retention, "algorithm": algorithm, "decay_first": decay_first,
            "chunk": chunk, "read": read, "gates": gates, "channels": channels,
            "eta_gate": eta_gate, "eta_max": eta_max, "init_std": init_std, "p": p, "q": q,
            "sharpness": sharpness, "total": total, "threshold": threshold,
        }  # fmt: skip
        of_row = (self.row and self.row.settings) or {}
        s = {**_DEFAULTS, **of_row, **{k: x for k, x in given.items() if x is not None}}
        if n_heads < 1 or (d_head is None and d_model % n_heads):
            raise ValueError(
                f"n_heads ({n_heads}) must divide d_model ({d_model}), unless d_head is given"
            )
        if s["memory"] not in ("linear", "mlp"):
            raise ValueError(f"memory must be linear or mlp, not {s['memory']!r}")
        if s["gates"] not in ("scalar", "channel"):
            raise ValueError(f"gates must be scalar or channel, not {s['gates']!r}")
        if depth is None:
            depth = 1 if s["memory"] == "linear" else 2
        if not 1 <= depth <= (1 if s["memory"] == "linear" else MAX_DEPTH):
            raise ValueError(
                f"a linear memory has depth 1, an mlp one of 1 to {MAX_DEPTH}, not {depth}"
            )
        if s["gates"] == "channel" and depth > 2:
            raise ValueError(f"gates by channel need a memory of at most two matrices, not {depth}")
        if s.get("channels") == "key" and (depth > 1 or s["gates"] == "scalar"):
            raise ValueError("channels='key' is for a linear memory with gates='channel'")
        if not s["eta_max"] > 0:
            raise ValueError(f"eta_max must be above 0, not {s['eta_max']}")
        d = d_head or d_model // n_heads
        if rope_theta is not None and d % 2:
            raise ValueError(f"rotary positions need an even d_head, not {d}")
        rule = Rule(**{f.name: s[f.name] for f in fields(Rule) if f.name in s})
        used = {
            "eta": s["eta_gate"],
            "alpha": rule.retention != "none",
            "delta": rule.bias in WITH_THRESHOLD,
            "momentum": rule.algorithm == "momentum",
        }
        names = [g for g in _GATES if used[g]]
        super().__init__(
            d_model,
            n_heads=n_heads,
            n_value_heads=n_heads,
            d_key=d,
            d_value=d,
            extras=[gate_rank] * len(names),
            d_conv=d_conv,
            gate=output_gate,
            norm_eps=norm_eps,
        )
        self.rule, self.depth, self.d_head = rule, depth, d
        self.eta_max, self.rope_theta = float(s["eta_max"]), rope_theta
        usual = 1.0 if rule.retention in _LOGITS else 0.5 if s["residual_norm"] else 0.02
        self.init_std = usual if s["init_std"] is None else float(s["init_std"])
        self._gates: dict[str, bool] = {}
        for name in names:
            # A threshold of a norm is one number; channels have thresholds only of their own.
            by_channel = s["gates"] == "channel" and (name != "delta" or rule.bias == "huber_coord")
            self._gates[name] = by_channel
            n = n_heads * d if by_channel else n_heads
            self.register_module(f"{name}_proj", nn.Linear(gate_rank, n, bias=False))
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.empty(n)))
        widths = [d, *[expand * d] * (depth - 1), d]
        for name, (inner, outer) in zip(_WEIGHTS, pairwise(widths), strict=False):
            self.register_parameter(name, nn.Parameter(torch.empty(n_heads, outer, inner)))
        for name in ("ln_weight", "ln_bias"):
            gain = nn.Parameter(torch.empty(n_heads, d)) if s["residual_norm"] else None
            self.register_parameter(name, gain)
        self.ln_weight: nn.Parameter | None
        self.ln_bias: nn.Parameter | None
        self.reset_parameters()

    @property
    def chunk(self) -> int:
        """Tokens whose gradients are taken at the same weights."""
        return self.rule.chunk

    @chunk.setter
    def chunk(self, tokens: int) -> None:
        self.rule = replace(self.rule, chunk=tokens)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Linear weights N(0, 0.02), norms 1; memory weights N(0, init_std), their LayerNorm 1
        and 0; the gates' last maps 0, with biases such that alpha = 0.999, eta = 0.1 eta_max,
        delta = sqrt(d_head) / 2, momentum = 0.8; the convolution as torch.nn.Conv1d."""
        super().reset_parameters()
        for w in self.weights():
            nn.init.normal_(w, std=self.init_std)
        if self.ln_weight is not None and self.ln_bias is not None:
            nn.init.ones_(self.ln_weight)
            nn.init.zeros_(self.ln_bias)
        half = torch.tensor(math.sqrt(self.d_head) / 2)
        start = {
            "alpha": torch.tensor(0.999).logit(), "eta": torch.tensor(0.1).logit(),
            "delta": softplus_inverse(half), "momentum": torch.tensor(0.8).logit(),
        }  # fmt: skip
        for name in self._gates:
            nn.init.zeros_(self.get_parameter(f"{name}_proj.weight"))
            nn.init.constant_(self.get_parameter(f"{name}_bias"), start[name].item())

    def weights(self) -> list[Tensor]:
        """The memory before the first token, in the order its matrices are applied."""
        return [getattr(self, name) for name in _WEIGHTS[: self.depth]]

    def init_state(self, batch: int) -> State:
        weights = [widen(w) for w in self.weights()]
        state = State(Carry.of(weights, None, self.rule, batch).state())
        if self.rope_theta is not None:
            w = weights[0]
            state = State(state, length=torch.zeros(batch, dtype=torch.int64, device=w.device))
        if self.conv1d is None:
            return state
        return State({"conv": self.conv1d.init_state(batch), **state})

    def gates(self, hidden: list[Tensor]) -> dict[str, Tensor]:
        """The gates of tokens: eta, log_a, delta, log_mu, those that the rule uses.

        Shapes: hidden: of each gate [B, T, gate_rank]; gates [B, T, H] or [B, T, H, d_head].
        """
        out = {}
        for (name, by_channel), h in zip(self._gates.items(), hidden, strict=True):
            raw = widen(getattr(self, f"{name}_proj")(h)) + getattr(self, f"{name}_bias")
            raw = raw.clamp(min=_LEAST)
            if by_channel:
                raw = self._heads(raw, self.d_head)
            if name == "eta":
                out["eta"] = self.eta_max * raw.sigmoid()
            elif name == "delta":
                out["delta"] = F.softplus(raw)
            else:
                out["log_a" if name == "alpha" else "log_mu"] = F.logsigmoid(raw)
        return out

    def recur(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        extras: list[Tensor],
        state: State | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        q, k = l2_norm(q), l2_norm(k)
        length = None
        if self.rope_theta is not None:
            seen = None if state is None else counts(state)
            q, k = self._turn(q, k, seen, cu_seqlens)
            length = moved_on(q, seen, cu_seqlens)
        gates = self.gates(extras)
        if "eta" not in gates:
            gates["eta"] = widen(v).new_full(v.shape[:3], self.eta_max)
        norm = None
        if self.ln_weight is not None and self.ln_bias is not None:
            norm = self.ln_weight, self.ln_bias
        before = None
        if state is not None:
            before = State({n: x for n, x in state.items() if n not in ("conv", "length")})
        o, after = memory(
            q, k, v, gates["eta"], gates.get("log_a"), gates.get("delta"), gates.get("log_mu"),
            weights=self.weights(), norm=norm, rule=self.rule, state=before,
            cu_seqlens=cu_seqlens,
        )  # fmt: skip
        carried = {n: after.tensor(n) for n in after}
        return o, carried if length is None else {**carried, "length": length}

    def _turn(
        self, q: Tensor, k: Tensor, seen: list[int] | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """q and k turned by their positions; `seen`: tokens before the first, of each row."""
        assert self.rope_theta is not None
        cos, sin = rotary_factors(
            q.shape[1], self.d_head, self.rope_theta, start=seen, cu_seqlens=cu_seqlens,
            dtype=compute_dtype(q), device=q.device,
        )  # fmt: skip
        q, k = rotary(torch.cat([q, k], 2), cos, sin).split(self.n_heads, 2)
        return q, k


class Titans(TestTimeMemory):
    """The long-term memory of Titans (LMM): an MLP that learns with momentum and weight decay.

    S_t = mu_t S_{t-1} - eta_t gradient of |M(W_{t-1}; k_t) - v_t|^2
    W_t = alpha_t W_{t-1} + S_t,   y_t = M(W_t; q_t)

    `TestTimeMemory` with bias squared and algorithm momentum. depth is the paper's L_M.

    Shapes, settings, precision: as `TestTimeMemory`.
    Source: arXiv 2501.00663, sections 3.1 and 3.2, eqs. 11 to 15; layer section 4.4.
    Differs: alpha is what is kept, 1 minus the paper's. Residual connection and norm in the
    memory, expansion 4, initialisation and eta_max 0.02 are not given there.
    Reference: none: no code was published; lucidrains/titans-pytorch, MIT, has gates per chunk and
    a loss averaged over channels.
    """

    row = ROWS["titans"]


class Moneta(TestTimeMemory):
    """A memory with an l_p loss whose weights are its accumulators, scaled by their l_q norm.

    A_t = alpha_t A_{t-1} - eta_t gradient of |M(W_{t-1}; k_t) - v_t|_p^p
    W_t = A_t / |A_t|_q^(q-2),   y_t = M(W_t; q_t)

    `TestTimeMemory` with bias lp and retention lq_paper, p = 3, q = 4. The gradient grows as
    |e|^(p-1): p above 2 is not robust to outliers.

    Shapes, settings, precision: as `TestTimeMemory`.
    Source: arXiv 2504.13173, section 5.3.
    Differs: the step is counted once, where the paper's gradient has it a second time; the
    norm is over one matrix of a head, at least 1e-3 where it divides; sharpness 10 of the smooth
    sign, eta_max 0.01, init_std 0.2. The mirror map of the l_q norm would be
    sign(A) |A|^(q-1) |A|_q^(2-q), which is retention lq_mirror. Inside a chunk the norm is that of
    its start, as the paper trains; read exact takes each token's own.
    Reference: none: no code was published; the memory as in test-time-training/ttt-lm-pytorch, MIT.
    """

    row = ROWS["moneta"]


class Yaad(TestTimeMemory):
    """A memory with Huber's loss: an error longer than a threshold counts as one of that length.

    W_t = alpha_t W_{t-1} - eta_t gradient of |e_t|^2 / 2            if |e_t| <= delta_t
    W_t = alpha_t W_{t-1} - eta_t delta_t gradient of |e_t|          otherwise
    e_t = M(W_{t-1}; k_t) - v_t,   y_t = M(W_t; q_t)

    `TestTimeMemory` with bias huber_norm and retention l2. The form that the paper prints for Yaad,
    bias huber_mix, has |e|_1 in the second case: its step jumps up to sqrt(d_head)-fold where |e|
    passes delta, signs keep it from settling, and gradients through it grow a hundredfold.

    Shapes, settings, precision: as `TestTimeMemory`.
    Source: arXiv 2504.13173, section 5.3.
    Differs: the second of the paper's three forms of Huber's loss is the default, the third, which
    it names Yaad, is bias huber_mix (`ROWS["yaad_printed"]`). eta_max 0.1.
    Reference: none: no code was published; the memory as in test-time-training/ttt-lm-pytorch, MIT.
    """

    row = ROWS["yaad"]


class Memora(TestTimeMemory):
    """A memory whose weights are distributions: the rows of each matrix have one sum.

    W_t = total softmax(alpha_t log W_{t-1} - eta_t gradient of |M(W_{t-1}; k_t) - v_t|^2 / 2)
    y_t = M(W_t; q_t)

    `TestTimeMemory` with bias l2 and retention kl. The state holds logits, w0, w1 too.

    Shapes, settings, precision: as `TestTimeMemory`.
    Source: arXiv 2504.13173, section 5.3.
    Differs: logits are carried and no logarithm is taken; the softmax runs over the inputs of a
    unit, and a unit has 8 in all (total); eta_max 0.05. The weights that tokens of a chunk are read
    with are linear in its gradients, as the paper trains, but the logits are carried, so that no
    weight that got lost or negative is carried on; read exact takes each token's own softmax.
    Reference: none: no code was published; the memory as in test-time-training/ttt-lm-pytorch, MIT.
    """

    row = ROWS["memora"]


class TTT(TestTimeMemory):
    """TTT-Linear: a matrix with a norm and a residual connection learns each token's value.

    W_t = W_{t-1} - eta_t gradient of |M(W; k_t) - v_t|^2 / 2 at the W before the mini-batch of t
    M(W; x) = x + norm(W x),   y_t = M(W_t; q_t)

    `TestTimeMemory` with a linear memory and retention none; chunk is the mini-batch. TTT-MLP is
    memory mlp and, as its authors chose, eta_max 0.1.

    Shapes, settings, precision: as `TestTimeMemory`.
    Source: arXiv 2407.04620, sections 2.2 to 2.7.
    Differs: unit q and k where the authors divide eta by d_head; no biases in the memory, no
    factor per place in the mini-batch, no rotary positions within it; a norm per head behind it,
    a silu gate, the convolution on v too.
    Reference: test-time-training/ttt-lm-pytorch, MIT.
    """

    row = ROWS["ttt_linear"]


__all__ = ["ROWS", "TTT", "Memora", "Moneta", "Row", "TestTimeMemory", "Titans", "Yaad"]
