"""Token files: what is written is what was read, whole or not at all, in bounded memory."""

import errno
import json
import os
import pickle
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longscan.io import SaveError
from longscan.language import tokens as module
from longscan.language.corpus import SPLITS, CorpusError, open_corpus
from longscan.language.tokenizer import ByteTokenizer
from longscan.language.tokens import Progress, TokenFile, TokenWriter, encode_corpus, train_bpe

EOD = 256


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    return path


class Counting(ByteTokenizer):
    """Bytes, counting the documents; breaks at document `fail_at` with `error`."""

    def __init__(self, fail_at: int | None = None, error: BaseException | None = None) -> None:
        self.calls, self.fail_at, self.error = 0, fail_at, error

    def encode_array(self, text):
        self.calls += 1
        if self.calls == self.fail_at and self.error is not None:
            raise self.error
        return super().encode_array(text)


@settings(max_examples=40, deadline=None)
@given(
    documents=st.lists(
        st.tuples(st.sampled_from(SPLITS), st.lists(st.integers(0, 65534), max_size=12)),
        max_size=12,
    ),
    vocab_size=st.sampled_from([65535, 65536, 65537, 1 << 20]),
)
def test_what_is_written_is_read(tmp_path_factory, documents, vocab_size):
    folder = tmp_path_factory.mktemp("tokens") / "made"
    eod = vocab_size - 1
    with TokenWriter(folder, vocab_size, eod) as writer:
        for split, ids in documents:
            writer.add(split, np.array(ids, np.int64), 3 * len(ids))
    for split in SPLITS:
        mine = [ids for s, ids in documents if s == split]
        file = TokenFile(folder, split)
        assert file.n_documents == len(mine)
        assert file.n_bytes == sum(3 * len(ids) for ids in mine)
        assert file.byte_counts.tolist() == [3 * len(ids) for ids in mine]
        flat = [eod] + [token for ids in mine for token in [*ids, eod]]
        assert len(file) == len(flat)
        assert file[:].tolist() == flat
        assert file[1:4].tolist() == flat[1:4]
        assert file.tokens.dtype == ("uint16" if vocab_size <= 65536 else "uint32")
        for i, ids in enumerate(mine):
            assert file.document(i).tolist() == [eod, *ids, eod]
        for i in (-1, len(mine)):
            with pytest.raises(IndexError, match=f"of {len(mine)} in split"):
                file.document(i)


def test_a_corpus_is_encoded_once(tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", [f"é {i}" for i in range(300)])
    corpus, tokenizer = open_corpus(path), Counting()
    folder = encode_corpus(corpus, tokenizer, tmp_path / "cache")
    assert tokenizer.calls == 300
    for split in SPLITS:
        texts = [d for _, d in corpus.documents(split)]
        file = TokenFile(folder, split)
        got = [tokenizer.decode_bytes(file.document(i)) for i in range(file.n_documents)]
        assert got == texts != []
        assert file.byte_counts.tolist() == [len(t) for t in texts]
    assert encode_corpus(open_corpus(path), tokenizer, tmp_path / "cache") == folder
    assert tokenizer.calls == 300
    write_jsonl(path, [f"other {i}" for i in range(310)])
    assert encode_corpus(open_corpus(path), tokenizer, tmp_path / "cache") != folder
    assert tokenizer.calls == 610


@pytest.mark.parametrize("error", [KeyboardInterrupt(), CorpusError("line 9: bad")])
def test_an_interrupted_encode_leaves_nothing(tmp_path, error):
    corpus = open_corpus(write_jsonl(tmp_path / "data.jsonl", ["some text"] * 20))
    with pytest.raises(type(error)):
        encode_corpus(corpus, Counting(9, error), tmp_path / "cache")
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []
    folder = encode_corpus(corpus, Counting(), tmp_path / "cache")
    assert TokenFile(folder, "train").n_documents > 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_is_said_and_leaves_nothing(tmp_path):
    def fill() -> None:
        with TokenWriter(tmp_path / "made", 257, EOD) as writer:
            writer._files["train", "tokens"].close()
            writer._files["train", "tokens"] = open("/dev/full", "wb")  # noqa: SIM115
            writer.add("train", np.zeros(1 << 20, np.uint8), 1 << 20)

    with pytest.raises(SaveError, match=r"No space left.*cache_dir") as caught:
        fill()
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "cache").write_text("a file")
    corpus = open_corpus(write_jsonl(tmp_path / "a.jsonl", ["x"]))
    with pytest.raises(SaveError, match="could not write tokens"):
        encode_corpus(corpus, Counting(), tmp_path / "cache")


