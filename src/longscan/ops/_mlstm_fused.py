"""`mlstm` on a GPU: what `kernels.mlstm` computes, launched in order."""

from __future__ import annotations

from collections.abc import Sequence
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
WARPS = 132 * 8
"""Warps that run at a time on a GPU of 132 processors, of kernels that take all registers."""
LONGEST = 16
"""Blocks of a sequence at most: each goes through the sums of those before it."""
BLOCK = 512
"""Tokens between the borders at which gradients of the gates begin anew: how far rounding errors
may add up."""


class Tile(NamedTuple):
    """Width of a tile, warps, stages of the software pipeline."""

    width: int
    warps: int
    stages: int


PLAIN = Tile(0, 4, 3)
LONG = Tile(2048, 8, 3)
"""Of kernels without products; LONG: tokens at a time of those that walk through the gates."""


class Launch(NamedTuple):
    """Tokens in a chunk of the forward and of the backward, the second a multiple of the first, and
    those of which a program of the backward computes gradients.

    scan: its tiles of the values; states: tiles of width x width; scores, and pairs, those of the
    backward, queries, keys: channels at once.
    """

    chunk: int
    backward: int
    rows: int
    scan: Tile
    states: Tile
    scores: Tile
    pairs: Tile
    queries: Tile
    keys: Tile


