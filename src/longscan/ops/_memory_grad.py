"""One chunk of `memory` with weights that are their accumulators, and its backward written out.

The names follow the forward: matrix l has inputs x_l and outputs p_l for the keys, X_l and P_l for
the queries, x_{l+1} = gelu(p_l); g_l is the gradient of the inner loss by p_l. A letter d before a
name is the gradient of the outer loss by it. Two second derivatives appear, of gelu and of
LayerNorm: with J(u) = r (u - mean u - zh mean(u zh)), LayerNorm's backward (r = 1 / deviation), and
d the gradient by J(u),

    du = J(d),   dz = J(-r (mean(d zh) u + mean(u zh) d)) - r mean(d J(u)) zh.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from longscan.ops._biases import BIASES
from longscan.ops._memory_net import EPS, first_order_only
from longscan.ops._memory_rule import Rule

_gelu_backward = torch.ops.aten.gelu_backward


def _slope(p: Tensor) -> Tensor:
    """gelu'(p)"""
    return _gelu_backward(p.new_ones(()).expand_as(p), p)


def _curve(p: Tensor) -> Tensor:
    """gelu''(p) = (2 - p^2) times the normal density"""
    square = p * p
    density = (square * -0.5).exp_().mul_(1 / math.sqrt(2 * math.pi))
    return density.mul_(square.neg_().add_(2))


def _ln_backward(u: Tensor, z: Tensor, mean: Tensor, r: Tensor) -> Tensor:
    return torch.ops.aten.native_layer_norm_backward(
        u, z, [z.shape[-1]], mean, r, None, None, [True, False, False]
    )[0]


