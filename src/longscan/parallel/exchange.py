"""The state that enters a shard, as a function that autograd knows: one exchange each way."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longscan.algebra import EMPTY, Affine, SegmentMap, adjoint
from longscan.ops._across import Segment, first_order_only
from longscan.ops._check import full_precision
from longscan.parallel.wire import Pending

if TYPE_CHECKING:
    from longscan.parallel.shards import Shards


class Exchange:
    """One op's exchange: begun with the map of the local tokens, waited for where it is needed.

    Work recorded between `begin` and `wait` overlaps with the exchange; in the backward, where
    autograd runs later work first, so does the backward of that work.

    The gradient of the state that leaves rank r is G_r, with D_r what the op of rank r sends to
    the state that enters it: G_{r-1} = D_r + A_r^T G_r. Then dU_r = G_r and dA_r = G_r S_in^T:
    the op's own backward and that of its map do all the rest, the part of the gates' gradients
    that tokens on later ranks cause included.
    """

    def __init__(self, shards: Shards, segment: Segment, state: Affine | None) -> None:
        self.shards, self.state = shards, state
        stretch = shards.last
        if not shards.onward:  # nothing leaves: the map of one token, for its shapes
            stretch = slice(stretch.stop - 1, stretch.stop)
        of = segment(stretch)
        if shards.onward and not shards.passes and state is not None:
            with full_precision(of.u):
                u, m = _parts(of(_like(of, _row(state, -1, shards.packed))))
            of = SegmentMap(of.kind, of.a, u, m)
        self.lead, (_, self.columns) = of.u.shape[:-2], of.u.shape[-2:]
        self.kind = of.kind
        given = (of.a, of.u, of.m)
        self.records = torch.is_grad_enabled() and any(
            x is not None and x.requires_grad for x in given
        )
        self.a, u, self.m = (self._flat(x, i) for i, x in enumerate(given))
        assert u is not None
        self.u = u
        self.both = _Both(shards, self.kind, shards.passes)
        anchor = self.u.new_empty(0, requires_grad=self.records)
        self.token = _Begin.apply(self.both, anchor, self.u, self.a, self.m)

    def _flat(self, x: Tensor | None, which: int) -> Tensor | None:
        """A part of the map with its leading axes as one."""
        if x is None:
            return None
        two = which == 1 or (self.kind == "matrix" and which == 0)
        tail = x.shape[x.ndim - 1 - two :]
        return x.expand(*self.lead, *tail).reshape(-1, *tail)

    def wait(self) -> Affine:
        """What the first local sequence starts from [rows or 1, ...]."""
        start = None if self.state is None else _row(self.state, 0, self.shards.packed)
        s, m = (None, None) if start is None else _parts(start)
        k, v = self.u.shape[1:]
        if s is None:
            s = self.u.new_zeros(self.u.shape)
            m = None if self.m is None else torch.zeros_like(self.m)
        else:
            s = s.reshape(-1, k, v).to(self.u.dtype)
            m = None if m is None else m.reshape(-1, m.shape[-1]).to(self.u.dtype)
        parts = [None if x is None else x.detach() for x in (self.a, self.u, self.m)]
        s, m = _Wait.apply(self.both, self.token, s, m, *parts)
        s = s.view(*self.lead, k, v)
        return s if m is None else (s, m.view(*self.lead, -1))

    def others(self) -> Affine | None:
        """The states of all local sequences, the first being zero."""
        rows = len(self.shards.local) - 1
        if self.state is None or not self.shards.packed or rows == 1:
            return None
        assert isinstance(self.state, Tensor)
        return torch.cat([torch.zeros_like(self.state[:1]), self.state[1:]])

    def place(self, entering: Affine) -> Affine:
        """The states of all local sequences, the first being what `wait` gave."""
        rows = len(self.shards.local) - 1
        if not self.shards.packed or rows == 1:
            return entering
        parts = entering if isinstance(entering, tuple) else (entering,)
        if self.state is None:
            rest = [x.new_zeros(rows - 1, *x.shape[1:]) for x in parts]
        else:
            given = self.state if isinstance(self.state, tuple) else (self.state,)
            rest = [x[1:].to(p.dtype) for x, p in zip(given, parts, strict=True)]
        first, *more = (torch.cat(x) for x in zip(parts, rest, strict=True))
        return (first, *more) if more else first  # type: ignore[return-value]


def _like(of: SegmentMap, state: Affine) -> Affine:
    """A state in the map's precision, which is the same on all ranks."""
    if isinstance(state, tuple):
        assert of.m is not None
        return state[0].to(of.u.dtype), state[1].to(of.m.dtype)
    return state.to(of.u.dtype)


def _parts(x: Affine) -> tuple[Tensor, Tensor | None]:
    return x if isinstance(x, tuple) else (x, None)


def _row(state: Affine, row: int, packed: bool) -> Affine:
    """The state of the first or the last local sequence; of a batch, all rows."""
    if not packed:
        return state
    at = slice(row, row + 1 or None)
    return (state[0][at], state[1][at]) if isinstance(state, tuple) else state[at]


