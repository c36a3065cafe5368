"""The scan behind `delta_chunked`: its states and outputs, with a written-out backward.

Autograd would keep, and visit, every step of the loop. Both directions go through the sequence in
blocks of chunks, so that what a block needs stays in cache and memory holds only what the
backward reads: the inputs, V', the states that enter chunks, and the inverses.

Names and equations are those of `delta_chunked`. Chunks lie as [G, H, ...] (see `_layout.Layout`)
and are handled as M = G H matrices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from longscan.ops._scores import decay_factors

# Numbers in one [M, N, V] tensor of a block. On a CPU 256 KB of float32, measured; other devices
# want few large launches.
_BLOCK = {"cpu": 1 << 16}
_BLOCK_ELSEWHERE = 1 << 26


@dataclass
class Factors:
    """What a chunk's maps are made of, per value head.

    q [G, H, C, K], k [G, H, N, K]; then either b [G, H, C], cumulative decays of tokens (one gate
    per head) from which all else follows, or, with a gate per key channel, q and k with their
    decays since the chunk began and: k_out, the keys with their decays until it ends; scores
    [G, H, C, N] and lower [G, H, N, N], P and L of `delta_chunked`; end [G, H, K, 1], what
    remains of the state.
    """

    q: Tensor
    k: Tensor
    b: Tensor | None = None
    k_out: Tensor | None = None
    scores: Tensor | None = None
    lower: Tensor | None = None
    end: Tensor | None = None


def delta_scan(
    f: Factors, v: Tensor, beta: Tensor, state: Tensor, counts: list[int]
) -> tuple[Tensor, Tensor]:
    """Outputs [G, H, C, V] and final states [R, H, K, V] of chunks in the order of `counts`.

    Shapes: v [G, H, N, V]; beta [G, H, N, 1]; state [R, H, K, V].
    """
    inputs = (f.q, f.k, f.b, f.k_out, f.scores, f.lower, f.end, v, beta, state)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    o, final, *_ = _forward(*inputs, counts, keep)
    return o, final


@dataclass
class _Gate:
    """The decays of chunks with one gate per head, as factors of their rows."""

    among: Tensor  # exp(b_t - b_t(j)) [M, C, N], zero where token t(j) is later
    rows: Tensor  # exp(b_t(i) - b_t(j)) [M, N, N], zero where token t(j) is later
    reads: Tensor  # exp(b_t) [M, C, 1]
    asks: Tensor  # exp(b_t(i)) [M, N, 1]
    writes: Tensor  # exp(b_end - b_t(i)) [M, N, 1]
    end: Tensor  # exp(b_end) [M, 1, 1]

    @staticmethod
    def of(b: Tensor, n: int) -> _Gate:
        steps = n // b.shape[1]
        among = decay_factors(b)
        reads = b.exp2().unsqueeze(-1)
        writes = (b[:, -1:] - b).exp2().unsqueeze(-1)
        end = reads[:, -1:]
        if steps == 1:
            return _Gate(among, among, reads, reads, writes, end)
        columns = among.repeat_interleave(steps, -1)
        rows = columns.repeat_interleave(steps, -2)
        asks, writes = (x.repeat_interleave(steps, 1) for x in (reads, writes))
        return _Gate(columns, rows, reads, asks, writes, end)

    def gradient(self, scores, lower, reads, asks, writes, ends) -> Tensor:
        """Gradient of b [M, C] from the products of each decayed term with its gradient."""
        c = self.reads.shape[1]
        sent = writes.sum(-1)
        rows = lower.sum(-1) - lower.sum(-2) - scores.sum(-2) - asks.sum(-1) - sent
        d_b = rows.unflatten(1, (c, -1)).sum(-1) + scores.sum(-1) + reads.sum(-1)
        d_b[:, -1] += sent.sum(-1) + ends.sum((-1, -2)) * self.end.view(-1)
        return d_b * math.log(2)


def _blocks(counts: list[int], v: Tensor) -> Iterator[tuple[slice, list[slice]]]:
    """Blocks of at least _BLOCK numbers of v: where they lie among the matrices, their steps."""
    heads, size = v.shape[1], v.shape[2] * v.shape[3]
    enough = _BLOCK.get(v.device.type, _BLOCK_ELSEWHERE)
    begin = at = 0
    steps: list[slice] = []
    for i, n in enumerate(counts):
        steps.append(slice(at - begin, at - begin + n * heads))
        at += n * heads
        if (at - begin) * size >= enough or i == len(counts) - 1:
            yield slice(begin, at), steps
            begin, steps = at, []


def _terms(q, k, b, scores, lower) -> tuple[_Gate | None, Tensor, Tensor]:
    """The decays, P and L of a block; of L only what is strictly below the diagonal counts."""
    if b is None:
        return None, scores, lower
    gate = _Gate.of(b, k.shape[1])
    return gate, (q @ k.mT).mul_(gate.among), (k @ k.mT).mul_(gate.rows)


def _flat(*tensors: Tensor | None) -> list:
    """[G, H, ...] -> [M, ...]."""
    return [None if x is None else x.flatten(0, 1) for x in tensors]


def _at(block: slice, *tensors: Tensor | None) -> list:
    return [None if x is None else x[block] for x in tensors]


@torch.library.custom_op("longscan::delta_scan", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    b: Tensor | None,
    k_out: Tensor | None,
    scores: Tensor | None,
    lower: Tensor | None,
    end: Tensor | None,
    v: Tensor,
    beta: Tensor,
    state: Tensor,
    counts: list[int],
    keep: bool,
) -> list[Tensor]:
    """-> o, final states, and if `keep` (I + diag(beta) L)^-1, V' and the states that enter."""
    g, h, n, d_value = v.shape
    o = v.new_empty(g, h, q.shape[2], d_value)
    state = state.clone()
    s, flat_o = state.flatten(0, 1), o.flatten(0, 1)
    m = g * h if keep else 0
    inverses, writes = v.new_empty(m, n, n), v.new_empty(m, n, d_value)
    entering = v.new_empty(m, *state.shape[2:])
    flat = _flat(q, k, b, k_out, scores, lower, end, v, beta)
    eye = torch.eye(n, dtype=v.dtype, device=v.device)
    for block, steps in list(_blocks(counts, v)):
        q, k, b, k_out, scores, lower, end, v, beta = _at(block, *flat)
        gate, scores, lower = _terms(q, k, b, scores, lower)
        # Unit lower triangular: the solver reads neither the diagonal nor what is above.
        inverse = torch.linalg.solve_triangular(
            beta * lower, eye.expand_as(lower), upper=False, unitriangular=True
        )
        if keep:
            inverses[block] = inverse
        solve = inverse.mul_(beta.mT)
        written = torch.bmm(solve, v, out=writes[block] if keep else None)
        if gate is not None:
            solve.mul_(gate.asks.mT)
            end = gate.end
        assert end is not None  # given, or the gate's
        out, k_last = flat_o[block], k if k_out is None else k_out
        for i in steps:
            now = s[: i.stop - i.start]
            if keep:
                entering[block][i] = now
            fresh = written[i].baddbmm_(solve[i], k[i] @ now, alpha=-1)
            read = torch.bmm(q[i], now, out=out[i])
            if gate is not None:
                read *= gate.reads[i]
                fresh = fresh * gate.writes[i]
            now *= end[i]
            now.baddbmm_(k_last[i].mT, fresh)
        out.baddbmm_(scores, written)
    return [o, state, inverses, writes, entering]


