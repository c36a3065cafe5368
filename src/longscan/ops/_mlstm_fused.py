"""`mlstm` on a GPU: what `kernels.mlstm` computes, launched in order."""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longscan.ops._kernel_op import kernel_op
from longscan.ops._packed import pieces, starts

MLSTMState = tuple[Tensor, Tensor]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SMALL = (64, 128)
"""Keys and values of heads whose products take more digits than bf16 has: where so few channels
cancel, normalisers are near zero, and cost little."""
PROGRAMS = 528
"""Programs that fill a GPU of 132 processors for a few rounds."""
SHORTEST = 512
"""Tokens of a block, at least, where sequences are cut for want of programs."""
BLOCK = 512
"""Tokens between the borders at which gradients of the gates begin anew: how far rounding errors
may add up."""
PIECE = 4096
"""Numbers of a state in a program of `combine`."""


class Tile(NamedTuple):
    """Width of a tile, warps, stages of the software pipeline."""

    width: int
    warps: int
    stages: int


class Launch(NamedTuple):
    """Tokens in a chunk of the forward and of the backward, the second a multiple of the first, and
    those of which a program of the backward computes gradients.

    scan: its tiles of the values; states: tiles of width x width; scores, queries, keys: channels
    at once; values: the width of a tile of dv.
    """

    chunk: int
    backward: int
    rows: int
    scan: Tile
    states: Tile
    scores: Tile
    queries: Tile
    keys: Tile
    values: Tile


# (padded K, padded V are at most this, 16-bit operands) -> launch, the first that fits.
LAUNCHES = {
    (128, 128, True): Launch(
        64, 128, 64, Tile(64, 4, 2), Tile(64, 4, 3), Tile(64, 4, 2),
        Tile(64, 8, 2), Tile(64, 4, 2), Tile(128, 4, 2),
    ),
    (256, 512, True): Launch(
        32, 128, 64, Tile(128, 8, 2), Tile(128, 8, 2), Tile(64, 4, 3),
        Tile(64, 8, 2), Tile(64, 8, 2), Tile(256, 8, 2),
    ),
    (64, 64, False): Launch(
        32, 64, 32, Tile(32, 4, 1), Tile(32, 4, 1), Tile(32, 4, 1),
        Tile(32, 4, 1), Tile(32, 4, 1), Tile(64, 4, 1),
    ),
    (128, 128, False): Launch(
        16, 64, 16, Tile(32, 8, 1), Tile(64, 4, 1), Tile(32, 4, 1),
        Tile(32, 4, 1), Tile(32, 4, 1), Tile(128, 4, 1),
    ),
    (256, 512, False): Launch(
        16, 64, 16, Tile(16, 8, 1), Tile(64, 4, 1), Tile(32, 4, 1),
        Tile(32, 8, 1), Tile(32, 8, 1), Tile(128, 4, 1),
    ),
}  # fmt: skip


def mlstm_fits(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, state: MLSTMState | None = None
) -> bool:
    """Whether the kernels compute this case: heads of K <= 256, V <= 512, nothing in float64."""
    return (
        max(q.shape[-1], k.shape[-1]) <= 256
        and v.shape[-1] <= 512
        and all(x.dtype in DTYPES for x in (q, k, v, i, f, *(state or ())))
    )


def mlstm_fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    state: MLSTMState | None = None,
    cu_seqlens: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, MLSTMState]:
    """As `mlstm_chunked`: h in v's dtype, the state in float32."""
    out = v.dtype
    if not q.dtype == k.dtype == out:
        wide = torch.promote_types(torch.promote_types(q.dtype, k.dtype), out)
        q, k, v = (x.to(wide) for x in (q, k, v))
    s, m = (None, None) if state is None else (x.float() for x in state)
    h, s, m, *_ = _mlstm(q, k, v, i, f, s, m, cu_seqlens, eps)
    return h if h.dtype == out else h.to(out), (s, m)


class _Sizes(NamedTuple):
    """What every launch of a call hangs on."""

    launch: Launch
    dot: dict  # the type of operands, and how they are multiplied
    stored: torch.dtype  # of scores and of states in between
    keys: int
    values: int
    heads: int
    K: int  # padded
    V: int


