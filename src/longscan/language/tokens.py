"""Token files: a corpus encoded once, memory-mapped ever after, in memory never whole."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import sys
import time
import uuid
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np

from longscan.io import SaveError
from longscan.language.corpus import SPLITS, Corpus, Split
from longscan.language.tokenizer import BPETokenizer, Tokenizer, load_tokenizer, recipe

FORMAT = 1
_A_DAY = 86400.0


def default_cache() -> Path:
    """Where tokenizers and token files are kept: longscan/ in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "longscan"


class TokenFile:
    """The tokens of one split on disk, memory-mapped.

    The file is: eod, document 0, eod, document 1, eod, ..., eod. So each document has an eod
    before it, from which its first token is predicted, and an eod after it, its last target.
    len() counts all tokens, slices give them raw (uint16 or uint32).

    offsets: int64 [n_documents + 1], the place of the eod before each document, and of the last.
    byte_counts: int64 [n_documents], the bytes of each document's text.
    Raises: FileNotFoundError if there is none; ValueError if it is damaged.
    """

    def __init__(self, folder: str | Path, split: Split) -> None:
        self.folder, self.split = Path(folder), split
        try:
            meta = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{self.folder} holds no token files") from error
        if meta.get("format") != FORMAT:
            raise ValueError(
                f"{self.folder} has format {meta.get('format')}, this version reads {FORMAT}; "
                "delete the folder, it will be made again"
            )
        counts = meta["splits"][split]
        self.n_documents: int = counts["n_documents"]
        self.n_bytes: int = counts["n_bytes"]
        self.eod: int = meta["eod"]
        self.vocab_size: int = meta["vocab_size"]
        self._n_tokens: int = counts["n_tokens"]
        self._dtype = np.dtype(meta["dtype"])

    def __len__(self) -> int:
        return self._n_tokens

    def __getitem__(self, part: slice) -> np.ndarray:
        return self.tokens[part]

    @cached_property
    def tokens(self) -> np.ndarray:
        """All tokens, mapped."""
        return self._map("tokens", self._dtype, self._n_tokens)

    @cached_property
    def offsets(self) -> np.ndarray:
        """Where each document starts (its eod), and where the last ends, mapped."""
        return self._map("offsets", np.dtype("<i8"), self.n_documents + 1)

    @cached_property
    def byte_counts(self) -> np.ndarray:
        """The bytes of each document, mapped."""
        return self._map("bytes", np.dtype("<i8"), self.n_documents)

    def document(self, i: int) -> np.ndarray:
        """Document i with the eod before and after it: inputs are [:-1], targets [1:]."""
        if not 0 <= i < self.n_documents:
            raise IndexError(f"document {i} of {self.n_documents} in split {self.split!r}")
        return self.tokens[int(self.offsets[i]) : int(self.offsets[i + 1]) + 1]

    def __reduce__(self):
        # A worker process maps the file itself: pickling a map would copy the whole corpus.
        return TokenFile, (self.folder, self.split)

    def _map(self, what: str, dtype: np.dtype, n: int) -> np.ndarray:
        path = self.folder / f"{self.split}.{what}"
        size = path.stat().st_size if path.exists() else -1
        if size != n * dtype.itemsize:
            raise ValueError(
                f"{path} is damaged ({size} bytes, {n * dtype.itemsize} expected); delete the "
                f"folder {self.folder}, it will be made again"
            )
        return np.memmap(path, dtype, "r") if n else np.zeros(0, dtype)


