"""Queries and keys normed and turned by their positions, values copied, in one kernel each way.

The heads of a token are q (QH) | k (KH) | v (VH), D numbers each; those of q and k are normed over
D (NORM), then their first DIM numbers are turned: with u, w the halves of these,

    u cos - w sin | w cos + u sin

The three parts are read and written where they lie: at a row of the batch, a token and a head by
strides in units of ALIGN numbers, so that rows are known to be aligned without a compilation for
each length. A program has a tile of tokens and GROUP heads of one part, ONCE of them
at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longscan.kernels._launch import entry


@triton.jit
def _tokens(tokens, length, BLOCK_T: tl.constexpr):
    """Of a program: rows of the batch, tokens in them, both counted through, which exist."""
    n = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    row = n // length
    return row.to(tl.int64), (n - row * length).to(tl.int64), n.to(tl.int64), n < tokens


@triton.jit
def _factors(
    cos, sin, token, n, ok,
    DIM: tl.constexpr, BLOCK_H: tl.constexpr, PER_ROW: tl.constexpr,
):  # fmt: skip
    """cos and sin [BLOCK_T, BLOCK_H] of the angles, from tables of [.., DIM] numbers."""
    HALF: tl.constexpr = DIM // 2
    c = tl.arange(0, BLOCK_H)[None, :]
    at = (n if PER_ROW else token) * DIM + c
    mask = ok & (c < HALF)
    return tl.load(cos + at, mask=mask, other=0.0), tl.load(sin + at + HALF, mask=mask, other=0.0)


@triton.jit
def _weights(
    weight, D: tl.constexpr, DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_E: tl.constexpr
):
    """The norm's weight for u, for w, and for what is not turned."""
    HALF: tl.constexpr = DIM // 2
    c = tl.arange(0, BLOCK_H)[None, :]
    e = tl.arange(0, BLOCK_E)[None, :]
    a = tl.load(weight + c, mask=c < HALF, other=0.0).to(tl.float32)
    b = tl.load(weight + HALF + c, mask=c < HALF, other=0.0).to(tl.float32)
    return a, b, tl.load(weight + DIM + e, mask=e < D - DIM, other=0.0).to(tl.float32)


@triton.jit
def _read(at, ok, D: tl.constexpr, DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_E: tl.constexpr):
    """A head of each token: u, w [BLOCK_T, BLOCK_H] and what is not turned [BLOCK_T, BLOCK_E]."""
    HALF: tl.constexpr = DIM // 2
    c = tl.arange(0, BLOCK_H)[None, :]
    e = tl.arange(0, BLOCK_E)[None, :]
    u = tl.zeros([ok.shape[0], BLOCK_H], tl.float32)
    w = tl.zeros([ok.shape[0], BLOCK_H], tl.float32)
    z = tl.zeros([ok.shape[0], BLOCK_E], tl.float32)
    if DIM > 0:
        u = tl.load(at + c, mask=ok & (c < HALF), other=0.0).to(tl.float32)
        w = tl.load(at + HALF + c, mask=ok & (c < HALF), other=0.0).to(tl.float32)
    if DIM < D:
        z = tl.load(at + DIM + e, mask=ok & (e < D - DIM), other=0.0).to(tl.float32)
    return u, w, z