class _Both:
    """What the two functions of an exchange share. No tensor of the graph is kept here longer than
    needed: a circle of references would keep the whole graph until it is collected."""

    def __init__(self, shards: Shards, kind: str, passes: bool) -> None:
        self.shards, self.kind, self.passes = shards, kind, passes
        self.going: Pending[Affine | None] | None = None
        self.coming: Pending[Affine | None] | None = None
        self.adjoint: Adjoint | None = None

    def start(self, of: SegmentMap) -> None:
        """Send the maps forward."""
        self.going = self.shards.over.scan(of, self.shards.forward, "state")

    def start_back(self, of: SegmentMap) -> None:
        """Send gradients of states back."""
        self.coming = self.shards.over.scan(of, self.shards.backward, "gradient")


class _Begin(torch.autograd.Function):
    """Starts the exchange; backward waits for the gradient of the state that leaves."""

    @staticmethod
    def forward(ctx, exchange: _Both, anchor: Tensor, u, a, m) -> Tensor:
        ctx.exchange = exchange
        if not exchange.shards.tape.replaying:
            exchange.start(SegmentMap(exchange.kind, a, u, m))
        return u.new_empty(0)

    @staticmethod
    def backward(ctx, _):  # type: ignore[override]
        first_order_only()
        ex: _Both = ctx.exchange
        assert ex.coming is not None
        assert ex.adjoint is not None
        found, back = ex.coming.wait(), ex.adjoint
        ex.coming = ex.adjoint = None
        if found is None or not ex.shards.onward:
            return None, None, None, None, None
        assert isinstance(found, Tensor)
        du, da, dm = back.gradients(found)
        return None, None, du, da, dm


class _Wait(torch.autograd.Function):
    """Waits for the exchange; backward starts the one of gradients.

    What enters, the map and its offset are saved here, so that a block which is computed again
    finds them without sending anything.
    """

    @staticmethod
    def forward(ctx, exchange: _Both, token, s, m, a, u, own):
        ex = exchange
        receives = ex.shards.continues

        def found() -> Affine | None:
            assert ex.going is not None
            return ex.going.wait()

        entered = ex.shards.tape.through(found)
        ex.going = None
        if receives:
            assert entered is not None
            s, m = _parts(entered)
        else:
            s, m = s.clone(), None if m is None else m.clone()
        ctx.exchange = ex
        ctx.save_for_backward(s, m, a, u, own)
        return s, m

    @staticmethod
    def backward(ctx, ds: Tensor, dm: Tensor | None):  # type: ignore[override]
        first_order_only()
        ex: _Both = ctx.exchange
        s, m, a, u, own = (None if x is None else x.detach() for x in ctx.saved_tensors)
        back, offset = Adjoint(ex.kind, ex.passes, s, m, a, u, own), ds
        if ex.shards.continues:
            ex.start_back(back.map(ds, dm))
        else:
            ex.start_back(back.map(torch.zeros_like(ds), None))
        ex.adjoint = back
        given = (None, None) if ex.shards.continues else (offset, dm)
        return None, ds.new_zeros(0), *given, None, None, None


class Adjoint:
    """The map of a shard read from the right, and the gradients of its parts.

    For scaled maps the log scales cancel in everything that is read but for what an op adds to a
    normaliser (the eps of mLSTM). So beside the gradient ds of the scaled state goes e, what is
    left of the gradient of its log scale m: e = dm - <s, ds>, handed to whichever of the two log
    scales m was the maximum of. It is a row of its own below those of ds.
    """

    def __init__(self, kind, passes, s, m, a, u, own) -> None:
        self.kind, self.passes, self.s, self.m = kind, passes, s, m
        self.a, self.u, self.own = a, u, own
        if m is not None and passes:
            kept = a + m
            self.kept = kept - torch.maximum(kept, own)
            self.added = own - torch.maximum(kept, own)
            self.wins = kept >= own

    def map(self, ds: Tensor, dm: Tensor | None) -> SegmentMap:
        """G_out -> D + A^T G_out."""
        if self.m is None:
            return adjoint(SegmentMap(self.kind, self.a, self.u), ds)
        k = ds.shape[1]
        excess = ds.new_zeros(len(ds), 1, ds.shape[2])
        if dm is not None:
            excess[..., :1] = (dm - (self.s * ds).sum((1, 2)).unsqueeze(-1)).unsqueeze(-1)
        decays = ds.new_zeros(len(ds), k + 1)
        if self.passes:
            decays[:, :k] = self.kept
            decays[:, k:] = torch.where(self.wins, 0.0, EMPTY)
        return SegmentMap("diagonal", decays, torch.cat([ds, excess], 1))

    def gradients(self, g: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Of U, of A, and of the log scale of U, from that of the state that leaves."""
        if self.m is not None:
            return self._scaled(g)
        if not self.passes or self.a is None:
            return g, None, None
        if self.kind == "matrix":
            return g, g @ self.s.mH, None
        da = ((self.a.exp().unsqueeze(-1) * self.s).conj() * g).sum(-1)
        return g, da.sum_to_size(self.a.shape), None

    def _scaled(self, g: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        g, e = g[:, :-1], g[:, -1, :1]
        if not self.passes:
            return g, None, (self.u * g).sum((1, 2)).unsqueeze(-1) + e
        du = self.added.exp().unsqueeze(-1) * g
        wins = self.wins.to(e.dtype)
        da = (self.kept.exp().unsqueeze(-1) * g * self.s).sum((1, 2)).unsqueeze(-1) + wins * e
        dm = (self.u * du).sum((1, 2)).unsqueeze(-1) + (1 - wins) * e
        return du, da, dm
