"""The parts of a chunk of `memory`: what its tokens teach, how each then finds the memory.

All axes are [N, C, ...]: N rows and heads side by side, C tokens of one chunk. A gate is one number
per head, or one per channel: rows of the last matrix (the only one, of a linear memory) and
columns of the first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from longscan.ops._memory_rule import Rule
from longscan.ops._scores import decay_factors

if TYPE_CHECKING:
    from longscan.ops._memory import Tokens

EPS = 1e-6
LARGE = 1e9


def first_order_only() -> None:
    """Raise RuntimeError in a backward that is itself to be differentiated."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "this fast form has no second derivatives (create_graph=True); "
            "pass backend='reference' or set LONGSCAN_BACKEND=reference"
        )


class Coefficients(NamedTuple):
    """How a chunk's accumulators A_t and momentum S_t hang on its start and on its gradients G_j.

    A_t = beta_t A_0 + f_t S_0 - sum_j d_tj G_j;   S_end = s S_0 - sum_j w_j G_j
    Shapes: d [..., C, C]; beta, f, w [..., C]; s [...]; f, w and s None without momentum.
    """

    d: Tensor
    beta: Tensor
    f: Tensor | None = None
    w: Tensor | None = None
    s: Tensor | None = None


def coefficients(
    eta: Tensor, b: Tensor | None, mu: Tensor | None, valid: Tensor | None
) -> Coefficients:
    """From steps and from cumulative logarithms (base 2) of retention and momentum, all [..., C].

    A slot without a token (valid False) has eta = 0 and keeps everything; momentum must not be
    added there.
    """
    if b is None:
        b = torch.zeros_like(eta)
    decay = decay_factors(b)
    if mu is None:
        return Coefficients(decay * eta.unsqueeze(-2), b.exp2())
    if valid is not None:
        decay = decay * valid.to(decay.dtype).unsqueeze(-2)
    carry = decay_factors(mu)
    kept = mu.exp2()
    d = (decay @ carry) * eta.unsqueeze(-2)
    f = (decay @ kept.unsqueeze(-1)).squeeze(-1)
    return Coefficients(d, b.exp2(), f, carry[..., -1, :] * eta, kept[..., -1])


class Norm(NamedTuple):
    """gamma and beta of M(x) = x + LN(net(x)), each [N, 1, d]."""

    gamma: Tensor
    beta: Tensor