@triton.jit
def _write(
    at, ok, u, w, z, D: tl.constexpr, DIM: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = DIM // 2
    kind = at.dtype.element_ty
    c = tl.arange(0, BLOCK_H)[None, :]
    e = tl.arange(0, BLOCK_E)[None, :]
    if DIM > 0:
        tl.store(at + c, u.to(kind), mask=ok & (c < HALF))
        tl.store(at + HALF + c, w.to(kind), mask=ok & (c < HALF))
    if DIM < D:
        tl.store(at + DIM + e, z.to(kind), mask=ok & (e < D - DIM))


@triton.jit
def _part(
    x, y, raw, weight, partial, cos, sin, eps, row, token, n, ok, group,
    x_row, x_token, x_head, y_row, y_token, y_head,
    HEADS: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr, ALIGN: tl.constexpr, GROUP: tl.constexpr, ONCE: tl.constexpr,
    PER_ROW: tl.constexpr, TURN: tl.constexpr, NORM: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Some heads of q, of k or of v from x to y. BACK: x is a gradient, that of what the forward
    made of `raw`, which lies as y does; partial [D]: what these heads give to that of weight."""
    from_ = x + (row * x_row + token * x_token) * ALIGN
    place = (row * y_row + token * y_token) * ALIGN
    if TURN:
        c, s = _factors(cos, sin, token, n, ok, DIM, BLOCK_H, PER_ROW)
        if BACK:
            s = -s
    if NORM:
        wu, ww, wz = _weights(weight, D, DIM, BLOCK_H, BLOCK_E)
        du = tl.zeros([BLOCK_H], tl.float32)
        dw = tl.zeros([BLOCK_H], tl.float32)
        dz = tl.zeros([BLOCK_E], tl.float32)
    for i in range(0, GROUP, ONCE):
        for j in tl.static_range(ONCE):
            head = (group * GROUP + i + j).to(tl.int64)
            on = ok & (head < HEADS)
            to = place + head * y_head * ALIGN
            u, w, z = _read(from_ + head * x_head * ALIGN, on, D, DIM, BLOCK_H, BLOCK_E)
            if NORM and not BACK:
                mean = (tl.sum(u * u, 1) + tl.sum(w * w, 1) + tl.sum(z * z, 1)) / D
                rstd = tl.rsqrt(mean + eps)[:, None]
                u = u * rstd * wu
                w = w * rstd * ww
                z = z * rstd * wz
            if TURN:
                turned = u * c - w * s
                w = w * c + u * s
                u = turned
            if NORM and BACK:
                nu, nw, nz = _read(raw + to, on, D, DIM, BLOCK_H, BLOCK_E)
                mean = (tl.sum(nu * nu, 1) + tl.sum(nw * nw, 1) + tl.sum(nz * nz, 1)) / D
                rstd = tl.rsqrt(mean + eps)[:, None]
                nu = nu * rstd
                nw = nw * rstd
                nz = nz * rstd
                du += tl.sum(u * nu, 0)
                dw += tl.sum(w * nw, 0)
                dz += tl.sum(z * nz, 0)
                u = u * wu
                w = w * ww
                z = z * wz
                along = (tl.sum(u * nu, 1) + tl.sum(w * nw, 1) + tl.sum(z * nz, 1)) / D
                along = along[:, None]
                u = rstd * (u - nu * along)
                w = rstd * (w - nw * along)
                z = rstd * (z - nz * along)
            _write(y + to, on, u, w, z, D, DIM, BLOCK_H, BLOCK_E)
    if NORM and BACK:
        h = tl.arange(0, BLOCK_H)
        e = tl.arange(0, BLOCK_E)
        tl.store(partial + h, du, mask=h < DIM // 2)
        tl.store(partial + DIM // 2 + h, dw, mask=h < DIM // 2)
        tl.store(partial + DIM + e, dz, mask=e < D - DIM)


_RUNTIME = [
    "tokens", "length", "xq_row", "xq_token", "xq_head", "xk_row", "xk_token", "xk_head",
    "xv_row", "xv_token", "xv_head", "yq_row", "yq_token", "yq_head", "yk_row", "yk_token",
    "yk_head", "yv_row", "yv_token", "yv_head",
]  # fmt: skip


@entry
@triton.jit(do_not_specialize=_RUNTIME)
def turn(
    xq, xk, xv, yq, yk, yv, raw, q_weight, k_weight, partial, cos, sin, eps, tokens, length,
    xq_row, xq_token, xq_head, xk_row, xk_token, xk_head, xv_row, xv_token, xv_head,
    yq_row, yq_token, yq_head, yk_row, yk_token, yk_head, yv_row, yv_token, yv_head,
    QH: tl.constexpr, KH: tl.constexpr, VH: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr, GROUP: tl.constexpr, ONCE: tl.constexpr, PER_ROW: tl.constexpr,
    NORM: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of tokens, groups of heads. From x, rows [q | k | v | ..], to q, k and v; or BACK
    from the gradients of these to that of x, which lies as `raw`, the x of the forward; partial
    [tiles, groups of q and k, D]."""
    QG: tl.constexpr = (QH + GROUP - 1) // GROUP
    KG: tl.constexpr = (KH + GROUP - 1) // GROUP
    XK: tl.constexpr = 0 if BACK else QH * D
    XV: tl.constexpr = 0 if BACK else (QH + KH) * D
    YK: tl.constexpr = QH * D if BACK else 0
    YV: tl.constexpr = (QH + KH) * D if BACK else 0
    row, token, n, ok = _tokens(tokens, length, BLOCK_T)
    group = tl.program_id(1)
    mine = partial + (tl.program_id(0).to(tl.int64) * (QG + KG) + group) * D
    if group < QG:
        _part(
            xq, yq, raw, q_weight, mine, cos, sin, eps, row, token, n, ok, group,
            xq_row, xq_token, xq_head, yq_row, yq_token, yq_head,
            QH, D, DIM, BLOCK_H, BLOCK_E, ALIGN, GROUP, ONCE, PER_ROW, DIM > 0, NORM, BACK,
        )  # fmt: skip
    elif group < QG + KG:
        _part(
            xk + XK, yk + YK, raw + QH * D, k_weight, mine, cos, sin, eps, row, token, n, ok,
            group - QG,
            xk_row, xk_token, xk_head, yk_row, yk_token, yk_head,
            KH, D, DIM, BLOCK_H, BLOCK_E, ALIGN, GROUP, ONCE, PER_ROW, DIM > 0, NORM, BACK,
        )  # fmt: skip
    else:
        _part(
            xv + XV, yv + YV, raw, q_weight, mine, cos, sin, eps, row, token, n, ok,
            group - QG - KG,
            xv_row, xv_token, xv_head, yv_row, yv_token, yv_head,
            VH, D, 0, 1, BLOCK_D, ALIGN, GROUP, ONCE, PER_ROW, False, False, BACK,
        )  # fmt: skip
