"""Rows of a token file as packed batches, any of which can be asked for by number.

A batch is a dict: ids [1, N], targets [1, N], cu_seqlens [n + 1], all int64. Its rows of seq_len
tokens are laid on one packed row, N = batch_size * seq_len. cu_seqlens marks every row edge and
every document start, so documents never see each other. A document starts with an eod, from which
its first token is predicted, and its last target is the eod after it: every position has a target
(none is -100), and no target lies in another document.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from longscan.language.tokens import TokenFile

Batch = dict[str, Tensor]
_ROUNDS = 6


def permuted(index: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """Where a pseudo-random permutation of range(n), picked by `keys`, sends each index.

    A Feistel network on the next even power of two, walked until it lands below n: any entry
    costs O(1) time and no memory, whatever n is.
    Shapes: index int [any], n >= 1, keys uint64 [rounds].
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)

    def shuffle(x: np.ndarray) -> np.ndarray:
        left, right = x >> half, x & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right + key) & mask)
        return left << half | right

    out = shuffle(np.atleast_1d(index).astype(np.uint64))
    while (beyond := out >= n).any():
        out[beyond] = shuffle(out[beyond])
    return out.astype(np.int64).reshape(np.shape(index))


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every bit of x moves about half the bits of the result."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Windows:
    """The rows of a token file: seq_len inputs each, with their targets and document starts.

    The file is read as a ring (its first and last tokens are both eod, so the seam is a document
    boundary like any other). Epoch e visits every window once, in an order and from a start that
    (seed, e) picks; row r is window r % n of epoch r // n.
    """

    def __init__(self, tokens: TokenFile, seq_len: int, seed: int = 0) -> None:
        self.tokens, self.seq_len, self.seed = tokens, seq_len, seed
        self.n_positions = len(tokens) - 1
        self.n = self.n_positions // seq_len

    def batch(self, rows: np.ndarray) -> Batch:
        """The batch of these rows of the shuffled stream."""
        starts = np.empty(len(rows), np.int64)
        epochs, places = rows // self.n, rows % self.n
        for epoch in np.unique(epochs):
            *keys, start = np.random.SeedSequence((self.seed, int(epoch))).generate_state(
                _ROUNDS + 1, np.uint64
            )
            here = epochs == epoch
            window = permuted(places[here], self.n, np.array(keys))
            starts[here] = (int(start) % self.n_positions + window * self.seq_len) % (
                self.n_positions
            )
        return self.batch_from(starts)

    def batch_from(self, starts: np.ndarray, length: int | None = None) -> Batch:
        """The batch whose rows start at these positions of the file."""
        length = self.seq_len if length is None else length
        ids = np.empty((len(starts), length), np.int64)
        targets = np.empty_like(ids)
        edges: list[np.ndarray] = []
        for row, start in enumerate(starts.tolist()):
            filled = 0
            while filled < length:  # once, or more where the row crosses the seam of the ring
                count = min(length - filled, self.n_positions - start)
                piece = self.tokens[start : start + count + 1]
                ids[row, filled : filled + count] = piece[:-1]
                targets[row, filled : filled + count] = piece[1:]
                first, last = np.searchsorted(self.tokens.offsets, (start + 1, start + count))
                inside = np.asarray(self.tokens.offsets[first:last]) - start
                edges += [np.array([row * length + filled]), row * length + filled + inside]
                filled, start = filled + count, 0
        edges.append(np.array([ids.size]))
        return {
            "ids": torch.from_numpy(ids.reshape(1, -1)),
            "targets": torch.from_numpy(targets.reshape(1, -1)),
            "cu_seqlens": torch.from_numpy(np.concatenate(edges)),
        }


class TrainStream:
    """The endless training stream: batch i is a function of (seed, i) alone.

    Iterating starts at `position`. Under a Lightning Trainer the position is counted in batches
    trained on (`trained` gives the count), because the trainer fetches one ahead; by itself, in
    batches handed out. The saved state counts rows over all ranks, so that a run resumes exactly,
    and also with another batch size or number of ranks where the rows come out even.
    """

    def __init__(
        self,
        windows: Windows,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        num_workers: int = 0,
        trained: Callable[[], int] | None = None,
    ) -> None:
        self.windows, self.batch_size = windows, batch_size
        self.rank, self.world = rank, world
        self.num_workers = num_workers
        self._trained = trained
        self._start = self._handed_out = 0
        self._trained_at_start = trained() if trained else 0

    @property
    def position(self) -> int:
        """The number of the first batch not yet used."""
        if self._trained:
            return self._start + self._trained() - self._trained_at_start
        return self._start + self._handed_out

    def batch_at(self, i: int) -> Batch:
        """This rank's batch i; the ranks' rows of one i are disjoint."""
        first = (i * self.world + self.rank) * self.batch_size
        return self.windows.batch(np.arange(first, first + self.batch_size))

    def __iter__(self) -> Iterator[Batch]:
        self._begin_at(self.position)
        for batch in self._batches(self._start):
            self._handed_out += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Where the stream stands, the same on every rank."""
        return {
            "rows": self.position * self.batch_size * self.world,
            "seed": self.windows.seed,
            "seq_len": self.windows.seq_len,
            "n_positions": self.windows.n_positions,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where `state` was taken.

        Raises: ValueError if the data are not the same, so that the run would not be either.
        """
        mine = self.state_dict()
        differ = [
            f"{name} {state[name]}, now {mine[name]}"
            for name in ("seed", "seq_len", "n_positions")
            if state[name] != mine[name]
        ]
        step = self.batch_size * self.world
        if state["rows"] % step:
            differ.append(f"{state['rows']} rows seen, not a multiple of the {step} of a batch now")
        if differ:
            raise ValueError(
                f"cannot resume on other training data: the checkpoint has {'; '.join(differ)}. "
                "Use the same text, tokenizer, seed, seq_len and batch_size, or start a new run "
                "from the checkpoint's weights"
            )
        self._begin_at(state["rows"] // step)

    def _begin_at(self, position: int) -> None:
        self._start, self._handed_out = position, 0
        self._trained_at_start = self._trained() if self._trained else 0

    def _batches(self, start: int) -> Iterator[Batch]:
        if self.num_workers == 0:
            return map(self.batch_at, itertools.count(start))
        return iter(
            DataLoader(
                _ByNumber(self),
                batch_size=None,
                sampler=itertools.count(start),  # type: ignore[arg-type] (any iterable will do)
                num_workers=self.num_workers,
            )
        )


class _ByNumber(Dataset):
    """`TrainStream.batch_at` for worker processes, without the trainer it may be tied to."""

    def __init__(self, stream: TrainStream) -> None:
        self.stream = TrainStream(stream.windows, stream.batch_size, stream.rank, stream.world)

    def __getitem__(self, i: int) -> Batch:
        return self.stream.batch_at(i)


class ValidationBatches:
    """A finite pass over a token file in windows: all of them, or `limit` batches spread evenly.

    Batches are equal in shape (what does not fill the last is left out) unless the file is
    smaller than one batch. Every rank gets all of them.
    """

    def __init__(self, windows: Windows, batch_size: int, limit: int | None = None) -> None:
        self.windows = windows
        self.length = min(windows.seq_len, windows.n_positions)
        n = windows.n_positions // self.length
        rows = n if limit is None else min(n, limit * batch_size)
        starts = np.arange(rows) * n // rows * self.length
        width = min(batch_size, rows)
        self.starts = starts[: rows // width * width].reshape(-1, width)

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[Batch]:
        return (self.windows.batch_from(starts, self.length) for starts in self.starts)
