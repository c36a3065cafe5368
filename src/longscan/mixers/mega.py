"""Mega: gated attention whose queries and keys see a damped moving average."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan.mixers._ema import AveragedAttention, Entries
from longscan.ops import _cache
from longscan.ops._check import cast, compute_dtype, full_precision
from longscan.ops._layout import check_cu_seqlens
from longscan.ops.attention import _buckets
from longscan.ops.rotary import rotary_factors
from longscan.state import State

# Causal queries that meet their keys together: those behind the last of them are left out.
_QUERIES = 256


class Mega(AveragedAttention):
    """Attention of one head between tokens that a damped moving average has made to know their
    place, with a gate that replaces a share of the residual stream.

    n = norm(x);   m = EMA(n);   u, z, r, hx = mx_proj(m)        u sigmoid, z and r SiLU
    q = gamma_0 z + beta_0,   k = gamma_1 z + beta_1,   v = SiLU(v_proj(n))
    o_i = sum_j A_ij v_j
    y = u (SiLU(hx + h_proj(r o)) - x)

    x is the residual stream itself, so that a block, which adds y to it, gives (1 - u) x + u H.
    EMA averages each channel at d_state speeds:

    h_t = q h_{t-1} + p beta n_t,   p = sigmoid(delta),   q = 1 - p sigmoid(alpha)
    m_t = SiLU(gamma . h_t / sqrt(d_state) + omega n_t)

    The weights A of attention, with N the number of keys that query i sees:

    softmax: A_i = softmax_j(q_i . k_j / sqrt(d_key) + b)
    laplace: A_ij = (1 + erf((s - 0.707107) / (0.282095 sqrt(2)))) / 2,   s = q_i . k_j / N + b
    relu2:   A_ij = max(0, s)^2,   s as for laplace

    Shapes: x, y [B, T, d_model]; rows of mx_proj u | z | r | hx; gamma, beta [2, d_key]; rel_bias
    [2 P - 1] (simple, for keys from P - 1 before to P - 1 behind the query, P = max_positions or
    chunk) or [2, d_key] (rotary); state: h [B, d_model, d_state], k [B, L, 1, d_key],
    v [B, L, 1, d_value], right-aligned, and length [B] int64, the tokens seen so far.
    d_key: Z, width of queries and keys; None: half of d_model, even. d_value: E, width of values;
    None: 2 d_model.
    d_state: averages per channel.
    attention: softmax, laplace or relu2.
    bias: b: simple, a number per distance; rotary, a(0) . c(i - j) with learned a and c turned by
    their distance; None, no bias.
    chunk: tokens are read within chunks of so many only, counted from the start of the sequence,
    and the average alone crosses their borders; None: all are read.
    max_positions: longest sequence with the simple bias and no chunk.
    bidirectional: all tokens of the sequence (or chunk) are read and the average runs both ways;
    then no state and no decoding.
    norm: of the input, layer (LayerNorm) or rms. norm_eps: added to its variance or mean square.
    Precision: the average, scores and weights float32.
    Raises: ValueError for settings that do not fit and for sequences longer than max_positions.
    Source: arXiv 2209.10655, sections 3 and 4, appendix B for laplace and the biases.
    Differs: the average in chunks, exactly causal, instead of an FFT, and without truncation; the
    last chunk may be partial, N counting its keys; dropout is the block's, on y; no batch norm,
    no norm behind the layer; rms has a weight per channel where the authors' scale norm has one.
    Reference: facebookresearch/mega, MIT.
    """

    no_weight_decay = ("rel_bias",)

    def __init__(
        self,
        d_model: int,
        *,
        d_key: int | None = None,
        d_value: int | None = None,
        d_state: int = 16,
        attention: str = "softmax",
        bias: str | None = "rotary",
        chunk: int | None = None,
        max_positions: int = 1024,
        bidirectional: bool = False,
        norm: str = "layer",
        norm_eps: float = 1e-5,
    ) -> None:
        if attention not in FORMS:
            raise ValueError(f"attention must be one of {', '.join(FORMS)}; got {attention!r}")
        if bias not in ("simple", "rotary", None):
            raise ValueError(f"bias must be 'simple', 'rotary' or None; got {bias!r}")
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk must be at least 1 or None, not {chunk}")
        if max_positions < 1:
            raise ValueError(f"max_positions must be at least 1, not {max_positions}")
        super().__init__(
            d_model, d_key=d_key, d_value=d_value, d_state=d_state, bidirectional=bidirectional,
            norm=norm, norm_eps=norm_eps,
        )  # fmt: skip
        if bias == "rotary" and self.d_key % 2:
            raise ValueError(f"the rotary bias turns pairs: d_key must be even, not {self.d_key}")
        self.attention, self.bias, self.chunk = attention, bias, chunk
        self.max_positions = max_positions if chunk is None else chunk
        shapes = {"simple": (2 * self.max_positions - 1,), "rotary": (2, self.d_key)}
        self.rel_bias = nn.Parameter(torch.empty(shapes[bias])) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As AveragedAttention; rel_bias N(0, 0.02)."""
        super().reset_parameters()
        if self.rel_bias is not None:
            nn.init.normal_(self.rel_bias, std=0.02)

    def init_state(self, batch: int) -> State:
        if self.bidirectional:
            return State()
        w = self.v_proj.weight
        k, v = (w.new_zeros(batch, 0, 1, d, dtype=compute_dtype(w))
                for d in (self.d_key, self.d_value))  # fmt: skip
        length = torch.zeros(batch, dtype=torch.int64, device=w.device)
        return State(self.move.init_state(batch), k=k, v=v, length=length)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, state: State | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Entries]:
        dtype = compute_dtype(q, self.gamma)
        q, k, v = cast(dtype, q, k, v)
        batch, n = q.shape[:2]
        rows = batch if cu_seqlens is None else cu_seqlens.numel() - 1
        seen = [0] * rows if state is None else _cache.counts(state)
        self._check_positions(n, seen, cu_seqlens)
        with full_precision(q):
            if cu_seqlens is None:
                valid = self._valid(seen)
                if max(valid) == 0:
                    return self._fresh(q, k, v, seen)
                assert state is not None
                if self.chunk is None or max(valid) + n <= self.chunk:
                    return self._append(q, k, v, state, seen, valid)
                bounds = [n * i for i in range(batch + 1)]
            else:
                bounds = check_cu_seqlens(cu_seqlens, batch, n)
            return self._pieces(q, k, v, state, seen, bounds)

    def _check_positions(self, n: int, seen: list[int], cu_seqlens: Tensor | None) -> None:
        if self.bias != "simple" or self.chunk is not None:
            return
        new = [n] * len(seen)
        if cu_seqlens is not None:
            new = [b - a for a, b in pairwise(check_cu_seqlens(cu_seqlens, 1, n))]
        longest = max(s + x for s, x in zip(seen, new, strict=True))
        if longest > self.max_positions:
            raise ValueError(
                f"a sequence of {longest} tokens is longer than max_positions "
                f"({self.max_positions}), which the simple bias has numbers for: raise it, set "
                "chunk, or use bias='rotary'"
            )

    def _valid(self, seen: list[int]) -> list[int]:
        """Of the tokens that rows have seen: how many their next token sees."""
        return seen if self.chunk is None else [s % self.chunk for s in seen]

    def _fresh(self, q: Tensor, k: Tensor, v: Tensor, seen: list[int]) -> tuple[Tensor, Entries]:
        """Rows that see nothing but these tokens."""
        batch, n = q.shape[:2]
        c = n if self.chunk is None else min(n, self.chunk)
        full = n // c * c
        out = []
        if full:
            parts = (x[:, :full].unflatten(1, (-1, c)).flatten(0, 1) for x in (q, k, v))
            out.append(self._read(*parts).view(batch, full, -1))
        if full < n:
            out.append(self._read(*(x[:, full:] for x in (q, k, v))))
        keep = n if self.chunk is None else n % self.chunk
        return torch.cat(out, 1), lambda: {
            "k": _tail(k, keep),
            "v": _tail(v, keep),
            "length": _length([s + n for s in seen], q.device),
        }

    def _append(
        self, q: Tensor, k: Tensor, v: Tensor, state: State, seen: list[int], valid: list[int]
    ) -> tuple[Tensor, Entries]:
        """Rows whose tokens all see what the state remembers."""
        n, used = q.shape[1], max(valid)
        seen = [s + n for s in seen]
        keep = max(self._valid(seen))
        keys, last_k = _cache.append(_last(state, "k", used, k.dtype), k.unsqueeze(2), keep)
        values, last_v = _cache.append(_last(state, "v", used, v.dtype), v.unsqueeze(2), keep)
        first = None
        if min(valid) < used:
            first = torch.tensor([used - x for x in valid], device=q.device)
        o = self._read(q, keys.squeeze(2), values.squeeze(2), first)
        return o, lambda: {"k": last_k, "v": last_v, "length": _length(seen, q.device)}

    def _pieces(
        self, q: Tensor, k: Tensor, v: Tensor, state: State | None, seen: list[int],
        bounds: list[int],
    ) -> tuple[Tensor, Entries]:  # fmt: skip
        """Sequences of any lengths and ages, cut into pieces that do not see each other.

        Pieces of similar length go together; the first of a sequence sees what the state
        remembers of it.
        """
        shape, device = q.shape, q.device
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        valid = self._valid(seen)
        used = max(valid)
        past = None
        if used:
            assert state is not None
            past = [_last(state, name, used, k.dtype).squeeze(2) for name in ("k", "v")]
        cuts, row, old = [0], [], []
        for r, (start, end) in enumerate(pairwise(bounds)):
            before = valid[r]
            while start < end:
                start = end if self.chunk is None else min(end, start + self.chunk - before)
                cuts.append(start)
                row.append(r)
                old.append(before)
                before = 0
        plan = _buckets(cuts, device)
        sizes = torch.tensor(cuts).diff().to(device)
        rows, first = (torch.tensor(x, device=device) for x in (row, [used - x for x in old]))
        padded = [F.pad(x, (0, 0, 0, 1)) for x in (q, k, v)]
        out = []
        for group, index, t in plan.parts:
            qs, ks, vs = (x[index].unflatten(0, (-1, t)) for x in padded)
            start = None
            if past is not None:
                ks, vs = (torch.cat([p[rows[group]], x], 1)
                          for p, x in zip(past, (ks, vs), strict=True))  # fmt: skip
                start = first[group]
            end = sizes[group] if self.bidirectional else None
            out.append(self._read(qs, ks, vs, start, end).flatten(0, 1))
        o = torch.cat(out)[plan.back].view(*shape[:2], -1)

        def entries() -> dict[str, Tensor]:
            new = [b - a for a, b in pairwise(bounds)]
            after = [s + x for s, x in zip(seen, new, strict=True)]
            index = _kept(new, self._valid(after), bounds, used).to(device)
            pools = (
                torch.cat(
                    [x, x.new_zeros(1, x.shape[1])]
                    + ([] if past is None else [past[i].flatten(0, 1)])
                )
                for i, x in enumerate((k, v))
            )
            last_k, last_v = (pool[index].unsqueeze(2) for pool in pools)
            return {"k": last_k, "v": last_v, "length": _length(after, device)}

        return o, entries

    def _read(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        first: Tensor | None = None,
        end: Tensor | None = None,
    ) -> Tensor:
        """Queries [G, T, Z] against their own keys and P before, [G, P + T, Z].

        first, end [G]: rows see keys from slot first on, and before slot end.
        """
        n, total = q.shape[1], k.shape[1]
        form = FORMS[self.attention]
        bias = self._bias(n, total, q)
        if self.bidirectional:
            return form(q, k, v, _toeplitz(bias, n, total), _mask(q, total, False, first, end))
        out, before = [], total - n
        for a in range(0, n, _QUERIES):
            b = min(n, a + _QUERIES)
            near = before + b
            part = None if bias is None else bias[n - b : n - b + near + b - a - 1]
            seen = _mask(q[:, a:b], near, True, first, end)
            out.append(
                form(q[:, a:b], k[:, :near], v[:, :near], _toeplitz(part, b - a, near), seen)
            )
        return out[0] if len(out) == 1 else torch.cat(out, 1)

    def _bias(self, n: int, total: int, q: Tensor) -> Tensor | None:
        """b of the last n of `total` slots, by slot of key - slot of query: 1 - total .. n - 1."""
        if self.rel_bias is None:
            return None
        w = self.rel_bias.to(q.dtype)
        if self.bias == "simple":
            # Distances beyond the table occur between slots that do not see each other only.
            p = self.max_positions
            return F.pad(w[max(0, p - total) : p + n - 1], (max(0, total - p), 0))
        half = self.d_key // 2
        cos, sin = rotary_factors(total, self.d_key, dtype=q.dtype, device=q.device)
        (a, c), (b, d) = w[:, :half], w[:, half:]
        even, odd = cos[:, 0, :half] @ (a * c + b * d), sin[:, 0, half:] @ (b * c - a * d)
        return torch.cat([(even - odd).flip(0), (even + odd)[1:n]])


