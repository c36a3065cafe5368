"""How well a model predicts text: loss, perplexity, bits per byte, with a state that slides on."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from longscan.language.rows import in_eval_mode, pack
from longscan.language.tokenizer import Tokenizer
from longscan.models.language_model import LanguageModel
from longscan.state import State

# A text, or its ids between two end-of-document ids with the number of bytes it has.
Document = str | bytes | tuple[Sequence[int] | np.ndarray | torch.Tensor, int]


@dataclass(frozen=True)
class Evaluation:
    """What predicting some documents cost.

    nats: summed cross entropy of all tokens, ends of documents included; n_bytes: of the texts.
    """

    nats: float
    n_tokens: int
    n_bytes: int
    n_documents: int
    seconds: float

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.n_tokens

    @property
    def perplexity(self) -> float:
        """exp(loss): per token, so only comparable for one tokenizer."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """The size of the texts, coded by the model, over their own: comparable for all."""
        return self.nats / math.log(2) / self.n_bytes if self.n_bytes else math.inf


@dataclass(frozen=True)
class Progress:
    """Where an evaluation stands. Totals and the estimate are None for a stream without end."""

    n_tokens: int
    done_bytes: int
    total_bytes: int | None
    loss: float
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Speed so far."""
        return self.n_tokens / max(self.seconds, 1e-9)

    @property
    def eta_seconds(self) -> float | None:
        """Time left at this speed."""
        if self.total_bytes is None or not self.done_bytes:
            return None
        return self.seconds * max(0, self.total_bytes - self.done_bytes) / self.done_bytes


@dataclass
class _Lane:
    ids: np.ndarray
    n_bytes: int
    at: int = 0

    @property
    def left(self) -> int:
        """Tokens not predicted yet; the first id is only a beginning."""
        return len(self.ids) - 1 - self.at


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    documents: Iterable[Document],
    *,
    segment: int | None = None,
    lanes: int | None = None,
    progress: Callable[[Progress], object] | None = None,
    every: float = 0.5,
) -> Evaluation:
    """Predict every token of every document once, each from all that is before it.

    A document goes through the model in segments with the state carried on: nothing is cut at the
    training length. Its first token is predicted from an end-of-document id, and the end of the
    document is predicted too, as in training; with the length of the code of the end counted in,
    bits per byte is what an arithmetic coder would need to store the documents one by one.
    `lanes` documents go side by side on one packed row, segment tokens of each (more of each when
    fewer are left); the result depends on neither. Runs in the caller's autocast.

    documents: texts, or (ids, n_bytes) with ids that begin and end with `tokenizer.eod`.
    segment, lanes: default to 512 x 8 on a CPU, 2048 x 32 on a GPU.
    progress: called at most once in `every` seconds.
    Precision: the sum over tokens in float64.
    Raises: ValueError if there are no documents, or ids without a beginning.
    """
    device = model.head_weight.device
    cpu = device.type == "cpu"
    segment = (512 if cpu else 2048) if segment is None else segment
    lanes = (8 if cpu else 32) if lanes is None else lanes
    if segment < 1 or lanes < 1:
        raise ValueError(f"segment and lanes must be at least 1, not {segment} and {lanes}")
    total_bytes = None
    if progress is not None and isinstance(documents, Sequence):
        total_bytes = sum(map(_size, documents))
    waiting = (_lane(document, tokenizer) for document in documents)
    start = last = time.perf_counter()
    nats, n_tokens, done_bytes, n_documents = 0.0, 0, 0, 0
    active: list[_Lane] = []
    state: State | None = None
    with in_eval_mode(model):
        while True:
            fresh = list(itertools.islice(waiting, lanes - len(active)))
            n_documents += len(fresh)
            if fresh and state is not None:
                state = State.cat([state, model.init_state(len(fresh))])
            active += fresh
            if not active:
                break
            room = segment * lanes // len(active)
            sizes = [min(room, lane.left) for lane in active]
            parts = [lane.ids[lane.at : lane.at + n] for lane, n in zip(active, sizes, strict=True)]
            after = [
                lane.ids[lane.at + 1 : lane.at + n + 1]
                for lane, n in zip(active, sizes, strict=True)
            ]
            ids, bounds = pack(parts, device)
            targets, _ = pack(after, device)
            losses, state = model.loss(ids, targets, state, cu_seqlens=bounds, reduction="none")
            nats += losses.cpu().sum(dtype=torch.float64).item()
            n_tokens += ids.numel()
            for lane, n in zip(active, sizes, strict=True):
                lane.at += n
            keep = [i for i, lane in enumerate(active) if lane.left]
            if len(keep) < len(active):
                done_bytes += sum(lane.n_bytes for lane in active if not lane.left)
                state = state.select(keep) if keep else None
                active = [active[i] for i in keep]
            now = time.perf_counter()
            if progress is not None and now - last >= every:
                last = now
                share = sum(lane.n_bytes * lane.at // (len(lane.ids) - 1) for lane in active)
                progress(
                    Progress(
                        n_tokens, done_bytes + share, total_bytes, nats / n_tokens, now - start
                    )
                )
    if not n_tokens:
        raise ValueError("there are no documents to evaluate on")
    return Evaluation(nats, n_tokens, done_bytes, n_documents, time.perf_counter() - start)


def _lane(document: Document, tokenizer: Tokenizer) -> _Lane:
    if isinstance(document, str | bytes):
        text = np.asarray(tokenizer.encode_array(document))
        ids = np.empty(len(text) + 2, np.uint32)
        ids[0] = ids[-1] = tokenizer.eod
        ids[1:-1] = text
        return _Lane(ids, _size(document))
    ids = np.asarray(document[0])
    if len(ids) < 2 or ids[0] != tokenizer.eod or ids[-1] != tokenizer.eod:
        raise ValueError(
            f"the ids of a document must begin and end with the end-of-document id {tokenizer.eod}"
        )
    return _Lane(ids, document[1])


def _size(document: Document) -> int:
    if isinstance(document, str):
        return len(document.encode("utf-8", "surrogatepass"))
    return len(document) if isinstance(document, bytes) else document[1]


__all__ = ["Document", "Evaluation", "Progress", "evaluate"]