def _add(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total + more


class LinearStep(torch.autograd.Function):
    """`chunk_step` for weights equal to their accumulators and gates per head.

    apply(rule, count, momentum, apart, q, k, v, delta, d, beta, f, w, s, gamma, beta_ln,
    *a, *m, *g) gives (y, *a, *m) after the chunk; count matrices; m only with momentum; g only if
    `apart`: if gradients are taken elsewhere than at a.
    """

    @staticmethod
    def forward(ctx, rule: Rule, count: int, momentum: bool, apart: bool, *tensors: Any):
        q, k, v, delta, d, beta, f, w, s, gamma, beta_ln = tensors[:11]
        a = tensors[11 : 11 + count]
        m = tensors[11 + count : 11 + 2 * count] if momentum else ()
        g = tensors[-count:] if apart else a
        n = k.shape[1]

        # What the keys teach. One product serves keys and queries where both meet the same matrix.
        xs, ps, slopes = [k], [], []
        raw: Any = None
        for i, weight in enumerate(g):
            if i == 0 and not apart:
                both = torch.cat([k, q], 1) @ weight.mT
                ps.append(both[:, :n].contiguous())
                raw = both[:, n:]
            else:
                ps.append(xs[-1] @ weight.mT)
            if i < count - 1:
                xs.append(F.gelu(ps[-1]))
                slopes.append(_slope(ps[-1]))
        z = ps[-1]
        if gamma is None:
            mean = r = zh = None
            e = z - v
            out = grad = BIASES[rule.bias](e, v, delta, rule)
        else:
            zh, mean, r = torch.native_layer_norm(z, [z.shape[-1]], None, None, EPS)
            e = torch.addcmul(k - v + beta_ln, gamma, zh)
            out = BIASES[rule.bias](e, v, delta, rule)
            grad = _ln_backward(gamma * out, z, mean, r)
        gs, back = [grad], []
        for i in range(count - 1, 0, -1):
            back.append(gs[-1] @ g[i])
            gs.append(back[-1] * slopes[i - 1])
        gs.reverse()
        back.reverse()

        # What the queries find.
        qs, qps, scores = [q], [], []
        column = beta.unsqueeze(-1)
        fade: Any = None if f is None else f.unsqueeze(-1)
        started: Any = None if f is None else f[:, -1].view(-1, 1, 1)
        for i in range(count):
            if i:
                qs.append(F.gelu(qps[-1]))
            x = qs[-1]
            p = (raw if i == 0 and raw is not None else x @ a[i].mT) * column
            if m:
                p = torch.addcmul(p, x @ m[i].mT, fade)
            scores.append(x @ xs[i].mT)
            qps.append(p.baddbmm_(scores[-1] * d, gs[i], alpha=-1))
        if gamma is None:
            y, qmean, qr, qzh = qps[-1], None, None, None
        else:
            qzh, qmean, qr = torch.native_layer_norm(qps[-1], [z.shape[-1]], None, None, EPS)
            y = torch.addcmul(q + beta_ln, gamma, qzh)

        # What remains.
        ends, ends_m = [], []
        last = d[:, -1].unsqueeze(-1)
        for i in range(count):
            end = a[i] * beta[:, -1].view(-1, 1, 1)
            if m:
                end.addcmul_(m[i], started)
                end_m = m[i] * s.view(-1, 1, 1)
                ends_m.append(end_m.baddbmm_((gs[i] * w.unsqueeze(-1)).mT, xs[i], alpha=-1))
            ends.append(end.baddbmm_((gs[i] * last).mT, xs[i], alpha=-1))

        ctx.rule, ctx.count, ctx.momentum, ctx.apart = rule, count, momentum, apart
        ctx.normed = gamma is not None
        ctx.save_for_backward(
            *tensors, mean, r, zh, e, out, qmean, qr, qzh,
            *xs[1:], *ps, *slopes, *gs, *back, *qs[1:], *qps, *scores,
        )  # fmt: skip
        return (y, *ends, *ends_m)

    @staticmethod
    def backward(ctx, dy, *dends):
        first_order_only()
        saved = list(ctx.saved_tensors)

        def take(n: int) -> list:
            part = saved[:n]
            del saved[:n]
            return part

        rule, count = ctx.rule, ctx.count
        q, k, v, delta, d, beta, f, w, s, gamma, _ = take(11)
        a = take(count)
        m = take(count) if ctx.momentum else []
        g = take(count) if ctx.apart else a
        mean, r, zh, e, out, qmean, qr, qzh = take(8)
        xs, ps, slopes = [k, *take(count - 1)], take(count), take(count - 1)
        gs, back = take(count), take(count - 1)
        qs, qps, scores = [q, *take(count - 1)], take(count), take(count)
        da_next, dm_next = dends[:count], dends[count:]
        column = beta.unsqueeze(-1)
        fade: Any = None if f is None else f.unsqueeze(-1)
        started: Any = None if f is None else f[:, -1].view(-1, 1, 1)
        z = ps[-1]

        # The queries, from the answer down. left, right: factors of products that add to da.
        left: list[list[Tensor]] = [[] for _ in range(count)]
        right: list[list[Tensor]] = [[] for _ in range(count)]
        dm: list[Tensor] = [dy] * count
        dgs: list[Tensor] = [dy] * count
        dxs: list[Tensor] = [dy] * count
        dgamma: Any = None
        dbeta_ln: Any = None
        dp = dy
        if gamma is not None:
            dgamma, dbeta_ln = (dy * qzh).sum(1, True), dy.sum(1, True)
            dp = _ln_backward(gamma * dy, qps[-1], qmean, qr)
        dd, dbeta = torch.zeros_like(d), torch.zeros_like(beta)
        df: Any = torch.zeros_like(beta) if m else None
        dx = dp
        for i in range(count - 1, -1, -1):
            if i < count - 1:
                dp = _gelu_backward(dx, qps[i])
            x = qs[i]
            found = dp @ a[i]
            dbeta += (found * x).sum(-1)
            dx = found * column
            left[i].append(dp * column)
            right[i].append(x)
            if m:
                found = dp @ m[i]
                df += (found * x).sum(-1)
                dx.addcmul_(found, fade)
                dm[i] = (dp * fade).mT @ x
            inside = dp @ gs[i].mT
            dgs[i] = ((scores[i] * d).mT @ dp).neg_()
            dd.addcmul_(inside, scores[i], value=-1)
            dscores = inside.mul_(d).neg_()
            dx.baddbmm_(dscores, xs[i])
            dxs[i] = dscores.mT @ x
        dq = dx if gamma is None else dx + dy

        # What remained.
        dlast = d.new_zeros(d.shape[:2])
        dw: Any = torch.zeros_like(w) if m else None
        ds: Any = torch.zeros_like(s) if m else None
        last = d[:, -1].unsqueeze(-1)
        for i in range(count):
            dbeta[:, -1] += (da_next[i] * a[i]).sum((1, 2))
            taught = xs[i] @ da_next[i].mT
            dlast -= (gs[i] * taught).sum(-1)
            dgs[i].addcmul_(taught, last, value=-1)
            dxs[i].baddbmm_(gs[i] * last, da_next[i], alpha=-1)
            if m:
                df[:, -1] += (da_next[i] * m[i]).sum((1, 2))
                dm[i].addcmul_(da_next[i], started)
                dm[i].addcmul_(dm_next[i], s.view(-1, 1, 1))
                ds += (dm_next[i] * m[i]).sum((1, 2))
                taught = xs[i] @ dm_next[i].mT
                dw -= (gs[i] * taught).sum(-1)
                dgs[i].addcmul_(taught, w.unsqueeze(-1), value=-1)
                dxs[i].baddbmm_(gs[i] * w.unsqueeze(-1), dm_next[i], alpha=-1)
        dd[:, -1] += dlast

        # What the keys taught: from the first matrix up, as its gradients came from the last down.
        gleft, gright = (
            ([[] for _ in range(count)] for _ in range(2)) if ctx.apart else (left, right)
        )
        dps: list[Tensor] = []
        for i in range(count - 1):
            dback = dgs[i] * slopes[i]
            dps.append((dgs[i] * back[i]).mul_(_curve(ps[i])))
            dgs[i + 1].baddbmm_(dback, g[i + 1].mT)
            gleft[i + 1].append(gs[i + 1])
            gright[i + 1].append(dback)
        dgrad = dgs[-1]
        dout = dgrad
        if gamma is not None:
            du = _ln_backward(dgrad, z, mean, r)
            dgamma += (du * out).sum(1, True)
            dout = gamma * du
        de, dv, ddelta = _bias_backward(rule, e, v, delta, dout)
        dz = de
        dk = None
        if gamma is not None:
            dgamma += (de * zh).sum(1, True)
            dbeta_ln += de.sum(1, True)
            u = gamma * out
            inner = (dgrad * zh).mean(-1, True) * u + (u * zh).mean(-1, True) * dgrad
            dz = _ln_backward(torch.addcmul(gamma * de, inner, r, value=-1), z, mean, r)
            dz.addcmul_(zh * r, (dgrad * gs[-1]).mean(-1, True), value=-1)
            dk = de
        dv = -de if dv is None else dv - de
        dp = dz
        for i in range(count - 1, -1, -1):
            if i < count - 1:
                dp = dps[i].addcmul_(dxs[i + 1], slopes[i])
            gleft[i].append(dp)
            gright[i].append(xs[i])
            dxs[i].baddbmm_(dp, g[i])
        dk = _add(dk, dxs[0])

        def products(i: int, lefts: list, rights: list) -> tuple[Tensor, Tensor]:
            return torch.cat(lefts[i], 1).mT, torch.cat(rights[i], 1)

        da = []
        for i in range(count):
            kept = da_next[i] * beta[:, -1].view(-1, 1, 1)
            da.append(kept.baddbmm_(*products(i, left, right)))
        dg = []
        if ctx.apart:
            dg = [torch.bmm(*products(i, gleft, gright)) for i in range(count)]
        return (
            None, None, None, None,
            dq, dk, dv, ddelta, dd, dbeta, df, dw, ds, dgamma, dbeta_ln,
            *da, *(dm if m else ()), *dg,
        )  # fmt: skip


def _bias_backward(
    rule: Rule, e: Tensor, v: Tensor, delta: Tensor | None, dout: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients by the error, the value and the threshold."""
    if rule.bias == "l2":
        return dout, None, None
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (e, v, delta) if x is not None]
        out = BIASES[rule.bias](
            inputs[0], inputs[1], inputs[2] if delta is not None else None, rule
        )
        de, dv, *rest = torch.autograd.grad(out, inputs, dout, allow_unused=True)
    return torch.zeros_like(e) if de is None else de, dv, rest[0] if rest else None