def _length(seen: list[int], device: torch.device) -> Tensor:
    return _cache.with_counts(torch.tensor(seen, device=device), seen)


def _tail(x: Tensor, keep: int) -> Tensor:
    """The last tokens as a cache, without holding on to the memory of the others."""
    n = x.shape[1]
    return (x if keep == n else x[:, n - keep :].clone()).unsqueeze(2)


def _last(state: State, name: str, used: int, dtype: torch.dtype) -> Tensor:
    """The last slots of a cache, itself if it has no others."""
    x = state.tensor(name)
    return (x if x.shape[1] == used else x[:, x.shape[1] - used :]).to(dtype)


def _kept(new: list[int], keep: list[int], bounds: list[int], used: int) -> Tensor:
    """Where the entries of a right-aligned cache lie: in the tokens, a zero, the old cache.

    Row r keeps keep[r] of its `new` tokens and what it had before. -> [rows, max(keep)]
    """
    size, valid, end = (torch.tensor(x)[:, None] for x in (new, keep, bounds[1:]))
    ago = torch.arange(max(keep) - 1, -1, -1)
    row = torch.arange(len(new))[:, None]
    old = bounds[-1] + 1 + row * used + used - 1 - (ago - size)
    return torch.where(ago < size, end - 1 - ago, old).where(ago < valid, bounds[-1])


