"""How the sequences of one batch lie on the ranks: what the model's door and the ops ask."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from longscan.algebra import Affine, SegmentMap
from longscan.ops import _across
from longscan.ops._cache import with_counts
from longscan.ops._layout import check_cu_seqlens
from longscan.ops._relayed import relayed
from longscan.parallel.attention import gathered_attention
from longscan.parallel.exchange import Exchange
from longscan.parallel.final import final_state
from longscan.parallel.halo import window
from longscan.parallel.relay import Call, relay
from longscan.parallel.scan import Row
from longscan.parallel.tape import Tape
from longscan.state import State

if TYPE_CHECKING:
    from longscan.mixers.base import Mixer
    from longscan.parallel.sequence import SequenceParallel

T = TypeVar("T")


class Shards:
    """Contiguous shards of one batch: rank r holds the tokens bounds[r] .. bounds[r + 1] - 1.

    Made by `SequenceParallel.shards`, the same on all ranks. Rows of a batch are cut at the same
    places; of a packed row (B = 1) the cuts may fall into sequences.

    cu_seqlens: boundaries of the local part of a packed row [n + 1], None for a batch; continues:
    whether the first local token goes on with a sequence that began on a rank before.
    """

    def __init__(
        self,
        over: SequenceParallel,
        lengths: Sequence[int],
        cu_seqlens: Tensor | None,
        *,
        device: torch.device,
        final_states: bool,
    ) -> None:
        self.over, self.wire, self.lengths = over, over.wire, tuple(lengths)
        self.device, self.returns_state = device, final_states
        self.bounds = [0, *accumulate(lengths)]
        total, size, rank = self.bounds[-1], self.wire.size, self.wire.rank
        self.sequences = [0, total]
        if cu_seqlens is not None:
            self.sequences = check_cu_seqlens(cu_seqlens, 1, total)
        starts = set(self.sequences)
        self._first = [_of(self.sequences, a) for a in self.bounds[:-1]]
        self._last = [_of(self.sequences, b - 1) for b in self.bounds[1:]]
        continues = [a not in starts for a in self.bounds[:-1]]
        passes = [
            c and first == last
            for c, first, last in zip(continues, self._first, self._last, strict=True)
        ]
        self._continues, self._passes = tuple(continues), tuple(passes)
        onward = (*continues[1:], False)
        ranks, n = tuple(range(size)), over.per_host
        self.forward = Row(ranks, tuple(passes), tuple(continues), n)
        back = tuple(p and o for p, o in zip(passes, onward, strict=True))
        self.backward = Row(ranks[::-1], back[::-1], onward[::-1], n)
        self.low, self.high = self.bounds[rank], self.bounds[rank + 1]
        self.length = self.high - self.low
        self.continues, self.onward = continues[rank], onward[rank]
        self.passes = passes[rank] and self.onward
        self.rows = slice(self._first[rank], self._last[rank] + 1)
        inner = self.sequences[self._first[rank] + 1 : self._last[rank] + 1]
        self.local = [0, *(x - self.low for x in inner), self.length]
        self.first, self.last = slice(0, self.local[1]), slice(self.local[-2], self.length)
        self.packed = cu_seqlens is not None
        self.cu_seqlens = None
        if cu_seqlens is not None:
            self.cu_seqlens = torch.tensor(self.local, device=cu_seqlens.device)
        self.tape = Tape()
        self.notes: dict[tuple, Any] = {}

    def __repr__(self) -> str:
        what = f"{len(self.sequences) - 1} packed sequences" if self.packed else "one batch"
        return f"Shards({what}, {self.bounds[-1]} tokens as {list(self.lengths)}, {self.over})"

    @property
    def total(self) -> int:
        """Tokens of a row on all ranks together."""
        return self.bounds[-1]

    @property
    def before(self) -> int:
        """Tokens of the first local sequence that lie on the ranks before."""
        return self.low - self.sequences[self.rows.start] if self.continues else 0

    def shard(self, x: Tensor, dim: int = 1) -> Tensor:
        """The local part of a tensor of whole rows, a view.

        Raises: ValueError if the axis does not have the length that the shards were made for.
        """
        if x.shape[dim] != self.total:
            raise ValueError(
                f"these shards cut {self.total} tokens, but axis {dim} of the tensor has "
                f"{x.shape[dim]}"
            )
        return x.narrow(dim, self.low, self.length)

    def join(self, x: Tensor, dim: int = 1) -> Tensor:
        """The local parts of all ranks put together, on every rank: for looking at, no gradient."""
        x = x.detach().movedim(dim, 0).contiguous()
        wide = x.new_zeros(max(self.lengths), *x.shape[1:])
        wide[: self.length] = x
        whole = self.wire.run(lambda w: self.wire.gather(w, "join"), wide)
        parts = [whole[r, :n] for r, n in enumerate(self.lengths)]
        return torch.cat(parts).movedim(0, dim)

    # What a model asks.

    def mix(self, mixer: Mixer, call: Call, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        """call(x, state, cu_seqlens) on local tokens; state: that of whole rows.

        Returns: y, and the states of the local sequences.
        """
        # Compilers leave messages alone.
        return _uncompiled(self._mix)(mixer, call, x, state)

    def _mix(
        self, mixer: Mixer, call: Call, x: Tensor, state: State | None
    ) -> tuple[Tensor, State]:
        rows = len(self.local) - 1 if self.packed else len(x)
        if self.packed and len(x) != 1:
            raise ValueError(f"packed sequences lie on one row, not {len(x)}")
        if x.shape[1] != self.length:
            raise ValueError(
                f"rank {self.wire.rank} holds {self.length} of {self.total} tokens, but got "
                f"{x.shape[1]}; cut them by shards.shard(...)"
            )
        if getattr(mixer, "bidirectional", False):
            raise ValueError(
                f"a bidirectional {type(mixer).__name__} reads to the right of a shard, from ranks "
                "that come later: sequences cannot be spread over ranks"
            )
        if state is not None and self.packed:
            state = state.select(self.rows)
        if not mixer.shardable:
            if state is None and rows > 1 and self.packed and self.continues:
                state = mixer.init_state(rows)
            with _across.within(None), relayed():
                return relay(self, call, x, state)
        bounds = self.cu_seqlens
        if bounds is None and len(x) > 1 and min(self.lengths) == 1:
            raise ValueError(
                "a batch needs two tokens on every rank: one looks like a step of decoding"
            )
        if self.length == 1 and bounds is None:
            bounds = torch.tensor([0, 1], device=x.device)
        with self.active():
            return call(x, self._placed(mixer, state, rows), bounds)

    def _placed(self, mixer: Mixer, state: State | None, rows: int) -> State | None:
        """A state whose counts of tokens seen are those of the first local token."""
        if not self.continues:
            return state
        given = mixer.init_state(rows) if state is None else state
        if state is None and all(t.is_floating_point() for t in given.flatten().values()):
            return None
        flat, first = given.flatten(), 1 if self.packed else rows
        for name, t in flat.items():
            if t.is_floating_point():
                continue
            known = [0] * rows if state is None else getattr(t, "_longscan_counts", None)
            flat[name] = t.clone()
            flat[name][:first] += self.before
            if known is not None:  # so that nobody asks the device
                seen = [n + self.before * (r < first) for r, n in enumerate(known)]
                with_counts(flat[name], seen)
        return State.unflatten(flat)

    def final(self, state: State) -> State:
        """The states behind the last tokens of all rows, on every rank, from those of local
        sequences; an empty one if these shards were made without final states."""
        return final_state(self, state) if self.returns_state else State()

    def mean(self, loss: Tensor, count: Tensor) -> Tensor:
        """The sum of `loss` over ranks divided by that of `count` (at least 1).

        The same number everywhere; its gradient on a rank is that of the rank's own share, so that
        gradients of parameters are to be summed over ranks.
        """
        both = torch.stack([loss.detach().double(), count.detach().double()])
        total = self.wire.run(lambda x: self.wire.total(x, "loss"), both)
        n = total[1].clamp(min=1)
        return _Mean.apply(loss, (total[0] / n).to(loss.dtype), n.to(loss.dtype))  # type: ignore[return-value]

    # What `ops._across` asks.

    def begin(self, segment: _across.Segment, state: Affine | None) -> Exchange:
        return Exchange(self, segment, state)

    def swap(self, of: SegmentMap, back: bool = False) -> Affine | None:
        row, kind = (self.backward, "gradient") if back else (self.forward, "state")

        def exchange() -> Affine | None:
            return self.over.scan(of, row, kind).wait()

        return exchange() if back else self.tape.through(exchange)

    def window(self, tokens: Tensor, n: int, state: Tensor | None) -> Tensor | None:
        return window(self, tokens, n, state)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Any:
        return gathered_attention(self, q, k, v, **more)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Ops called inside work on these shards."""
        with _across.within(self):
            yield


def _of(bounds: list[int], token: int) -> int:
    """Which sequence a token belongs to."""
    return next(i for i, (a, b) in enumerate(pairwise(bounds)) if a <= token < b)


class _Mean(torch.autograd.Function):
    """`mean` of all ranks, with the gradient of this rank's share, 1 / n."""

    @staticmethod
    def forward(ctx, loss: Tensor, mean: Tensor, n: Tensor) -> Tensor:
        ctx.save_for_backward(n)
        return mean.clone()

    @staticmethod
    def backward(ctx, d: Tensor):  # type: ignore[override]
        return d / ctx.saved_tensors[0], None, None


def _uncompiled(run: Callable[..., T]) -> Callable[..., T]:
    """run, which torch.compile does not look into."""
    return torch.compiler.disable(run) if torch.compiler.is_compiling() else run  # type: ignore[return-value]
