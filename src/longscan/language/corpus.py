"""Corpora: documents of bytes, from any text on disk, each in the train, valid or test split."""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")
HASHED = (0.96, 0.98)  # a document whose hash falls below .96 trains, below .98 validates
CUT = (0.90, 0.95)  # where a text file that is split inside is cut
FEW_FILES = 50  # folders with fewer text files are split inside each file, not by file
BLOCK = 4 << 20  # a longer text is several documents, so that memory stays bounded
RULES = 1  # part of the fingerprint: raise it when the same files would give other documents

_SKIPPED_FOLDERS = {"__pycache__", "node_modules", "site-packages", "dist-packages"}
_COMPRESSED = {".gz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".tgz", ".lz4"}
_PROBE = 1 << 13


class CorpusError(ValueError):
    """The text asked for is missing, malformed or too small; the message says what to do."""


class Document(NamedTuple):
    """One document: its split, a name unique in the corpus, its bytes, the part of the source
    read once it is done (0 to 1)."""

    split: Split
    name: str
    data: bytes
    done: float


@dataclass(frozen=True)
class TextFile:
    """A file of a corpus: its name relative to the corpus, and what it holds."""

    path: Path
    name: str
    kind: Literal["text", "jsonl", "parquet"]
    size: int
    mtime_ns: int


def split_of(name: str) -> Split:
    """The split of a document, from its name alone: 96 % train, 2 % valid, 2 % test."""
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    return "train" if place < HASHED[0] else "valid" if place < HASHED[1] else "test"


@dataclass(frozen=True)
class Corpus:
    """Documents of bytes behind one path, read anew on each pass, never all in memory.

    Splits: files of a folder and records of JSONL or Parquet are drawn by `split_of(name)`. A
    single text file, and the files of a folder with fewer than 50, are each cut inside: the first
    90 % trains, 5 % validates, 5 % tests, cut at line ends. Text beyond 4 MiB is several
    documents. Empty documents and copies of an earlier file are left out.
    """

    source: str
    files: tuple[TextFile, ...]
    text_field: str = "text"

    @cached_property
    def fingerprint(self) -> str:
        """A short hash that changes when any file's name, size or time does."""
        facts = [RULES, HASHED, CUT, FEW_FILES, BLOCK, self.text_field]
        facts += [(f.name, f.kind, f.size, f.mtime_ns) for f in self.files]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:20]

    @property
    def n_bytes(self) -> int:
        """The size of all files on disk, copies included."""
        return sum(f.size for f in self.files)

    @cached_property
    def cut_inside(self) -> bool:
        """Whether text files are split inside rather than by file."""
        return sum(f.kind == "text" for f in self.files) < FEW_FILES

    def documents(self, split: Split | Literal["all"]) -> Iterator[tuple[str, bytes]]:
        """The (name, bytes) of each document of a split, always in the same order."""
        if split != "all" and split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; use train, valid, test or all")
        wanted: tuple[Split, ...] = SPLITS if split == "all" else (split,)
        return ((d.name, d.data) for d in self.read(wanted))

    def read(self, splits: Iterable[Split] = SPLITS) -> Iterator[Document]:
        """Every document of `splits`, in one pass over the files.

        Raises: CorpusError where a file is malformed, with the place.
        """
        wanted, total, before = set(splits), max(1, self.n_bytes), 0
        for file in self.files:
            if file not in self._copies:
                for d in _read_file(file, self.text_field, self.cut_inside, wanted):
                    done = (before + d.done * file.size) / total
                    yield d._replace(done=done)
            before += file.size

    def sample(self, max_bytes: int) -> Iterator[bytes]:
        """Up to about `max_bytes` of the training split, always the same documents.

        Files are visited in the order of their hashes, and none gives more than its share plus
        1 MiB, so that a few large files cannot be all of it.
        """
        by_hash = sorted(self.files, key=lambda f: hashlib.sha256(f.name.encode()).digest())
        by_hash = [f for f in by_hash if f not in self._copies]
        share = max_bytes // max(1, len(by_hash)) + (1 << 20)
        left = max_bytes
        for file in by_hash:
            quota = min(left, share)
            for d in _read_file(file, self.text_field, self.cut_inside, {"train"}):
                if quota <= 0:
                    break
                data = d.data[:quota]
                quota -= len(data)
                left -= len(data)
                yield data
            if left <= 0:
                return

    @cached_property
    def _copies(self) -> frozenset[TextFile]:
        """Text files with the same bytes as an earlier one; only equal sizes are compared."""
        sizes = Counter(f.size for f in self.files if f.kind == "text")
        seen: set[bytes] = set()
        copies = []
        for file in self.files:
            if file.kind == "text" and sizes[file.size] > 1:
                with open(file.path, "rb") as f:
                    digest = hashlib.file_digest(f, "sha256").digest()
                if digest in seen:
                    copies.append(file)
                seen.add(digest)
        return frozenset(copies)


