"""Checkpoint keys to ours, by tables: each of our parameters joins some of theirs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from longscan.models.checkpoint import CheckpointError

Table = Mapping[str, str]
"""Our name -> their names, space-separated, joined along the first axis. "a|b": whichever exists;
a trailing "?": may be absent (our parameter is then absent too if nothing is left)."""


def convert(tensors: Mapping[str, Tensor], table: Table) -> dict[str, Tensor]:
    """Our state dict from theirs.

    Raises: CheckpointError naming a tensor that is missing, or tensors nothing asked for.
    """
    used: set[str] = set()
    out: dict[str, Tensor] = {}
    for ours, theirs in table.items():
        parts = []
        for want in theirs.split():
            names = want.rstrip("?").split("|")
            found = next((n for n in names if n in tensors), None)
            if found is not None:
                used.add(found)
                parts.append(tensors[found])
            elif not want.endswith("?"):
                raise CheckpointError(f"there is no tensor {' or '.join(names)} (for {ours})")
        if parts:
            out[ours] = torch.cat(parts) if len(parts) > 1 else parts[0]
    extra = sorted(set(tensors) - used)
    if extra:
        raise CheckpointError(f"the checkpoint holds tensors without a place here: {extra}")
    return out
