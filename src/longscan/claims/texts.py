"""Text for the claims: random stretches of a corpus, byte by byte."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longscan.claims.training import Batch
from longscan.language.corpus import open_corpus

BOS = 256  # behind the 256 bytes


@cache
def text(data: Path | None, split: str, megabytes: float) -> Tensor:
    """Bytes of a split of the corpus, uint8, at most so many."""
    most, parts, size = int(megabytes * 1e6), [], 0
    corpus = open_corpus(data)
    pieces = corpus.sample(most) if split == "train" else (d for _, d in corpus.documents("valid"))
    for piece in pieces:
        parts.append(piece[: most - size])
        size += len(parts[-1])
        if size >= most:
            break
    if size < 1000:
        raise ValueError(f"{corpus.source} has only {size} bytes of text to {split} on")
    return torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8)


def windows(
    data: Path | None, split: str, size: dict[str, Any], generator: torch.Generator
) -> Batch:
    """Random stretches of the text, a BOS before each: inputs, and the byte that follows each."""
    source = text(data, split, size["megabytes"] if split == "train" else 1.0)
    length, device = size["length"], generator.device
    starts = torch.randint(
        len(source) - length, (size["batch"], 1), generator=generator, device=device
    )
    places = starts.cpu() + torch.arange(length)
    labels = source[places].long().to(device)
    front = labels.new_full((len(labels), 1), BOS)
    return torch.cat([front, labels[:, :-1]], 1), labels
