"""One token of a recurrence with a matrix as its state, for all rows of a batch.

A program has one value head of one row and BV of its columns: it reads that part of the state once
and writes the new one once, elsewhere. Everything in front of the state (window of the short
convolution, SiLU, feature map, norms, rotation, gates) is a few hundred numbers, which every
program makes for itself; of programs that share channels the first writes their new window.

    S <- diag(exp(log_a)) S
    S' = S + k u^T,   u = v | beta (v - S^T k) | dt v,   or exp(i - m') k v^T for RULE 3
    o = S'^T q, perhaps divided by its sum over keys, plus a skip
"""

from __future__ import annotations

import triton
import triton.language as tl

from longscan.kernels._launch import entry


@triton.jit
def _log1p(e):
    """log(1 + e) for e in [0, 1] to full relative precision, as 2 artanh(e / (2 + e))."""
    z = e / (2.0 + e)
    w = z * z
    p = 1.0 / 11 + w * (1.0 / 13 + w * (1.0 / 15))
    p = 1.0 / 5 + w * (1.0 / 7 + w * (1.0 / 9 + w * p))
    return 2.0 * z * (1.0 + w * (1.0 / 3 + w * p))


@triton.jit
def _softplus(x):
    return tl.maximum(x, 0.0) + _log1p(tl.exp(-tl.abs(x)))


@triton.jit
def _channels(
    x, window, taps, bias, new, row, x_row, all_channels, at, index, mask, write,
    W: tl.constexpr, BIAS: tl.constexpr, MAP: tl.constexpr,
):  # fmt: skip
    """Channels of the token behind convolution and nonlinearity, in float32; 0 outside the mask.

    index: among those at x; the convolution numbers them from `at`. W: its taps, 0 for none.
    MAP: 1 SiLU.
    """
    now = tl.load(x + row * x_row + index, mask=mask, other=0.0)
    y = now.to(tl.float32)
    if W > 0:
        c = at + index
        old = row * (W - 1) * all_channels + c
        y = y * tl.load(taps + c * W + (W - 1), mask=mask, other=0.0).to(tl.float32)
        for w in tl.static_range(W - 1):
            past = tl.load(window + old + w * all_channels, mask=mask, other=0.0)
            y += past.to(tl.float32) * tl.load(taps + c * W + w, mask=mask, other=0.0)
        if BIAS:
            y += tl.load(bias + c, mask=mask, other=0.0)
        if write:  # read again: a store between the loads above would hold them up
            for w in tl.static_range(W - 2):
                past = tl.load(window + old + (w + 1) * all_channels, mask=mask, other=0.0)
                tl.store(new + old + w * all_channels, past, mask=mask)
            tl.store(new + old + (W - 2) * all_channels, now, mask=mask)
    if MAP == 1:
        y = y * tl.sigmoid(y)
    return y


@triton.jit
def _feature(y, mask):
    """elu(y) + 1."""
    return tl.where(mask, tl.where(y > 0, y + 1.0, tl.exp(tl.minimum(y, 0.0))), 0.0)


