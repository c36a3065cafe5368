"""Many sequences of different lengths through one model, side by side on a packed row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan.state import Leaf, State


def pack(parts: Sequence[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Token arrays behind one another: ids [1, N] int64 and their boundaries [n + 1].

    A single part needs no boundaries: it is a batch of one row.
    """
    ids = torch.from_numpy(np.concatenate(parts).astype(np.int64))[None].to(device)
    if len(parts) == 1:
        return ids, None
    bounds = np.cumsum([0, *map(len, parts)], dtype=np.int64)
    return ids, torch.from_numpy(bounds).to(device)


def join_states(states: Iterable[State]) -> State:
    """`State.cat` of states of different ages.

    What grows with age, keys and values of attention, is right-aligned along axis 1; the shorter
    are padded there with zeros on the left. All else has equal shapes at any age.
    """
    states = list(states)
    out: dict[str, Leaf] = {}
    for k, value in states[0].items():
        if isinstance(value, State):
            out[k] = join_states(s.child(k) for s in states)
            continue
        tensors = [s.tensor(k) for s in states]
        if tensors[0].ndim > 1:
            longest = max(t.shape[1] for t in tensors)
            tensors = [
                t
                if t.shape[1] == longest
                else F.pad(t, (0, 0) * (t.ndim - 2) + (longest - t.shape[1], 0))
                for t in tensors
            ]
        out[k] = torch.cat(tensors)
    return State(out)


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """The model as in use, not in training; its mode is put back afterwards."""
    was = model.training
    if was:
        model.eval()
    try:
        yield
    finally:
        if was:
            model.train()


__all__ = ["in_eval_mode", "join_states", "pack"]
