"""Memories that learn at test time: TTT, Titans, Moneta, Yaad, Memora and all of the Miras kind."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from longscan.ops import _memory, _memory_net
from longscan.ops._biases import BIASES
from longscan.ops._check import (
    cast,
    check_floating,
    check_values,
    compute_dtype,
    full_precision,
)
from longscan.ops._layout import check_cu_seqlens
from longscan.ops._memory_rule import (
    Carry,
    Norm,
    Rule,
    check_carried,
    check_gates,
    check_memory,
    net,
    on_matrix,
)
from longscan.ops.dispatch import choose
from longscan.state import State

MIRAS = Rule()


def memory_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    log_a: Tensor | None = None,
    delta: Tensor | None = None,
    log_mu: Tensor | None = None,
    *,
    weights: Sequence[Tensor],
    norm: Norm | None = None,
    rule: Rule = MIRAS,
    state: State | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, State]:
    """The definition of `memory`: a loop over time in the input dtype."""
    if cu_seqlens is not None:
        outs, states = [], []
        for i, (a, b) in enumerate(pairwise(check_cu_seqlens(cu_seqlens, *q.shape[:2]))):
            gates = [None if x is None else x[:, a:b] for x in (log_a, delta, log_mu)]
            y, s = memory_reference(
                q[:, a:b], k[:, a:b], v[:, a:b], eta[:, a:b], *gates, weights=weights, norm=norm,
                rule=rule, state=None if state is None else state.select(i),
            )  # fmt: skip
            outs.append(y)
            states.append(s)
        return torch.cat(outs, 1), State.cat(states)
    carry = Carry.of(weights, state, rule, q.shape[0])
    out = []
    for t in range(q.shape[1]):
        gates = _gates_at(t, eta, log_a, delta, log_mu)
        out.append(_one_token(q[:, t], k[:, t], v[:, t], gates, carry, norm, rule))
    return torch.stack(out, 1), carry.state()


class Gates(NamedTuple):
    """What a token is learned with, each [B, H, 1] or [B, H, D]."""

    eta: Tensor
    log_a: Tensor | None
    delta: Tensor | None
    log_mu: Tensor | None


def _gates_at(t: int, eta: Tensor, *more: Tensor | None) -> Gates:
    def at(x: Tensor) -> Tensor:
        return x[:, t].unsqueeze(-1) if x.ndim == 3 else x[:, t]

    return Gates(at(eta), *(None if x is None else at(x) for x in more))


def _one_token(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    carry: Carry,
    norm: Norm | None,
    rule: Rule,
) -> Tensor:
    """One token of the definition; moves the carry on. Shapes as `memory_step`."""
    eta, log_a, delta, log_mu = gates
    steps = _on_matrices(_step_size(eta, k, rule), carry, rule)
    keep = [1.0] * len(carry.a) if log_a is None else _on_matrices(log_a.exp(), carry, rule)
    _begin_token(carry, keep, rule)

    def answer(*weights: Tensor) -> Tensor:
        return net(weights, norm, k.unsqueeze(-2)).squeeze(-2)

    known, pull = torch.func.vjp(answer, *rule.map.weights(carry.g, rule))[:2]
    gradients = pull(BIASES[rule.bias](known - v, v, delta, rule))
    updates = [-s * g for s, g in zip(steps, gradients, strict=True)]
    if log_mu is not None:
        mu = _on_matrices(log_mu.exp(), carry, rule)
        carry.m = updates = [x * m + u for x, m, u in zip(mu, carry.m, updates, strict=True)]
    carry.a = [x * a + u for x, a, u in zip(keep, carry.a, updates, strict=True)]
    carry.r = [x * r + u for x, r, u in zip(keep, carry.r, updates, strict=False)]
    if rule.map.shrink is not None:
        carry.a = [rule.map.shrink(a, s, rule) for a, s in zip(carry.a, steps, strict=True)]
    return net(carry.readers(rule), norm, q.unsqueeze(-2)).squeeze(-2)


def _step_size(eta: Tensor, k: Tensor, rule: Rule) -> Tensor:
    """The step of a token; the implicit one solves min |A - A'|^2 + eta |A k - v|^2 for A."""
    if rule.algorithm != "implicit":
        return eta
    return eta / (1 + eta * k.square().sum(-1, True))


def _on_matrices(gate: Tensor, carry: Carry, rule: Rule) -> list[Tensor]:
    n = len(carry.a)
    return [on_matrix(gate, i, n, rule) for i in range(n)]


def _begin_token(carry: Carry, keep: Sequence[Tensor | float], rule: Rule) -> None:
    """Rows whose chunk begins here take their gradients, and frozen readers, from here."""
    now = carry.a
    if rule.decay_first:
        now = [x * a for x, a in zip(keep, carry.a, strict=True)]
    if carry.at is None:
        carry.g = now
        return
    first = carry.at == 0
    carry.g = _chosen(first, now, carry.g)
    if carry.r:
        carry.r = _chosen(first, rule.map.weights(carry.a, rule), carry.r)
    carry.at = (carry.at + 1) % rule.chunk


