"""The fast form of `memory`: gradients of a chunk at its start, its tokens by matrix products.

The gradient of one token with respect to one matrix is g a^T, an output gradient times the
activation that went in. With all gradients of a chunk taken at the same weights, the accumulator
after token t is a sum of such products,

    A_t = beta_t A_0 + f_t S_0 - sum_{j <= t} D_tj g_j a_j^T,

whose coefficients are known from the gates alone (f only with momentum), so that reading it needs
no matrix per token:  A_t x = beta_t A_0 x + f_t S_0 x - sum_j D_tj (a_j . x) g_j. Where a map
stands between accumulator and weights, the A_t of one chunk are written out.

Chunks follow one another; rows and heads advance side by side. Only some accumulators are kept
for the backward, which recomputes the chunks between two of them (see `_Segments`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from longscan.ops._biases import BIASES
from longscan.ops._check import full_precision
from longscan.ops._memory_fused import Fused, fits
from longscan.ops._memory_grad import LinearStep
from longscan.ops._memory_net import (
    MatrixNorm,
    Norm,
    advance,
    beside,
    finish,
    first_order_only,
    learn,
    read,
    shrunk,
    side_of,
    unrolled,
)
from longscan.ops._memory_rule import Carry, Rule
from longscan.ops._memory_tokens import Tokens, ages, join, plan, tokens
from longscan.state import State


def chunk_step(memory: Carry, x: Tokens, norm: Norm | None, rule: Rule) -> tuple[Tensor, Carry]:
    """What the tokens of one chunk read, and the memory after it.

    Shapes: memory [N, out, in]; x [N, C, ...]; y [N, C, V].
    """
    count = len(memory.a)
    c = x.coefficients()
    sides = [side_of(i, count, c, rule) for i in range(count)]

    def begin(new: list[Tensor], old: list[Tensor]) -> list[Tensor]:
        if x.fresh is None:
            return new
        return [torch.where(x.fresh, n, o) for n, o in zip(new, old, strict=True)]

    starts = memory.a
    if rule.decay_first:
        starts = [a * beside(c.beta[..., 0], side) for a, side in zip(starts, sides, strict=True)]
    g = begin(starts, memory.g)
    if rule.map.linear and c.beta.ndim == 2 and not torch.compiler.is_compiling():
        apart = x.fresh is not None or rule.decay_first
        y, *end = LinearStep.apply(
            rule, count, bool(memory.m), apart,
            x.q, x.k, x.v, x.delta, *c, *(norm or (None, None)),
            *memory.a, *memory.m, *(g if apart else ()),
        )  # fmt: skip
        return y, Carry(end[:count], end[count:], g if rule.chunk > 1 else [], [], None)
    r = begin(rule.map.weights(memory.a, rule), memory.r) if rule.keeps_reader else []
    known = rule.map.weights(g, rule)
    acts, grads = learn(known, x.k, x.v, norm, lambda e, v: BIASES[rule.bias](e, v, x.delta, rule))

    def each(matrices: list[Tensor]) -> list[tuple]:
        s = memory.m or [None] * count
        return list(zip(matrices, s, acts, grads, [c] * count, sides, strict=True))

    every = None
    if rule.map.shrink is not None:
        every = [shrunk(x, rule, *args) for args in each(memory.a)]
    elif not rule.map.linear and not rule.frozen:
        every = [unrolled(*args) for args in each(memory.a)]
    z = x.q
    for i in range(count):
        z = F.gelu(z) if i else z
        if every is None or rule.frozen or rule.map.scale is not None:
            z = read(z, *each(r or memory.a)[i])
            if rule.map.scale is not None:
                z = z * _scale(g[i] if every is None else every[i], rule)
        else:
            z = (rule.map.weights([every[i]], rule)[0] * z.unsqueeze(-2)).sum(-1)
    ends = [advance(*args) for args in each(memory.a)]
    a = [end[0] for end in ends]
    if rule.map.shrink is not None and every is not None:
        a = [t[:, -1].clone() for t in every]  # a view would keep every one of them
    m = [end[1] for end in ends if end[1] is not None]
    r = [advance(*args)[0] for args in each(r)] if r else []
    return finish(x.q, z, norm), Carry(a, m, g if rule.chunk > 1 else [], r, None)


def _scale(a: Tensor, rule: Rule) -> Tensor:
    """What A [N, out, in], or those [N, C, out, in] of every token, are multiplied by."""
    assert rule.map.scale is not None
    if a.ndim == 3 or torch.compiler.is_compiling():
        scale = rule.map.scale(a, rule)
    else:
        norm = MatrixNorm.apply(a, rule.q)
        scale = torch.where(norm > 0, norm, 1).pow(2 - rule.q)
    return scale if a.ndim == 3 else scale.squeeze(-1)


@dataclass(frozen=True)
class Walk:
    """How chunks lead to one another. counts[i]: rows that have an i-th chunk."""

    rule: Rule
    counts: list[int]
    matrices: int

    @property
    def carried(self) -> int:
        """Tensors that go from chunk to chunk: accumulators and momentum."""
        return self.matrices * (1 + (self.rule.algorithm == "momentum"))

    @property
    def segment(self) -> int:
        """Chunks between two kept states: a chunk's graph takes as much as this many states."""
        graph = 2 if self.rule.map.linear else 8 if self.rule.frozen else 4 * self.rule.chunk
        return max(1, math.isqrt(len(self.counts) // graph))

    def carry(self, tensors: Sequence[Tensor]) -> Carry:
        """From the tensors of a carry in the order a, m, g, r."""
        parts: list[list[Tensor]] = []
        for some in (
            True, self.rule.algorithm == "momentum", self.rule.chunk > 1, self.rule.keeps_reader
        ):  # fmt: skip
            n = self.matrices if some else 0
            parts.append(list(tensors[:n]))
            tensors = tensors[n:]
        a, m, g, r = parts
        return Carry(a, m, g, r, None)

    def run(
        self, chunks: Sequence[Tokens], norm: Norm | None, state: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Through chunks [N', C, ...] that follow one another, from states [N, out, in].

        Rows (the last ones) that have no further chunk keep their state.
        """
        ys, done = [], []
        for x in chunks:
            n = x.q.shape[0]
            if n < state[0].shape[0]:
                done.append([t[n:] for t in state])
                state = [t[:n] for t in state]
            here = norm
            if norm is not None and n < norm.gamma.shape[0]:
                here = Norm(norm.gamma[:n], norm.beta[:n])
            y, end = chunk_step(self.carry(state), x, here, self.rule)
            ys.append(y)
            state = [*end.a, *end.m, *end.g, *end.r]
        for rest in reversed(done):
            state = [torch.cat([t, r]) for t, r in zip(state, rest, strict=True)]
        return ys, state

    def chunks(self, tokens: Sequence[Tensor | None]) -> list[Tokens]:
        """The tokens [G, H, C, ...] of all chunks, step by step."""
        parts = [
            [None] * len(self.counts) if t is None
            else [p.flatten(0, 1) for p in t.split(self.counts)]
            for t in tokens
        ]  # fmt: skip
        return [Tokens._make(x) for x in zip(*parts, strict=True)]


def segmented(
    walk: Walk, tokens: Tokens, norm: Norm | None, state: list[Tensor], fused: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """`Walk.run` through all chunks; y [G * H, C, V]. Keeps little for a backward.

    fused: whether the kernel may be used, where it fits.
    """
    if fused and norm is not None and fits(walk, tokens, norm, state):
        y, *end = Fused.apply(walk, *tokens, *norm, *state)
        return y.flatten(0, 1), end
    steps = len(walk.counts)
    inputs = [*tokens, *(norm or ()), *state]
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    if steps < 3 or not wanted or torch.compiler.is_compiling():
        ys, end = walk.run(walk.chunks(tokens), norm, state)
        return torch.cat(ys), end
    y, *end = _Segments.apply(walk, norm is not None, *inputs)
    return y, end


class _Segments(torch.autograd.Function):
    """`Walk.run` that keeps the state before every few chunks and goes through these again.

    Kept are n / s states, and while s chunks are gone through again, s times what the backward of
    one needs: with s about the root of n both stay small.
    """

    @staticmethod
    def forward(ctx, walk: Walk, normed: bool, *tensors):
        few = len(Tokens._fields)
        norm = Norm(*tensors[few : few + 2]) if normed else None
        state = list(tensors[few + 2 * normed :])
        chunks = walk.chunks(tensors[:few])
        kept = len(state) if chunks[0].fresh is not None else walk.carried
        ys, done, starts = [], [], []
        for first in range(0, len(chunks), walk.segment):
            part = chunks[first : first + walk.segment]
            n = part[0].q.shape[0]
            if n < state[0].shape[0]:
                done.append([t[n:] for t in state])
                state = [t[:n] for t in state]
            if first:
                starts += state[:kept]
            y, state = walk.run(part, norm, state)
            ys += y
        for rest in reversed(done):
            state = [torch.cat([t, r]) for t, r in zip(state, rest, strict=True)]
        ctx.walk, ctx.normed, ctx.kept = walk, normed, kept
        ctx.save_for_backward(*tensors, *starts)
        return (torch.cat(ys), *state)

    @staticmethod
    def backward(ctx, dy: Tensor, *dend: Tensor):
        first_order_only()
        walk, kept, few = ctx.walk, ctx.kept, len(Tokens._fields)
        count = few + 2 * ctx.normed + len(dend)
        saved = ctx.saved_tensors  # asked for once: blocks that are computed anew allow no more
        tensors, starts = saved[:count], saved[count:]
        wanted = ctx.needs_input_grad[2:]
        norm = tensors[few : few + 2 * ctx.normed]
        chunks = walk.chunks(tensors[:few])
        grads = [
            torch.zeros_like(t, memory_format=torch.contiguous_format) if w else None
            for t, w in zip(tensors[: count - len(dend)], wanted, strict=False)
        ]
        parts = walk.chunks(grads[:few])
        dys = dy.split([x.q.shape[0] for x in chunks])
        dstate = list(dend)
        with full_precision(dy):
            for first in reversed(range(0, len(chunks), walk.segment)):
                last = first + walk.segment
                start = tensors[count - len(dend) :]
                if first:
                    start = starts[-kept:]
                    starts = starts[:-kept]
                dstate = _segment_backward(
                    walk, chunks[first:last], parts[first:last], norm,
                    grads[few:], start, dys[first:last], dstate,
                )  # fmt: skip
        return None, None, *grads, *dstate


def _segment_backward(
    walk: Walk,
    chunks: list[Tokens],
    grads: list[Tokens],
    norm: Sequence[Tensor],
    dnorm: Sequence[Tensor | None],
    start: Sequence[Tensor],
    dys: Sequence[Tensor],
    dstate: list[Tensor],
) -> list[Tensor]:
    """Through some chunks again and back; adds to grads and dnorm, returns the start's dstate."""
    n = chunks[0].q.shape[0]
    with torch.enable_grad():
        leaves = [
            [None if t is None else t.detach().requires_grad_(d is not None) for t, d in pairs]
            for pairs in (zip(x, g, strict=True) for x, g in zip(chunks, grads, strict=True))
        ]
        scale = [t.detach().requires_grad_(d is not None) for t, d in zip(norm, dnorm, strict=True)]
        state = [t[:n].detach().requires_grad_() for t in start]
        # What every first chunk sets anew is not kept; anything may stand in its place.
        full = state + state[:1] * (len(dstate) - len(state))
        ys, end = walk.run([Tokens._make(x) for x in leaves], Norm(*scale) if scale else None, full)
        inputs, sinks = [], []
        for group, into in [*zip(leaves, grads, strict=True), (scale, dnorm)]:
            for t, d in zip(group, into, strict=True):
                if d is not None:
                    inputs.append(t)
                    sinks.append(d)
        out = [(t, d) for t, d in zip([*ys, *end], [*dys, *(d[:n] for d in dstate)], strict=True)]
        out = [(t, d) for t, d in out if t.requires_grad]
        found = torch.autograd.grad(
            [t for t, _ in out], [*inputs, *state], [d for _, d in out], allow_unused=True
        )
    for into, d in zip(sinks, found, strict=False):
        if d is not None:
            into += d
    out = []
    begun = [*found[len(inputs) :], *[None] * (len(dstate) - len(state))]
    for new, d in zip(begun, dstate, strict=True):
        new = torch.zeros_like(d[:n]) if new is None else new
        out.append(new if n == d.shape[0] else torch.cat([new, d[n:]]))
    return out


def memory_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    log_a: Tensor | None = None,
    delta: Tensor | None = None,
    log_mu: Tensor | None = None,
    *,
    weights: Sequence[Tensor],
    norm: tuple[Tensor, Tensor] | None = None,
    rule: Rule,
    state: State | None = None,
    cu_seqlens: Tensor | None = None,
    fused: bool = False,
) -> tuple[Tensor, State]:
    """The fast torch form of `memory`; `fused`: with the kernel where that fits."""
    batch, length, heads, _ = v.shape
    rows = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    carry = Carry.of(weights, state, rule, rows)
    age = None if state is None or "at" not in state else carry.at
    parts = plan(batch, length, rule.chunk, cu_seqlens, age)
    if rule.algorithm == "implicit":
        square = k.square().sum(-1, eta.ndim == 4)
        eta = eta / (1 + eta * square)
    x = tokens(q, k, v, eta, log_a, delta, log_mu, parts, age)
    walk = Walk(rule, parts.counts, len(weights))
    start = [parts.rows_in(t).flatten(0, 1) for t in [*carry.a, *carry.m, *carry.g, *carry.r]]
    sides = None
    if norm is not None:
        sides = Norm(*(t.expand(rows, -1, -1).flatten(0, 1).unsqueeze(1) for t in norm))
    y, end = segmented(walk, x, sides, start, fused)
    y = y.unflatten(0, (-1, heads))
    carry = walk.carry([parts.rows_out(t.unflatten(0, (rows, heads))) for t in end])
    if rule.chunk > 1:
        carry.at = ages(rows, length, cu_seqlens, age, v.device) % rule.chunk
    return join(parts, y.transpose(1, 2), batch), carry.state()