# (padded K, padded V are at most this, 16-bit operands) -> launch, the first that fits.
LAUNCHES = {
    (128, 128, True): Launch(
        32, 128, 64, Tile(64, 4, 3), Tile(64, 4, 3), Tile(64, 4, 3),
        Tile(64, 4, 2), Tile(64, 4, 2), Tile(32, 4, 3),
    ),
    (256, 512, True): Launch(
        32, 128, 64, Tile(128, 8, 3), Tile(128, 8, 3), Tile(64, 4, 3),
        Tile(64, 4, 3), Tile(64, 8, 3), Tile(32, 4, 2),
    ),
    (64, 64, False): Launch(
        32, 64, 32, Tile(32, 4, 1), Tile(32, 4, 1), Tile(32, 4, 1),
        Tile(32, 4, 1), Tile(32, 4, 1), Tile(32, 4, 1),
    ),
    (128, 128, False): Launch(
        16, 64, 16, Tile(32, 8, 1), Tile(64, 4, 1), Tile(32, 4, 1),
        Tile(32, 4, 1), Tile(32, 4, 1), Tile(32, 4, 1),
    ),
    (256, 512, False): Launch(
        16, 64, 16, Tile(16, 8, 1), Tile(64, 4, 1), Tile(32, 4, 1),
        Tile(32, 4, 1), Tile(32, 8, 1), Tile(32, 8, 1),
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
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, *, state: MLSTMState | None = None,
    cu_seqlens: Tensor | None = None, eps: float = 1e-6,
) -> tuple[Tensor, MLSTMState]:  # fmt: skip
    """As `mlstm_chunked`: h in v's dtype, the state in float32."""
    out = v.dtype
    if not q.dtype == k.dtype == out:
        wide = torch.promote_types(torch.promote_types(q.dtype, k.dtype), out)
        q, k, v = (x.to(wide) for x in (q, k, v))
    s, m = (None, None) if state is None else (x.float() for x in state)
    h, s, m, *_ = _mlstm(q, k, v, i, f, s, m, cu_seqlens, eps)
    return h if h.dtype == out else h.to(out), (s, m)


def _pad(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


def _launch(dtype: torch.dtype, keys: int, values: int) -> tuple[Launch, dict, torch.dtype]:
    """What is launched, how operands are multiplied, the dtype of scores and states in between."""
    half = dtype == torch.bfloat16 and (keys > SMALL[0] or values > SMALL[1])
    launch = next(
        launch
        for (k, v, narrow), launch in LAUNCHES.items()
        if keys <= k and values <= v and narrow == half
    )
    tl = import_module("triton.language")
    dot = {"DT": tl.bfloat16 if half else tl.float32, "PRECISION": "tf32x3"}
    return launch, dot, torch.bfloat16 if half else torch.float32


class _Call:
    """What the kernels of a call share."""

    def __init__(self, q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> None:
        self.batch, self.length, self.H, self.V = v.shape
        self.K, self.cu, self.device = q.shape[-1], cu_seqlens, v.device
        self.launch, self.dot, self.stored = _launch(q.dtype, self.K, self.V)
        self.rows = self.batch if cu_seqlens is None else cu_seqlens.numel() - 1
        self.N = self.batch * self.length
        self.sizes = {"H": self.H, "K": self.K, "V": self.V}

    def run(self, name: str, programs: int, tile: Tile, *args: Any, **more: Any) -> None:
        kernel = getattr(import_module("longscan.kernels.mlstm"), name)
        kernel[(programs,)](*args, **more, num_warps=tile.warps, num_stages=tile.stages)

    def pieces(self, size: int) -> tuple[Tensor, Tensor]:
        return pieces(self.batch, self.length, size, self.cu, self.device)

    @property
    def starts(self) -> Tensor:
        return starts(self.batch, self.length, self.cu, self.device)

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def per_token(self, count: int) -> tuple[Tensor, ...]:
        """[H N] each, so padded that kernels, compiled for pointers to 16 bytes, find all so."""
        return self.new(count, -(-self.H * self.N // 4) * 4).unbind(0)

    def state(self) -> Tensor:
        return self.new(self.rows, self.H, self.K, self.V + 1)

    def cut(self) -> tuple[int, int]:
        """Tokens of a block, and how many blocks there are at most if sequences are cut into
        several, for want of programs: as many as there is room for on the GPU. A program of `scan`
        walks through a block."""
        tile, rows = self.launch.scan, self.rows
        room = WARPS // (self.H * -(-self.V // min(tile.width, _pad(self.V))) * tile.warps)
        if self.cu is None:
            each = max(1, min(room // rows, LONGEST))
            size = -(-self.length // (each * BLOCK)) * BLOCK
            most = -(-self.length // size) * rows
            return size, most if most > rows else 0
        each = room if room > 1 and rows < 4 * room else 1
        size = -(-self.N // (each * BLOCK)) * BLOCK
        return size, self.N // size + rows if each > 1 else 0

    def blocks(self) -> tuple[Tensor, Tensor]:
        """Where they are, as `pieces`."""
        return self.pieces(self.cut()[0])

    def sums(self) -> Tensor:
        """What blocks add to the state, and their decays."""
        new = torch.empty if self.cu is None else torch.zeros  # not all of it may be written
        return new(self.cut()[1], self.H, self.K * self.V + 4, device=self.device)


def _weigh(
    z: _Call, chunk: int, k: Tensor, i: Tensor, f: Tensor, m0: Tensor | None, m: Tensor,
    bar: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """steps, rest, gain, read, keep, total of chunks; bar is filled."""
    table, _ = z.pieces(chunk)
    tokens, total = z.per_token(5), z.new(table.shape[0], z.H)
    z.run(
        "weigh", table.shape[0] * z.H, PLAIN, k, i, f, i if m0 is None else m0, m, *tokens, total,
        m if bar is None else bar, table, z.starts, z.N,
        H=z.H, K=z.K, HAS=m0 is not None, BAR=bar is not None, C=chunk, KP=_pad(z.K),
    )  # fmt: skip
    return *tokens, total


def _carry(
    z: _Call, chunk: int, bar: Tensor, total: Tensor, n0: Tensor | None, n_end: Tensor,
    reverse: bool,
) -> Tensor:  # fmt: skip
    """The normaliser before every chunk, or its gradient after it; n_end has that of the end."""
    n, parts = z.new(bar.shape[0], z.H, z.K), bar.shape[2] if reverse else 1
    bk = min(32, _pad(z.K))
    z.run(
        "carry", z.rows * z.H * -(-z.K // bk), PLAIN, bar, total, bar if n0 is None else n0, n,
        n_end, z.pieces(chunk)[1], z.H,
        K=z.K, V=z.V, HAS=n0 is not None, REVERSE=reverse, PARTS=parts, R=64, BK=bk,
    )  # fmt: skip
    return n


def _walk(
    z: _Call, chunk: int, weights: tuple, k: Tensor, v: Tensor, x0: Tensor | None, sums: Tensor,
    s: Tensor | None, reverse: bool = False, s_end: Tensor | None = None, s0: Tensor | None = None,
    other: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Fills s, or without it sums; the products at borders if reversed. See the kernel."""
    (table, blocks), (borders, firsts), first = z.blocks(), z.pieces(BLOCK), z.pieces(chunk)[1]
    keep, total = weights
    tile, pad = z.launch.states, (_pad(z.K), _pad(z.V))
    bk, bv = (min(tile.width, n) for n in pad)
    tiles = -(-z.K // bk) * -(-z.V // bv)
    product = z.new(tiles, borders.shape[0], z.H) if reverse and s is not None else total
    z.run(
        "walk", table.shape[0] * z.H * tiles, tile, k, v, keep, total,
        *(total if x is None else x for x in (x0, sums, s, s_end, s0, other)), product,
        table, blocks, first, firsts, z.starts, z.N, borders.shape[0],
        **z.sizes, HAS=x0 is not None, HAS0=s0 is not None, SPLIT=table.shape[0] > z.rows,
        SUM=s is None, REVERSE=reverse, G=BLOCK // chunk, C=chunk, BK=bk, BV=bv, **z.dot,
    )  # fmt: skip
    return product


def _scores(
    z: _Call, chunk: int, rows: int, tile: Tile, eps: float, n: Tensor, m: Tensor,
    weights: Sequence[Tensor], q: Tensor, k: Tensor, v: Tensor, dh: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(M, P, over), and with dh (M, P, over, inv, side, half); see the kernel."""
    back, (table, _) = dh is not None, z.pieces(chunk)
    over, *more = tokens = z.per_token(4 if back else 1)
    M = z.new(z.H, z.N, chunk, dtype=z.stored)
    P = z.new(z.H, z.N, chunk) if back else M
    z.run(
        "scores", table.shape[0] * z.H * (chunk // rows), tile, q, k, v, v if dh is None else dh,
        m, *weights, n, over, *(more or (m, m, m)), M, P,
        table, z.starts, z.pieces(z.launch.chunk)[1], z.N, eps,
        **z.sizes, BACK=back, NC=z.launch.chunk, C=chunk, R=rows, BD=min(tile.width, _pad(z.K)),
        **z.dot,
    )  # fmt: skip
    return M, P, *tokens


def _forward(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, s0: Tensor | None, m0: Tensor | None,
    cu_seqlens: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(h, s, m) and what the backward needs: m of every token, normalisers before chunks, sums of
    blocks of sequences that are cut."""
    q, k, v, i, f = (x.contiguous() for x in (q, k, v, i, f))
    s0, m0 = (None if x is None else x.contiguous() for x in (s0, m0))
    z = _Call(q, v, cu_seqlens)
    chunk, tile = z.launch.chunk, z.launch.scan
    h, s, m_end, m, bar, sums = _empty(z, v)
    z.run(
        "gates", z.rows * z.H, LONG, i, f, i if m0 is None else m0, m, m_end, z.starts, z.N, z.H,
        HAS=m0 is not None, B=LONG.width,
    )  # fmt: skip
    *weights, keep, total = _weigh(z, chunk, k, i, f, m0, m, bar)
    n = _carry(z, chunk, bar, total, s0, s, False)
    M, _, over = _scores(z, chunk, chunk, z.launch.scores, eps, n, m, weights, q, k, v, None)
    table, blocks = z.blocks()
    split, width = table.shape[0] > z.rows, min(tile.width, _pad(z.V))
    if split:
        _walk(z, chunk, (keep, total), k, v, None, sums, None)
    z.run(
        "scan", table.shape[0] * z.H * -(-z.V // width), tile, q, k, v, M, over, keep, total,
        total if s0 is None else s0, sums, s, h, table, blocks, z.pieces(chunk)[1], z.starts, z.N,
        **z.sizes, HAS=s0 is not None, SPLIT=split, C=chunk, KP=_pad(z.K), BV=width, **z.dot,
    )  # fmt: skip
    return h, s, m_end, m, n, sums


def _empty(z: _Call, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    chunks = z.N // z.launch.chunk + z.rows  # no fewer than there are, whatever cu_seqlens
    m_end, n = z.new(z.rows, z.H, 1), z.new(chunks, z.H, z.K)
    return torch.empty_like(v), z.state(), m_end, z.new(z.H * z.N), n, z.sums()


def _fake(q, k, v, i, f, s0, m0, cu_seqlens, eps):
    return _empty(_Call(q, v, cu_seqlens), v.contiguous())


def _backward(
    dh: Tensor, ds: Tensor | None, dm: Tensor | None, q: Tensor, k: Tensor, v: Tensor, i: Tensor,
    f: Tensor, s0: Tensor | None, m0: Tensor | None, cu_seqlens: Tensor | None, eps: float,
    s: Tensor, m: Tensor, n: Tensor, sums: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, i, f and of the first s and m."""
    dh, q, k, v, i, f = (x.contiguous() for x in (dh, q, k, v, i, f))
    s0, m0, ds = (None if x is None else x.contiguous() for x in (s0, m0, ds))
    z = _Call(q, v, cu_seqlens)
    launch, H, N, C = z.launch, z.H, z.N, z.launch.backward
    (chunks, first), (_, first_n) = z.pieces(C), z.pieces(launch.chunk)
    split, parts = z.blocks()[0].shape[0] > z.rows, C // launch.rows
    *weights, keep, total = _weigh(z, C, k, i, f, m0, m, None)
    S, dS = z.new(2, chunks.shape[0], H, z.K, z.V, dtype=z.stored).unbind(0)
    _walk(z, C, (keep, total), k, v, s0, sums, S)
    M, P, over, *more = _scores(z, C, launch.rows, launch.pairs, eps, n, m, weights, q, k, v, dh)
    dM, dn = torch.empty_like(M), z.new(chunks.shape[0], H, parts, z.K)

    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    qdq, kdk, straight, through = z.per_token(4)

    def reads(tile: Tile, r, y, s, n, first, every, mate, weight, out, product):
        z.run(
            "reads", chunks.shape[0] * H * parts, tile, r, y, M, dM, s, n, mate, weight, out,
            product, dh, dv, P, *weights, *more, straight, dn, chunks, z.starts, first, N, eps,
            **z.sizes, QUERY=r is dh, NC=every, C=C, R=launch.rows,
            BD=min(tile.width, _pad(z.V)), KP=_pad(z.K), **z.dot,
        )  # fmt: skip

    reads(launch.queries, dh, k, S, n, first_n, launch.chunk, q, over, dq, qdq)
    ds0, dm0 = z.state(), z.new(z.rows, H, 1)
    dn = _carry(z, C, dn, total, ds, ds0, True)
    sums = torch.empty_like(sums)
    if split:
        _walk(z, C, (over, total), q, dh, None, sums, None, True)
    borders = _walk(z, C, (over, total), q, dh, ds, sums, dS, True, ds0, s0, S)
    reads(launch.keys, v, q, dS, dn, first, C, k, keep, dk, kdk)
    last = tail = m.new_zeros(z.rows, H, 1)
    if dm is not None:
        last = dm.contiguous()
    if ds is not None:  # the last s is divided by exp(m)
        tail = (ds * s).sum((2, 3)).unsqueeze(-1)
        last = last - tail
    z.run("routes", z.rows * H, LONG, i, m, straight, last, through, z.starts, N, H, B=LONG.width)
    di, df = torch.empty_like(i), torch.empty_like(f)
    table, _ = z.pieces(BLOCK)
    z.run(
        "gates_backward", table.shape[0] * H, PLAIN, i, f, i if m0 is None else m0, m, through,
        qdq, kdk, borders, n, dn, ds0, tail, di, df, dm0, table, first, first_n, z.starts, N, H,
        table.shape[0], K=z.K, V=z.V, HAS=m0 is not None,
        BORDERS=borders.shape[0], NC=launch.chunk, C=C, B=BLOCK, KP=_pad(z.K),
        BP=_pad(borders.shape[0]),
    )  # fmt: skip
    return dq, dk, dv, di, df, ds0, dm0


def _fake_backward(dh, ds, dm, q, k, v, i, f, s0, m0, cu_seqlens, eps, s, m, n, sums):
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
