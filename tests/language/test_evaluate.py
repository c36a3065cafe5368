"""Evaluation: every token once, from the document's beginning, whatever the segments and lanes."""

import itertools
import math

import ema  # noqa: F401  (registers the mixer)
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from longscan.language.evaluate import evaluate
from longscan.language.tokenizer import ByteTokenizer
from longscan.models import LanguageModel, LanguageModelConfig

PATTERNS = ["ema", "gated_deltanet,mamba2", "ema,attention", "ema,sliding_attention"]
BYTES = ByteTokenizer()
TEXTS = ["a", "", "def f(x):\n    return x\n", "é" * 40, b"\xff\x00raw", "z" * 17, "end"]


def make(pattern="gated_deltanet", dtype=torch.float64):
    torch.manual_seed(0)
    settings = {}
    if "mamba2" in pattern:
        settings["mixers"] = {"mamba2": {"d_state": 8, "d_head": 8}}
    if "sliding" in pattern:
        settings["mixers"] = {"sliding_attention": {"window": 6}}
    config = LanguageModelConfig(257, pattern=pattern, d_model=16, n_layers=2, **settings)
    model = LanguageModel(config)
    with torch.no_grad():
        model.embedding.weight.mul_(30)
    return model.to(dtype)


def alone(model, texts):
    """The definition: each document whole, by itself."""
    nats = 0.0
    for text in texts:
        ids = torch.tensor([[256, *BYTES.encode(text), 256]])
        logits, _ = model(ids[:, :-1])
        nats += F.cross_entropy(logits[0], ids[0, 1:], reduction="sum").item()
    return nats


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_result_does_not_depend_on_segments_and_lanes(pattern):
    model = make(pattern)
    want = alone(model, TEXTS)
    for segment, lanes in ((1, 1), (5, 3), (7, 2), (64, 4), (4, 20), (None, None)):
        got = evaluate(model, BYTES, TEXTS, segment=segment, lanes=lanes)
        assert got.nats == pytest.approx(want, rel=1e-10)
        size = sum(len(t if isinstance(t, bytes) else t.encode()) for t in TEXTS)
        assert (got.n_bytes, got.n_tokens, got.n_documents) == (size, size + 7, 7)


def test_measures():
    result = evaluate(make(), BYTES, TEXTS)
    assert result.loss == result.nats / result.n_tokens
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    assert result.bits_per_byte == pytest.approx(result.nats / math.log(2) / result.n_bytes)
    assert result.seconds > 0


def test_a_model_that_knows_nothing_needs_log2_of_the_vocabulary():
    model = make()
    with torch.no_grad():
        model.embedding.weight.zero_()
    result = evaluate(model, BYTES, ["abcd", "efgh"])
    assert result.loss == pytest.approx(math.log(257))
    # ten tokens for eight bytes: the ends of the documents are paid for
    assert result.bits_per_byte == pytest.approx(10 / 8 * math.log2(257))


def test_ids_with_their_byte_counts_are_the_same_as_texts():
    model = make()
    ready = [
        (kind([256, *BYTES.encode(t), 256]), len(BYTES.encode(t)))
        for t, kind in zip(TEXTS, itertools.cycle((list, np.array, torch.tensor)), strict=False)
    ]
    a, b = evaluate(model, BYTES, TEXTS, lanes=2), evaluate(model, BYTES, iter(ready), lanes=3)
    assert a.nats == pytest.approx(b.nats, rel=1e-12)
    assert (a.n_bytes, a.n_tokens) == (b.n_bytes, b.n_tokens)


def test_documents_are_read_as_lanes_become_free():
    model = make("ema")
    taken = []

    def stream():
        for i in range(9):
            taken.append(i)
            yield "x" * (50 if i == 0 else 3)

    widest = 0

    def watch(module, args, kwargs, out):
        nonlocal widest
        bounds = kwargs["cu_seqlens"]
        widest = max(widest, 1 if bounds is None else len(bounds) - 1)

    model.blocks[0].register_forward_hook(watch, with_kwargs=True)
    seen = []
    evaluate(model, BYTES, stream(), lanes=2, segment=4, every=0.0,
             progress=lambda p: seen.append((len(taken), p.n_tokens)))  # fmt: skip
    assert widest == 2
    assert seen[0] == (2, 8)
    assert len(taken) == 9
    assert [n for n, _ in seen] == sorted(n for n, _ in seen)


def test_progress_ends_at_everything():
    model, seen = make("ema"), []
    result = evaluate(model, BYTES, TEXTS, segment=3, lanes=2, every=0.0, progress=seen.append)
    last = seen[-1]
    assert last.done_bytes == last.total_bytes == result.n_bytes
    assert last.n_tokens == result.n_tokens
    assert last.loss == pytest.approx(result.loss)
    assert last.eta_seconds == 0
    assert seen[0].eta_seconds > 0
    done = [p.done_bytes for p in seen]
    assert done == sorted(done)
    rare, streamed = [], []
    evaluate(model, BYTES, TEXTS, segment=3, progress=rare.append, every=1e9)
    evaluate(model, BYTES, iter(TEXTS), segment=3, progress=streamed.append, every=0.0)
    assert rare == []
    assert streamed[-1].total_bytes is None
    assert streamed[-1].eta_seconds is None


def test_autocast_and_narrow_weights_are_near():
    model = make("gated_deltanet,mamba2", torch.float32)
    texts = ["some text here", "more", "and more of it"]
    want = evaluate(model, BYTES, texts).loss
    with torch.autocast("cpu", torch.bfloat16):
        got = evaluate(model, BYTES, texts, segment=3, lanes=2).loss
    assert got == pytest.approx(want, rel=0.05)
    narrow = evaluate(model.to(torch.bfloat16), BYTES, texts, segment=3, lanes=2).loss
    assert narrow == pytest.approx(want, rel=0.05)


def test_training_mode_is_put_back_and_no_graph_is_kept():
    model = make().train()
    modes = set()
    model.blocks[0].register_forward_hook(
        lambda m, a, out: modes.add((m.training, out[0].requires_grad))
    )
    evaluate(model, BYTES, ["abc"])
    assert modes == {(False, False)}
    assert model.training


def test_bad_input():
    model = make("ema")
    for documents, options, words in (
        ([], {}, "no documents"),
        ([([1, 2, 256], 2)], {}, "begin and end"),
        ([([256], 0)], {}, "begin and end"),
        (["a"], {"segment": 0}, "at least 1"),
        (["a"], {"lanes": 0}, "at least 1"),
    ):
        with pytest.raises(ValueError, match=words):
            evaluate(model, BYTES, documents, **options)
