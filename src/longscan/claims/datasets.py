"""Real data that some claims need, read from a folder given by --data."""

from __future__ import annotations

import gzip
import json
import lzma
import re
import wave
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

MNIST = (
    "the MNIST files: train-images-idx3-ubyte, train-labels-idx1-ubyte and the two t10k files, "
    "as they are or with .gz"
)
SPEECH = (
    "the Free Spoken Digit Dataset: recordings/0_george_0.wav and so on "
    "(github.com/Jakobovski/free-spoken-digit-dataset)"
)
REVIEWS = (
    "the movie reviews (sentiment polarity v2.0): pos/cv000_29590.txt and so on "
    "(cs.cornell.edu/people/pabo/movie-review-data)"
)


@dataclass(frozen=True)
class Split:
    """Examples and their labels [n] int64; lengths [n] where examples are padded."""

    x: Tensor
    label: Tensor
    lengths: Tensor | None = None


def mnist(folder: Path | None) -> tuple[Split, Split]:
    """Training and test digits, images [n, 28, 28] uint8.

    The folder holds the four IDX files of the original distribution, plain or gzipped, or
    train_images.u8.xz, train_labels.npy, test_images.u8.xz, test_labels.npy.
    Raises: ValueError if it holds neither, or files of other sizes.
    """
    folder = _existing(folder, MNIST, "mnist")
    if (folder / "train_images.u8.xz").is_file():
        return _compact_mnist(folder, "train"), _compact_mnist(folder, "test")
    return _idx_mnist(folder, "train"), _idx_mnist(folder, "t10k")


def _compact_mnist(folder: Path, name: str) -> Split:
    raw = _unpacked(folder / f"{name}_images.u8.xz")
    label = np.load(folder / f"{name}_labels.npy").astype(np.int64)
    return _digits(np.frombuffer(raw, np.uint8), label, folder)


def _idx_mnist(folder: Path, name: str) -> Split:
    images, labels = (
        _read(folder / f"{name}-{part}-ubyte") for part in ("images-idx3", "labels-idx1")
    )
    return _digits(
        np.frombuffer(images, np.uint8, offset=16),
        np.frombuffer(labels, np.uint8, offset=8).astype(np.int64),
        folder,
    )


def _digits(pixels: np.ndarray, label: np.ndarray, folder: Path) -> Split:
    if pixels.size != 784 * label.size:
        raise ValueError(
            f"{folder}: {pixels.size} pixels do not fit {label.size} labels of 28 x 28 images; "
            "a file may be cut short"
        )
    return Split(torch.from_numpy(pixels.copy()).view(-1, 28, 28), torch.from_numpy(label))


def _read(path: Path) -> bytes:
    packed = path.with_name(path.name + ".gz")
    if path.is_file():
        return path.read_bytes()
    if packed.is_file():
        return gzip.decompress(packed.read_bytes())
    raise ValueError(f"there is no {path} or {packed.name}; --data must hold {MNIST}")


def _unpacked(path: Path) -> bytes:
    return lzma.decompress(path.read_bytes())


def _existing(folder: Path | None, what: str, name: str) -> Path:
    if folder is None:
        raise ValueError(f"give --data FOLDER with {what}")
    inner = folder / name
    return inner if inner.is_dir() else folder