def _toeplitz(bias: Tensor | None, n: int, total: int) -> Tensor | None:
    """[n + total - 1] by slot of key minus slot of query -> [n, total]."""
    return None if bias is None else bias.unfold(0, total, 1).flip(0)


def _mask(
    q: Tensor, total: int, causal: bool, first: Tensor | None, end: Tensor | None
) -> Tensor | None:
    """True where a query may look, [n, total] or [G, 1 or n, total]; None: everywhere."""
    n, slot = q.shape[1], torch.arange(total, device=q.device)
    seen = None
    if causal and n > 1:
        seen = slot <= slot[total - n :, None]
    for limit in (None if first is None else slot >= first[:, None, None],
                  None if end is None else slot < end[:, None, None]):  # fmt: skip
        if limit is not None:
            seen = limit if seen is None else seen & limit
    return seen


def _scores(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    return q @ k.mT if bias is None else torch.baddbmm(bias.expand(len(q), -1, -1), q, k.mT)


def _softmax(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, seen: Tensor | None) -> Tensor:
    if seen is not None and seen.ndim == 2 and bias is not None:
        bias, seen = bias.masked_fill(~seen, -torch.inf), None  # once for all rows
    s = _scores(q * q.shape[-1] ** -0.5, k, bias)
    return (s if seen is None else s.masked_fill(~seen, -torch.inf)).softmax(-1) @ v


def _elementwise(activation: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def read(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, seen: Tensor | None) -> Tensor:
        count = k.shape[1] if seen is None else seen.sum(-1, keepdim=True).to(q.dtype)
        a = activation(_scores(q / count, k, bias))
        return (a if seen is None else a * seen) @ v

    return read


def _laplace(s: Tensor) -> Tensor:
    return torch.erf((s - 0.707107) * (1 / (0.282095 * math.sqrt(2)))).add(1) * 0.5


FORMS: dict[str, Callable[..., Tensor]] = {
    "softmax": _softmax,
    "laplace": _elementwise(_laplace),
    "relu2": _elementwise(lambda s: s.relu().square()),
}

__all__ = ["Mega"]
