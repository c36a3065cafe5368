"""Titans' memory as a context (MAC): attention in segments that reads a memory and writes to it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan.mixers._parts import RMSNorm
from longscan.mixers._persistent import PersistentMixer, attend, attention_dtype
from longscan.ops._cache import counts, with_counts
from longscan.ops._check import check_shape, compute_dtype, full_precision
from longscan.ops._layout import check_cu_seqlens
from longscan.ops.memory import memory_read
from longscan.ops.norm import l2_norm
from longscan.ops.rotary import rotary, rotary_at, rotary_factors
from longscan.state import State


@dataclass(frozen=True)
class _Part:
    """The next tokens of some rows, of each row within one segment.

    ages, sizes: tokens of its segment each row has seen, and how many follow now.
    first: where these begin in every row, if all rows have equal ages and sizes. Otherwise
    tokens [rows, n] says which of the packed tokens they are (one past the last for none), and
    back [sum of sizes] where they lie among rows n; cu_seqlens: the sizes, summed.
    """

    ages: list[int]
    sizes: list[int]
    first: int = 0
    tokens: Tensor | None = None
    back: Tensor | None = None
    cu_seqlens: Tensor | None = None

    def spread(self, x: Tensor) -> Tensor:
        """[rows, T, ...] -> [rows, n, ...]; packed tokens are [1, T + 1, ...], the last padding."""
        if self.tokens is None:
            return x[:, self.first : self.first + self.sizes[0]]
        return x[0][self.tokens]

    def pack(self, x: Tensor) -> Tensor:
        """[rows, n, ...] -> the same, or without padding [1, sum of sizes, ...]."""
        return x if self.back is None else x.flatten(0, 1)[self.back].unsqueeze(0)

    def positions(self, n: int, device: torch.device) -> Tensor:
        """Places in the segment, [1 or rows, n]."""
        if self.tokens is None:
            return torch.arange(self.ages[0], self.ages[0] + n, device=device)[None]
        return torch.tensor(self.ages, device=device)[:, None] + torch.arange(n, device=device)

    def turns(
        self, places: Tensor, dim: int, theta: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """The rotary factors of places in the segment, for tokens [rows, n, heads, dim]."""
        if self.tokens is None:
            return rotary_factors(
                places.shape[1], dim, theta, start=self.ages[:1], dtype=dtype, device=places.device
            )
        cos, sin = rotary_at(places, dim, theta, dtype)
        return cos.unsqueeze(-2), sin.unsqueeze(-2)

    def join(self, old: Tensor | None, new: Tensor) -> Tensor:
        """The segments up to here [rows, longest, ...], zero behind the end of a row.

        Shapes: old [rows, segment, ...], None before the first token; new [rows, n, ...].
        """
        if self.tokens is None:
            age = self.ages[0]
            return new if old is None or age == 0 else torch.cat([old[:, :age].to(new), new], 1)
        age, size = (torch.tensor(x, device=new.device)[:, None] for x in (self.ages, self.sizes))
        width = max(a + n for a, n in zip(self.ages, self.sizes, strict=True))
        slot = torch.arange(width, device=new.device)
        row = torch.arange(len(self.ages), device=new.device)[:, None]
        both = new[row, (slot - age).clamp(0, new.shape[1] - 1)]
        ones = [1] * (new.ndim - 2)
        if old is not None:
            both = torch.where((slot < age).unflatten(1, (-1, *ones)), old[:, :width].to(new), both)
        return torch.where((slot < age + size).unflatten(1, (-1, *ones)), both, 0)


def _even(rows: int, age: int, length: int, segment: int) -> Iterator[_Part]:
    """The parts of rows that all have the same age and length."""
    at = 0
    while at < length:
        n = min(segment - age, length - at)
        yield _Part([age] * rows, [n] * rows, at)
        at, age = at + n, 0


def _uneven(
    ages: list[int], at: list[int], ends: list[int], segment: int, device: torch.device
) -> Iterator[_Part]:
    """The parts of packed rows from token `at` to `ends`, where later rows end in no later part."""
    last = max(ends)
    while rows := sum(a < b for a, b in zip(at, ends, strict=False)):
        at, ages = at[:rows], ages[:rows]
        sizes = [min(segment - g, b - a) for g, a, b in zip(ages, at, ends, strict=False)]
        begin, size = (torch.tensor(x)[:, None] for x in (at, sizes))
        place = torch.arange(max(sizes))
        tokens = torch.where(place < size, begin + place, last)
        back = (place < size).flatten().nonzero().squeeze(1)
        cu = torch.tensor([0, *accumulate(sizes)], device=device)
        yield _Part(ages, sizes, 0, tokens.to(device), back.to(device), cu)
        at, ages = [a + n for a, n in zip(at, sizes, strict=True)], [0] * rows


class TitansMAC(PersistentMixer):
    """Memory as a context: attention in segments sees what a memory knows, and writes to it.

    h_t = M(r_t)    read with the memory as it was before token b, the first of t's segment
    a_t = attention of x_t to [persistent | h_b ... h_t | x_b ... x_t]
    m_t = memory(a_1 ... a_t)    written token by token, and read after each
    y = out_proj(norm(a) * sigmoid(norm(m)))

    Queries r = unit(silu(in_proj(x))) are the pattern's own; what they find passes the norm of
    the memory's heads and its out_proj. A token and what was retrieved for it share a position,
    counted from the start of the segment. A segment begins a chunk of the memory (see `Titans`).

    Shapes: x, y [B, T, d_model]; rows of in_proj: q | r, of kv_proj: k | v; persistent
    [n_persistent, d_model]; state: memory (see `Titans`), start (its a0, a1, ... when the segment
    began), k, v [B, segment, 2, n_heads, d_head] of (h, x) in the segment so far, zero behind
    it, and length [B], the tokens seen.
    segment: tokens of a segment; attention does not look beyond it.
    Precision: scores, softmax and rotary factors in float32; the memory as `Titans`.
    Raises: ValueError for sizes that do not divide, and what `Titans` refuses.
    Source: arXiv 2501.00663, section 4.1 and figure 3a; norms, gates 4.2 and 4.4.
    Differs: strictly causal. The paper's mask lets a token see what is retrieved for all tokens
    of its segment, which depends on later tokens; here h_j is seen from token j on. For the same
    reason m_t is read after token t was written, not after the whole segment. Where the paper is
    silent: no convolution on r, shared positions, RMSNorm and sigmoid as in `TitansMAG`.
    Reference: none by the authors, no code was published; lucidrains/titans-pytorch, MIT, is an
    independent one, which retrieves into learned tokens at the start of segments.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 4,
        segment: int = 64,
        n_persistent: int = 4,
        rope_theta: float | None = 10000.0,
        memory: Mapping[str, Any] = MappingProxyType({}),
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(
            d_model,
            n_heads=n_heads,
            n_persistent=n_persistent,
            rope_theta=rope_theta,
            memory=memory,
        )
        if segment < 1:
            raise ValueError(f"segment must be at least 1, not {segment}")
        self.segment = segment
        self._rows = [d_model, self.memory.n_heads * self.memory.d_head]
        self.in_proj = nn.Linear(d_model, sum(self._rows), bias=False)
        self.attention_norm = RMSNorm(d_model, norm_eps)
        self.memory_norm = RMSNorm(d_model, norm_eps)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)
        self.reset_parameters()

    def init_state(self, batch: int) -> State:
        memory = self.memory.init_state(batch)
        shape = (batch, self.segment, 2, self.n_heads, self.d_head)
        zeros = self.persistent.new_zeros(shape, dtype=self._cache_dtype())
        length = torch.zeros(batch, dtype=torch.int64, device=zeros.device)
        start = self._weights(memory).clone()
        return State(memory=memory, start=start, k=zeros, v=zeros.clone(), length=length)

    def _weights(self, memory: State) -> State:
        """What the memory is read with, of its state."""
        return State({name: memory.tensor(name) for name in self._names()})

    def _names(self) -> list[str]:
        return [f"a{i}" for i in range(self.memory.depth)]

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        self._check_input(x)
        batch, length = x.shape[:2]
        bounds = [i * length for i in range(batch + 1)]
        if cu_seqlens is not None:
            bounds = check_cu_seqlens(cu_seqlens, batch, length)
        sizes = [b - a for a, b in pairwise(bounds)]
        rows = len(sizes)
        if state is None:
            state, seen = self.init_state(rows), [0] * rows
        else:
            check_shape("state.length", state.tensor("length"), (rows,), "[rows]")
            seen = counts(state)
        ages = [s % self.segment for s in seen]
        tokens = self._project(x, seen, cu_seqlens)
        prefix = self._keys_values(self.persistent)
        even = len(set(zip(ages, sizes, strict=True))) == 1
        if even:
            tokens = [t.reshape(rows, sizes[0], *t.shape[2:]) for t in tokens]
            parts = _even(rows, ages[0], sizes[0], self.segment)
            a, m, carry, _ = self._run(parts, tokens, prefix, state)
        else:
            count = [-(-(g + n) // self.segment) for g, n in zip(ages, sizes, strict=True)]
            order = sorted(range(rows), key=lambda i: -count[i])
            tokens = [F.pad(t.flatten(0, 1), (0, 0) * (t.ndim - 2) + (0, 1))[None] for t in tokens]
            begin, end = ([x[i] for i in order] for x in (bounds[:-1], bounds[1:]))
            parts = _uneven([ages[i] for i in order], begin, end, self.segment, x.device)
            a, m, carry, which = self._run(parts, tokens, prefix, state.select(order))
            back = torch.cat(which).argsort()
            a, m = a[:, back], m[:, back]
            carry = carry.select(torch.tensor(order).argsort())
        y = self.attention_norm(a) * self.memory_norm(m).sigmoid()
        total = [s + n for s, n in zip(seen, sizes, strict=True)]
        if even:
            after = state.tensor("length") + sizes[0]
        else:
            after = torch.tensor(total, device=x.device)
        if not all(g > 0 and g + n < self.segment for g, n in zip(ages, sizes, strict=True)):
            # Where a segment began, the memory's tensors are also its start, and a state is saved
            # tensor by tensor.
            carry = State(carry, start=carry.child("start").clone())
        carry = State(carry, length=with_counts(after, total))
        return self.out_proj(y.reshape(x.shape).to(x.dtype)), carry

    def _project(self, x: Tensor, seen: list[int], cu_seqlens: Tensor | None) -> list[Tensor]:
        """q, r, k, v of all tokens [B, T, heads, d_head], without the positions of attention."""
        q, r = self.in_proj(x).split(self._rows, -1)
        r = l2_norm(F.silu(r).unflatten(-1, (self.memory.n_heads, -1)))
        if self.memory.rope_theta is not None:  # then the memory's keys are turned as well
            cos, sin = rotary_factors(
                x.shape[1],
                self.memory.d_head,
                self.memory.rope_theta,
                start=seen,
                cu_seqlens=cu_seqlens,
                dtype=compute_dtype(x),
                device=x.device,
            )
            r = rotary(r, cos, sin)
        return [self._heads(q), r, *self._keys_values(x)]

    def _run(
        self, parts: Iterator[_Part], tokens: list[Tensor], prefix: tuple[Tensor, Tensor], s: State
    ) -> tuple[Tensor, Tensor, State, list[Tensor]]:
        """(attention's heads, the memory's answers, the state, which tokens these are) of parts.

        Segments follow one another, as the memory is written by one before the next reads it.
        """
        out, answers, which, ended = [], [], [], []
        for part in parts:
            rows = len(part.ages)
            if rows < s.batch_size:
                ended.append(s.select(slice(rows, None)))
                s = s.select(slice(0, rows))
            a, keys, values = self._attend(part, [part.spread(t) for t in tokens], prefix, s)
            a = part.pack(a)
            m, memory = self.memory(a, self._begun(part, s), cu_seqlens=part.cu_seqlens)
            out.append(a)
            answers.append(m)
            if part.tokens is not None and part.back is not None:
                which.append(part.tokens.flatten()[part.back])
            s = self._moved_on(part, s, memory, keys, values)
        if ended:
            s = State.cat([s, *reversed(ended)])
        return torch.cat(out, 1), torch.cat(answers, 1), s, which

    def _attend(
        self, part: _Part, tokens: list[Tensor], prefix: tuple[Tensor, Tensor], s: State
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attention's heads [rows, n, d_model]; keys and values of the segments up to here."""
        q, r, k, v = tokens
        norm = None
        if self.memory.ln_weight is not None and self.memory.ln_bias is not None:
            norm = self.memory.ln_weight, self.memory.ln_bias
        h = memory_read(r, norm=norm, rule=self.memory.rule, state=s.child("start"))
        assert self.memory.norm is not None
        h = self.memory.out_proj(self.memory.norm(h).flatten(-2).to(q.dtype))
        hk, hv = self._keys_values(h)
        place = part.positions(q.shape[1], q.device)
        if self.rope_theta is not None:
            cos, sin = part.turns(place, self.d_head, self.rope_theta, compute_dtype(q))
            turned = rotary(torch.cat([q, hk, k], 2), cos, sin)
            q, hk, k = turned.chunk(3, 2)
        dtype, out = attention_dtype(q), q.dtype
        keys = part.join(s.tensor("k"), torch.stack([hk, k], 2).to(dtype))
        values = part.join(s.tensor("v"), torch.stack([hv, v], 2).to(dtype))
        slot = torch.arange(keys.shape[1], device=q.device).repeat_interleave(2)
        mask = (slot <= place[..., None]).unsqueeze(1)
        prefix = prefix[0].to(dtype), prefix[1].to(dtype)
        with full_precision(q):
            a = attend(q.to(dtype), keys.flatten(1, 2), values.flatten(1, 2), prefix, mask)
        return a.flatten(-2).to(out), keys, values

    def _begun(self, part: _Part, s: State) -> State:
        """The memory's state, in which a segment that begins also begins a chunk."""
        memory = s.child("memory")
        if "at" not in memory or all(part.ages):
            return memory
        if any(part.ages):
            inside = torch.tensor([g > 0 for g in part.ages], device=s.tensor("k").device)
            return State(memory, at=memory.tensor("at") * inside)
        chunk = {"at", *(name for name in memory if re.fullmatch(r"[gr]\d+", name))}
        return State({name: x for name, x in memory.items() if name not in chunk})

    def _moved_on(
        self, part: _Part, s: State, memory: State, keys: Tensor, values: Tensor
    ) -> State:
        """The state behind a part: where a segment is full, the next one begins."""
        full = [a + n == self.segment for a, n in zip(part.ages, part.sizes, strict=True)]
        start, old = self._weights(memory), s.child("start")
        room = (0, 0) * 3 + (0, self.segment - keys.shape[1])
        if not any(full):
            start, keys, values = old, F.pad(keys, room), F.pad(values, room)
        elif not all(full):
            new = torch.tensor(full, device=keys.device).view(-1, 1, 1, 1)
            start = State({n: torch.where(new, start.tensor(n), old.tensor(n)) for n in old})
            keys, values = (torch.where(new[..., None], 0, F.pad(x, room)) for x in (keys, values))
        elif any(part.ages):
            keys, values = torch.zeros_like(s.tensor("k")), torch.zeros_like(s.tensor("v"))
        else:  # they are empty already
            keys, values = s.tensor("k"), s.tensor("v")
        return State(s, memory=memory, start=start, k=keys, v=values)


__all__ = ["TitansMAC"]