@_forward.register_fake
def _(q, k, b, k_out, scores, lower, end, v, beta, state, counts, keep):
    g, h, n, d_value = v.shape
    m = g * h if keep else 0
    shapes = [(m, n, n), (m, n, d_value), (m, *state.shape[2:])]
    o = v.new_empty(g, h, q.shape[2], d_value)
    return [o, torch.empty_like(state), *(v.new_empty(shape) for shape in shapes)]


@torch.library.custom_op("longscan::delta_scan_backward", mutates_args=())
def _backward(
    q: Tensor,
    k: Tensor,
    b: Tensor | None,
    k_out: Tensor | None,
    scores: Tensor | None,
    lower: Tensor | None,
    end: Tensor | None,
    v: Tensor,
    beta: Tensor,
    inverses: Tensor,
    writes: Tensor,
    entering: Tensor,
    do: Tensor,
    ds: Tensor,
    counts: list[int],
) -> list[Tensor]:
    """Gradients of the tensors given among the inputs of `_forward`, in their order."""
    inputs = (q, k, b, k_out, scores, lower, end, v, beta)
    grads = [None if x is None else x.new_empty(x.shape) for x in inputs]
    flat, flat_grads = _flat(*inputs), _flat(*grads)
    do = do.contiguous().flatten(0, 1)
    d_state = ds.clone()
    d = d_state.flatten(0, 1)
    for block, steps in reversed(list(_blocks(counts, v))):
        q, k, b, k_out, scores, lower, end, v, beta = _at(block, *flat)
        dq, dk, db, dk_out, d_scores, d_lower, d_end, dv, d_beta = _at(block, *flat_grads)
        inverse, written, enter, d_out = _at(block, inverses, writes, entering, do)
        gate, scores, lower = _terms(q, k, b, scores, lower)
        asked, d_read = k @ enter, d_out
        if gate is not None:
            asked *= gate.asks
            d_read = d_out * gate.reads
            end = gate.end
        wrong = v - asked
        solve = inverse * beta.mT
        d_written, d_enter = scores.mT @ d_out, q.mT @ d_read
        assert end is not None
        leaving = torch.empty_like(enter)
        k_last = k if k_out is None else k_out
        for i in reversed(steps):
            now = d[: i.stop - i.start]
            leaving[i] = now
            if gate is None:
                d_written[i].baddbmm_(k_last[i], now)
            else:
                d_written[i].addcmul_(k_last[i] @ now, gate.writes[i])
            d_ask = torch.bmm(solve[i].mT, d_written[i], out=dv[i])
            if gate is not None:
                d_ask = d_ask * gate.asks[i]
            now *= end[i]
            now += d_enter[i]
            now.baddbmm_(k[i].mT, d_ask, alpha=-1)
        d_solve = d_written @ wrong.mT
        # With the inverse X: dX = d_solve diag(beta), d(beta L) = - strict_lower(X^T dX X^T).
        d_l = (inverse.mT @ (d_solve * beta.mT) @ inverse.mT).tril_(-1).neg_()
        torch.sum(d_l * lower, -1, True, out=d_beta)
        d_beta += d_solve.mul_(inverse).sum(-2).unsqueeze(-1)
        d_l *= beta
        d_p = torch.bmm(d_out, written.mT, out=d_scores)
        torch.bmm(d_read, enter.mT, out=dq)
        if gate is None:
            d_lower.copy_(d_l)
            torch.bmm(dv, enter.mT, out=dk).neg_()
            torch.bmm(written, leaving.mT, out=dk_out)
            torch.sum(enter * leaving, -1, True, out=d_end)
            continue
        sent = (written * gate.writes) @ leaving.mT
        db.copy_(
            gate.gradient(d_p * scores, d_l * lower, dq * q, dv * asked, sent * k, enter * leaving)
        )
        d_qk, d_kk = d_p.mul_(gate.among), d_l.mul_(gate.rows)
        dq.baddbmm_(d_qk, k)
        torch.baddbmm(sent, d_qk.mT, q, out=dk).baddbmm_(d_kk + d_kk.mT, k)
        dk.baddbmm_(dv * gate.asks, enter.mT, alpha=-1)
    return [*(x for x in grads if x is not None), d_state]


@_backward.register_fake
def _(q, k, b, k_out, scores, lower, end, v, beta, inverses, writes, entering, do, ds, counts):
    inputs = (q, k, b, k_out, scores, lower, end, v, beta)
    return [*(x.new_empty(x.shape) for x in inputs if x is not None), torch.empty_like(ds)]


def _save(ctx, inputs, output) -> None:
    *tensors, _, ctx.counts, _ = inputs
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.shapes = [x.shape for x in output[:2]]
    ctx.set_materialize_grads(False)  # what is only kept for the backward has no gradient


def _gradients(ctx, grads: list[Tensor]):
    saved = ctx.saved_tensors
    given = saved[:9]
    do, ds = (
        given[0].new_zeros(shape) if grad is None else grad
        for grad, shape in zip(grads, ctx.shapes, strict=False)
    )
    *found, d_state = _backward(*saved, do, ds, ctx.counts)
    rest = iter(found)
    return *(None if x is None else next(rest) for x in given), d_state, None, None


_forward.register_autograd(_gradients, setup_context=_save)