def normed(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm without gain: the result, the mean, 1 / deviation."""
    return torch.native_layer_norm(z, [z.shape[-1]], None, None, EPS)


def finish(x: Tensor, z: Tensor, norm: Norm | None) -> Tensor:
    """The memory's output for input x and output z of its net."""
    if norm is None:
        return z
    # What a map of the chunk's start makes of accumulators that have grown since can be so large
    # that its square is not a number.
    z = z / (z.detach().abs().amax(-1, True) / LARGE).clamp(min=1)
    return torch.addcmul(x + norm.beta, norm.gamma, normed(z)[0])


class Learned(NamedTuple):
    """Factors of a chunk's gradients g_j a_j^T, per matrix: a [N, C, in], g [N, C, out]."""

    a: list[Tensor]
    g: list[Tensor]


def learn(weights: list[Tensor], k: Tensor, v: Tensor, norm: Norm | None, bias) -> Learned:
    """Gradients of the inner loss of every token at the same weights.

    bias(e, v) is the derivative of the loss by the memory's output M(k), e = M(k) - v.
    """
    acts, pre = [k], []
    for w in weights:
        pre.append(acts[-1] @ w.mT)
        acts.append(F.gelu(pre[-1]))
    z = pre[-1]
    if norm is None:
        g = bias(z - v, v)
    else:
        zh, mean, rstd = normed(z)
        e = torch.addcmul(k - v + norm.beta, norm.gamma, zh)
        u = norm.gamma * bias(e, v)
        g = torch.ops.aten.native_layer_norm_backward(
            u, z, [z.shape[-1]], mean, rstd, None, None, [True, False, False]
        )[0]
    grads = [g]
    for w, p in zip(weights[:0:-1], pre[-2::-1], strict=True):
        grads.append(torch.ops.aten.gelu_backward(grads[-1] @ w, p))
    return Learned(acts[:-1], grads[::-1])


def side_of(index: int, count: int, c: Coefficients, rule: Rule) -> str:
    """What the gates of matrix `index` of `count` scale: "all" of it, its "rows" or "columns"."""
    if c.beta.ndim == 2:
        return "all"
    last = index == count - 1 and (count > 1 or rule.channels == "value")
    return "rows" if last else "columns"


def beside(x: Tensor, side: str) -> Tensor:
    """One gate of every matrix, [N] or [N, D], beside [N, out, in]."""
    if side == "all":
        return x.view(-1, 1, 1)
    return x.unsqueeze(-1 if side == "rows" else -2)


def read(
    x: Tensor, a0: Tensor, s0: Tensor | None, a: Tensor, g: Tensor, c: Coefficients, side: str
) -> Tensor:
    """A_t x_t for every token t of the chunk, without writing A_t out: [N, C, out].

    x [N, C, in]; a0, s0 [N, out, in]; a, g as in `Learned`.
    """
    if side == "all":
        beta, f = c.beta.unsqueeze(-1), None if c.f is None else c.f.unsqueeze(-1)
    else:
        beta, f = c.beta.mT, None if c.f is None else c.f.mT
    if side == "columns":
        p = (x * beta) @ a0.mT
        if f is not None and s0 is not None:
            p = torch.baddbmm(p, x * f, s0.mT)
        scores = (c.d * (x.mT.unsqueeze(-1) * a.mT.unsqueeze(-2))).sum(1)
        return torch.baddbmm(p, scores, g, alpha=-1)
    p = (x @ a0.mT) * beta
    if f is not None and s0 is not None:
        p = torch.addcmul(p, x @ s0.mT, f)
    if side == "all":
        return torch.baddbmm(p, (x @ a.mT) * c.d, g, alpha=-1)
    inside = (c.d * (x @ a.mT).unsqueeze(1)) @ g.mT.unsqueeze(-1)
    return p - inside.squeeze(-1).mT


def advance(
    a0: Tensor, s0: Tensor | None, a: Tensor, g: Tensor, c: Coefficients, side: str
) -> tuple[Tensor, Tensor | None]:
    """The accumulator and the momentum after the chunk."""

    def products(w: Tensor, kept: Tensor) -> Tensor:
        if side == "columns":
            return torch.baddbmm(kept, g.mT, a * w.mT, alpha=-1)
        return torch.baddbmm(
            kept, (g * (w.unsqueeze(-1) if side == "all" else w.mT)).mT, a, alpha=-1
        )

    kept = a0 * beside(c.beta[..., -1], side)
    if s0 is None or c.f is None or c.w is None or c.s is None:
        return products(c.d[..., -1, :], kept), None
    kept = torch.addcmul(kept, s0, beside(c.f[..., -1], side))
    return products(c.d[..., -1, :], kept), products(c.w, s0 * beside(c.s, side))


def unrolled(
    a0: Tensor, s0: Tensor | None, a: Tensor, g: Tensor, c: Coefficients, side: str
) -> Tensor:
    """A_t of every token of the chunk, written out: [N, C, out, in]."""
    if side == "columns":
        flipped = None if s0 is None else s0.mT
        return unrolled(a0.mT, flipped, g, a, c, "rows").mT
    n, steps = a.shape[:2]

    def of(x: Tensor) -> Tensor:  # [N, C] or [N, D, C] beside [N, C, out, in]
        return x.view(n, steps, 1, 1) if side == "all" else x.mT.unsqueeze(-1)

    kept = of(c.beta) * a0.unsqueeze(1)
    if s0 is not None and c.f is not None:
        kept = torch.addcmul(kept, of(c.f), s0.unsqueeze(1))
    d = c.d.unsqueeze(2) if side == "all" else c.d.transpose(1, 2)  # [N, C, 1 or D, C]
    left = (d * g.mT.unsqueeze(1)).flatten(1, 2)  # [N, C * out, C]
    return torch.baddbmm(kept.flatten(1, 2), left, a, alpha=-1).unflatten(1, (steps, -1))


class MatrixNorm(torch.autograd.Function):
    """|A|_q over [.., out, in], kept; autograd would write each A several times over."""

    @staticmethod
    def forward(ctx, a: Tensor, q: float) -> Tensor:
        largest = torch.maximum(a.amax((-2, -1), True), -a.amin((-2, -1), True))
        x = a / torch.where(largest > 0, largest, 1)
        x = x.square_().square_() if q == 4 else x.abs_().pow_(q)
        norm = x.sum((-2, -1), True).pow(1 / q) * largest
        ctx.q = q
        ctx.save_for_backward(a, norm)
        return norm

    @staticmethod
    def backward(ctx, dnorm: Tensor):
        first_order_only()
        a, norm = ctx.saved_tensors
        x = a / torch.where(norm > 0, norm, 1)
        power = x.square() if ctx.q == 4 else x.abs().pow_(ctx.q - 2)
        return power.mul_(x).mul_(dnorm), None


def shrunk(
    x: Tokens,
    rule: Rule,
    a0: Tensor,
    s0: Tensor | None,
    a: Tensor,
    g: Tensor,
    c: Coefficients,
    side: str,
) -> Tensor:
    """As `unrolled`, where every update is followed by a shrinkage: token after token."""
    assert rule.map.shrink is not None
    keep = mu = None
    if x.b is not None:
        keep = x.b.diff(prepend=torch.zeros_like(x.b[..., :1])).exp2()
    if x.mu is not None:
        mu = x.mu.diff(prepend=torch.zeros_like(x.mu[..., :1])).exp2()
    out = []
    for t in range(a.shape[1]):
        eta = beside(x.eta[..., t], side)
        update = -eta * g[:, t].unsqueeze(-1) * a[:, t].unsqueeze(-2)
        if s0 is not None and mu is not None:
            s0 = update = torch.addcmul(update, s0, beside(mu[..., t], side))
            if x.valid is not None:
                update = update * x.valid[:, t].view(-1, 1, 1).to(update.dtype)
        kept = a0 if keep is None else a0 * beside(keep[..., t], side)
        a0 = rule.map.shrink(kept + update, eta, rule)
        out.append(a0)
    return torch.stack(out, 1)
