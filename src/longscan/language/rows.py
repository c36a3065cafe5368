"""Many sequences of different lengths through one model, side by side on a packed row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn


def pack(parts: Sequence[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Token arrays behind one another: ids [1, N] int64 and their boundaries [n + 1].

    A single part needs no boundaries: it is a batch of one row.
    """
    ids = torch.from_numpy(np.concatenate(parts).astype(np.int64))[None].to(device)
    if len(parts) == 1:
        return ids, None
    bounds = np.cumsum([0, *map(len, parts)], dtype=np.int64)
    return ids, torch.from_numpy(bounds).to(device)


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


__all__ = ["in_eval_mode", "pack"]
