"""How a memory that learns at test time learns, as data, and what it carries along."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from longscan.ops._biases import BIASES, WITH_THRESHOLD
from longscan.ops._check import check_floating, check_log_decay, check_shape, check_state
from longscan.ops._retentions import RETENTIONS, Retention
from longscan.state import State

ALGORITHMS = ("gd", "momentum", "implicit")
Norm = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Rule:
    """How a memory learns.

    bias: the loss of a token, of e = M(k) - v: dot -<M(k), v>; l1; l2 |e|^2 / 2; squared |e|^2;
    lp |e|_p^p; huber_coord, huber_norm, huber_mix (of coordinates, of the length, l2 or l1);
    value_shift. The last four have a threshold delta.
    retention: how weights follow from accumulators: none and l2 (they are these), lq_paper,
    lq_mirror, kl, elastic_net, elastic_net_smooth, elastic_net_proximal, bregman, f_chi2,
    f_reverse_kl, f_hellinger. With none nothing may decay.
    algorithm: gd; momentum; implicit (linear memory and l2 only: the step eta / (1 + eta k.k)).
    decay_first: gradients are taken at decayed accumulators, as in the gated delta rule: those of
    the token or, with chunks, of the chunk's first token.
    chunk: gradients are taken at the start of a token's chunk. Unlike elsewhere this changes the
    result: 1 is the exact recurrence, larger chunks are faster.
    read: exact, the map follows every token; frozen, the whole chunk is read with W = s A, s of
    its start (lq_paper), or with weights that begin as map(A) and are linear in the gradients
    from there (all other maps). Only answers differ, not what is learned.
    channels: whether channel-wise gates of a linear memory act on its value or its key axis.
    p, sharpness, eps: of lp, |x| = sqrt(x^2 + eps), sign(x) = tanh(sharpness x), the latter also
    of l1 and huber_mix. q: of lq. total: what rows sum to (kl, f_*). threshold: of the elastic net.
    """

    bias: str = "l2"
    retention: str = "l2"
    algorithm: str = "gd"
    decay_first: bool = False
    chunk: int = 16
    read: str = "exact"
    channels: str = "value"
    p: float = 3.0
    q: float = 4.0
    sharpness: float = 10.0
    eps: float = 1e-6
    total: float = 1.0
    threshold: float = 0.01

    def __post_init__(self) -> None:
        for name, known in (
            ("bias", BIASES),
            ("retention", RETENTIONS),
            ("algorithm", ALGORITHMS),
            ("read", ("exact", "frozen")),
            ("channels", ("value", "key")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"unknown {name} {getattr(self, name)!r}; choose from {', '.join(known)}"
                )
        if isinstance(self.chunk, bool) or not isinstance(self.chunk, int) or self.chunk < 1:
            raise ValueError(f"chunk must be an integer >= 1, got {self.chunk!r}")
        for name in ("sharpness", "eps", "total", "threshold"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}")
        if not 1 <= self.p < math.inf:
            raise ValueError(f"p must be at least 1, got {self.p}")
        if not 2 <= self.q < math.inf:
            raise ValueError(f"q must be at least 2 (its map has no slope at 0 else), got {self.q}")
        if self.algorithm == "implicit" and (self.bias != "l2" or not self.map.linear):
            raise ValueError(
                "algorithm 'implicit' is known in closed form for bias 'l2' and retention 'none' "
                f"or 'l2' only, not for {self.bias!r} and {self.retention!r}"
            )

    @property
    def map(self) -> Retention:
        """The retention named."""
        return RETENTIONS[self.retention]

    @property
    def frozen(self) -> bool:
        """Whether reading inside a chunk differs from reading with the map of the accumulators."""
        return self.read == "frozen" and self.chunk > 1 and not self.map.linear

    @property
    def keeps_reader(self) -> bool:
        """Whether the weights that tokens are read with are carried beside the accumulators."""
        return self.frozen and self.map.scale is None


@dataclass
class Carry:
    """What goes from token to token; lists hold one tensor [B, H, out, in] per matrix.

    a: accumulators; m: momentum; g: accumulators at which gradients are taken; r: weights that
    tokens are read with; at [B]: tokens already in the running chunk. What a rule does not need
    is empty or None.
    """

    a: list[Tensor]
    m: list[Tensor]
    g: list[Tensor]
    r: list[Tensor]
    at: Tensor | None

    @staticmethod
    def of(weights: Sequence[Tensor], state: State | None, rule: Rule, rows: int) -> Carry:
        """The carry before the first token given."""
        n = range(len(weights))
        if state is None:
            a = [w.unsqueeze(0).expand(rows, *w.shape) for w in weights]
            if rule.chunk > 1:  # they become part of a state, which no optimiser may change
                a = [w.clone() for w in a]
            m = [torch.zeros_like(x) for x in a] if rule.algorithm == "momentum" else []
        else:
            a = [state.tensor(f"a{i}") for i in n]
            m = [state.tensor(f"m{i}") for i in n] if rule.algorithm == "momentum" else []
        if rule.chunk == 1:
            return Carry(a, m, [], [], None)
        if state is None or "at" not in state or (rule.keeps_reader and "r0" not in state):
            at = torch.zeros(rows, dtype=torch.long, device=a[0].device)
            return Carry(a, m, a, a if rule.keeps_reader else [], at)
        r = [state.tensor(f"r{i}") for i in n] if rule.keeps_reader else []
        return Carry(a, m, [state.tensor(f"g{i}") for i in n], r, state.tensor("at") % rule.chunk)

    def readers(self, rule: Rule) -> list[Tensor]:
        """The weights that a token is read with."""
        if self.r:
            return self.r
        if rule.frozen and (scale := rule.map.scale) is not None:
            return [scale(g, rule) * a for g, a in zip(self.g, self.a, strict=True)]
        return rule.map.weights(self.a, rule)

    def state(self) -> State:
        """As a value to carry on from."""
        kinds = "am" if self.at is None else "amgr"
        items = {f"{k}{i}": x for k in kinds for i, x in enumerate(getattr(self, k))}
        return State(items) if self.at is None else State(items, at=self.at)


def on_matrix(gate: Tensor, index: int, count: int, rule: Rule) -> Tensor:
    """A gate [..., H] or [..., H, D] so that it multiplies matrix `index` of `count`.

    One number per head scales the whole matrix [..., H, 1, 1]. Channels scale the rows (value
    channels) of the last matrix and the columns (key channels) of the first of two.
    """
    rows = index == count - 1 and (count > 1 or rule.channels == "value")
    if gate.shape[-1] == 1 or rows:
        return gate.unsqueeze(-1)
    return gate.unsqueeze(-2)


def net(weights: Sequence[Tensor], norm: Norm | None, x: Tensor, eps: float = 1e-6) -> Tensor:
    """What the memory answers: W_n gelu(... W_1 x), and x + LN(that) with a norm.

    Shapes: x [B, H, N, K]; weights [B, H, out, in]; norm [H, d] each.
    """
    y = x
    for i, w in enumerate(weights):
        y = (F.gelu(y) if i else y) @ w.mT
    if norm is None:
        return y
    gamma, beta = (p.unsqueeze(-2) for p in norm)
    return x + F.layer_norm(y, y.shape[-1:], eps=eps) * gamma + beta


def check_memory(
    q: Tensor, k: Tensor, v: Tensor, weights: Sequence[Tensor], norm: Norm | None, rule: Rule
) -> None:
    """The memory's matrices follow each other from K to V."""
    batch, length, heads, d_value = v.shape
    check_shape("q", q, (batch, length, heads, None), "[B, T, H, K]")
    d_key = q.shape[-1]
    check_shape("k", k, tuple(q.shape), "[B, T, H, K], as q")
    if not weights:
        raise ValueError("weights must hold at least one matrix [H, out, in]")
    check_floating(**{f"weights[{i}]": w for i, w in enumerate(weights)})
    width = d_key
    for i, w in enumerate(weights):
        last = d_value if i == len(weights) - 1 else None
        check_shape(f"weights[{i}]", w, (heads, last, width), "[H, out, in]")
        width = w.shape[1]
    if norm is not None:
        check_floating(gamma=norm[0], beta=norm[1])
        if d_key != d_value:
            raise ValueError(f"a norm adds the input: it needs K = V, got {d_key} and {d_value}")
        for name, p in zip(("gamma", "beta"), norm, strict=True):
            check_shape(name, p, (heads, d_value), "[H, d]")
    if rule.algorithm == "implicit" and (len(weights) > 1 or norm is not None):
        raise ValueError("algorithm 'implicit' needs a linear memory: one matrix, no norm")
    if rule.channels == "key" and len(weights) > 1:
        raise ValueError("channels 'key' is for a linear memory; this has several matrices")


