"""Tokenizers: bytes, and byte-level BPE; both give back every byte they were given."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from longscan.io import save_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer as HFTokenizer

END_OF_DOCUMENT = "<|endoftext|>"
Ids = Sequence[int] | np.ndarray

# Names of the end-of-document token in published tokenizers, tried in this order.
_KNOWN_ENDS = (END_OF_DOCUMENT, "<|end_of_text|>", "<|eos|>", "</s>", "<eos>", "<|eod|>", "[EOS]")
_BYTES_FORMAT = "longscan bytes 1"
_BYTES_FILE = {"format": _BYTES_FORMAT, "vocab_size": 257, "end_of_document": 256}
_MAX_CACHED_WORDS = 1 << 18
_PIECE = 1 << 18  # characters encoded at a time, which bounds memory


class Tokenizer(Protocol):
    """What both tokenizers can do. Ids of text never include `eod`; callers place it.

    eod: the id that starts and ends a document; it stands for no bytes.
    """

    vocab_size: int
    eod: int

    def encode(self, text: str | bytes) -> list[int]: ...
    def encode_array(self, text: str | bytes) -> np.ndarray: ...
    def decode(self, ids: Ids) -> str: ...
    def decode_bytes(self, ids: Ids) -> bytes: ...
    def n_bytes(self, ids: Ids) -> int: ...
    def save(self, path: str | Path) -> None: ...
    @property
    def fingerprint(self) -> str: ...


class ByteTokenizer:
    """One token a byte: ids 0 to 255 are the bytes, 256 is the end of a document."""

    vocab_size = 257
    eod = 256
    fingerprint = "bytes"

    def encode(self, text: str | bytes) -> list[int]:
        """The bytes of `text` (UTF-8) as ids."""
        return list(_as_bytes(text))

    def encode_array(self, text: str | bytes) -> np.ndarray:
        """`encode`, as an integer array."""
        return np.frombuffer(_as_bytes(text), np.uint8)

    def decode_bytes(self, ids: Ids) -> bytes:
        """The bytes of `ids`; ids above 255 stand for none."""
        a = _as_array(ids)
        return a[(a >= 0) & (a < 256)].astype(np.uint8).tobytes()

    def decode(self, ids: Ids) -> str:
        """The text of `ids`, with U+FFFD for bytes that are not UTF-8."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def n_bytes(self, ids: Ids) -> int:
        """How many bytes `ids` stand for."""
        a = _as_array(ids)
        return int(((a >= 0) & (a < 256)).sum())

    def save(self, path: str | Path) -> None:
        """Write a tokenizer.json that `load_tokenizer` reads."""
        save_text(json.dumps(_BYTES_FILE), path)