class TokenWriter:
    """Writes the token files of all splits document by document; whole when closed, or absent.

    Used as a context: leaving it normally renames the finished folder into place, leaving it by
    an error removes it.
    Raises: SaveError if the disk is full or cannot be written.
    """

    def __init__(self, folder: str | Path, vocab_size: int, eod: int) -> None:
        self.folder = Path(folder)
        self.vocab_size, self.eod = vocab_size, eod
        self.dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        # Two hosts that share a disk may have processes of the same number.
        own = f"{os.getpid()}.{uuid.uuid4().hex[:8]}"
        self._temporary = self.folder.with_name(f".{self.folder.name}.{own}.tmp")
        self._files: dict[tuple[Split, str], BinaryIO] = {}
        self._counts = {s: {"n_tokens": 0, "n_documents": 0, "n_bytes": 0} for s in SPLITS}

    def __enter__(self) -> TokenWriter:
        try:
            self._open()
        except OSError as error:
            self._discard()
            raise self._save_error(error) from error
        return self

    def add(self, split: Split, ids: np.ndarray, n_bytes: int) -> None:
        """Append a document, its ids without eod."""
        try:
            self._append(split, ids, n_bytes)
        except OSError as error:
            raise self._save_error(error) from error

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if error is None:
                self._finish()
        except OSError as full:
            raise self._save_error(full) from full
        finally:
            self._discard()

    def _discard(self) -> None:
        for f in self._files.values():
            with contextlib.suppress(OSError):  # a full disk also fails the last flush
                f.close()
        shutil.rmtree(self._temporary, ignore_errors=True)

    def _open(self) -> None:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        # What a killed run left behind; a live one writes to its files far more often.
        for old in self.folder.parent.glob(".*.tmp"):
            written = max((f.stat().st_mtime for f in old.iterdir()), default=0.0)
            if time.time() - written > _A_DAY:
                shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary.mkdir()
        for split in SPLITS:
            for what in ("tokens", "offsets", "bytes"):
                path = self._temporary / f"{split}.{what}"
                self._files[split, what] = open(path, "wb")  # noqa: SIM115 (closed in __exit__)
            self._write_tokens(split, np.array([self.eod]))

    def _append(self, split: Split, ids: np.ndarray, n_bytes: int) -> None:
        counts = self._counts[split]
        self._files[split, "offsets"].write(np.array(counts["n_tokens"] - 1, "<i8").tobytes())
        self._files[split, "bytes"].write(np.array(n_bytes, "<i8").tobytes())
        self._write_tokens(split, np.append(ids, self.eod))
        counts["n_documents"] += 1
        counts["n_bytes"] += n_bytes

    def _write_tokens(self, split: Split, ids: np.ndarray) -> None:
        self._files[split, "tokens"].write(ids.astype(self.dtype).tobytes())
        self._counts[split]["n_tokens"] += len(ids)

    def _finish(self) -> None:
        for split in SPLITS:
            last = self._counts[split]["n_tokens"] - 1
            self._files[split, "offsets"].write(np.array(last, "<i8").tobytes())
        meta = {
            "format": FORMAT,
            "dtype": self.dtype.str,
            "vocab_size": self.vocab_size,
            "eod": self.eod,
            "splits": self._counts,
        }
        (self._temporary / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
        for f in self._files.values():
            f.flush()
            os.fsync(f.fileno())
            f.close()
        try:
            os.replace(self._temporary, self.folder)
        except OSError:
            # Another process finished the same folder first: theirs holds the same tokens.
            if not (self.folder / "meta.json").exists():
                raise

    def _save_error(self, error: OSError) -> SaveError:
        full = error.errno == errno.ENOSPC
        hint = "free some space or choose another" if full else "check its permissions or choose"
        return SaveError(
            f"could not write tokens to {self.folder.parent}: {error}; {hint} folder with "
            "--data.cache_dir"
        )


def encode_corpus(
    corpus: Corpus, tokenizer: Tokenizer, cache: str | Path, quiet: bool = False
) -> Path:
    """The folder with the corpus's token files, encoded now or found in the cache.

    One pass, one document in memory at a time. The folder's name holds the fingerprints of
    corpus and tokenizer, so a change of either encodes anew.
    """
    name = f"{corpus.fingerprint}-{tokenizer.fingerprint}-{FORMAT}"
    folder = Path(cache) / "tokens" / name
    if (folder / "meta.json").exists():
        return folder
    progress = Progress(f"encoding {corpus.source}", quiet)
    with TokenWriter(folder, tokenizer.vocab_size, tokenizer.eod) as writer:
        for document in corpus.read():
            ids = tokenizer.encode_array(document.data)
            writer.add(document.split, ids, len(document.data))
            progress.update(document.done)
    progress.close()
    return folder


def train_bpe(
    corpus: Corpus, vocab_size: int, cache: str | Path, sample_bytes: int = 16 << 20
) -> BPETokenizer:
    """A BPE tokenizer learned on the training split, now or found in the cache.

    sample_bytes: how much text the merges are learned from (see `Corpus.sample`).
    """
    name = f"{corpus.fingerprint}-{vocab_size}-{sample_bytes}-{recipe()}.json"
    path = Path(cache) / "tokenizers" / name
    if path.exists():
        found = load_tokenizer(path)
        assert isinstance(found, BPETokenizer)
        return found
    trained = BPETokenizer.train(corpus.sample(sample_bytes), vocab_size)
    trained.save(path)
    return trained


class Progress:
    """One line on stderr, `label  42 %  1:05 left`, once work has lasted two seconds.

    On a terminal the line is rewritten; elsewhere a new one is printed each half minute.
    """

    def __init__(self, label: str, quiet: bool = False) -> None:
        self.label, self.quiet = label, quiet
        self._terminal = sys.stderr.isatty()
        self._start = time.monotonic()
        self._next = self._start + (2.0 if self._terminal else 30.0)
        self._shown = False

    def update(self, done: float) -> None:
        """Say that the part `done` (0 to 1) of the work is over."""
        now = time.monotonic()
        if self.quiet or now < self._next or done <= 0:
            return
        self._next = now + (0.5 if self._terminal else 30.0)
        left = int((now - self._start) * (1 - done) / done)
        line = f"{self.label}  {done:4.0%}  {left // 60}:{left % 60:02d} left"
        print(f"\r{line}  " if self._terminal else line, end="", file=sys.stderr, flush=True)
        if not self._terminal:
            print(file=sys.stderr)
        self._shown = True

    def close(self) -> None:
        """End the line."""
        if self._shown:
            took = int(time.monotonic() - self._start)
            start = "\r" if self._terminal else ""
            print(f"{start}{self.label}  done in {took // 60}:{took % 60:02d}  ", file=sys.stderr)
