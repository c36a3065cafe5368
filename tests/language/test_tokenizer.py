"""Tokenizers: every byte comes back, training is deterministic, foreign files are checked."""

import json
import pickle
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longscan.language import tokenizer as module
from longscan.language.corpus import open_corpus
from longscan.language.tokenizer import (
    END_OF_DOCUMENT,
    BPETokenizer,
    ByteTokenizer,
    load_tokenizer,
)

tokenizers = pytest.importorskip("tokenizers")

CODE = st.text("abc_XY09 .,:()[]\"'#\n\t\r\f=é語\u00a0\u2003🙂", max_size=300)


@pytest.fixture(scope="module")
def sample() -> list[bytes]:
    return list(open_corpus().sample(300_000))


@pytest.fixture(scope="module")
def bpe(sample) -> BPETokenizer:
    return BPETokenizer.train(sample, 700)


def foreign(sample, **options) -> tokenizers.Tokenizer:
    """A byte-level BPE as others publish them: GPT-2's words, another name for the end."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=options.get("prefix", False)
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    if "normalizer" in options:
        backend.normalizer = options["normalizer"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=options.get("special", ["<|im_start|>", "</s>"]),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([t.decode("utf-8", "ignore") for t in sample], trainer)
    return backend


@settings(max_examples=50, deadline=None)
@given(st.one_of(st.binary(), st.text(st.characters())))
def test_bytes_round_trip(text):
    tokenizer = ByteTokenizer()
    data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    ids = tokenizer.encode(text)
    assert ids == list(data)
    assert tokenizer.encode_array(text).tolist() == ids
    framed = [tokenizer.eod, *ids, tokenizer.eod]
    assert tokenizer.decode_bytes(framed) == data
    assert tokenizer.n_bytes(framed) == len(data)
    assert max(framed) < tokenizer.vocab_size


@settings(max_examples=150, deadline=None)
@given(text=st.one_of(st.binary(max_size=200), st.text(st.characters(), max_size=200), CODE))
def test_bpe_round_trip(bpe, text):
    data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    ids = bpe.encode(text)
    assert bpe.decode_bytes(ids) == data
    assert bpe.n_bytes(ids) == len(data)
    assert bpe.encode(data) == ids
    assert bpe.eod not in ids
    framed = np.array([bpe.eod, *ids, bpe.eod])
    assert bpe.decode_bytes(framed) == data
    assert bpe.n_bytes(framed) == len(data)
    assert all(0 <= i < bpe.vocab_size for i in ids)


@settings(max_examples=150, deadline=None)
@given(text=st.one_of(st.text(max_size=200), CODE))
def test_our_fast_path_is_the_library_s_encoding(bpe, text):
    assert bpe.encode(text) == bpe.backend.encode(text, add_special_tokens=False).ids


@settings(max_examples=100, deadline=None)
@given(text=st.one_of(CODE, st.text("ab(1\n\r \t", max_size=60)), size=st.integers(1, 20))
def test_long_text_is_encoded_in_pieces_that_change_nothing(bpe, text, size):
    whole = bpe.encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PIECE", size)
        assert bpe.encode(text) == whole


def test_the_standard_library_round_trips_and_is_compressed(bpe):
    n_tokens = n_bytes = 0
    for _, data in open_corpus().documents("valid"):
        ids = bpe.encode_array(data)
        assert bpe.decode_bytes(ids) == data
        n_tokens, n_bytes = n_tokens + len(ids), n_bytes + len(data)
    assert n_bytes / n_tokens > 2


def test_training_is_deterministic(bpe, sample):
    again = BPETokenizer.train(iter(sample), 700)
    assert again.backend.to_str() == bpe.backend.to_str()
    assert again.fingerprint == bpe.fingerprint
    other = BPETokenizer.train(sample[: len(sample) // 2], 700)
    assert other.fingerprint != bpe.fingerprint


def test_vocabulary_sizes(bpe, sample):
    assert bpe.vocab_size == 700
    assert BPETokenizer.train(sample, 257).vocab_size == 257
    assert BPETokenizer.train([b"ab ab"], 5000).vocab_size < 270
    assert BPETokenizer.train([], 300).encode("é") != []
    with pytest.raises(ValueError, match=r"vocab_size 256 is below 257.*'byte'"):
        BPETokenizer.train(sample, 256)


def test_special_tokens_in_text_are_text(bpe):
    text = f"a {END_OF_DOCUMENT} b"
    assert bpe.eod not in bpe.encode(text)
    assert bpe.decode(bpe.encode(text)) == text


def test_decoding_is_forgiving(bpe):
    assert bpe.decode([*bpe.encode("é"), 10**6, -1, bpe.eod]) == "é"
    assert bpe.decode(bpe.encode("é".encode()[:1])) == "\ufffd"
    assert bpe.n_bytes([bpe.vocab_size, -1]) == 0
    assert ByteTokenizer().decode([0xC3, 300, -1]) == "\ufffd"
    assert bpe.decode([]) == ""
    assert bpe.encode("") == bpe.encode(b"") == []


def test_saved_loaded_pickled(bpe, tmp_path):
    bpe.save(tmp_path / "tokenizer.json")
    ByteTokenizer().save(tmp_path / "bytes.json")
    text = "def f(x):\n    return x  # caf\xe9\n"
    for same in (load_tokenizer(tmp_path), pickle.loads(pickle.dumps(bpe))):
        assert same.encode(text) == bpe.encode(text)
        assert (same.eod, same.vocab_size) == (bpe.eod, bpe.vocab_size)
        assert same.fingerprint == bpe.fingerprint
    assert isinstance(load_tokenizer(tmp_path / "bytes.json"), ByteTokenizer)


def test_a_foreign_tokenizer(sample, tmp_path):
    backend = foreign(sample)
    backend.add_tokens([tokenizers.AddedToken("    ", normalized=False)])
    backend.enable_truncation(5)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eod == backend.token_to_id("</s>")
    text = "def f(x):\n    return 'é'  # <|im_start|> is text\n"
    ids = tokenizer.encode(text)
    assert backend.token_to_id("    ") in ids
    assert backend.token_to_id("<|im_start|>") not in ids
    rng = random.Random(0)
    noise = bytes(rng.randrange(256) for _ in range(3000))
    long = (text.encode() * 6000)[:200_000]
    for data in (text.encode(), noise, long, b"x" * 150_000):
        ids = tokenizer.encode_array(data)
        assert tokenizer.decode_bytes(ids) == data
        assert tokenizer.n_bytes(ids) == len(data)
    assert tokenizer.decode_bytes([tokenizer.eod, *tokenizer.encode("a")]) == b"a"


def test_the_end_of_document_is_found_or_asked_for(sample, tmp_path):
    path = tmp_path / "tokenizer.json"
    foreign(sample, special=["<|im_start|>", "<|im_end|>"]).save(str(path))
    with pytest.raises(ValueError, match=r"no end-of-document token.*'<\|im_start\|>'"):
        load_tokenizer(path)
    with pytest.raises(ValueError, match="'<end>' is not among"):
        load_tokenizer(path, end="<end>")
    assert load_tokenizer(path, end="<|im_end|>").eod == 1
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_start|>"}))
    assert load_tokenizer(path).eod == 0
    config = {"eos_token": {"content": "<|im_end|>", "lstrip": False}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(path).eod == 1


def test_tokenizers_that_cannot_be_used_are_refused(sample, tmp_path):
    path = tmp_path / "tokenizer.json"
    foreign(sample, prefix=True).save(str(path))
    with pytest.raises(ValueError, match="changes text"):
        load_tokenizer(path)
    foreign(sample, normalizer=tokenizers.normalizers.Lowercase()).save(str(path))
    with pytest.raises(ValueError, match="changes text"):
        load_tokenizer(path)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    words.add_special_tokens(["</s>"])
    words.save(str(path))
    with pytest.raises(ValueError, match="not a byte-level BPE tokenizer"):
        load_tokenizer(path)
    path.write_text("not json")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_tokenizer(path)
    path.write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"is not a tokenizer.json"):
        load_tokenizer(path)
    with pytest.raises(FileNotFoundError, match="no tokenizer file"):
        load_tokenizer(tmp_path / "none.json")