def open_corpus(path: str | Path | None = None, text_field: str = "text") -> Corpus:
    """The corpus at `path`, or the standard library of the running interpreter.

    path: None (the .py files of Python's own standard library, without site-packages: about
    30 MB); a text file; a .jsonl/.ndjson or .parquet file, whose `text_field` holds the text; or
    a folder of any of these (hidden files and binary files are passed over; beside JSONL or
    Parquet files, so are text files: they describe the data).
    Raises: CorpusError if there is nothing to read.
    """
    if path is None:
        root = Path(sysconfig.get_path("stdlib"))
        files = _walk(root, text_field, only=".py")
        if not files:
            raise CorpusError(
                f"this Python has no standard library source under {root}; "
                "give text of your own with --data.path"
            )
        return Corpus("the Python standard library", tuple(files), text_field)
    root = Path(path).expanduser()
    if root.is_dir():
        files = _walk(root, text_field)
        if not files:
            raise CorpusError(
                f"{root} holds no text: looked for text files, .jsonl and .parquet, with "
                "subfolders, passing over hidden and binary files"
            )
        return Corpus(str(root), tuple(files), text_field)
    if not root.exists():
        raise CorpusError(f"there is no file or folder {root}; check --data.path")
    file = _describe(root, root.name)
    if file is None:
        raise CorpusError(_why_not(root))
    _check_field(file, text_field)
    return Corpus(str(root), (file,), text_field)


def _why_not(path: Path) -> str:
    if path.stat().st_size == 0:
        return f"{path} is empty"
    if path.suffix.lower() in _COMPRESSED:
        return f"{path} is compressed; unpack it first"
    return (
        f"{path} looks like a binary file (it has zero bytes); convert it to UTF-8 text, JSONL or "
        "Parquet"
    )


def _walk(root: Path, text_field: str, only: str = "") -> list[TextFile]:
    """All readable files under `root` by name; hidden ones, caches and installed packages not."""
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(
            s for s in subfolders if not s.startswith(".") and s not in _SKIPPED_FOLDERS
        )
        for name in names:
            path = Path(folder, name)
            if name.endswith(only) and not name.startswith(".") and path.is_file():
                file = _describe(path, path.relative_to(root).as_posix())
                if file is not None:
                    files.append(file)
    records = [f for f in files if f.kind != "text"]
    files = sorted(records or files, key=lambda f: f.name)
    for file in files:
        _check_field(file, text_field)
    return files


def _describe(path: Path, name: str) -> TextFile | None:
    """What `path` holds, or None if it is empty, compressed or binary."""
    stat = path.stat()
    suffix = path.suffix.lower()
    if stat.st_size == 0 or suffix in _COMPRESSED:
        return None
    if suffix == ".parquet":
        kind = "parquet"
    else:
        kind = "jsonl" if suffix in (".jsonl", ".ndjson") else "text"
        with open(path, "rb") as f:
            if b"\0" in f.read(_PROBE):
                return None
    return TextFile(path, name, kind, stat.st_size, stat.st_mtime_ns)


def _read_file(
    file: TextFile, field: str, cut_inside: bool, wanted: set[Split]
) -> Iterator[Document]:
    if file.kind == "text":
        return _read_text(file, cut_inside, wanted)
    return (
        _read_jsonl(file, field, wanted)
        if file.kind == "jsonl"
        else _read_parquet(file, field, wanted)
    )