def test_two_processes_may_encode_the_same(tmp_path):
    with TokenWriter(tmp_path / "made", 257, EOD) as mine:
        mine.add("train", np.array([1, 2]), 2)
        # As another process would, meanwhile.
        other = TokenWriter(tmp_path / "made", 257, EOD)
        other._temporary = tmp_path / ".made.other.tmp"
        with other:
            other.add("train", np.array([1, 2]), 2)
    assert TokenFile(tmp_path / "made", "train").document(0).tolist() == [EOD, 1, 2, EOD]
    assert [p.name for p in tmp_path.iterdir()] == ["made"]


def test_what_a_killed_run_left_is_removed_in_time(tmp_path):
    for name, age in (("old", 2 * 86400), ("new", 60)):
        folder = tmp_path / f".{name}.123.tmp"
        folder.mkdir()
        (folder / "train.tokens").write_bytes(b"half")
        os.utime(folder / "train.tokens", (time.time() - age,) * 2)
    with TokenWriter(tmp_path / "made", 257, EOD):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == [".new.123.tmp", "made"]


def test_damaged_files_are_said(tmp_path):
    with TokenWriter(tmp_path / "made", 257, EOD) as writer:
        writer.add("train", np.arange(50), 50)
    path = tmp_path / "made" / "train.tokens"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"damaged \(102 bytes, 104 expected\).*delete the folder"):
        TokenFile(tmp_path / "made", "train").document(0)
    with pytest.raises(FileNotFoundError, match="no token files"):
        TokenFile(tmp_path, "train")
    meta = json.loads((tmp_path / "made" / "meta.json").read_text())
    (tmp_path / "made" / "meta.json").write_text(json.dumps({**meta, "format": 99}))
    with pytest.raises(ValueError, match="has format 99"):
        TokenFile(tmp_path / "made", "train")


def test_a_corpus_larger_than_memory(tmp_path):
    """24 MB of text pass through less than 1 MB of memory, to the disk and back."""
    path = tmp_path / "data.jsonl"
    with open(path, "w") as f:
        for i in range(1500):
            f.write(json.dumps({"text": f"{i} " * 4000}) + "\n")
    assert path.stat().st_size > 20e6
    tracemalloc.start()
    try:
        folder = encode_corpus(open_corpus(path), ByteTokenizer(), tmp_path / "cache")
        file = TokenFile(folder, "train")
        total = sum(len(file.document(i)) for i in range(file.n_documents))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total > 20e6
    assert peak < 1e6


def test_a_token_file_is_sent_to_workers_by_name(tmp_path):
    with TokenWriter(tmp_path / "made", 257, EOD) as writer:
        writer.add("train", np.zeros(100_000, np.uint8), 100_000)
    file = TokenFile(tmp_path / "made", "train")
    assert file[:3].tolist() == [EOD, 0, 0]
    sent = pickle.dumps(file)
    assert len(sent) < 1000
    assert pickle.loads(sent)[:].tolist() == file[:].tolist()


def test_bpe_is_trained_once_and_on_the_training_split_only(tmp_path, monkeypatch):
    pytest.importorskip("tokenizers")
    lines = "".join(f"the word {i}\n" for i in range(4000))
    book = tmp_path / "book.txt"
    book.write_text(lines + "zyx" * (len(lines) // 36))  # beyond 90 %: not the training split's
    corpus = open_corpus(book)
    assert b"zyx" not in b"".join(corpus.sample(1 << 20))
    bpe = train_bpe(corpus, 300, tmp_path / "cache")
    assert len(bpe.encode("zyxzyx")) == 6
    assert len(bpe.encode("the word")) < 5
    monkeypatch.setattr(module.BPETokenizer, "train", None)  # would fail if called
    assert train_bpe(open_corpus(book), 300, tmp_path / "cache").fingerprint == bpe.fingerprint


def test_progress_is_said_after_a_while(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    short = Progress("encoding a")
    short.update(0.5)
    short.close()
    assert capsys.readouterr().err == ""
    long = Progress("encoding b")
    for now[0], done in ((10.0, 0.1), (31.0, 0.25), (40.0, 0.3), (62.0, 0.5)):
        long.update(done)
    now[0] = 125.0
    long.close()
    assert capsys.readouterr().err.splitlines() == [
        "encoding b   25%  1:33 left",
        "encoding b   50%  1:02 left",
        "encoding b  done in 2:05  ",
    ]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    now[0] = 0.0
    terminal = Progress("encoding c")
    now[0] = 2.5
    terminal.update(0.5)
    terminal.close()
    assert capsys.readouterr().err == (
        "\rencoding c   50%  0:02 left  \rencoding c  done in 0:02  \n"
    )