class BPETokenizer:
    """Byte-level BPE (byte pair encoding over the 256 bytes), kept in the `tokenizers` format.

    Encoding is lossless on any bytes, also where they are not UTF-8, unless a loaded
    tokenizer.json itself normalises text. Special tokens spelt out in text are plain text.
    backend: the `tokenizers.Tokenizer`; end: the end-of-document token's name (looked for among
    the usual names if None).
    Raises: ValueError if the tokenizer is not byte-level BPE, or has no such token.
    """

    def __init__(self, backend: HFTokenizer, end: str | None = None) -> None:
        spec = json.loads(backend.to_str())
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.end, self.eod = _find_end(spec, end)
        self._bytes_of = _byte_table(backend, spec)
        self.vocab_size = len(self._bytes_of)
        vocab = backend.get_vocab(with_added_tokens=True)
        self._id_of_byte = [vocab[c] for c in _CHAR_OF_BYTE]
        self._lengths = np.array([len(b) for b in self._bytes_of], np.int64)
        # The words of our own pattern are found by Python's re and each is encoded once: 5x
        # faster than backend.encode. Other patterns take backend.encode.
        self._ours = spec["pre_tokenizer"] == json.loads(_own_backend().to_str())["pre_tokenizer"]
        self._ours &= spec["normalizer"] is None
        self._words: dict[str, bytes] = {}  # the ids of each word met, as uint32
        self._check_lossless()

    @property
    def fingerprint(self) -> str:
        """A short hash of everything that decides the ids."""
        facts = f"{self.eod} {self.backend.to_str()}"
        return hashlib.sha256(facts.encode()).hexdigest()[:20]

    @classmethod
    def train(cls, texts: Iterable[bytes], vocab_size: int = 4096) -> BPETokenizer:
        """Learn the merges from `texts`; the same texts always give the same tokenizer.

        vocab_size: with the 256 bytes and the end-of-document token; fewer where the text has
        no more pairs to merge.
        Raises: ValueError if vocab_size leaves no room for the bytes.
        """
        if vocab_size < 257:
            raise ValueError(
                f"vocab_size {vocab_size} is below 257 (256 bytes and the end of a document); "
                "for bytes alone use the tokenizer 'byte'"
            )
        tokenizers = _tokenizers()
        backend = _own_backend()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_DOCUMENT],
            initial_alphabet=sorted(_CHAR_OF_BYTE),
            show_progress=False,
        )
        backend.train_from_iterator((t.decode("utf-8", "ignore") for t in texts), trainer)
        return cls(backend, END_OF_DOCUMENT)

    def encode(self, text: str | bytes) -> list[int]:
        """The ids of `text`, without the end of document."""
        return self.encode_array(text).tolist()

    def encode_array(self, text: str | bytes) -> np.ndarray:
        """`encode`, as an integer array."""
        # A byte that is not UTF-8 becomes a lone surrogate, and back again per word.
        text = _as_bytes(text).decode("utf-8", "surrogateescape")
        encode = self._encode_words if self._ours else self._encode_foreign
        return np.frombuffer(b"".join([encode(piece) for piece in _pieces(text)]), np.uint32)

    def decode_bytes(self, ids: Ids) -> bytes:
        """The bytes of `ids`; special tokens, and ids beyond the vocabulary, stand for none."""
        table, n = self._bytes_of, self.vocab_size
        return b"".join([table[i] for i in _as_array(ids).tolist() if 0 <= i < n])

    def decode(self, ids: Ids) -> str:
        """The text of `ids`, with U+FFFD for bytes that are not UTF-8."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def n_bytes(self, ids: Ids) -> int:
        """How many bytes `ids` stand for, exactly."""
        a = _as_array(ids)
        return int(self._lengths[a[(a >= 0) & (a < self.vocab_size)]].sum())

    def save(self, path: str | Path) -> None:
        """Write tokenizer.json, which `load_tokenizer` and the `tokenizers` library read."""
        save_text(self.backend.to_str(), path)

    def _encode_words(self, piece: str) -> bytes:
        words = _WORDS.findall(piece)
        if len(self._words) > _MAX_CACHED_WORDS:
            self._words.clear()
        known, tokenize = self._words, self.backend.model.tokenize
        for word in set(words).difference(known):
            data = word.encode("utf-8", "surrogateescape")
            tokens = tokenize("".join([_CHAR_OF_BYTE[b] for b in data]))
            known[word] = np.array([t.id for t in tokens], np.uint32).tobytes()
        return b"".join([known[word] for word in words])

    def _encode_foreign(self, piece: str) -> bytes:
        ids: list[int] = []
        for i, part in enumerate(_ESCAPED.split(piece)):
            if i % 2:  # bytes that are not UTF-8
                ids += [self._id_of_byte[ord(c) - 0xDC00] for c in part]
            elif part:
                ids += self.backend.encode(part, add_special_tokens=False).ids
        return np.array(ids, np.uint32).tobytes()

    def __reduce__(self):
        return _restore, (self.backend.to_str(), self.end)

    def _check_lossless(self) -> None:
        probe = "def f(x):\n\treturn  'é 語 🙂'\r\n\n  # A_b 1234 <|x|>  \n"
        if self.decode_bytes(self.encode_array(probe)) != probe.encode():
            raise ValueError(
                "this tokenizer changes text (its normaliser or pre-tokeniser drops or adds "
                "characters), so bits per byte would be wrong; give a byte-level BPE "
                "tokenizer.json that keeps text as it is, or use the tokenizer 'bpe'"
            )


def load_tokenizer(path: str | Path, end: str | None = None) -> ByteTokenizer | BPETokenizer:
    """The tokenizer saved in a tokenizer.json, ours or a published byte-level BPE.

    path: the file, or its folder. end: the end-of-document token's name, else the "eos_token" of
    a tokenizer_config.json beside it, else the usual names.
    Raises: FileNotFoundError, or ValueError if it is not a tokenizer that can be used here.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no tokenizer file {path}; give a tokenizer.json, 'byte' or 'bpe'"
        )
    text = path.read_text(encoding="utf-8")
    try:
        spec = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if isinstance(spec, dict) and spec.get("format") == _BYTES_FORMAT:
        return ByteTokenizer()
    config = path.with_name("tokenizer_config.json")
    if end is None and config.is_file():
        end = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
        end = end.get("content") if isinstance(end, dict) else end
    try:
        backend = _tokenizers().Tokenizer.from_str(text)
    except ImportError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path} is not a tokenizer.json: {error}") from error
    try:
        return BPETokenizer(backend, end)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _as_bytes(text: str | bytes) -> bytes:
    # A lone surrogate is not UTF-8; "surrogatepass" keeps it, as three bytes that stay exact.
    return text.encode("utf-8", "surrogatepass") if isinstance(text, str) else bytes(text)