def spoken_digits(folder: Path | None, longest: int = 8192) -> tuple[Split, Split]:
    """Training and test recordings at 8 kHz, [n, longest] float32 in [-1, 1], cut or zero-padded.

    The folder holds recordings/DIGIT_SPEAKER_TAKE.wav (takes 0 to 4 are the test set, as its
    authors split it), or train_pcm16.xz, train_index.npz, test_pcm16.xz, test_index.npz.
    Raises: ValueError if it holds neither.
    """
    folder = _existing(folder, SPEECH, "spoken_digits")
    if (folder / "train_index.npz").is_file():
        return tuple(_compact_speech(folder, name, longest) for name in ("train", "test"))  # type: ignore[return-value]
    files = sorted((folder / "recordings").glob("*_*_*.wav")) or sorted(folder.glob("*_*_*.wav"))
    if not files:
        raise ValueError(f"{folder} has no recordings; --data must hold {SPEECH}")
    parts: tuple[list[tuple[np.ndarray, int]], ...] = ([], [])
    for file in files:
        match = re.fullmatch(r"(\d)_\w+_(\d+)", file.stem)
        if match is None:
            raise ValueError(f"{file.name} is not named DIGIT_SPEAKER_TAKE.wav")
        parts[int(match[2]) < 5].append((_samples(file), int(match[1])))
    return tuple(  # type: ignore[return-value]
        _padded([s for s, _ in part], np.array([d for _, d in part]), longest) for part in parts
    )


def _samples(file: Path) -> np.ndarray:
    with wave.open(str(file)) as sound:
        if (sound.getnchannels(), sound.getsampwidth(), sound.getframerate()) != (1, 2, 8000):
            raise ValueError(f"{file.name} must be mono, 16 bit, 8 kHz")
        return np.frombuffer(sound.readframes(sound.getnframes()), "<i2")


def _compact_speech(folder: Path, name: str, longest: int) -> Split:
    index = np.load(folder / f"{name}_index.npz")
    raw = np.frombuffer(_unpacked(folder / f"{name}_pcm16.xz"), "<i2")
    clips = np.split(raw, np.cumsum(index["length"])[:-1])
    return _padded(clips, index["label"], longest)


def _padded(clips: list[np.ndarray], label: np.ndarray, longest: int) -> Split:
    x = np.zeros((len(clips), longest), np.float32)
    for row, clip in zip(x, clips, strict=True):
        row[: clip.size] = clip[:longest] / 32768
    lengths = torch.tensor([min(clip.size, longest) for clip in clips])
    return Split(torch.from_numpy(x), torch.from_numpy(label.astype(np.int64)), lengths)


def movie_reviews(folder: Path | None, longest: int = 4096) -> tuple[Split, Split]:
    """Training and test reviews as bytes, x [n, longest] uint8, cut or zero-padded; 1: positive.

    The folder holds pos/cv000_29416.txt, neg/... (files 900 to 999 of each are the test set, the
    last of the ten published folds), or train.jsonl.xz and test.jsonl.xz.
    Raises: ValueError if it holds neither.
    """
    folder = _existing(folder, REVIEWS, "movie_reviews")
    if (folder / "train.jsonl.xz").is_file():
        parts = []
        for name in ("train", "test"):
            lines = _unpacked(folder / f"{name}.jsonl.xz").decode().splitlines()
            parts.append([(r["text"].encode(), int(r["label"])) for r in map(json.loads, lines)])
    else:
        files = sorted((folder / "pos").glob("cv*.txt")) + sorted((folder / "neg").glob("cv*.txt"))
        if not files:
            raise ValueError(f"{folder} has no reviews; --data must hold {REVIEWS}")
        parts = [[], []]
        for file in files:
            # Folds 0 to 7 train, as in the compact form; the fold between is for choosing.
            fold = int(file.name[2:5]) // 100
            if fold != 8:
                parts[fold == 9].append((file.read_bytes(), int(file.parent.name == "pos")))
    return tuple(_padded_bytes(part, longest) for part in parts)  # type: ignore[return-value]


def _padded_bytes(texts: list[tuple[bytes, int]], longest: int) -> Split:
    x = np.zeros((len(texts), longest), np.uint8)
    for row, (text, _) in zip(x, texts, strict=True):
        cut = np.frombuffer(text[:longest], np.uint8)
        row[: cut.size] = cut
    lengths = torch.tensor([min(len(text), longest) for text, _ in texts])
    return Split(torch.from_numpy(x), torch.tensor([label for _, label in texts]), lengths)
