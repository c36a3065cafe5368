"""`mlstm` on a GPU: what `kernels.mlstm` and its companions compute, launched in order."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, cached_property
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longscan.ops._kernel_op import DTYPES, kernel_op
from longscan.ops._packed import pieces, starts

MLSTMState = tuple[Tensor, Tensor]
MODULES = ("mlstm_gates", "mlstm", "mlstm_whole")
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
"""Of kernels without products; LONG: tokens in a block of those that run through the gates."""


class Launch(NamedTuple):
    """Tokens in a chunk of the forward and of the backward, the second a multiple of the first, and
    those of which a program of the backward computes gradients.

    scan: its tiles of the values; states, reversed: tiles of width x width of a walk in either
    direction; scores: channels at once; queries, keys: channels of the values at once. whole: all
    of a head's state in a program; the forward is `outputs`, with scan's tiles, and the backward
    `look_back` and `look_ahead`, with the warps and stages of queries and keys.
    """

    chunk: int
    backward: int
    rows: int
    scan: Tile
    states: Tile
    reversed: Tile
    scores: Tile
    queries: Tile
    keys: Tile
    whole: bool = False


# (padded K, padded V are at most this, 16-bit operands) -> launch, the first that fits.
LAUNCHES = {
    (128, 128, True): Launch(
        64, 64, 64, Tile(64, 4, 2), Tile(64, 4, 3), Tile(128, 8, 3), Tile(256, 4, 1),
        Tile(128, 8, 3), Tile(128, 8, 2), whole=True,
    ),
    (256, 512, True): Launch(
        32, 128, 64, Tile(128, 8, 3), Tile(128, 8, 3), Tile(64, 4, 3), Tile(256, 4, 1),
        Tile(64, 8, 2), Tile(32, 4, 2),
    ),
    (64, 64, False): Launch(
        32, 64, 32, Tile(32, 4, 1), Tile(32, 4, 1), Tile(32, 4, 1), Tile(32, 4, 1), Tile(32, 4, 1),
        Tile(32, 4, 1),
    ),
    (128, 128, False): Launch(
        16, 64, 16, Tile(32, 8, 1), Tile(64, 4, 1), Tile(64, 4, 1), Tile(32, 4, 1), Tile(32, 4, 1),
        Tile(32, 4, 1),
    ),
    (256, 512, False): Launch(
        16, 64, 16, Tile(16, 8, 1), Tile(64, 4, 1), Tile(64, 4, 1), Tile(32, 4, 1), Tile(32, 8, 1),
        Tile(32, 8, 1),
    ),
}  # fmt: skip


def mlstm_fits(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, state: MLSTMState | None = None
) -> bool:
    """Whether the kernels compute this case: heads of K <= 256, V <= 512, nothing in float64,
    and something at all."""
    return (
        max(q.shape[-1], k.shape[-1]) <= 256
        and v.shape[-1] <= 512
        and all(x.dtype in DTYPES for x in (q, k, v, i, f, *(state or ())))
        and q.numel() > 0
        and v.numel() > 0
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


@cache
def _module(name: str) -> ModuleType:
    """The one that a kernel is in."""
    modules = (import_module(f"longscan.kernels.{x}") for x in MODULES)
    return next(x for x in modules if hasattr(x, name))


def _pad(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


@cache
def _launch(dtype: torch.dtype, keys: int, values: int) -> tuple[Launch, dict, torch.dtype]:
    """What is launched, how operands are multiplied, the dtype of scores and states in between."""
    half = dtype == torch.bfloat16 and (keys > SMALL[0] or values > SMALL[1])
    launch = next(
        launch
        for (k, v, narrow), launch in LAUNCHES.items()
        if keys <= k and values <= v and narrow == half
    )
    return launch, _dot(half), torch.bfloat16 if half else torch.float32


@cache
def _dot(half: bool) -> dict:
    tl = import_module("triton.language")
    return {"DT": tl.bfloat16 if half else tl.float32, "PRECISION": "tf32x3"}


class _Call:
    """What the kernels of a call share."""

    def __init__(self, q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> None:
        self.batch, self.length, self.H, self.V = v.shape
        self.K, self.cu, self.device = q.shape[-1], cu_seqlens, v.device
        self.launch, self.dot, self.stored = _launch(q.dtype, self.K, self.V)
        self.rows = self.batch if cu_seqlens is None else cu_seqlens.numel() - 1
        self.N = self.batch * self.length
        self.sizes = {"H": self.H, "K": self.K, "V": self.V}
        self.tables: dict[int, tuple[Tensor, Tensor]] = {}

    def run(self, name: str, programs: int, tile: Tile, *args: Any, **more: Any) -> None:
        kernel = getattr(_module(name), name)
        kernel[(programs,)](*args, **more, num_warps=tile.warps, num_stages=tile.stages)

    def pieces(self, size: int) -> tuple[Tensor, Tensor]:
        found = self.tables.get(size)
        if found is None:
            found = pieces(self.batch, self.length, size, self.cu, self.device)
            self.tables[size] = found
        return found

    @cached_property
    def starts(self) -> Tensor:
        return starts(self.batch, self.length, self.cu, self.device)

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def per_token(self, count: int) -> Tensor:
        """[count, H N], so padded that kernels, compiled for pointers to 16 bytes, find all so."""
        return self.new(count, -(-self.H * self.N // 4) * 4)

    def state(self) -> Tensor:
        return self.new(self.rows, self.H, self.K, self.V + 1)

    @cached_property
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
        return self.pieces(self.cut[0])

    def sums(self) -> Tensor:
        """What blocks add to the state, and their decays."""
        new = torch.empty if self.cu is None else torch.zeros  # not all of it may be written
        return new(self.cut[1], self.H, self.K * (self.V + 1) + 4, device=self.device)


def _gates(z: _Call, name: str, head: tuple, ends: tuple, rest: tuple, has: bool) -> None:
    """`gates` or `routes`: of sequences of several blocks the sums of blocks first, in `ends`."""
    table, first = z.pieces(LONG.width)
    split = table.shape[0] > z.rows
    for alone in (True, False) if split else (False,):
        z.run(
            name, table.shape[0] * z.H, LONG, *head, *ends, *rest, table, first, z.starts, z.N, z.H,
            HAS=has, SPLIT=split, SUM=alone, B=LONG.width, P=64,
        )  # fmt: skip


def _weigh(
    z: _Call, chunk: int, k: Tensor, i: Tensor, f: Tensor, m0: Tensor | None, m: Tensor,
    weights: Sequence[Tensor], spread: Tensor | None, bar: Tensor | None,
) -> None:  # fmt: skip
    """Fills steps, rest, gain, read, keep, total of chunks, spread, and bar."""
    table, _ = z.pieces(chunk)
    z.run(
        "weigh", table.shape[0] * z.H, PLAIN, k, i, f, i if m0 is None else m0, m, *weights,
        m if spread is None else spread, m if bar is None else bar, table, z.starts, z.N,
        H=z.H, K=z.K, HAS=m0 is not None, BAR=bar is not None, SPREAD=spread is not None, C=chunk,
        KP=_pad(z.K),
    )  # fmt: skip


def _carry(
    z: _Call, chunk: int, bar: Tensor, total: Tensor, n0: Tensor | None, n_end: Tensor,
    reverse: bool,
) -> Tensor:  # fmt: skip
    """The normaliser before every chunk, or its gradient after it; n_end has that of the end."""
    n, parts = z.new(bar.shape[0], z.H, z.K), bar.shape[2] if reverse else 1
    bk = min(16, _pad(z.K))
    z.run(
        "carry", z.rows * z.H * -(-z.K // bk), PLAIN, bar, total, bar if n0 is None else n0, n,
        n_end, z.pieces(chunk)[1], z.H,
        K=z.K, V=z.V, HAS=n0 is not None, REVERSE=reverse, PARTS=parts, R=128, BK=bk,
    )  # fmt: skip
    return n


def _walk(
    z: _Call, chunk: int, weights: tuple, k: Tensor, v: Tensor, x0: Tensor | None, sums: Tensor,
    s: Tensor | None, reverse: bool = False, s_end: Tensor | None = None, s0: Tensor | None = None,
    other: Tensor | None = None, more: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Fills s, or without it sums; the products at borders if reversed. See the kernel."""
    (table, blocks), (borders, firsts), first = z.blocks(), z.pieces(BLOCK), z.pieces(chunk)[1]
    keep, total = weights
    tile, pad = z.launch.reversed if reverse else z.launch.states, (_pad(z.K), _pad(z.V))
    bk, bv = (min(tile.width, n) for n in pad)
    tiles = -(-z.K // bk) * -(-z.V // bv)
    product = z.new(tiles, borders.shape[0], z.H) if reverse and s is not None else total
    z.run(
        "walk", table.shape[0] * z.H * tiles, tile, k, v, keep, total,
        *(total if x is None else x for x in (more, x0, sums, s, s_end, s0, other)), product,
        table, blocks, first, firsts, z.starts, z.N, borders.shape[0],
        **z.sizes, HAS=x0 is not None, HAS0=s0 is not None, SPLIT=table.shape[0] > z.rows,
        SUM=s is None, MORE=more is not None, REVERSE=reverse, G=BLOCK // chunk, C=chunk, BK=bk,
        BV=bv, **z.dot,
    )  # fmt: skip
    return product


def _forward(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, s0: Tensor | None, m0: Tensor | None,
    cu_seqlens: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(h, s, m) and what the backward needs: m, q . n and weights of every token, normalisers
    before chunks, sums of blocks of sequences that are cut."""
    q, k, v, i, f = (x.contiguous() for x in (q, k, v, i, f))
    s0, m0 = (None if x is None else x.contiguous() for x in (s0, m0))
    z = _Call(q, v, cu_seqlens)
    chunk, tile = z.launch.chunk, z.launch.scan
    h, s, m_end, tokens, bar, sums = _empty(z, v)
    m, qn, over, spread, *weights = tokens.unbind(0)
    own, *_, keep, total = weights
    head = i, f, i if m0 is None else m0
    _gates(z, "gates", head, (own, over), (m, m_end), m0 is not None)
    if z.launch.whole:
        n = bar
        _weigh(z, chunk, k, i, f, m0, m, weights, spread, None)
        _outputs(z, q, k, v, s0, m, qn, over, spread, weights, n, sums, s, h, eps)
        return h, s, m_end, tokens, n, sums
    _weigh(z, chunk, k, i, f, m0, m, weights, None, bar)
    n = _carry(z, chunk, bar, total, s0, s, False)
    chunks, first = z.pieces(chunk)
    M = z.new(z.H, z.N, chunk, dtype=z.stored)
    z.run(
        "scores", chunks.shape[0] * z.H, z.launch.scores, q, k, m, *weights[:4], n, over, qn, M,
        chunks, z.N, eps,
        H=z.H, K=z.K, C=chunk, BD=min(z.launch.scores.width, _pad(z.K)), **z.dot,
    )  # fmt: skip
    table, blocks = z.blocks()
    split, width = table.shape[0] > z.rows, min(tile.width, _pad(z.V))
    if split:
        _walk(z, chunk, (keep, total), k, v, None, sums, None)
    z.run(
        "scan", table.shape[0] * z.H * -(-z.V // width), tile, q, k, v, M, over, keep, total,
        total if s0 is None else s0, sums, s, h, table, blocks, first, z.starts, z.N,
        **z.sizes, HAS=s0 is not None, SPLIT=split, C=chunk, KP=_pad(z.K), BV=width, **z.dot,
    )  # fmt: skip
    return h, s, m_end, tokens, n, sums


def _outputs(
    z: _Call, q: Tensor, k: Tensor, v: Tensor, s0: Tensor | None, m: Tensor, qn: Tensor,
    over: Tensor, spread: Tensor, weights: Sequence[Tensor], n: Tensor, sums: Tensor, s: Tensor,
    h: Tensor, eps: float,
) -> None:  # fmt: skip
    """Fills h, s, qn, over and n; sums of sequences that are cut."""
    chunk, tile, (*weights, keep, total) = z.launch.chunk, z.launch.scan, weights
    (table, blocks), first = z.blocks(), z.pieces(chunk)[1]
    width = min(tile.width, _pad(z.V))
    if table.shape[0] > z.rows:
        _walk(z, chunk, (keep, total), k, v, None, sums, None, more=keep)
    z.run(
        "outputs", table.shape[0] * z.H * -(-z.V // width), tile, q, k, v, m, *weights, spread,
        keep, total, total if s0 is None else s0, sums, n, qn, over, s, h, table, blocks, first,
        z.starts, z.N, eps,
        **z.sizes, HAS=s0 is not None, C=chunk, KP=_pad(z.K), BV=width,
    )  # fmt: skip


def _empty(z: _Call, v: Tensor) -> tuple[Tensor, ...]:
    chunks = z.N // z.launch.chunk + z.rows  # no fewer than there are, whatever cu_seqlens
    m_end, n = z.new(z.rows, z.H, 1), z.new(chunks, z.H, z.K)
    return torch.empty_like(v), z.state(), m_end, z.per_token(10), n, z.sums()


def _fake(q, k, v, i, f, s0, m0, cu_seqlens, eps):
    return _empty(_Call(q, v, cu_seqlens), v.contiguous())


def _backward(
    dh: Tensor, ds: Tensor | None, dm: Tensor | None, q: Tensor, k: Tensor, v: Tensor, i: Tensor,
    f: Tensor, s0: Tensor | None, m0: Tensor | None, cu_seqlens: Tensor | None, eps: float,
    s: Tensor, tokens: Tensor, n: Tensor, sums: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, i, f and of the first s and m."""
    dh, q, k, v, i, f = (x.contiguous() for x in (dh, q, k, v, i, f))
    s0, m0, ds = (None if x is None else x.contiguous() for x in (s0, m0, ds))
    z = _Call(q, v, cu_seqlens)
    launch, H, N, C = z.launch, z.H, z.N, z.launch.backward
    m, qn, over, spread, *weights = tokens.unbind(0)
    own, spare, straight, through, qdq, kdk = z.per_token(6).unbind(0)
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    ds0, dm0 = z.state(), z.new(z.rows, H, 1)
    sums_back = torch.empty_like(sums)
    given, filled = (q, k, v, dh, ds, s0), (dq, dk, dv, ds0, own, straight, qdq, kdk, sums_back)
    if launch.whole:
        dn, borders = _back_whole(z, given, filled, (m, qn, over, spread), weights, n, sums, eps)
    else:
        if launch.chunk != C:
            weights = z.per_token(6).unbind(0)
            _weigh(z, C, k, i, f, m0, m, weights, None, None)
        dn, borders = _back_apart(z, given, filled, (m, qn), weights, n, sums, eps)
    last, tail = None if dm is None else dm.contiguous(), None
    if ds is not None:  # the last s is divided by exp(m)
        tail = (ds * s).sum((2, 3)).unsqueeze(-1)
        last = -tail if last is None else last - tail
    head = i, m, straight, straight if last is None else last
    _gates(z, "routes", head, (own, spare), (through,), last is not None)
    di, df = torch.empty_like(i), torch.empty_like(f)
    (table, _), first, first_n = z.pieces(BLOCK), z.pieces(C)[1], z.pieces(launch.chunk)[1]
    z.run(
        "gates_backward", table.shape[0] * H, PLAIN, i, f, i if m0 is None else m0, m, through,
        qdq, kdk, borders, n, dn, ds0, m if tail is None else tail, di, df, dm0, table, first,
        first_n, z.starts, N, H, table.shape[0],
        K=z.K, V=z.V, HAS=m0 is not None, TAIL=tail is not None, BORDERS=borders.shape[0],
        NC=launch.chunk, C=C, B=BLOCK, KP=_pad(z.K), BP=_pad(borders.shape[0]),
    )  # fmt: skip
    return dq, dk, dv, di, df, ds0, dm0


def _back_apart(
    z: _Call, given: tuple, filled: tuple[Tensor, ...], tokens: tuple[Tensor, Tensor],
    weights: Sequence[Tensor], n: Tensor, sums: Tensor, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Fills dq, dk, dv, ds0 and what gates need. Returns the gradient of the normaliser after
    chunks, and the products at borders."""
    q, k, v, dh, ds, s0 = given
    dq, dk, dv, ds0, over, straight, qdq, kdk, sums_back = filled
    (m, qn), (*weights, keep, total) = tokens, weights
    launch, H, N, C = z.launch, z.H, z.N, z.launch.backward
    chunks, first_n, parts = z.pieces(C)[0], z.pieces(launch.chunk)[1], C // launch.rows
    S, dS = z.new(2, chunks.shape[0], H, z.K, z.V, dtype=z.stored).unbind(0)
    _walk(z, C, (keep, total), k, v, s0, sums, S)
    M, dM = z.new(2, H, N, C, dtype=z.stored).unbind(0)
    dn = z.new(chunks.shape[0], H, parts, z.K)
    keys, values, programs = _pad(z.K), _pad(z.V), chunks.shape[0] * H * parts
    tile = launch.queries
    wide = min(tile.width, values)
    narrow = min(tile.width, max(16, keys * wide // values))
    z.run(
        "queries", programs, tile, q, k, v, dh, S, n, m, qn, *weights, over, straight, qdq, M, dM,
        dq, dn, chunks, z.starts, first_n, N, eps,
        **z.sizes, NC=launch.chunk, C=C, R=launch.rows, BK=narrow, BD=wide, KP=keys,
        TURNS=max(-(-z.V // wide), -(-z.K // narrow)), **z.dot,
    )  # fmt: skip
    dn = _carry(z, C, dn, total, ds, ds0, True)
    if z.blocks()[0].shape[0] > z.rows:
        _walk(z, C, (over, total), q, dh, None, sums_back, None, True)
    borders = _walk(z, C, (over, total), q, dh, ds, sums_back, dS, True, ds0, s0, S)
    z.run(
        "keys", programs, launch.keys, q, k, v, dh, dS, dn, M, dM, keep, kdk, dk, dv, chunks, N,
        **z.sizes, C=C, R=launch.rows, BD=min(launch.keys.width, values), KP=keys, **z.dot,
    )  # fmt: skip
    return dn, borders


def _back_whole(
    z: _Call, given: tuple, filled: tuple[Tensor, ...], tokens: tuple[Tensor, ...],
    weights: Sequence[Tensor], n: Tensor, sums: Tensor, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `_back_apart`, of heads whose state one program holds."""
    q, k, v, dh, ds, s0 = given
    dq, dk, dv, ds0, own, straight, qdq, kdk, sums_back = filled
    (m, qn, over, spread), (*weights, keep, total) = tokens, weights
    (table, blocks), (borders, firsts) = z.blocks(), z.pieces(BLOCK)
    C, programs, first = z.launch.backward, table.shape[0] * z.H, z.pieces(z.launch.backward)[1]
    M, dM = z.new(2, z.H, z.N, C, dtype=z.stored).unbind(0)
    S = z.new(borders.shape[0], z.H, z.K, z.V, dtype=z.stored)
    dn, product = torch.empty_like(n), z.new(1, borders.shape[0], z.H)
    same = {**z.sizes, "G": BLOCK // C, "C": C, "KP": _pad(z.K), "VP": _pad(z.V)}
    z.run(
        "look_back", programs, z.launch.queries, q, k, v, dh, n, m, qn, over, *weights, spread,
        keep, total, total if s0 is None else s0, sums, own, straight, qdq, M, dM, S, dq,
        table, blocks, first, firsts, z.starts, z.N, eps, HAS=s0 is not None, **same,
    )  # fmt: skip
    if table.shape[0] > z.rows:
        _walk(z, C, (over, total), q, dh, None, sums_back, None, True, more=own)
    z.run(
        "look_ahead", programs, z.launch.keys, q, k, v, dh, M, dM, over, own, keep, total,
        total if ds is None else ds, sums_back, S, total if s0 is None else s0, dn, ds0, product,
        kdk, dk, dv, table, blocks, first, firsts, z.starts, z.N,
        HAS=ds is not None, HAS0=s0 is not None, **same,
    )  # fmt: skip
    return dn, product


def _fake_backward(dh, ds, dm, q, k, v, i, f, s0, m0, cu_seqlens, eps, s, tokens, n, sums):
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