@entry
@triton.jit
def step(
    q, k, v, window, taps, bias, new_window, state, new_state, raw, a_log, gate_bias,
    strength, m, new_m, skip, turns, length, o,
    q_row, k_row, v_row, raw_row, strength_row, channels, q_at, k_at, v_at,
    q_scale, k_scale, factor, low, high, top, eps, unit_eps,
    H: tl.constexpr, RQ: tl.constexpr, RK: tl.constexpr, RV: tl.constexpr, RG: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    W: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, FEATURE: tl.constexpr,
    UNIT: tl.constexpr, TURN: tl.constexpr, GATE: tl.constexpr, PER_KEY: tl.constexpr,
    RULE: tl.constexpr, SUM: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """Sizes: H value heads, of which R. = 2, 3, ... consecutive ones share q, k, v or the gate.

    GATE: 0 none, 1 log_a given, 2 -exp(a_log) clamp(softplus(raw + bias), low, high),
    3 max(factor logsigmoid(raw), low), 4 factor sigmoid(exp(a_log) (raw + bias)).
    RULE: 0 add, 1 delta rule with beta = top sigmoid(strength), 2 add dt v (with GATE 2),
    3 mLSTM's exponential gate i = strength, 4 delta rule with beta = strength.
    SUM: the state has one more column, for v = 1. SKIP: 1 one number a head, 2 one a channel.
    """
    tiles: tl.constexpr = (V + BV - 1) // BV
    wide: tl.constexpr = V + SUM
    pid = tl.program_id(0)
    tile = pid % tiles
    head = pid // tiles % H
    row = (pid // tiles // H).to(tl.int64)
    keys = tl.arange(0, BK)
    cols = tile * BV + tl.arange(0, BV)
    k_in, v_in = keys < K, cols < V
    inside = k_in[:, None] & v_in[None, :]
    lines = ((row * H + head) * K + keys) * wide
    s = tl.load(state + lines[:, None] + cols[None, :], mask=inside, other=0.0)
    if SUM:
        n = tl.load(state + lines + V, mask=k_in, other=0.0)

    first = tile == 0
    q_index, k_index = head // RQ * K, head // RK * K
    own_q, own_k = first & (head % RQ == 0), first & (head % RK == 0)
    qs = _channels(q, window, taps, bias, new_window, row, q_row, channels, q_at,
                   q_index + keys, k_in, own_q, W, BIAS, SILU)  # fmt: skip
    ks = _channels(k, window, taps, bias, new_window, row, k_row, channels, k_at,
                   k_index + keys, k_in, own_k, W, BIAS, SILU)  # fmt: skip
    vs = _channels(v, window, taps, bias, new_window, row, v_row, channels, v_at,
                   head // RV * V + cols, v_in, head % RV == 0, W, BIAS, SILU)  # fmt: skip
    if TURN:  # each channel with its partner, half a head away
        other = (keys + K // 2) % K
        q2 = _channels(q, window, taps, bias, new_window, row, q_row, channels, q_at,
                       q_index + other, k_in, False, W, BIAS, SILU)  # fmt: skip
        k2 = _channels(k, window, taps, bias, new_window, row, k_row, channels, k_at,
                       k_index + other, k_in, False, W, BIAS, SILU)  # fmt: skip
        position = tl.load(length + row).to(tl.float32)
        angle = position * tl.load(turns + keys % (K // 2), mask=k_in, other=0.0)
        cos = tl.cos(angle)
        sin = tl.where(keys < K // 2, -tl.sin(angle), tl.sin(angle))
        qs = qs * cos + q2 * sin
        ks = ks * cos + k2 * sin
    if FEATURE:
        qs = _feature(qs, k_in)
        ks = _feature(ks, k_in)
    if UNIT:
        qs = qs * tl.rsqrt(tl.sum(qs * qs, 0) + unit_eps)
        ks = ks * tl.rsqrt(tl.sum(ks * ks, 0) + unit_eps)
    qs = qs * q_scale
    ks = ks * k_scale

    if GATE > 0:
        group = head // RG
        if PER_KEY:
            x = tl.load(raw + row * raw_row + group * K + keys, mask=k_in, other=0.0)
        else:
            x = tl.load(raw + row * raw_row + group)
        log_a = x.to(tl.float32)
        if GATE == 2 or GATE == 4:
            if PER_KEY:
                log_a += tl.load(gate_bias + group * K + keys, mask=k_in, other=0.0)
            else:
                log_a += tl.load(gate_bias + group)
            rate = tl.exp(tl.load(a_log + group).to(tl.float32))
        if GATE == 2:
            dt = tl.minimum(tl.maximum(_softplus(log_a), low), high)
            log_a = -rate * dt
        if GATE == 3:
            log_a = tl.maximum(-_softplus(-log_a) * factor, low)
        if GATE == 4:
            log_a = factor * tl.sigmoid(rate * log_a)
        if RULE == 3:
            i = tl.load(strength + row * strength_row + head).to(tl.float32)
            kept = log_a + tl.load(m + row * H + head)
            top_m = tl.maximum(kept, i)
            log_a = kept - top_m
            ks = ks * tl.exp(i - top_m)
            if first:
                tl.store(new_m + row * H + head, top_m)
        a = tl.exp(log_a)
        if PER_KEY:
            s = s * a[:, None]
        else:
            s = s * a
        if SUM:
            n = n * a
    u = vs
    if RULE == 1 or RULE == 4:
        beta = tl.load(strength + row * strength_row + head).to(tl.float32)
        if RULE == 1:
            beta = top * tl.sigmoid(beta)
        u = beta * (vs - tl.sum(s * ks[:, None], 0))
    if RULE == 2:
        u = vs * dt
    s += ks[:, None] * u[None, :]
    tl.store(new_state + lines[:, None] + cols[None, :], s, mask=inside)
    out = tl.sum(s * qs[:, None], 0)
    if SUM:
        n += ks
        if first:
            tl.store(new_state + lines + V, n, mask=k_in)
        total = tl.sum(n * qs, 0)
        if RULE == 3:  # without the overflow of exp(-m)
            least = tl.minimum(top_m, 0.0)
            scale = tl.exp(least)
            out = out * (
                scale / (tl.maximum(tl.abs(total) * scale, tl.exp(least - top_m)) + eps * scale)
            )
        else:
            out = out / (total + eps)
    if SKIP == 1:
        out += vs * tl.load(skip + head).to(tl.float32)
    if SKIP == 2:
        out += vs * tl.load(skip + head * V + cols, mask=v_in, other=0.0).to(tl.float32)
    place = (row * H + head) * V + cols
    tl.store(o + place, out.to(o.dtype.element_ty), mask=v_in)


@entry
@triton.jit
def convolve(
    x, old, taps, bias, new, y, x_row, channels,
    W: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token of a short convolution by itself, perhaps with SiLU behind it."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = index < channels
    out = _channels(x, old, taps, bias, new, row, x_row, channels, 0, index, mask, True,
                    W, BIAS, SILU)  # fmt: skip
    tl.store(y + row * channels + index, out.to(y.dtype.element_ty), mask=mask)


@entry
@triton.jit
def scan(
    u, raw, dt_bias, a_log, b, c, skip, z, state, new_state, y,
    u_row, raw_row, b_row, c_row, z_row, channels,
    N: tl.constexpr, BN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token of Mamba's state space: dt = softplus(raw + dt_bias),
    h' = exp(-dt exp(a_log)) h + dt u b^T, y = (h' c + skip u) silu(z)."""
    row = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, BN)
    e_in, n_in = e < channels, n < N
    inside = e_in[:, None] & n_in[None, :]
    at = e[:, None] * N + n[None, :]
    place = row * channels * N + at
    h = tl.load(state + place, mask=inside, other=0.0)
    rate = tl.exp(tl.load(a_log + at, mask=inside, other=0.0).to(tl.float32))
    us = tl.load(u + row * u_row + e, mask=e_in, other=0.0).to(tl.float32)
    dt = tl.load(raw + row * raw_row + e, mask=e_in, other=0.0).to(tl.float32)
    dt = _softplus(dt + tl.load(dt_bias + e, mask=e_in, other=0.0))
    bs = tl.load(b + row * b_row + n, mask=n_in, other=0.0).to(tl.float32)
    cs = tl.load(c + row * c_row + n, mask=n_in, other=0.0).to(tl.float32)
    gate = tl.load(z + row * z_row + e, mask=e_in, other=0.0).to(tl.float32)
    h = tl.exp(-dt[:, None] * rate) * h + (dt * us)[:, None] * bs[None, :]
    tl.store(new_state + place, h, mask=inside)
    out = tl.sum(h * cs[None, :], 1) + us * tl.load(skip + e, mask=e_in, other=0.0)
    out = out * gate * tl.sigmoid(gate)
    tl.store(y + row * channels + e, out.to(y.dtype.element_ty), mask=e_in)