def _chosen(rows: Tensor, these: list[Tensor], others: list[Tensor]) -> list[Tensor]:
    """The matrices of `these` where a row is True, else of `others`."""
    if rows.device.type == "cpu" and not torch.compiler.is_compiling():  # looking costs nothing
        count = int(rows.sum())
        if count in (0, len(rows)):
            return list(these if count else others)
    rows = rows.view(-1, 1, 1, 1)
    return [torch.where(rows, x, y) for x, y in zip(these, others, strict=True)]


def memory_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    carry: Carry,
    norm: Norm | None,
    rule: Rule,
) -> Tensor:
    """One token of `memory` for all rows, wherever in their chunks; moves the carry on.

    The gradient with respect to every matrix is one outer product, left right^T.

    Shapes: q, k [B, H, K]; v, y [B, H, V]; gates [B, H, 1] or with channels.
    """
    rows, heads = k.shape[:2]
    flat = (rows * heads, 1, -1)
    _, log_a, delta, log_mu = gates
    eta = _step_size(gates.eta, k, rule)
    keep = [1.0] * len(carry.a) if log_a is None else _on_matrices(log_a.exp(), carry, rule)
    _begin_token(carry, keep, rule)
    beside = None
    if norm is not None:
        beside = _memory_net.Norm(*(p.repeat(rows, 1).unsqueeze(-2) for p in norm))
    if delta is not None:
        delta = delta.reshape(flat)
    at = [w.flatten(0, 1) for w in rule.map.weights(carry.g, rule)]

    def bias(e: Tensor, v: Tensor) -> Tensor:
        return BIASES[rule.bias](e, v, delta, rule)

    rights, lefts = _memory_net.learn(at, k.reshape(flat), v.reshape(flat), beside, bias)
    old, carry.a = carry.a, []
    for i, (left, right) in enumerate(zip(lefts, rights, strict=True)):
        step = on_matrix(eta, i, len(at), rule)
        if step.shape[-1] == 1:  # one number, or one per row
            left = left * step.reshape(flat)
        else:
            right = right * step.reshape(flat)
        left = left.mT
        if log_mu is None:
            carry.a.append(_add_outer(old[i] * keep[i], left, right))
            if carry.r:
                carry.r[i] = _add_outer(carry.r[i] * keep[i], left, right)
        else:
            mu = on_matrix(log_mu.exp(), i, len(at), rule)
            carry.m[i] = _add_outer(carry.m[i] * mu, left, right)
            carry.a.append(old[i] * keep[i] + carry.m[i])
            if carry.r:
                carry.r[i] = carry.r[i] * keep[i] + carry.m[i]
        if rule.map.shrink is not None:
            carry.a[i] = rule.map.shrink(carry.a[i], step, rule)
    return net(carry.readers(rule), norm, q.unsqueeze(-2)).squeeze(-2)


