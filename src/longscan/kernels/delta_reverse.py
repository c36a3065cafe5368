"""The backward of `delta` in one pass from the last piece of a sequence to the first, on Hopper.

A program owns a head of a sequence, with all channels and columns. The gradient D [V, K] of the
state stays in registers; a piece of 64 rows, or two chunks, gives all its gradients on the way, so
that neither Z nor D ever reach memory: see `longscan.kernels.delta` for what they are and for the
states and errors of the forward, which must be there. For bfloat16, and rows in multiples of 16
bytes. Written in Gluon because nothing else keeps products and copies of several pieces under way.

A chain of products leads from chunk to chunk, transposed, so that D is a left operand in registers:

    U = D K^T exp(last - b) + dO^T P    with P the scores Q K^T of the chunk and their decays
    Z = U + U diag(beta) G
    D = D exp(last) + (dO exp(b))^T Q - Z diag(beta exp(b)) K

What reads the state S that entered and D as it left the piece then comes for both chunks at once.
Rows are copied two pieces ahead and states one; scores are made at the end of the piece behind.
A piece is a chain of latencies, so that what counts is few barriers and few instructions.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from longscan.kernels._launch import entry

C = gl.constexpr(32)  # rows of a chunk
R = gl.constexpr(64)  # rows of a piece
BV = gl.constexpr(128)


@gluon.constexpr_function
def _mma(warps, width):
    """Layout of a product's result: eight warps below each other, or in two columns."""
    return gl.NVMMADistributedLayout([3, 0], warps, [16, width, 16])


@gluon.constexpr_function
def _left(layout):
    return gl.DotOperandLayout(0, layout, 2)