def _as_array(ids: Ids) -> np.ndarray:
    return np.asarray(ids, np.int64).reshape(-1)


def _tokenizers() -> Any:
    # Without this the library warns on every fork, and data loading workers are forks (they
    # never tokenise).
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            "BPE tokens need the tokenizers library: pip install 'longscan[train]' "
            "(the tokenizer 'byte' needs nothing)"
        ) from error
    return tokenizers


# --- words: what merges never cross ---------------------------------------------------------
# Classes are spelt as ranges, not as Unicode properties, so that Python's re and the library's
# Oniguruma find the very same words. Letters are bounded, for text written without spaces.
#   a word, with one leading space or sign | up to 3 digits | signs, with a leading space |
#   line ends with the next line's indent | other white space (leaving its last for the word)
_LETTER = r"A-Za-z\u00c0-\u1fff\u2c00-\u2dff\u3040-\ufeff\uff10-\U0010ffff"
_SPACE = r" \t\r\n\f\v"
_PATTERN = (
    rf"[^\r\n0-9{_LETTER}]?[{_LETTER}]{{1,32}}"
    r"|[0-9]{1,3}"
    rf"| ?[^0-9{_SPACE}{_LETTER}]+"
    rf"|[{_SPACE}]*[\r\n]+[ \t]*"
    rf"|[{_SPACE}]+(?![^{_SPACE}])"
    rf"|[{_SPACE}]+"
)
_WORDS = re.compile(_PATTERN)
_ONIGURUMA = re.sub(r"\\[uU]0*([0-9a-f]+)", r"\\x{\1}", _PATTERN)
_ESCAPED = re.compile("([\udc80-\udcff]+)")
# No word of our pattern holds a sign or letter and the white space after it, so text may be cut
# there without any change to the words.
_SAFE_CUT = re.compile(rf"(?<=[^{_SPACE}])[{_SPACE}]")


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        cut = _SAFE_CUT.search(text, start + _PIECE)
        end = cut.start() if cut else len(text)
        yield text[start:end]
        start = end


def _chars_of_bytes() -> list[str]:
    """GPT-2's way to write bytes as visible characters: those that are visible stand for
    themselves, the others are numbered from U+0100."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(b) if b in visible else chr(next(others)) for b in range(256)]


_CHAR_OF_BYTE = _chars_of_bytes()
_BYTE_OF_CHAR = {c: b for b, c in enumerate(_CHAR_OF_BYTE)}


def _own_backend() -> Any:
    tokenizers = _tokenizers()
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(_ONIGURUMA), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    return backend


def recipe() -> str:
    """A short hash of all but the text that decides what `BPETokenizer.train` learns."""
    facts = f"{_tokenizers().__version__} {_own_backend().to_str()} {END_OF_DOCUMENT}"
    return hashlib.sha256(facts.encode()).hexdigest()[:8]


def _restore(text: str, end: str) -> BPETokenizer:
    return BPETokenizer(_tokenizers().Tokenizer.from_str(text), end)


def _find_end(spec: dict, end: str | None) -> tuple[str, int]:
    added = {t["content"]: t["id"] for t in spec["added_tokens"]}
    for name in (end,) if end else _KNOWN_ENDS:
        if name in added:
            return name, added[name]
    known = ", ".join(map(repr, list(added)[:20])) or "none"
    wanted = f"{end!r}" if end else f"none of the usual names ({', '.join(_KNOWN_ENDS)})"
    raise ValueError(f"no end-of-document token: {wanted} is not among its added tokens: {known}")


def _byte_table(backend: HFTokenizer, spec: dict) -> list[bytes]:
    """The bytes of each id; special tokens have none."""
    vocab = backend.get_vocab(with_added_tokens=True)
    missing = [b for b, c in enumerate(_CHAR_OF_BYTE) if c not in vocab]
    if spec["model"]["type"] != "BPE" or missing:
        raise ValueError(
            f"not a byte-level BPE tokenizer (its model is {spec['model']['type']} and lacks "
            f"{len(missing)} of the 256 bytes), so bits per byte would not be exact"
        )
    added = {t["id"]: b"" if t["special"] else t["content"].encode() for t in spec["added_tokens"]}
    table = [b""] * (max(vocab.values()) + 1)
    for token, i in vocab.items():
        try:
            table[i] = added[i] if i in added else bytes([_BYTE_OF_CHAR[c] for c in token])
        except KeyError as error:
            raise ValueError(
                f"not a byte-level BPE tokenizer: token {i} is {token!r}, which spells no bytes"
            ) from error
    return table