def _add_outer(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """x - left right^T, overwriting x [B, H, out, in]; left [B * H, out, 1], right [.., 1, in]."""
    return x.flatten(0, 1).baddbmm_(left, right, alpha=-1).view(x.shape)


def memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    log_a: Tensor | None = None,
    delta: Tensor | None = None,
    log_mu: Tensor | None = None,
    *,
    weights: Sequence[Tensor],
    norm: Norm | None = None,
    rule: Rule = MIRAS,
    state: State | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, State]:
    """A memory, linear or deep, that learns to answer k_t with v_t: one step of training a token.

    G_t = d loss(M(W; k_t), v_t) / dW      at W = map(A_c), c the start of the token's chunk
    A_t = exp(log_a_t) A_{t-1} - eta_t G_t
    y_t = M(map(A_t); q_t)
    With momentum S_t = exp(log_mu_t) S_{t-1} - eta_t G_t and A_t = exp(log_a_t) A_{t-1} + S_t.
    M(x) = W_n gelu(... gelu(W_1 x)) or, with a norm, x + LN(that). The loss (attentional bias) and
    the map (retention) are the rule's, see `Rule`.

    Shapes: q, k [B, T, H, K]; v, y [B, T, H, V]; eta, log_a, log_mu [B, T, H], or with channels
    [B, T, H, V], for a memory of at most two matrices: they scale the rows of the last (only) and
    the columns of the first of two (Rule(channels="key"): [B, T, H, K], columns of the only one).
    log_a, log_mu natural logarithms <= 0, log_a None keeps all.
    delta [B, T, H] for the biases with a threshold; huber_coord takes [B, T, H, V] too.
    weights: the accumulators A before the first token, one [H, out, in] per matrix, the first
    applied first. norm: None or gamma, beta [H, d], K = V = d.
    cu_seqlens [n + 1] packs n sequences on one row (B = 1), the state then has n rows.
    State: a0, a1, ... accumulators [B, H, out, in]; m0, ... momentum; with chunks g0, ... the
    accumulators that gradients are taken at and at [B], tokens already in the running chunk; with
    frozen reading by weights also these, r0, ... A state may go from one chunk size to another.
    With a state the weights are not used; they then get gradients of zero, not none.
    Precision: everything in float32 (float64 for float64 inputs), y in v's dtype. The gradient of
    lp grows as |e|^(p-1).
    Raises: ValueError, TypeError for shapes, dtypes, gates above 0, cu_seqlens, and for gates or
    thresholds that the rule needs and are missing or that it has no use for.
    Source: Miras: Moneta, Yaad, Memora (arXiv 2504.13173); Titans (arXiv 2501.00663, with log_a
    the logarithm of 1 - alpha); TTT (arXiv 2407.04620); Longhorn (arXiv 2407.14207) for implicit.
    Differs: no code of Miras or Titans was published. The paper's weights are linear inside a
    chunk; here accumulators are, which with kl cannot turn negative, and the map follows every
    token unless reading is frozen. Moneta's printed map A / |A|_q^(q-2) is lq_paper; the mirror
    map of its regulariser has the power |A|^(q-1) as well: lq_mirror. Of Moneta's two factors eta
    one counts. l2 is half the squared error, squared (Titans) is not. LN has eps 1e-6 and its gain
    and shift are parameters, not part of the memory. f_* are regularisers from the start, as
    for the other maps, not steps from the last weights; with kl both are the same. Not affine.
    """
    check_floating(q=q, k=k, v=v, eta=eta, log_a=log_a, delta=delta, log_mu=log_mu)
    batch, length, _, _ = check_values(v)
    check_memory(q, k, v, weights, norm, rule)
    check_gates(v, eta, log_a, delta, log_mu, weights, rule)
    if cu_seqlens is not None and not torch.compiler.is_compiling():
        check_cu_seqlens(cu_seqlens, batch, length)
    rows = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    if state is not None:
        check_carried(state, weights, rows, rule)
    out = v.dtype
    tensors = [q, k, v, eta, log_a, delta, log_mu, *weights, *(norm or ())]
    dtype = compute_dtype(*tensors, *(() if state is None else state.flatten().values()))
    q, k, v, eta, log_a, delta, log_mu = cast(dtype, q, k, v, eta, log_a, delta, log_mu)
    first = cast(dtype, *weights)
    if norm is not None:
        norm = (norm[0].to(dtype), norm[1].to(dtype))
    if state is not None:
        state = state.to(dtype=dtype)
    forms = {
        "reference": memory_reference,
        "torch": _memory.memory_chunked,
        "triton": partial(_memory.memory_chunked, fused=True),
    }
    run = choose("memory", v, backend, forms)
    with full_precision(v):
        if length == 1 and cu_seqlens is None and run is not memory_reference:
            carry = Carry.of(first, state, rule, rows)
            gates = _gates_at(0, eta, log_a, delta, log_mu)
            y = memory_step(q[:, 0], k[:, 0], v[:, 0], gates, carry, norm, rule).unsqueeze(1)
            end = carry.state()
        else:
            y, end = run(
                q, k, v, eta, log_a, delta, log_mu,
                weights=first, norm=norm, rule=rule, state=state, cu_seqlens=cu_seqlens,
            )  # fmt: skip
        if state is not None and torch.is_grad_enabled():
            for w in first:
                if w.requires_grad:  # the sum of nothing: 0, with a gradient of zeros
                    y = y + w[:0].sum()
    return y.to(out), end


def memory_read(
    q: Tensor,
    *,
    weights: Sequence[Tensor] | None = None,
    norm: Norm | None = None,
    rule: Rule = MIRAS,
    state: State | None = None,
) -> Tensor:
    """What a memory answers, without learning: y_t = M(map(A); q_t).

    Shapes: q [B, T, H, K]; y [B, T, H, V]; A from a state of `memory` with B rows or, without
    one, from weights [H, out, in], the accumulators before the first token; norm as `memory`.
    Precision: float32 (float64 for float64 inputs), y in q's dtype.
    Raises: ValueError without state and weights. Source, Differs: as `memory`.
    """
    if state is not None:
        a = []
        while f"a{len(a)}" in state:
            a.append(state.tensor(f"a{len(a)}"))
    elif weights is not None:
        a = [w.unsqueeze(0) for w in weights]
    else:
        raise ValueError("memory_read needs a state, or the weights before the first token")
    dtype = compute_dtype(q, *a, *(norm or ()))
    x, *a = cast(dtype, q, *a)
    if norm is not None:
        norm = (norm[0].to(dtype), norm[1].to(dtype))
    with full_precision(q):
        return net(rule.map.weights(a, rule), norm, x.transpose(1, 2)).transpose(1, 2).to(q.dtype)


__all__ = ["Rule", "memory", "memory_read", "memory_reference", "memory_step"]