def _read_text(file: TextFile, cut_inside: bool, wanted: set[Split]) -> Iterator[Document]:
    if not cut_inside and split_of(file.name) not in wanted:
        return
    with open(file.path, "rb") as f:
        ranges: Sequence[tuple[Split, int, int]]
        if cut_inside:
            a, b = (_line_end(f, int(file.size * part), file.size) for part in CUT)
            ranges = (("train", 0, a), ("valid", a, b), ("test", b, file.size))
        else:
            ranges = ((split_of(file.name), 0, file.size),)
        for split, start, end in ranges:
            part = 0
            while split in wanted and start < end:
                stop = end
                if end - start > BLOCK:
                    stop = _line_end(f, start + BLOCK, end)
                f.seek(start)
                data = f.read(stop - start)
                name = f"{file.name}:{split}:{part}" if cut_inside or part else file.name
                yield Document(split, name, data, stop / file.size)
                start, part = stop, part + 1


def _line_end(f: BinaryIO, place: int, size: int) -> int:
    """The first line start at or after `place`, else the first character start, within reach."""
    f.seek(place)
    near = f.read(min(max(size // 50, 16), 1 << 16))
    newline = near.find(b"\n")
    if newline >= 0:
        return min(place + newline + 1, size)
    # No line ends here: only keep a UTF-8 character (at most 4 bytes) whole.
    inside = 0
    while inside < min(3, len(near)) and near[inside] & 0xC0 == 0x80:
        inside += 1
    return min(place + inside, size)


def _read_jsonl(file: TextFile, field: str, wanted: set[Split]) -> Iterator[Document]:
    at = 0
    with open(file.path, "rb") as f:
        for number, line in enumerate(f, 1):
            at += len(line)
            name = f"{file.name}:{number}"
            split = split_of(name)
            if split in wanted and line.strip():
                text = _record_text(file, number, line, field)
                # A lone surrogate, which JSON can spell and UTF-8 cannot, keeps its three bytes.
                data = text.encode("utf-8", "surrogatepass")
                if data:
                    yield Document(split, name, data, at / file.size)


def _record_text(file: TextFile, number: int, line: bytes, field: str) -> str:
    where = f"{file.path}, line {number}"
    try:
        record = json.loads(line)
    except ValueError as error:
        raise CorpusError(f"{where}: not valid JSON ({error}); one object a line is due") from error
    if not isinstance(record, dict):
        raise CorpusError(f"{where}: expected an object, found {type(record).__name__}")
    if field not in record:
        raise CorpusError(
            f"{where}: no field {field!r}; there is {', '.join(map(repr, record)) or 'none'}: "
            "name the one with the text with --data.text_field"
        )
    text = record[field]
    if text is not None and not isinstance(text, str):
        raise CorpusError(f"{where}: field {field!r} holds {type(text).__name__}, not text")
    return text or ""


def _parquet(path: Path):
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ImportError("reading Parquet needs pyarrow: pip install 'longscan[train]'") from error
    try:
        return parquet.ParquetFile(path)
    except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise CorpusError(f"{path} cannot be read as Parquet: {error}") from error


def _check_field(file: TextFile, field: str) -> None:
    """See early that the text column is there; JSONL is seen by its first record."""
    if file.kind == "jsonl":
        with open(file.path, "rb") as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    _record_text(file, number, line, field)
                    return
    elif file.kind == "parquet":
        with _parquet(file.path) as parquet:
            schema = parquet.schema_arrow
        columns = dict(zip(schema.names, map(str, schema.types), strict=True))
        if field not in columns:
            raise CorpusError(
                f"{file.path}: no column {field!r}; there is {', '.join(map(repr, columns))}: "
                "name the one with the text with --data.text_field"
            )
        if not any(kind in columns[field] for kind in ("string", "utf8", "binary")):
            raise CorpusError(f"{file.path}: column {field!r} holds {columns[field]}, not text")


def _read_parquet(file: TextFile, field: str, wanted: set[Split]) -> Iterator[Document]:
    with _parquet(file.path) as parquet:
        total, row = parquet.metadata.num_rows, 0
        for batch in parquet.iter_batches(batch_size=256, columns=[field]):
            for value in batch.column(0).to_pylist():
                name = f"{file.name}:{row}"
                row += 1
                split = split_of(name)
                if split in wanted and value:
                    data = value.encode() if isinstance(value, str) else value
                    yield Document(split, name, data, row / total)