@gluon.constexpr_function
def _lines(width):
    """Layout of rows as they are read and written, 16 bytes a thread, in steps of all threads."""
    return gl.BlockedLayout([1, 1, 8], [1, 256 // width, width // 8], [1, 8, 1], [2, 1, 0])


@gluon.constexpr_function
def _shared(width):
    """Layout of rows of `width` numbers in shared memory, for products."""
    return gl.NVMMASharedLayout(min(128, 2 * width), 16, 2)


@gluon.constexpr_function
def _slice(dim, layout):
    return gl.SliceLayout(dim, layout)


@gluon.constexpr_function
def _plain(rank=1):
    return gl.SwizzledSharedLayout(1, 1, 1, list(range(rank))[::-1])


@gluon.constexpr_function
def _pairs():
    """Layout of two numbers a row: two rows a lane, the same in all warps."""
    return gl.BlockedLayout([2, 2], [32, 1], [8, 1], [1, 0])


@gluon.jit
def _opaque():
    """A zero that the compiler does not know: what is added to it is not computed before the loop.

    Addresses and descriptors of products are more than there are registers, and it is faster to
    compute them in every piece than to read them back from memory.
    """
    zero = gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [gl.program_id(1)], dtype=gl.int32, is_pure=False, pack=1
    )
    return gl.multiple_of(zero, 16)


@gluon.jit
def _tile(n, step, zero, ROWS: gl.constexpr, W: gl.constexpr, BW: gl.constexpr):
    """Offsets [.., rows that all threads copy at once, BW] of rows, and which of them exist."""
    L: gl.constexpr = _lines(BW)
    EACH: gl.constexpr = 2048 // BW
    a = gl.arange(0, ROWS // EACH, layout=_slice(1, _slice(2, L)))[:, None, None] * EACH
    i = gl.arange(0, EACH, layout=_slice(0, _slice(2, L)))[None, :, None]
    j = gl.arange(0, BW, layout=_slice(0, _slice(1, L)))[None, None, :]
    return a * step + (i * step + (j + zero)), (i < n - a) & (j < W)


@gluon.jit
def _bring(to, base, n, step, zero, W: gl.constexpr, ROWS: gl.constexpr, BW: gl.constexpr):
    """Copy n rows to shared memory; rows and columns that do not exist become zero."""
    EACH: gl.constexpr = 2048 // BW
    offsets, mask = _tile(n, step, zero, ROWS, W, BW)
    to = to.reshape([ROWS // EACH, EACH, BW])
    async_copy.async_copy_global_to_shared(to, base + offsets, mask)


@gluon.jit
def _bring_numbers(to, base, n, zero):
    i = gl.arange(0, R, layout=gl.BlockedLayout([1], [32], [8], [0]))
    async_copy.async_copy_global_to_shared(to, base + (i + zero), i < n)


@gluon.jit
def _put(base, x, factors, n, step, zero, W: gl.constexpr, BW: gl.constexpr, SCALED: gl.constexpr):
    """Write rows of shared memory, times factors if SCALED."""
    EACH: gl.constexpr = 2048 // BW
    L: gl.constexpr = _slice(0, _lines(BW))
    i = gl.arange(0, EACH, layout=_slice(1, L))
    j = gl.arange(0, BW, layout=_slice(0, L))
    offsets = i[:, None] * step + (j + zero)[None, :]
    for a in gl.static_range(0, R, EACH):
        y = x.slice(a, EACH).load(L)
        if SCALED:
            y = y.to(gl.float32) * factors.slice(a, EACH).load(_slice(1, L))[:, None]
        mask = (i < n - a)[:, None] & (j < W)[None, :]
        gl.store(base + offsets + a * step, y.to(base.dtype.element_ty), mask=mask)


@gluon.jit
def _halves(x, BK: gl.constexpr):
    """Sums of both halves of rows, each of which is a warp's own."""
    return gl.sum(x.reshape([R, 2, BK // 2]), 2)


@gluon.jit
def _add(x, y):
    return x + y


@gluon.jit
def _bring_rows(
    x, y, d, g, beta, b, q, k, do, gs, factors, at, n, N, h, zero,
    H: gl.constexpr, K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """Start the copies of what the chain needs of a piece at row `at`."""
    _bring(x, k + (at * H + h) * K, n, H * K, zero, K, R, BK)
    _bring(y, q + (at * H + h) * K, n, H * K, zero, K, R, BK)
    _bring(d, do + (at * H + h) * V, n, H * V, zero, V, R, BV)
    _bring(g, gs + (at * H + h) * C, n, H * C, zero, C, R, C)
    by = factors + h * N + at
    _bring_numbers(beta, by, n, zero)
    if GATED:
        _bring_numbers(b, by + N.to(gl.int64) * H, n, zero)
    async_copy.commit_group()


@gluon.jit
def _bring_states(
    s, w, states, e, at, n, piece, h, zero,
    H: gl.constexpr, K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr,
):  # fmt: skip
    """Start the copies of the state that entered the piece and of its errors."""
    there = gl.where(n > 0, V, 0)
    _bring(w, e + (at * H + h) * V, n, H * V, zero, V, R, BV)
    _bring(s, states + (piece * H + h) * V * K, there, K, zero, K, BV, BK)
    async_copy.commit_group()


@gluon.jit
def _last(by, n, GATED: gl.constexpr):
    """b at the end of both chunks of a piece."""
    first, second = 0.0, 0.0
    if GATED:
        first = gl.load(by + gl.minimum(n, C) - 1, mask=n > 0, other=0.0)
        second = gl.load(by + n - 1, mask=n > C, other=0.0)
    return first, second


@gluon.jit
def _between(b, i, j, last, L: gl.constexpr, GATED: gl.constexpr):
    """exp(b_i - b_j) of a piece for i >= j, else zero; last: b at the end of its first chunk."""
    if GATED:
        bi = b.load(_slice(1, L))[:, None] + gl.where(i >= C, last, 0.0)
        bj = b.load(_slice(0, L))[None, :] + gl.where(j >= C, last, 0.0)
        return gl.where(i >= j, gl.exp2(gl.minimum(bi - bj, 0.0)), 0.0)
    else:
        return gl.where(i >= j, 1.0, 0.0)


@gluon.jit
def _scores(x, y):
    """Start the products of the rows of a piece."""
    none = gl.zeros([R, R], gl.float32, layout=_mma([4, 2], R // 2))
    return warpgroup_mma(y, x.permute([1, 0]), none, use_acc=False, is_async=True)


@gluon.jit
def _store_scores(scores, score, decay, i, j):
    """The scores of both chunks, and none between them."""
    score = warpgroup_mma_wait(0, [score])
    score = gl.where(i // C == j // C, score * decay, 0.0)
    scores.store(score.to(gl.bfloat16))
    fence_async_shared()


@gluon.jit
def _lead(d, x, AT: gl.constexpr):
    """Start D K^T of a chunk."""
    LZ: gl.constexpr = _mma([8, 1], C)
    none = gl.zeros([BV, C], gl.float32, layout=LZ)
    d = gl.convert_layout(d.to(gl.bfloat16), _left(LZ))
    return warpgroup_mma(d, x.slice(AT, C).permute([1, 0]), none, use_acc=False, is_async=True)


@gluon.jit
def _chain(
    d, outer, x, y, do, g, scores, beta, b, last, AT: gl.constexpr, BK: gl.constexpr,
    GATED: gl.constexpr,
):  # fmt: skip
    """D before the chunk from that behind it and from its lead; and Z."""
    LD: gl.constexpr = _mma([8, 1], BK)
    LZ: gl.constexpr = _mma([8, 1], C)
    xc, yc = x.slice(AT, C), y.slice(AT, C)
    none = gl.zeros([BV, C], gl.float32, layout=LZ)
    dot = do.slice(AT, C).permute([1, 0]).load(_left(LZ))
    inner = warpgroup_mma(
        dot, scores.slice(AT, C).slice(AT, C, 1), none, use_acc=False, is_async=True
    )
    be = beta.slice(AT, C).load(_slice(0, LZ))[None, :]
    at = -be
    if GATED:
        bc = b.slice(AT, C).load(_slice(0, LZ))
        reads = gl.exp2(bc)
        at *= reads[None, :]
        reads = gl.exp2(b.slice(AT, C).load(_slice(0, _left(LZ))))
        dot = (dot.to(gl.float32) * reads[None, :]).to(gl.bfloat16)
        d *= gl.exp2(last)
    d = warpgroup_mma(gl.convert_layout(dot, _left(LD)), yc, d, is_async=True)
    outer, inner = warpgroup_mma_wait(1, [outer, inner])
    if GATED:
        outer *= gl.exp2(gl.minimum(last - bc, 0.0))[None, :]
    z = outer + inner
    more = gl.convert_layout((z * be).to(gl.bfloat16), _left(LZ))
    z = warpgroup_mma(more, g.slice(AT, C), z, is_async=True)
    z, d = warpgroup_mma_wait(0, [z, d])
    dz = gl.convert_layout((z * at).to(gl.bfloat16), _left(LD))
    return warpgroup_mma(dz, xc, d), z.to(gl.bfloat16)


@entry
@gluon.jit(do_not_specialize=["N"])
def reverse(
    q, k, g, factors, do, d_final, e, states, dq, dk, dv, d_beta, d_log_a, d_state, starts, first,
    N, H: gl.constexpr, K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, GATED: gl.constexpr,
    ENDS: gl.constexpr,
):  # fmt: skip
    """dq, dk [N, H, K], dv [N, H, V], d_beta and d_log_a [N, H] of all pieces of a sequence, and
    the gradient d_state [rows, H, K, V] of the state that entered it. Segments of long sequences
    are sequences here.

    g [N, H, 32] and factors as `solve` writes them, e [N, H, V] and states [pieces, H, V, K] as
    `passes`; starts, first [rows + 1]: the first token and piece of sequences. d_final [rows, H, K,
    V]: the gradient of final states, if ENDS.
    """
    LD: gl.constexpr = _mma([8, 1], BK)
    LK: gl.constexpr = _mma([4, 2], BK // 2)
    LP: gl.constexpr = _mma([4, 2], R // 2)
    LB: gl.constexpr = gl.BlockedLayout([2], [32], [8], [0])
    BF: gl.constexpr = gl.bfloat16
    pid = gl.program_id(0).to(gl.int64)
    h, row = pid % H, pid // H
    begin = gl.load(starts + row)
    length = (gl.load(starts + row + 1) - begin).to(gl.int32)
    count = (length + R - 1) // R
    piece = gl.load(first + row) + count - 1
    at = begin + (count - 1) * R
    n = length - (count - 1) * R

    xs = gl.allocate_shared_memory(BF, [2, R, BK], _shared(BK))
    ys = gl.allocate_shared_memory(BF, [2, R, BK], _shared(BK))
    dos = gl.allocate_shared_memory(BF, [2, R, BV], _shared(BV))
    gs = gl.allocate_shared_memory(BF, [2, R, C], _shared(C))
    betas = gl.allocate_shared_memory(gl.float32, [2, R], _plain())
    bs = gl.allocate_shared_memory(gl.float32, [2, R], _plain())
    s_ = gl.allocate_shared_memory(BF, [1, BV, BK], _shared(BK))
    w_ = gl.allocate_shared_memory(BF, [1, R, BV], _shared(BV))
    end_ = gl.allocate_shared_memory(BF, [1, BV, BK], _shared(BK))
    zs_ = gl.allocate_shared_memory(BF, [1, R, BV], _shared(BV))
    asks_ = gl.allocate_shared_memory(BF, [1, R, R], _shared(R))
    pairs_ = gl.allocate_shared_memory(BF, [1, R, R], _shared(R))
    scores_ = gl.allocate_shared_memory(BF, [1, R, R], _shared(C))
    parts = gl.allocate_shared_memory(gl.float32, [2, R, 2], _plain(2))
    sums = gl.allocate_shared_memory(gl.float32, [BV], _plain())

    kk, vv = gl.arange(0, BK, layout=_slice(0, LD)), gl.arange(0, BV, layout=_slice(1, LD))
    turned = (row * H + h) * K * V + kk[None, :] * V + vv[:, None]
    there = (kk < K)[None, :] & (vv < V)[:, None]
    d = gl.zeros([BV, BK], gl.float32, layout=LD)
    if ENDS:
        d = gl.load(d_final + turned, mask=there, other=0.0).to(gl.float32)
    i, j = gl.arange(0, R, layout=_slice(1, LP))[:, None], gl.arange(0, R, layout=_slice(0, LP))
    j = j[None, :]
    by = factors + N.to(gl.int64) * H * GATED + h * N
    zero = _opaque()
    _bring_rows(
        xs.index(0), ys.index(0), dos.index(0), gs.index(0), betas.index(0), bs.index(0),
        q, k, do, g, factors, at, n, N, h, zero, H, K, V, BK, GATED,
    )  # fmt: skip
    _bring_states(s_.index(0), w_.index(0), states, e, at, n, piece, h, zero, H, K, V, BK)
    _bring_rows(
        xs.index(1), ys.index(1), dos.index(1), gs.index(1), betas.index(1), bs.index(1),
        q, k, do, g, factors, at - R, gl.where(count > 1, R, 0), N, h, zero, H, K, V, BK, GATED,
    )  # fmt: skip
    last0, last1 = _last(by + at, n, GATED)
    async_copy.wait_group(2)
    fence_async_shared()
    gl.thread_barrier()
    score = _scores(xs.index(0), ys.index(0))
    decay = _between(bs.index(0), i, j, last0, LP, GATED)
    _store_scores(scores_.index(0), score, decay, i, j)
    for back in range(count):
        zero = _opaque()
        stage = back % 2
        s, w, end, zs = s_.index(zero), w_.index(zero), end_.index(zero), zs_.index(zero)
        asks, pairs, scores = asks_.index(zero), pairs_.index(zero), scores_.index(zero)
        x, y, dot, gc = xs.index(stage), ys.index(stage), dos.index(stage), gs.index(stage)
        beta, b = betas.index(stage), bs.index(stage)
        async_copy.wait_group(1)
        more = gl.where(back + 1 < count, R, 0)
        next0, next1 = _last(by + at - R, more, GATED)
        lead = _lead(d, x, C)
        end.store(d.to(BF))
        if GATED:
            sums.store(gl.sum(s.load(LD).to(gl.float32) * d, 1))
        d, z1 = _chain(d, lead, x, y, dot, gc, scores, beta, b, last1, C, BK, GATED)
        lead = _lead(d, x, 0)
        d, z0 = _chain(d, lead, x, y, dot, gc, scores, beta, b, last0, 0, BK, GATED)
        z = gl.join(z0, z1).permute([0, 2, 1]).reshape([BV, R])
        zs.permute([1, 0]).store(z)
        fence_async_shared()
        gl.thread_barrier()

        # What is ready is scaled and summed while other products are under way.
        none = gl.zeros([R, R], gl.float32, layout=LP)
        ask = warpgroup_mma(dot, w.permute([1, 0]), none, use_acc=False, is_async=True)
        pair = warpgroup_mma(zs, w.permute([1, 0]), none, use_acc=False, is_async=True)
        nil = gl.zeros([R, BK], gl.float32, layout=LK)
        sent = warpgroup_mma(w, end, nil, use_acc=False, is_async=True)
        decay = _between(b, i, j, last0, LP, GATED) * beta.load(_slice(0, LP))[None, :]
        ask, pair = warpgroup_mma_wait(1, [ask, pair])
        asks.store((ask * decay).to(BF))
        decay *= beta.load(_slice(1, LP))[:, None]
        pairs.store(gl.where(i > j, pair * -decay, 0.0).to(BF))
        fence_async_shared()
        gl.thread_barrier()
        read = warpgroup_mma(dot, s, nil, use_acc=False, is_async=True)
        asked = warpgroup_mma(zs, s, nil, use_acc=False, is_async=True)
        # d_beta is the diagonal of Z E^T.
        to = d_beta + at * H + h + (i * H + j * 0 + zero)
        gl.store(to, pair.to(d_beta.dtype.element_ty), mask=(i == j) & (i < n))
        leave = beta.load(_slice(1, LK))
        ask_at = -leave
        if GATED:
            br = b.load(_slice(1, LK))
            i1 = gl.arange(0, R, layout=_slice(1, LK))
            br += gl.where(i1 >= C, last0, 0.0)
            reads = gl.exp2(br)
            ask_at *= reads
            leave *= gl.exp2(gl.minimum(last0 + last1 - br, 0.0))
        sent = warpgroup_mma_wait(2, [sent])
        sent *= leave[:, None]
        if GATED:
            parts.index(0).store(_halves(sent * x.load(LK).to(gl.float32), BK))
        sent = warpgroup_mma(pairs.permute([1, 0]), x, sent, is_async=True)
        sent = warpgroup_mma(asks.permute([1, 0]), y, sent, is_async=True)
        _put(dv + (at * H + h) * V, zs, beta, n, H * V, zero, V, BV, True)
        read = warpgroup_mma_wait(3, [read])
        if GATED:
            read *= reads[:, None]
        read = warpgroup_mma(asks, x, read, is_async=True)
        asked = warpgroup_mma_wait(3, [asked])
        asked *= ask_at[:, None]
        asked = warpgroup_mma(pairs, x, asked, is_async=True)
        async_copy.wait_group(0)
        fence_async_shared()
        gl.thread_barrier()
        _bring_states(s, w, states, e, at - R, more, piece - 1, h, zero, H, K, V, BK)
        sent, read = warpgroup_mma_wait(1, [sent, read])
        # Nothing reads Z any more, nor D as it left.
        zs.slice(0, BK, 1).store(read.to(BF))
        if GATED:
            db = _halves(read * y.load(LK).to(gl.float32), BK)
        asked = warpgroup_mma_wait(0, [asked])
        # Scores of the piece before, which the chain begins with.
        score = _scores(xs.index(1 - stage), ys.index(1 - stage))
        end.slice(0, R).store((asked + sent).to(BF))
        if GATED:
            db += _halves((asked - sent) * x.load(LK).to(gl.float32), BK)
            parts.index(1).store(db)
        decay = _between(bs.index(1 - stage), i, j, next0, LP, GATED)
        gl.thread_barrier()
        more = gl.where(back + 2 < count, R, 0)
        _bring_rows(
            x, y, dot, gc, beta, b, q, k, do, g, factors, at - 2 * R, more, N, h, zero,
            H, K, V, BK, GATED,
        )  # fmt: skip
        _put(dq + (at * H + h) * K, zs.slice(0, BK, 1), beta, n, H * K, zero, K, BK, False)
        _put(dk + (at * H + h) * K, end.slice(0, R), beta, n, H * K, zero, K, BK, False)
        if GATED:
            # A log_a enters b of its row and of all later ones.
            r = gl.arange(0, R, layout=LB)
            all_rows = gl.convert_layout(gl.sum(parts.index(0).load(_pairs()), 1), LB)
            kept = sums.slice(0, R).load(LB) + sums.slice(R, R).load(LB)
            db = gl.convert_layout(gl.sum(parts.index(1).load(_pairs()), 1), LB)
            all_rows = gl.sum(all_rows + kept * gl.exp2(last0 + last1) + db, 0)
            da = all_rows - (gl.associative_scan(db, 0, _add) - db)
            to = d_log_a + at * H + h + (r * H + zero)
            gl.store(to, da.to(d_log_a.dtype.element_ty), mask=r < n)
        _store_scores(scores, score, decay, i, j)
        at -= R
        piece -= 1
        n = R
        last0, last1 = next0, next1
    async_copy.wait_group(0)
    gl.store(d_state + turned, d, mask=there)