def _pad(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


def _sizes(dtype: torch.dtype, heads: int, keys: int, values: int) -> _Sizes:
    tl = import_module("triton.language")
    half = dtype == torch.bfloat16 and (keys > SMALL[0] or values > SMALL[1])
    launch = next(
        launch
        for (k, v, narrow), launch in LAUNCHES.items()
        if keys <= k and values <= v and narrow == half
    )
    dot = {
        "DT": tl.bfloat16 if half else tl.float32,
        "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32",
    }
    stored = torch.bfloat16 if half else torch.float32
    return _Sizes(launch, dot, stored, keys, values, heads, _pad(keys), _pad(values))


class _Call:
    """What the kernels of a call share."""

    def __init__(self, q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> None:
        batch, length, heads, values = v.shape
        self.sizes = _sizes(q.dtype, heads, q.shape[-1], values)
        self.shape, self.cu, self.device = (batch, length), cu_seqlens, v.device
        self.rows = batch if cu_seqlens is None else cu_seqlens.numel() - 1
        self.tokens = batch * length
        self.heads = {"H": heads, "K": q.shape[-1], "V": values}

    def pieces(self, size: int) -> tuple[Tensor, Tensor]:
        return pieces(*self.shape, size, self.cu, self.device)

    @property
    def starts(self) -> Tensor:
        return starts(*self.shape, self.cu, self.device)

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def per_token(self, count: int) -> tuple[Tensor, ...]:
        """[H N] each, so padded that kernels, compiled for pointers to 16 bytes, find all so."""
        return self.new(count, -(-self.sizes.heads * self.tokens // 4) * 4).unbind(0)

    def state(self) -> Tensor:
        z = self.sizes
        return self.new(self.rows, z.heads, z.keys, z.values + 1)

    def block(self, tiles: int, unit: int) -> int:
        """Tokens of a block that one program walks through, a multiple of `unit`: all of a
        sequence, unless programs are too few."""
        tiles *= self.sizes.heads
        if self.cu is not None:
            size = -(-self.tokens * tiles // PROGRAMS) * 3 // 2
        elif self.rows * tiles * 3 >= PROGRAMS:
            size = self.shape[1]
        else:
            size = -(-self.shape[1] // max(1, PROGRAMS // (self.rows * tiles)))
        return -(-max(size, SHORTEST) // unit) * unit


def _kernels() -> Any:
    return import_module("longscan.kernels.mlstm")


def _weigh(
    z: _Call, chunk: int, k: Tensor, i: Tensor, f: Tensor, m0: Tensor | None, m: Tensor,
    bar: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """a, c, cut, read, keep, total of chunks; bar is filled."""
    s, (table, _) = z.sizes, z.pieces(chunk)
    tokens = z.per_token(5)
    total = z.new(table.shape[0], s.heads)
    _kernels().weigh[(table.shape[0] * s.heads,)](
        k, i, f, i if m0 is None else m0, m, *tokens, total, m if bar is None else bar,
        table, z.starts, z.tokens,
        H=s.heads, K=s.keys, HAS=m0 is not None, BAR=bar is not None, C=chunk, KP=s.K, num_warps=4,
    )  # fmt: skip
    return *tokens, total


def _carry(
    z: _Call, chunk: int, bar: Tensor, total: Tensor, n0: Tensor | None, n_end: Tensor,
    reverse: bool,
) -> Tensor:  # fmt: skip
    """The normaliser before every chunk, or its gradient after it; n_end has that of the end."""
    s, parts = z.sizes, bar.shape[2] if reverse else 1
    n = z.new(bar.shape[0], s.heads, s.keys)
    bk = min(32, s.K)
    _kernels().carry[(z.rows * s.heads * -(-s.keys // bk),)](
        bar, total, bar if n0 is None else n0, n, n_end, z.pieces(chunk)[1], s.heads,
        K=s.keys, V=s.values, HAS=n0 is not None, REVERSE=reverse, PARTS=parts, R=16, BK=bk,
        num_warps=1,
    )  # fmt: skip
    return n


def _entering(
    z: _Call, block: int, chunk: int, k: Tensor, v: Tensor, keep: Tensor, total: Tensor,
    s0: Tensor | None, s_end: Tensor, reverse: bool,
) -> Tensor:  # fmt: skip
    """The states that enter blocks [blocks, H, K, V], or their gradients, from the right."""
    s, (table, firsts), first = z.sizes, z.pieces(block), z.pieces(chunk)[1]
    tile = s.launch.states
    bk, bv = min(tile.width, s.K), min(tile.width, s.V)
    states, decay = z.new(table.shape[0], s.heads, s.keys, s.values), z.new(table.shape[0], s.heads)
    _kernels().states[(table.shape[0] * s.heads * -(-s.keys // bk) * -(-s.values // bv),)](
        k, v, keep, total, states, decay, table, first, z.starts, z.tokens,
        **z.heads, REVERSE=reverse, C=chunk, BK=bk, BV=bv, **s.dot,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    _kernels().combine[(z.rows * s.heads * -(-s.keys * s.values // PIECE),)](
        states, decay, decay if s0 is None else s0, s_end, firsts, s.heads, K=s.keys, V=s.values,
        HAS=s0 is not None, REVERSE=reverse, B=PIECE, num_warps=4,
    )  # fmt: skip
    return states


def _walk(
    z: _Call, k: Tensor, v: Tensor, keep: Tensor, total: Tensor, first_state: Tensor | None,
    s_end: Tensor | None, s0: Tensor | None = None, other: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The states before chunks; given these as `other`, their gradients after chunks, and the
    products of the two at left borders of blocks of BLOCK tokens, [tiles, blocks, H].

    s_end: is filled with the last of the gradients.
    """
    s, reverse, chunk = z.sizes, other is not None, z.sizes.launch.backward
    tile = s.launch.states
    bk, bv = min(tile.width, s.K), min(tile.width, s.V)
    tiles = -(-s.keys // bk) * -(-s.values // bv)
    block, (chunks, first) = z.block(tiles, BLOCK), z.pieces(chunk)
    table, _ = z.pieces(block)
    borders, firsts = z.pieces(BLOCK)
    entry, split = first_state, table.shape[0] > z.rows
    if split:
        end = z.state() if s_end is None else s_end
        entry = _entering(z, block, chunk, k, v, keep, total, first_state, end, reverse)
    states = z.new(chunks.shape[0], s.heads, s.keys, s.values, dtype=s.stored)
    product = z.new(tiles, borders.shape[0], s.heads) if reverse else None
    _kernels().walk[(table.shape[0] * s.heads * tiles,)](
        k, v, keep, total, total if entry is None else entry, states,
        total if s_end is None else s_end, total if s0 is None else s0,
        states if other is None else other, total if product is None else product,
        table, first, firsts, z.starts, z.tokens, borders.shape[0],
        **z.heads, HAS=entry is not None, EXTRA=0 if split else 1, HAS0=s0 is not None,
        FINAL=s_end is not None and not split, REVERSE=reverse, G=BLOCK // chunk,
        C=chunk, BK=bk, BV=bv, **s.dot, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return states, product


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    s0: Tensor | None,
    m0: Tensor | None,
    cu_seqlens: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(h, s, m) and what the backward needs: numbers of tokens [3, H N], normalisers before
    chunks."""
    q, k, v, i, f = (x.contiguous() for x in (q, k, v, i, f))
    s0, m0 = (None if x is None else x.contiguous() for x in (s0, m0))
    z, kernels = _Call(q, v, cu_seqlens), _kernels()
    size, chunk = z.sizes, z.sizes.launch.chunk
    s, m_end, tokens, n = _empty(z)
    m, inv, side = tokens.unbind(0)
    kernels.gates[(z.rows * size.heads,)](
        i, f, i if m0 is None else m0, m, m_end, z.starts, z.tokens, size.heads,
        HAS=m0 is not None, B=1024, num_warps=4,
    )  # fmt: skip
    a, c, cut, read, keep, total = _weigh(z, chunk, k, i, f, m0, m, n)
    n = _carry(z, chunk, n, total, s0, s, False)
    (over,), (table, first) = z.per_token(1), z.pieces(chunk)
    tile = size.launch.scores
    M = z.new(size.heads, z.tokens, chunk, dtype=size.stored)
    kernels.scores[(table.shape[0] * size.heads,)](
        q, k, m, a, c, cut, read, n, inv, side, over, M, table, z.tokens, eps,
        H=size.heads, K=size.keys, C=chunk, BD=min(tile.width, size.K), **size.dot,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    tile = size.launch.scan
    width = min(tile.width, size.V)
    tiles = -(-size.values // width)
    block = z.block(tiles, chunk)
    blocks, _ = z.pieces(block)
    entry, split = s0, blocks.shape[0] > z.rows
    if split:
        entry = _entering(z, block, chunk, k, v, keep, total, s0, s, False)
    h = torch.empty_like(v)
    kernels.scan[(blocks.shape[0] * size.heads * tiles,)](
        q, k, v, M, over, keep, total, total if entry is None else entry, s, h, blocks, first,
        z.starts, z.tokens, **z.heads, HAS=entry is not None, EXTRA=0 if split else 1,
        FINAL=not split, C=chunk, KP=size.K, BV=width, **size.dot,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return h, s, m_end, tokens, n


def _empty(z: _Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The outputs of the forward after h."""
    size = z.sizes
    chunks = z.tokens // size.launch.chunk + z.rows  # no fewer than there are, whatever cu_seqlens
    tokens = z.new(3, -(-size.heads * z.tokens // 4) * 4)
    m = z.new(z.rows, size.heads, 1)
    return z.state(), m, tokens, z.new(chunks, size.heads, size.keys)


def _fake(q, k, v, i, f, s0, m0, cu_seqlens, eps):
    return v.new_empty(v.shape), *_empty(_Call(q, v, cu_seqlens))


def _backward(
    dh: Tensor,
    ds: Tensor | None,
    dm: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    s0: Tensor | None,
    m0: Tensor | None,
    cu_seqlens: Tensor | None,
    eps: float,
    s: Tensor,
    tokens: Tensor,
    n: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, i, f and of the first s and m."""
    dh, q, k, v, i, f = (x.contiguous() for x in (dh, q, k, v, i, f))
    s0, m0, ds = (None if x is None else x.contiguous() for x in (s0, m0, ds))
    z, kernels = _Call(q, v, cu_seqlens), _kernels()
    size, launch = z.sizes, z.sizes.launch
    H, N, C = size.heads, z.tokens, launch.backward
    m, inv, side = tokens.unbind(0)
    (chunks, first), (_, first_n) = z.pieces(C), z.pieces(launch.chunk)
    parts = C // launch.rows
    grid = chunks.shape[0] * H * parts
    a, c, cut, read, keep, total = _weigh(z, C, k, i, f, m0, m, None)
    S, _ = _walk(z, k, v, keep, total, s0, None)

    M, dM = z.new(2, H, N, C, dtype=size.stored).unbind(0)
    over, straight, through, qdq = z.per_token(4)
    dq, dn, tile = torch.empty_like(q), z.new(chunks.shape[0], H, parts, size.keys), launch.queries
    kernels.queries[(grid,)](
        q, k, v, dh, a, c, cut, read, inv, side, n, S, M, dM, dq, qdq, over, straight, dn,
        chunks, z.starts, first_n, N, eps,
        **z.heads, NC=launch.chunk, C=C, R=launch.rows, KP=size.K, BD=min(tile.width, size.V),
        **size.dot, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    ds0, dm0 = z.state(), z.new(z.rows, H, 1)
    dn = _carry(z, C, dn, total, ds, ds0, True)
    dS, borders = _walk(z, q, dh, over, total, ds, ds0, s0, S)

    def reads(tile: Tile, width: int, r: Tensor, y: Tensor, M: Tensor, norm: bool):
        out, tiles = torch.empty_like(y), -(-y.shape[-1] // width)
        product = z.new(tiles, H, N) if norm else None
        kernels.reads[(grid * tiles,)](
            r, y, M, dS, dn, k, keep, out, keep if product is None else product, chunks, N,
            H=H, D=r.shape[-1], W=y.shape[-1], OVER=not norm, NORM=norm, C=C, R=launch.rows,
            BD=min(launch.keys.width, _pad(r.shape[-1])), BW=width, **size.dot,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        return out, product

    dk, kdk = reads(launch.keys, size.K, v, q, dM, True)
    assert kdk is not None
    assert borders is not None
    dv, _ = reads(launch.values, min(launch.values.width, size.V), k, dh, M, False)
    last = tail = z.new(z.rows, H, 1).zero_()
    if dm is not None:
        last = dm.contiguous()
    if ds is not None:  # the last s is divided by exp(m)
        tail = (ds * s).sum((2, 3)).unsqueeze(-1)
        last = last - tail
    kernels.routes[(z.rows * H,)](
        i, m, straight, last, through, z.starts, N, H, B=1024, num_warps=4
    )
    di, df = torch.empty_like(i), torch.empty_like(f)
    table, _ = z.pieces(BLOCK)
    kernels.gates_backward[(table.shape[0] * H,)](
        i, f, i if m0 is None else m0, m, through, qdq, kdk, borders, n, dn, ds0, tail, di, df, dm0,
        table, first, first_n, z.starts, N, H, table.shape[0], K=size.keys, V=size.values,
        HAS=m0 is not None, TILES=kdk.shape[0], BORDERS=borders.shape[0], NC=launch.chunk, C=C,
        B=BLOCK, KP=size.K, BP=_pad(borders.shape[0]), num_warps=4,
    )  # fmt: skip
    return dq, dk, dv, di, df, ds0, dm0


def _fake_backward(dh, ds, dm, q, k, v, i, f, s0, m0, cu_seqlens, eps, s, tokens, n):
    new = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, i, f, s, s))
    *grads, ds0, dm0 = new
    return (*grads, ds0, dm0[..., 0, :1].contiguous())


def _keep(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    _, s, _, *rest = output
    ctx.save_for_backward(*tensors, s, *rest)
    ctx.mark_non_differentiable(*rest)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, run, dh, ds, dm, *_):
    q, k, v, i, f, s0, m0, cu_seqlens, *rest = ctx.saved_tensors
    dh = torch.zeros_like(v) if dh is None else dh
    *grads, ds0, dm0 = run(dh, ds, dm, q, k, v, i, f, s0, m0, cu_seqlens, ctx.eps, *rest)
    return (*grads, None if s0 is None else ds0, None if m0 is None else dm0, None, None)


_mlstm = kernel_op("mlstm", _forward, _fake, _keep, _backward, _fake_backward, _differentiate)
