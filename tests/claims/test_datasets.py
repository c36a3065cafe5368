import gzip
import json
import lzma
import wave
from pathlib import Path

import numpy as np
import pytest
import torch

from longscan.claims.datasets import mnist, movie_reviews, spoken_digits

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def write_idx(folder, name, images, labels, pack):
    """The files of the original distribution."""
    head = np.array([2051, len(images), 28, 28], ">i4").tobytes()
    files = {
        f"{name}-images-idx3-ubyte": head + images.tobytes(),
        f"{name}-labels-idx1-ubyte": np.array([2049, len(labels)], ">i4").tobytes()
        + labels.tobytes(),
    }
    for file, data in files.items():
        path = folder / (file + (".gz" if pack else ""))
        path.write_bytes(gzip.compress(data) if pack else data)


@pytest.mark.parametrize("pack", [False, True])
def test_mnist_as_distributed(tmp_path, pack):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (7, 28, 28), np.uint8), np.arange(7, dtype=np.uint8)
    write_idx(tmp_path, "train", images, labels, pack)
    write_idx(tmp_path, "t10k", images[:3], labels[:3], pack)
    train, test = mnist(tmp_path)
    assert np.array_equal(train.x.numpy(), images)
    assert train.label.tolist() == list(range(7))
    assert test.x.shape == (3, 28, 28)


def test_mnist_compact(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, 28, 28), np.uint8)
    (tmp_path / "mnist").mkdir()
    for name in ("train", "test"):
        (tmp_path / "mnist" / f"{name}_images.u8.xz").write_bytes(lzma.compress(images.tobytes()))
        np.save(tmp_path / "mnist" / f"{name}_labels.npy", np.arange(4, dtype=np.uint8))
    train, _ = mnist(tmp_path)
    assert np.array_equal(train.x.numpy(), images)


def test_mnist_refusals(tmp_path):
    with pytest.raises(ValueError, match="give --data"):
        mnist(None)
    with pytest.raises(ValueError, match="train-images-idx3-ubyte"):
        mnist(tmp_path)
    images = np.zeros((2, 28, 28), np.uint8)
    write_idx(tmp_path, "train", images, np.zeros(3, np.uint8), False)
    with pytest.raises(ValueError, match="cut short"):
        mnist(tmp_path)


def write_wav(path, samples, rate=8000):
    with wave.open(str(path), "wb") as sound:
        sound.setparams((1, 2, rate, 0, "NONE", "none"))
        sound.writeframes(np.asarray(samples, "<i2").tobytes())


def test_spoken_digits_as_distributed(tmp_path):
    folder = tmp_path / "recordings"
    folder.mkdir()
    for take in (0, 4, 5, 17):
        for digit in (3, 8):
            write_wav(folder / f"{digit}_ann_{take}.wav", np.arange(take + 2) * 100)
    train, test = spoken_digits(tmp_path, longest=6)
    assert train.label.tolist() == [3, 3, 8, 8]
    assert train.lengths.tolist() == [6, 6, 6, 6]
    assert sorted(test.lengths.tolist()) == [2, 2, 6, 6]
    assert torch.allclose(train.x[0], torch.arange(6) * 100 / 32768)
    assert test.x[test.lengths == 2][:, 2:].abs().max() == 0


def test_spoken_digits_refusals(tmp_path):
    with pytest.raises(ValueError, match="has no recordings"):
        spoken_digits(tmp_path)
    write_wav(tmp_path / "3_ann_7.wav", [0, 1], rate=16000)
    with pytest.raises(ValueError, match="8 kHz"):
        spoken_digits(tmp_path)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data sets")
def test_real_data():
    train, test = mnist(SHARED)
    assert train.x.shape == (50000, 28, 28)
    assert test.x.shape == (5000, 28, 28)
    assert train.label[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    train, test = spoken_digits(SHARED)
    assert train.x.shape == (1800, 8192)
    assert test.label.bincount().tolist() == [20] * 10
    assert 0.05 < train.x.abs().amax(1).median() < 1


# -- movie reviews


def test_reviews_as_distributed(tmp_path):
    for kind in ("pos", "neg"):
        (tmp_path / kind).mkdir()
        for n in (0, 799, 800, 899, 900, 999):
            (tmp_path / kind / f"cv{n:03}_{n}.txt").write_bytes(
                f"{kind} {n} fin\xe9".encode("latin1")
            )
    train, test = movie_reviews(tmp_path, 9)
    assert [bytes(x.tolist()) for x in test.x] == [
        b"pos 900 f", b"pos 999 f", b"neg 900 f", b"neg 999 f"
    ]  # fmt: skip
    assert test.label.tolist() == [1, 1, 0, 0]
    assert bytes(train.x[0].tolist()) == b"pos 0 fin"
    assert len(train.x) == 4, "the fold between training and test is left alone"
    assert movie_reviews(tmp_path, 40)[0].lengths.tolist() == [10, 12, 10, 12]
    assert movie_reviews(tmp_path, 12)[0].x[0].tolist() == [*b"pos 0 fin", 0xE9, 0, 0]


def test_reviews_compact(tmp_path):
    folder = tmp_path / "movie_reviews"
    folder.mkdir()
    for name, texts in (("train", ["good \u00e9", "bad"]), ("test", ["so so"])):
        lines = [
            json.dumps({"text": t, "label": i, "id": "", "fold": 0}) for i, t in enumerate(texts)
        ]
        (folder / f"{name}.jsonl.xz").write_bytes(lzma.compress("\n".join(lines).encode()))
    train, test = movie_reviews(tmp_path)
    assert train.lengths.tolist() == [7, 3]
    assert train.label.tolist() == [0, 1]
    assert bytes(test.x[0, :6].tolist()) == b"so so\0"


def test_reviews_refusals(tmp_path):
    with pytest.raises(ValueError, match="give --data"):
        movie_reviews(None)
    with pytest.raises(ValueError, match="cv000"):
        movie_reviews(tmp_path)


@pytest.mark.skipif(not (SHARED / "movie_reviews").is_dir(), reason="the shared data are absent")
def test_the_real_reviews():
    train, test = movie_reviews(SHARED, 15000)
    assert (len(train.x), len(test.x)) == (1600, 200)
    assert train.label.float().mean() == test.label.float().mean() == 0.5
    assert int(train.lengths.max()) > 10000
