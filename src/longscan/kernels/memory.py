"""`memory` of two layers with a norm in one kernel: a program walks through the chunks of a row.

The state of a row and head, 8 D^2 numbers and as many of momentum, stays in the second-level cache
and is read and written in blocks of BLOCK hidden units; nothing else leaves the chip but y. The
backward goes through the chunks from the last to the first, from the states before each of them.
Names as in `longscan.ops._memory_grad`: a letter d before a name is the gradient by it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longscan.kernels._launch import entry

EPS = tl.constexpr(1e-6)
PRECISION = tl.constexpr("ieee")


@triton.jit
def _gelu(x):
    return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _slope(x):
    return 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(
        -0.5 * x * x
    )


@triton.jit
def _curve(x):
    return (2 - x * x) * 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def _dot(a, b):
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _mean(x, D: tl.constexpr):
    return (tl.sum(x, 1) / D)[:, None]


@triton.jit
def _norm(z, D: tl.constexpr):
    """z normalised, and 1 / deviation."""
    z = z - _mean(z, D)
    r = 1 / tl.sqrt(_mean(z * z, D) + EPS)
    return z * r, r


@triton.jit
def _through_norm(u, zh, r, D: tl.constexpr):
    """The backward of a LayerNorm without gain."""
    return r * (u - _mean(u, D) - zh * _mean(u * zh, D))


@triton.jit
def _length(e):
    """|e|, which does not overflow, and is 1 where e = 0."""
    top = tl.max(tl.abs(e), 1)[:, None]
    top = tl.where(top > 0, top, 1.0)
    e = e / top
    n = tl.sqrt(tl.sum(e * e, 1))[:, None] * top
    return tl.where(n > 0, n, 1.0)


@triton.jit
def _tanh(x):
    t = tl.exp(-2 * tl.abs(x))
    t = (1 - t) / (1 + t)
    return tl.where(x < 0, -t, t)


@triton.jit
def _sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))


@triton.jit
def _bias(e, delta, sharpness, KIND: tl.constexpr):
    """The derivative of the inner loss by the memory's output."""
    if KIND == 0:
        out = e
    elif KIND == 1:
        out = 2 * e
    elif KIND == 2:
        out = tl.where(tl.abs(e) <= delta, e, delta * _sign(e))
    elif KIND == 3:
        n = _length(e)
        out = tl.where(n <= delta, e, delta * (e / n))
    else:
        out = tl.where(_length(e) <= delta, e, delta * _tanh(sharpness * e))
    return out


@triton.jit
def _bias_backward(e, delta, dout, sharpness, KIND: tl.constexpr):
    """Gradients by e, and by delta before it is summed over channels."""
    ddelta = tl.zeros_like(e)
    if KIND == 0:
        de = dout
    elif KIND == 1:
        de = 2 * dout
    elif KIND == 2:
        inside = tl.abs(e) <= delta
        de = tl.where(inside, dout, 0.0)
        ddelta = tl.where(inside, 0.0, _sign(e) * dout)
    elif KIND == 3:
        n = _length(e)
        way = e / n
        inside = n <= delta
        along = tl.sum(way * dout, 1)[:, None]
        de = tl.where(inside, dout, delta / n * (dout - way * along))
        ddelta = tl.where(inside, 0.0, way * dout)
    else:
        inside = _length(e) <= delta
        t = _tanh(sharpness * e)
        de = tl.where(inside, dout, delta * sharpness * (1 - t * t) * dout)
        ddelta = tl.where(inside, 0.0, t * dout)
    return de, ddelta


@triton.jit
def _taught(a0, a1, K, V, gamma, shift, delta, sharpness, D: tl.constexpr, E: tl.constexpr,
            BLOCK: tl.constexpr, KIND: tl.constexpr):  # fmt: skip
    """What the keys teach: zh, r, e, out and the gradient gz by the output of the net."""
    od, ob = tl.arange(0, D), tl.arange(0, BLOCK)
    z = tl.zeros_like(K)
    for b in range(0, E, BLOCK):
        A0 = tl.load(a0 + (b + ob)[:, None] * D + od[None, :])
        A1 = tl.load(a1 + od[:, None] * E + (b + ob)[None, :])
        z += _dot(_gelu(_dot(K, tl.trans(A0))), tl.trans(A1))
    zh, r = _norm(z, D)
    e = K - V + shift + gamma * zh
    out = _bias(e, delta, sharpness, KIND)
    return zh, r, e, out, _through_norm(gamma * out, zh, r, D)


