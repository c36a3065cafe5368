"""Corpora: what is read, how it is split, and what is said when it cannot be."""

import hashlib
import json
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longscan.language import corpus as module
from longscan.language.corpus import SPLITS, CorpusError, open_corpus, split_of


def write_files(folder: Path, n: int) -> dict[str, bytes]:
    files = {f"sub/file{i:03}.txt": f"text {i}\n".encode() * (i % 7 + 1) for i in range(n)}
    (folder / "sub").mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return files


def write_jsonl(path: Path, records: list) -> Path:
    path.write_text("\n".join(json.dumps(r) for r in records) + "\n", encoding="utf-8")
    return path


def by_split(corpus) -> dict[str, dict[str, bytes]]:
    return {s: dict(corpus.documents(s)) for s in SPLITS}


def test_split_of_is_fixed():
    # These never change: a model's test files must stay unseen by later versions.
    names = ["abc.py", "gzip.py", "unittest/mock.py", "statistics.py", "typing.py"]
    assert [split_of(n) for n in names] == ["train", "valid", "valid", "train", "train"]
    counts = [split_of(f"record {i}") for i in range(20000)]
    assert abs(counts.count("train") / 20000 - 0.96) < 0.005
    assert abs(counts.count("valid") / 20000 - 0.02) < 0.004
    assert abs(counts.count("test") / 20000 - 0.02) < 0.004


def test_the_default_is_the_standard_library():
    corpus = open_corpus()
    root = Path(sysconfig.get_path("stdlib"))
    splits = by_split(corpus)
    names = [n for s in SPLITS for n in splits[s]]
    assert len(names) == len(set(names)) > 500
    assert all(n.endswith(".py") for n in names)
    assert not any("site-packages" in n or "__pycache__" in n for n in names)
    for split, documents in splits.items():
        assert documents, split
        assert all(split_of(n) == split for n in documents)
    assert splits["train"]["abc.py"] == (root / "abc.py").read_bytes()
    contents = [d for s in SPLITS for d in splits[s].values()]
    assert len(set(contents)) == len(contents)
    assert b"" not in contents
    assert sum(map(len, contents)) > 5e6
    assert open_corpus().fingerprint == corpus.fingerprint


def test_a_text_file_is_cut_at_line_ends(tmp_path):
    text = "".join(f"line {i} of a file\n" for i in range(5000)).encode()
    path = tmp_path / "book.txt"
    path.write_bytes(text)
    corpus = open_corpus(path)
    parts = [list(corpus.documents(s)) for s in SPLITS]
    assert [len(p) for p in parts] == [1, 1, 1]
    assert b"".join(p[0][1] for p in parts) == text
    assert all(p[0][1].endswith(b"\n") for p in parts)
    sizes = [len(p[0][1]) / len(text) for p in parts]
    assert sizes == pytest.approx([0.9, 0.05, 0.05], abs=0.002)
    assert b"".join(d for _, d in corpus.documents("all")) == text


@settings(max_examples=40, deadline=None)
@given(text=st.text(min_size=1, max_size=400).filter(lambda t: "\0" not in t), few=st.booleans())
def test_any_text_is_cut_without_loss_or_overlap(tmp_path_factory, text, few):
    path = tmp_path_factory.mktemp("cut") / "some.txt"
    data = (text if few else text * 7).encode()
    path.write_bytes(data)
    parts = [d for s in SPLITS for _, d in open_corpus(path).documents(s)]
    assert b"".join(parts) == data
    for part in parts:
        part.decode()  # no character was cut in two


def test_long_text_is_several_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 1000)
    text = "".join(f"line {i}\n" for i in range(2000)).encode()
    (tmp_path / "long.txt").write_bytes(text)
    corpus = open_corpus(tmp_path / "long.txt")
    documents = list(corpus.documents("all"))
    assert len(documents) > 10
    assert len({n for n, _ in documents}) == len(documents)
    assert max(len(d) for _, d in documents) < 1500
    assert b"".join(d for _, d in documents) == text
    assert all(d.endswith(b"\n") for _, d in documents)
    done = [d.done for d in corpus.read()]
    assert done == sorted(done)
    assert done[-1] == 1.0


def test_a_folder_of_many_files_is_split_by_file(tmp_path):
    files = write_files(tmp_path / "a", 300)
    corpus = open_corpus(tmp_path / "a")
    splits = by_split(corpus)
    seen = {n: d for s in SPLITS for n, d in splits[s].items()}
    assert all(files[n] == d and split_of(n) == s for s in SPLITS for n, d in splits[s].items())
    assert set(seen.values()) == set(files.values())
    # The same files elsewhere are the same corpus, whatever the order they were made in.
    write_files(tmp_path / "b", 300)
    assert by_split(open_corpus(tmp_path / "b")) == splits