def check_gates(
    v: Tensor,
    eta: Tensor,
    log_a: Tensor | None,
    delta: Tensor | None,
    log_mu: Tensor | None,
    weights: Sequence[Tensor],
    rule: Rule,
) -> None:
    """Gates and thresholds have a shape that fits, and are there where the rule needs them."""
    if log_a is not None and rule.retention == "none":
        raise ValueError("retention 'none' keeps all: give no log_a, or choose retention 'l2'")
    if (log_mu is not None) != (rule.algorithm == "momentum"):
        raise ValueError(
            f"algorithm {rule.algorithm!r} "
            + ("takes no log_mu" if log_mu is not None else "needs log_mu, the momentum's decay")
        )
    if (delta is not None) != (rule.bias in WITH_THRESHOLD):
        raise ValueError(
            f"bias {rule.bias!r} "
            + ("takes no" if delta is not None else "needs a threshold")
            + " delta"
        )
    head = tuple(v.shape[:3])
    d_key, d_value = weights[0].shape[2], v.shape[3]
    width = d_key if rule.channels == "key" else d_value
    for name, gate in (("eta", eta), ("log_a", log_a), ("log_mu", log_mu)):
        if gate is None:
            continue
        if gate.ndim != 4:
            check_shape(name, gate, head, "[B, T, H] (or with channels)")
            continue
        check_shape(name, gate, (*head, width), f"[B, T, H, {'K' if width is d_key else 'V'}]")
        if len(weights) > 2 or (len(weights) == 2 and d_key != d_value):
            raise ValueError(
                f"a channel-wise {name} needs a memory of one matrix, or of two with K = V; "
                "give one number per head"
            )
        if rule.algorithm == "implicit" and rule.channels == "key" and name == "eta":
            raise ValueError("algorithm 'implicit' needs one eta per head or per value channel")
    if delta is not None:
        coord = rule.bias == "huber_coord" and delta.ndim == 4
        check_shape(
            "delta",
            delta,
            (*head, d_value) if coord else head,
            "[B, T, H] ([..., V] for huber_coord)",
        )
    for name, gate in (("log_a", log_a), ("log_mu", log_mu)):
        if gate is not None:
            try:
                check_log_decay(gate)
            except ValueError as e:
                raise ValueError(str(e).replace("log_a", name)) from None


def check_carried(state: State, weights: Sequence[Tensor], rows: int, rule: Rule) -> None:
    """The state is one of such a memory, and of so many rows."""
    needed = [
        f"{kind}{i}"
        for kind in "am"[: 1 + (rule.algorithm == "momentum")]
        for i in range(len(weights))
    ]
    if missing := [name for name in needed if name not in state]:
        raise ValueError(f"the state has no {', '.join(missing)}: it is of another memory or rule")
    for kind in "amgr":
        for i, w in enumerate(weights):
            if f"{kind}{i}" in state:
                shape = (rows, *w.shape)
                check_state(
                    f"state {kind}{i}", state.tensor(f"{kind}{i}"), shape, "[rows, H, out, in]"
                )
    if "at" in state:
        check_state("state at", state.tensor("at"), (rows,), "[rows]")