@entry
@triton.jit
def forward(
    q, k, v, delta, d, beta, f, w, s, gamma, shift,
    a0, a1, m0, m1, g0, g1, y, starts,
    first, steps, begin, end, every, sharpness, H, N,
    C: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr,
    MOMENTUM: tl.constexpr, READ: tl.constexpr,
):  # fmt: skip
    """Chunks begin .. end - 1 of every row; a0, a1, m0, m1 are changed in place.

    g0, g1: the state before the last chunk of a row. starts: before every `every`-th from begin.
    READ: whether y is wanted.
    """
    n = tl.program_id(0)
    row, head = n // H, n % H
    oc, od, ob = tl.arange(0, C), tl.arange(0, D), tl.arange(0, BLOCK)
    tile = oc[:, None] * D + od[None, :]
    gain = tl.load(gamma + n * D + od)[None, :]
    move = tl.load(shift + n * D + od)[None, :]
    size = E * D
    a0 += n.to(tl.int64) * size
    a1 += n.to(tl.int64) * size
    m0 += n.to(tl.int64) * size
    m1 += n.to(tl.int64) * size
    g0 += n.to(tl.int64) * size
    g1 += n.to(tl.int64) * size
    mine = tl.load(steps + row)
    for i in range(begin, end):
        if i < mine:
            at = (tl.load(first + i) + row).to(tl.int64) * H + head
            K = tl.load(k + at * C * D + tile)
            V = tl.load(v + at * C * D + tile)
            limit = tl.zeros([C, 1], tl.float32)
            if KIND >= 2:
                limit = tl.load(delta + at * C + oc)[:, None]
            _zh, _r, _e, _out, gz = _taught(
                a0, a1, K, V, gain, move, limit, sharpness, D, E, BLOCK, KIND
            )
            Q = tl.load(q + at * C * D + tile)
            DM = tl.load(d + at * C * C + oc[:, None] * C + oc[None, :])
            be = tl.load(beta + at * C + oc)[:, None]
            last = tl.load(d + at * C * C + (C - 1) * C + oc)[:, None]
            b_end = tl.load(beta + at * C + C - 1)
            if MOMENTUM:
                fe = tl.load(f + at * C + oc)[:, None]
                f_end = tl.load(f + at * C + C - 1)
                we = tl.load(w + at * C + oc)[:, None]
                keep = tl.load(s + at)
            near = _dot(Q, tl.trans(K)) * DM
            zq = tl.zeros_like(K)
            scores = tl.zeros([C, C], tl.float32)
            put = (i - begin) % every == 0
            slot = (
                starts
                + (((i - begin) // every).to(tl.int64) * N + n) * (4 if MOMENTUM else 2) * size
            )
            for b in range(0, E, BLOCK):
                rows = (b + ob)[:, None] * D + od[None, :]
                columns = od[:, None] * E + (b + ob)[None, :]
                A0 = tl.load(a0 + rows)
                A1 = tl.load(a1 + columns)
                p = _dot(K, tl.trans(A0))
                x = _gelu(p)
                gp = _dot(gz, A1) * _slope(p)
                N0 = A0 * b_end - _dot(tl.trans(gp * last), K)
                N1 = A1 * b_end - _dot(tl.trans(gz * last), x)
                if READ:
                    qp = _dot(Q, tl.trans(A0)) * be - _dot(near, gp)
                if MOMENTUM:
                    M0 = tl.load(m0 + rows)
                    M1 = tl.load(m1 + columns)
                    N0 += M0 * f_end
                    N1 += M1 * f_end
                    tl.store(m0 + rows, M0 * keep - _dot(tl.trans(gp * we), K))
                    tl.store(m1 + columns, M1 * keep - _dot(tl.trans(gz * we), x))
                    if READ:
                        qp += _dot(Q, tl.trans(M0)) * fe
                if READ:
                    xq = _gelu(qp)
                    zq += _dot(xq, tl.trans(A1)) * be
                    if MOMENTUM:
                        zq += _dot(xq, tl.trans(M1)) * fe
                    scores += _dot(xq, tl.trans(x))
                if put:
                    tl.store(slot + rows, A0)
                    tl.store(slot + size + columns, A1)
                    if MOMENTUM:
                        tl.store(slot + 2 * size + rows, M0)
                        tl.store(slot + 3 * size + columns, M1)
                if i == mine - 1:
                    tl.store(g0 + rows, A0)
                    tl.store(g1 + columns, A1)
                tl.store(a0 + rows, N0)
                tl.store(a1 + columns, N1)
            if READ:
                zq -= _dot(scores * DM, gz)
                qh, _qr = _norm(zq, D)
                tl.store(y + at * C * D + tile, Q + move + gain * qh)
            tl.debug_barrier()


@entry
@triton.jit
def backward(
    q, k, v, delta, d, beta, f, w, s, gamma, shift, starts,
    dy, da0, da1, dm0, dm1, dg0, dg1, scratch,
    dq, dk, dv, ddelta, dd, dbeta, df, dw, ds, dgamma, dshift,
    first, steps, begin, end, sharpness, H, N,
    C: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr,
    MOMENTUM: tl.constexpr,
):  # fmt: skip
    """Chunks end - 1 .. begin of every row; da0, da1, dm0, dm1, dgamma, dshift change in place.

    starts: the states before each of these chunks. scratch: [N, C, E].
    """
    n = tl.program_id(0)
    row, head = n // H, n % H
    oc, od, ob = tl.arange(0, C), tl.arange(0, D), tl.arange(0, BLOCK)
    tile = oc[:, None] * D + od[None, :]
    square = oc[:, None] * C + oc[None, :]
    gain = tl.load(gamma + n * D + od)[None, :]
    move = tl.load(shift + n * D + od)[None, :]
    size = E * D
    da0 += n.to(tl.int64) * size
    da1 += n.to(tl.int64) * size
    dm0 += n.to(tl.int64) * size
    dm1 += n.to(tl.int64) * size
    dg0 += n.to(tl.int64) * size
    dg1 += n.to(tl.int64) * size
    scratch += n.to(tl.int64) * C * E
    dgain = tl.load(dgamma + n * D + od)
    dmove = tl.load(dshift + n * D + od)
    mine = tl.load(steps + row)
    for j in range(begin, end):
        i = end - 1 - (j - begin)
        if i < mine:
            at = (tl.load(first + i) + row).to(tl.int64) * H + head
            a0 = starts + ((i - begin).to(tl.int64) * N + n) * (4 if MOMENTUM else 2) * size
            a1 = a0 + size
            m0 = a0 + 2 * size
            m1 = a0 + 3 * size
            K = tl.load(k + at * C * D + tile)
            V = tl.load(v + at * C * D + tile)
            limit = tl.zeros([C, 1], tl.float32)
            if KIND >= 2:
                limit = tl.load(delta + at * C + oc)[:, None]
            zh, r, e, out, gz = _taught(
                a0, a1, K, V, gain, move, limit, sharpness, D, E, BLOCK, KIND
            )
            Q = tl.load(q + at * C * D + tile)
            DY = tl.load(dy + at * C * D + tile)
            DM = tl.load(d + at * C * C + square)
            be = tl.load(beta + at * C + oc)[:, None]
            last = tl.load(d + at * C * C + (C - 1) * C + oc)[:, None]
            b_end = tl.load(beta + at * C + C - 1)
            if MOMENTUM:
                fe = tl.load(f + at * C + oc)[:, None]
                f_end = tl.load(f + at * C + C - 1)
                we = tl.load(w + at * C + oc)[:, None]
                keep = tl.load(s + at)
            raw = _dot(Q, tl.trans(K))
            near = raw * DM

            # The queries once more, for the norm of their answers.
            zq = tl.zeros_like(K)
            scores = tl.zeros([C, C], tl.float32)
            for b in range(0, E, BLOCK):
                rows = (b + ob)[:, None] * D + od[None, :]
                columns = od[:, None] * E + (b + ob)[None, :]
                A0 = tl.load(a0 + rows)
                A1 = tl.load(a1 + columns)
                p = _dot(K, tl.trans(A0))
                qp = _dot(Q, tl.trans(A0)) * be - _dot(near, _dot(gz, A1) * _slope(p))
                if MOMENTUM:
                    qp += _dot(Q, tl.trans(tl.load(m0 + rows))) * fe
                xq = _gelu(qp)
                zq += _dot(xq, tl.trans(A1)) * be
                if MOMENTUM:
                    zq += _dot(xq, tl.trans(tl.load(m1 + columns))) * fe
                scores += _dot(xq, tl.trans(_gelu(p)))
            zq -= _dot(scores * DM, gz)
            qh, qr = _norm(zq, D)
            dgain += tl.sum(DY * qh, 0)
            dmove += tl.sum(DY, 0)
            dzq = _through_norm(gain * DY, qh, qr, D)
            inside = _dot(dzq, tl.trans(gz))
            dD = -inside * scores
            dscores = -inside * DM
            dgz = -_dot(tl.trans(scores * DM), dzq)

            # Down the queries, and what the state after the chunk asks of the keys.
            dbe = tl.zeros([C], tl.float32)
            dfe = tl.zeros([C], tl.float32)
            dlast = tl.zeros([C], tl.float32)
            dwe = tl.zeros([C], tl.float32)
            found = tl.zeros_like(K)
            found_m = tl.zeros_like(K)
            taught = tl.zeros_like(K)
            taught_m = tl.zeros_like(K)
            dK = tl.zeros_like(K)
            inside = tl.zeros([C, C], tl.float32)
            db_end = tl.zeros([BLOCK], tl.float32)
            df_end = tl.zeros([BLOCK], tl.float32)
            dkeep = tl.zeros([BLOCK], tl.float32)
            for b in range(0, E, BLOCK):
                rows = (b + ob)[:, None] * D + od[None, :]
                columns = od[:, None] * E + (b + ob)[None, :]
                A0 = tl.load(a0 + rows)
                A1 = tl.load(a1 + columns)
                DA0 = tl.load(da0 + rows)
                DA1 = tl.load(da1 + columns)
                p = _dot(K, tl.trans(A0))
                x = _gelu(p)
                slope = _slope(p)
                back = _dot(gz, A1)
                gp = back * slope
                qp = _dot(Q, tl.trans(A0)) * be - _dot(near, gp)
                hit = _dot(dzq, A1)
                dxq = hit * be + _dot(dscores, x)
                db_end += tl.sum(DA0 * A0, 1) + tl.sum(DA1 * A1, 0)
                if MOMENTUM:
                    M0 = tl.load(m0 + rows)
                    M1 = tl.load(m1 + columns)
                    DM0 = tl.load(dm0 + rows)
                    DM1 = tl.load(dm1 + columns)
                    qp += _dot(Q, tl.trans(M0)) * fe
                    hit_m = _dot(dzq, M1)
                    dxq += hit_m * fe
                    df_end += tl.sum(DA0 * M0, 1) + tl.sum(DA1 * M1, 0)
                    dkeep += tl.sum(DM0 * M0, 1) + tl.sum(DM1 * M1, 0)
                xq = _gelu(qp)
                dqp = dxq * _slope(qp)
                dbe += tl.sum(hit * xq, 1)
                found += _dot(dqp, A0)
                inside += _dot(dqp, tl.trans(gp))
                asked = _dot(K, tl.trans(DA0))
                dlast -= tl.sum(gp * asked, 1)
                dK -= _dot(gp * last, DA0)
                dgp = -_dot(tl.trans(near), dqp) - asked * last
                taught += _dot(x, tl.trans(DA1))
                dx = _dot(tl.trans(dscores), xq) - _dot(gz * last, DA1)
                if MOMENTUM:
                    dfe += tl.sum(hit_m * xq, 1)
                    found_m += _dot(dqp, M0)
                    asked = _dot(K, tl.trans(DM0))
                    dwe -= tl.sum(gp * asked, 1)
                    dK -= _dot(gp * we, DM0)
                    dgp -= asked * we
                    taught_m += _dot(x, tl.trans(DM1))
                    dx -= _dot(gz * we, DM1)
                    tl.store(dm0 + rows, DA0 * f_end + DM0 * keep + _dot(tl.trans(dqp * fe), Q))
                    tl.store(dm1 + columns, DA1 * f_end + DM1 * keep + _dot(tl.trans(dzq * fe), xq))
                dback = dgp * slope
                dgz += _dot(dback, tl.trans(A1))
                tl.store(
                    scratch + oc[:, None] * E + (b + ob)[None, :],
                    dgp * back * _curve(p) + dx * slope,
                )
                tl.store(da0 + rows, DA0 * b_end + _dot(tl.trans(dqp * be), Q))
                tl.store(
                    da1 + columns,
                    DA1 * b_end + _dot(tl.trans(dzq * be), xq) + _dot(tl.trans(gz), dback),
                )
            tl.debug_barrier()
            dbe += tl.sum(found * Q, 1)
            dQ = found * be + DY
            if MOMENTUM:
                dfe += tl.sum(found_m * Q, 1)
                dQ += found_m * fe
                dwe -= tl.sum(gz * taught_m, 1)
                dgz -= taught_m * we
                tl.store(df + at * C + oc, dfe + tl.where(oc == C - 1, tl.sum(df_end, 0), 0.0))
                tl.store(dw + at * C + oc, dwe)
                tl.store(ds + at, tl.sum(dkeep, 0))
            dlast -= tl.sum(gz * taught, 1)
            dgz -= taught * last
            dD -= inside * raw
            dD += tl.where(oc[:, None] == C - 1, dlast[None, :], 0.0)
            tl.store(dd + at * C * C + square, dD)
            tl.store(dbeta + at * C + oc, dbe + tl.where(oc == C - 1, tl.sum(db_end, 0), 0.0))
            dscores = -inside * DM
            dQ += _dot(dscores, K)
            dK += _dot(tl.trans(dscores), Q)
            tl.store(dq + at * C * D + tile, dQ)

            # What the keys taught: the second derivatives of norm, bias and gelu.
            du = _through_norm(dgz, zh, r, D)
            dgain += tl.sum(du * out, 0)
            de, dlimit = _bias_backward(e, limit, gain * du, sharpness, KIND)
            if KIND >= 2:
                tl.store(ddelta + at * C + oc, tl.sum(dlimit, 1))
            dgain += tl.sum(de * zh, 0)
            dmove += tl.sum(de, 0)
            u = gain * out
            inner = _mean(dgz * zh, D) * u + _mean(u * zh, D) * dgz
            dz = _through_norm(gain * de - inner * r, zh, r, D) - zh * r * _mean(dgz * gz, D)
            tl.store(dv + at * C * D + tile, -de)
            dK += de
            for b in range(0, E, BLOCK):
                rows = (b + ob)[:, None] * D + od[None, :]
                columns = od[:, None] * E + (b + ob)[None, :]
                A0 = tl.load(a0 + rows)
                A1 = tl.load(a1 + columns)
                p = _dot(K, tl.trans(A0))
                dp = tl.load(scratch + oc[:, None] * E + (b + ob)[None, :]) + _dot(dz, A1) * _slope(
                    p
                )
                N0 = tl.load(da0 + rows) + _dot(tl.trans(dp), K)
                N1 = tl.load(da1 + columns) + _dot(tl.trans(dz), _gelu(p))
                if i == mine - 1:
                    N0 += tl.load(dg0 + rows)
                    N1 += tl.load(dg1 + columns)
                tl.store(da0 + rows, N0)
                tl.store(da1 + columns, N1)
                dK += _dot(dp, A0)
            tl.store(dk + at * C * D + tile, dK)
            tl.debug_barrier()
    tl.store(dgamma + n * D + od, dgain)
    tl.store(dshift + n * D + od, dmove)
