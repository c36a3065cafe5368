"""Text from a model: prefill in bounded pieces, then one token at a time."""

from __future__ import annotations

import codecs
import random
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from longscan.language.rows import in_eval_mode, pack
from longscan.language.sampling import Sampling
from longscan.language.tokenizer import Tokenizer
from longscan.models.graphed import GraphedStep, graphed
from longscan.models.language_model import LanguageModel
from longscan.state import State

# Tokens of prompts that go through the model in one call.
SEGMENT = 4096
# Tokens from which on a CUDA graph is worth capturing: that takes the time of about five.
GRAPH_FROM = 16


@torch.inference_mode()
def prefill(
    model: LanguageModel,
    prompts: Sequence[Sequence[int] | np.ndarray],
    state: State | None = None,
    *,
    segment: int = SEGMENT,
) -> tuple[Tensor, State]:
    """Read prompts of different lengths: logits [B, vocab] after the last tokens, state of B rows.

    The prompts are packed on one row, at most about `segment` tokens of it at a time, so memory
    does not grow with the prompts where the mixers' states do not.
    state: what went before the prompts, B rows. The state returned is of inference mode: clone it
    to train from it.
    Raises: ValueError if there is no prompt, or an empty one.
    """
    arrays = [np.asarray(p, np.int64).reshape(-1) for p in prompts]
    if not arrays or not all(map(len, arrays)):
        raise ValueError("every prompt needs at least one token (the end-of-document id, say)")
    if segment < 1:
        raise ValueError(f"segment must be at least 1, not {segment}")
    device = model.head_weight.device
    rows, at = list(range(len(arrays))), 0
    done_rows: list[int] = []
    logits: list[Tensor] = []
    states: list[State] = []
    with in_eval_mode(model):
        while rows:
            room = max(1, segment // len(rows))
            ids, bounds = pack([arrays[i][at : at + room] for i in rows], device)
            h, state = model.hidden(ids, state, cu_seqlens=bounds)
            at += room
            ends = torch.tensor([-1], device=device) if bounds is None else bounds[1:] - 1
            done = [j for j, i in enumerate(rows) if len(arrays[i]) <= at]
            if done:
                logits.append(model.logits(h[0, ends[done]]))
                states.append(state if len(done) == len(rows) else state.select(done))
                done_rows += [rows[j] for j in done]
                left = [j for j, i in enumerate(rows) if len(arrays[i]) > at]
                state = state.select(left) if left else None
                rows = [rows[j] for j in left]
    if len(states) == 1:
        return logits[0], states[0]
    order = np.argsort(done_rows).tolist()
    return torch.cat(logits)[order], State.cat(states).select(order)


class TokenStream(Iterator[list[int | None]]):
    """Continues prompts, one token of each at a time; see `generate_ids`.

    rows: the prompts still being continued; state: theirs, one row each, after all tokens but the
    last one given out.
    On CUDA the steps are replayed from graphs where the model allows it (see
    `models.graphed.graphed`): not with attention, whose cache grows. Prompts that are over stay
    in the graph, unread, until half of its rows are.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompts: Sequence[Sequence[int] | np.ndarray],
        *,
        max_new_tokens: int,
        sampling: Sampling,
        seed: int | None,
        eod: int | None,
        state: State | None,
        segment: int,
    ) -> None:
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be 0 or more, not {max_new_tokens}")
        self.model, self.sampling, self.eod = model, sampling, eod
        self.left = max_new_tokens
        self.total = len(prompts)
        self.rows = list(range(self.total))
        self._numbers = [
            random.Random(None if seed is None else f"{seed} {i}") for i in range(self.total)
        ]
        self._last: list[int] = []
        self._logits, self._state = prefill(model, prompts, state, segment=segment)
        self._graph: GraphedStep | None = None
        self._places = self.rows
        self._may_graph = True
        self._seen: Tensor | None = None
        if sampling.repetition_penalty != 1:
            self._seen = torch.zeros_like(self._logits, dtype=torch.bool)
            for i, prompt in enumerate(prompts):
                self._seen[i, torch.as_tensor(np.asarray(prompt, np.int64))] = True
            if eod is not None:  # a marker, not something said
                self._seen[:, eod] = False

    @torch.inference_mode()
    def __next__(self) -> list[int | None]:
        if self.left == 0 or not self.rows:
            raise StopIteration
        self.left -= 1
        if self._last:
            self._advance()
        u = torch.tensor([self._numbers[i].random() for i in self.rows], dtype=torch.float64)
        picks = self.sampling.choose(self._logits.to(torch.float32), u, self._seen)
        self._last = picks.tolist()
        if self._seen is not None:
            self._seen.scatter_(1, picks[:, None], True)
        out: list[int | None] = [None] * self.total
        for i, token in zip(self.rows, self._last, strict=True):
            out[i] = token
        if self.eod in self._last:
            self._drop([j for j, token in enumerate(self._last) if token != self.eod])
        return out

    @property
    def state(self) -> State:
        if self._graph is None:
            return self._state
        return self._graph.state.select(self._places)

    def _advance(self) -> None:
        with in_eval_mode(self.model):
            if self._graph is None and self._may_graph and self.left >= GRAPH_FROM:
                self._graph = graphed(self.model, self._state)
                self._may_graph = self._graph is not None
                self._state = State() if self._may_graph else self._state
                self._places = list(range(len(self.rows)))
            if self._graph is None:
                ids = torch.tensor(self._last, device=self._logits.device)[:, None]
                logits, self._state = self.model(ids, self._state)
                self._logits = logits[:, 0]
                return
        ids = torch.zeros(self._graph.rows, 1, dtype=torch.long)
        ids[self._places, 0] = torch.tensor(self._last)
        logits = self._graph(ids)[:, 0]
        whole = len(self._places) == self._graph.rows
        self._logits = logits if whole else logits[self._places]

    def _drop(self, keep: list[int]) -> None:
        self.rows = [self.rows[j] for j in keep]
        self._last = [self._last[j] for j in keep]
        if not keep:
            return
        if self._seen is not None:
            self._seen = self._seen[keep]
        if self._graph is None:
            self._state = self._state.select(keep)
            return
        self._places = [self._places[j] for j in keep]
        if 2 * len(keep) <= self._graph.rows:
            self._state, self._graph = self.state, None


def generate_ids(
    model: LanguageModel,
    prompts: Sequence[Sequence[int] | np.ndarray],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    seed: int | None = None,
    eod: int | None = None,
    state: State | None = None,
    segment: int = SEGMENT,
) -> TokenStream:
    """Continue a batch of prompts of any lengths; each step gives one token id per prompt.

    A prompt that has given `eod` is over: it gives None from then on, and costs nothing. What a
    prompt gives depends on (seed, its place in the batch), not on the other prompts.
    state: what went before the prompts, one row each (a prefix kept from earlier).

    Raises: ValueError for an empty prompt or an option out of range, before any token is made.
    """
    return TokenStream(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=Sampling() if sampling is None else sampling,
        seed=seed,
        eod=eod,
        state=state,
        segment=segment,
    )


def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str | bytes,
    *,
    max_new_tokens: int,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop: str | Iterable[str] = (),
    segment: int = SEGMENT,
) -> Iterator[str]:
    """Continue `prompt`, piece by piece, as a document that it begins.

    Ends after max_new_tokens, at the end of the document, or before one of the `stop` texts. With
    linear mixers every token takes the same time and memory however long the text has become.
    The same seed gives the same text on the same machine. Pieces are whole characters; bytes that
    are not UTF-8 become U+FFFD. For the other options see `Sampling`.

    Raises: ValueError for an option out of range, at once and not at the first piece.
    """
    stops = [stop] if isinstance(stop, str) else list(stop)
    if not all(stops):
        raise ValueError("a stop text must not be empty")
    stream = generate_ids(
        model,
        [[tokenizer.eod, *tokenizer.encode(prompt)]],
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature, top_k, top_p, min_p, repetition_penalty),
        seed=seed,
        eod=tokenizer.eod,
        segment=segment,
    )
    tokens = (token for (token,) in stream if token is not None)
    return until_stop(decoded(tokens, tokenizer), stops)


def decoded(tokens: Iterable[int], tokenizer: Tokenizer) -> Iterator[str]:
    """The text of tokens as soon as its characters are whole."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        text = decoder.decode(tokenizer.decode_bytes([token]))
        if text:
            yield text
    rest = decoder.decode(b"", final=True)
    if rest:
        yield rest


def until_stop(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """The text before the stop text that is complete first, however the pieces are cut.

    Only what may be the beginning of a stop text is held back.
    """
    held = ""
    for piece in pieces:
        held += piece
        found = [(held.find(stop) + len(stop), -len(stop)) for stop in stops if stop in held]
        if found:
            end, minus = min(found)
            if end + minus:
                yield held[: end + minus]
            return
        n = max((_overlap(held, stop) for stop in stops), default=0)
        if n < len(held):
            yield held[: len(held) - n]
            held = held[len(held) - n :]
    if held:
        yield held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


__all__ = ["SEGMENT", "Sampling", "TokenStream", "generate", "generate_ids", "prefill"]