def test_copies_hidden_binary_and_empty_files_are_left_out(tmp_path):
    for name in ("a.txt", "z.txt"):
        (tmp_path / name).write_bytes(b"the same words\n" * 40)
    (tmp_path / "other.txt").write_bytes(b"some other word\n" * 40)
    (tmp_path / "same_size.md").write_bytes(b"as long as them\n" * 40)
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0\0\1")
    (tmp_path / ".hidden.txt").write_bytes(b"hidden")
    for folder in (".git", "__pycache__"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_bytes(b"not this")
    names = {n.partition(":")[0] for n, _ in open_corpus(tmp_path).documents("all")}
    assert names == {"a.txt", "other.txt", "same_size.md"}


def test_files_that_are_not_utf8_keep_their_bytes(tmp_path):
    data = "déjà vu\n".encode("latin-1") * 50
    (tmp_path / "old.txt").write_bytes(data)
    assert b"".join(d for _, d in open_corpus(tmp_path / "old.txt").documents("all")) == data


def test_jsonl(tmp_path):
    records = [{"id": i, "text": f"document {i} é"} for i in range(400)]
    records[7]["text"] = None
    records[8]["text"] = ""
    records[9]["text"] = "\ud800"  # JSON can spell a lone surrogate
    path = write_jsonl(tmp_path / "data.jsonl", records)
    splits = by_split(open_corpus(path))
    seen = {n: d for s in SPLITS for n, d in splits[s].items()}
    assert all(split_of(n) == s for s in SPLITS for n in splits[s])
    assert len(seen) == 398
    assert seen["data.jsonl:1"] == "document 0 é".encode()
    assert seen["data.jsonl:10"] == b"\xed\xa0\x80"
    assert all(splits.values())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut sho', "line 3: not valid JSON"),
        ("[1, 2]", "line 3: expected an object, found list"),
        ('{"body": "x", "id": 3}', "line 3: no field 'text'; there is 'body', 'id'"),
        ('{"text": 5}', "line 3: field 'text' holds int"),
    ],
)
def test_a_malformed_record_is_named(tmp_path, line, message):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(CorpusError, match=message):
        list(open_corpus(path).documents("all"))


def test_a_wrong_field_is_seen_at_once(tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", [{"body": "x"}])
    with pytest.raises(CorpusError, match=r"'body'.*--data.text_field"):
        open_corpus(path)
    assert list(open_corpus(path, text_field="body").documents("all")) == [("data.jsonl:1", b"x")]


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [f"row {i} ü" for i in range(1000)]
    texts[5] = None
    table = pa.table({"id": list(range(1000)), "text": texts})
    path = tmp_path / "data.parquet"
    parquet.write_table(table, path, row_group_size=64)
    documents = list(open_corpus(path).documents("all"))
    assert len(documents) == 999
    assert dict(documents)["data.parquet:999"] == "row 999 ü".encode()
    with pytest.raises(CorpusError, match="no column 'body'; there is 'id', 'text'"):
        open_corpus(path, text_field="body")
    with pytest.raises(CorpusError, match="column 'id' holds int64, not text"):
        open_corpus(path, text_field="id")
    # Beside records, a README describes the data and is not part of it.
    (tmp_path / "README.md").write_text("about the data")
    assert [n for n, _ in open_corpus(tmp_path).documents("all")] == [n for n, _ in documents]
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(CorpusError, match="cannot be read as Parquet"):
        open_corpus(tmp_path / "broken.parquet")


def test_what_cannot_be_read_is_said(tmp_path):
    with pytest.raises(CorpusError, match=r"no file or folder .*nowhere"):
        open_corpus(tmp_path / "nowhere")
    with pytest.raises(CorpusError, match="holds no text"):
        open_corpus(tmp_path)
    (tmp_path / "empty.txt").write_bytes(b"")
    with pytest.raises(CorpusError, match="is empty"):
        open_corpus(tmp_path / "empty.txt")
    (tmp_path / "binary.bin").write_bytes(b"ab\0cd")
    with pytest.raises(CorpusError, match="binary"):
        open_corpus(tmp_path / "binary.bin")
    (tmp_path / "data.jsonl.gz").write_bytes(b"\x1f\x8b some")
    with pytest.raises(CorpusError, match="is compressed; unpack"):
        open_corpus(tmp_path / "data.jsonl.gz")
    (tmp_path / "a.txt").write_bytes(b"words")
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        open_corpus(tmp_path / "a.txt").documents("dev")


def test_the_fingerprint_follows_the_files(tmp_path):
    write_files(tmp_path / "a", 3)
    first = open_corpus(tmp_path / "a").fingerprint
    assert open_corpus(tmp_path / "a").fingerprint == first
    assert open_corpus(tmp_path / "a", text_field="body").fingerprint != first
    (tmp_path / "a").rename(tmp_path / "b")
    assert open_corpus(tmp_path / "b").fingerprint == first
    (tmp_path / "b" / "sub" / "file000.txt").write_bytes(b"another text\n")
    assert open_corpus(tmp_path / "b").fingerprint != first


def test_the_sample_is_of_the_training_split_and_capped(tmp_path):
    files = write_files(tmp_path, 300)
    corpus = open_corpus(tmp_path)
    train = {hashlib.sha256(d).digest() for _, d in corpus.documents("train")}
    everything = list(corpus.sample(1 << 30))
    assert {hashlib.sha256(d).digest() for d in everything} == train
    some = list(corpus.sample(500))
    assert sum(map(len, some)) == 500
    assert some == list(open_corpus(tmp_path).sample(500))
    assert len(files) > len(everything) > len(some)
