"""The claims on signals, pixels and speech: they run, and their verdicts follow the numbers."""

import gzip
import wave

import numpy as np
import pytest
import torch

from longscan.claims import CLAIMS, images, signals
from longscan.claims.datasets import Split
from longscan.claims.results import Row
from longscan.claims.training import Job
from longscan.cli import load
from longscan.models import Classifier, ClassifierConfig

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A few made-up digits and words in the forms of the real data sets."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name in ("train", "t10k"):
        pixels = rng.integers(0, 256, (30, 28, 28), np.uint8).tobytes()
        labels = (np.arange(30) % 10).astype(np.uint8).tobytes()
        for part, data in (
            ("images-idx3-ubyte", bytes(16) + pixels),
            ("labels-idx1-ubyte", bytes(8) + labels),
        ):
            (folder / f"{name}-{part}.gz").write_bytes(gzip.compress(data))
    (folder / "recordings").mkdir()
    for digit in range(10):
        for take in (0, 7):
            with wave.open(str(folder / "recordings" / f"{digit}_ann_{take}.wav"), "wb") as f:
                f.setparams((1, 2, 8000, 0, "NONE", "none"))
                f.writeframes(rng.integers(-999, 999, 1200 + digit * 64, np.int16).tobytes())
    return folder


@pytest.mark.parametrize("name", ["timescale", "delay", "resampling", "smnist", "spoken_digits"])
def test_quick_run(name, data):
    claim = CLAIMS[name]
    job = Job(CPU, (0,), quick=True, data=data if claim.data else None)
    rows = list(load(claim.target)(job))
    assert set(claim.mixers) == {r.mixer for r in rows}
    plan = Job(CPU, (0,), quick=True, plan=True)
    assert list(load(claim.target)(plan)) == [], "planning needs no data"
    assert plan.planned == [m.key for m in job.measurements]
    holds, sentence = load(claim.check)(rows)
    assert isinstance(holds, bool)
    assert sentence.endswith(".")


def test_timescale_at_full_size():
    """At full size, without training: the errors are those of an independent computation."""
    size = signals._TIMESCALE["cpu"]
    got = [
        signals.remember(*case, size, 0)[signals.ERROR] for case in (("legs", 1.9), ("legt", 1.9))
    ]
    assert got[0] == pytest.approx(0.041, rel=0.02)
    assert got[1] == pytest.approx(2.0e-5, rel=0.05)


def test_rate_reaches_every_mixer():
    model = Classifier(
        ClassifierConfig(d_model=8, n_layers=3, pattern="s4,s4d,lssl", n_classes=2, d_input=1)
    ).double()
    x = torch.randn(2, 30, 1, dtype=torch.float64)
    before = model(x)
    signals.set_rate(model, 2.0)
    assert not torch.allclose(model(x), before)
    assert all(block.mixer.rate == 2.0 for block in model.blocks)
    signals.set_rate(model, 1.0)
    assert torch.equal(model(x), before)


def test_pixels_and_sounds():
    split = Split(torch.arange(2 * 784).view(2, 28, 28).to(torch.uint8), torch.tensor([1, 2]))
    x = images.pixels(split, 2, CPU).x
    assert x.shape == (2, 196, 1)
    raw = split.x[0, :2, :2].float().mean() / 255
    assert x[0, 0, 0].item() == pytest.approx((raw.item() - 0.13) / 0.3)
    wave_ = torch.zeros(1, 64)
    wave_[0, :40] = torch.arange(40) / 40
    sound = images.sounds(Split(wave_, torch.tensor([3]), torch.tensor([40])), 4, CPU)
    assert sound.x.shape == (1, 16, 1)
    assert sound.lengths.tolist() == [10]
    assert sound.x.square().mean().item() == pytest.approx(1)
    _, _, lengths = images._examples(sound, torch.tensor([0]), 3)
    assert lengths.tolist() == [4]


def rows(metric, **cases):
    return [Row(c, c, metric, x, "", 0) for c, x in cases.items()]


def test_verdicts():
    good = {"s4d": 0.97, "lssl": 0.96, "mlstm": 0.9, "attention": 0.8}
    assert images.smnist_holds(rows(images.ACCURACY, **good))[0]
    assert not images.smnist_holds(rows(images.ACCURACY, **{**good, "lssl": 0.7}))[0]

    def heard(full, half, stale):
        return [
            r
            for metric, x in ((images.ACCURACY, full), (images.HALF, half), (images.STALE, stale))
            for r in rows(metric, s4=x, s4d=x)
        ]

    assert images.spoken_digits_holds(heard(0.95, 0.9, 0.2))[0]
    for bad in ((0.8, 0.8, 0.2), (0.95, 0.7, 0.2), (0.95, 0.9, 0.85)):
        assert not images.spoken_digits_holds(heard(*bad))[0]

    def delayed(legs, legt, fout, far):
        errors = (legs, legt, fout, far, far)
        cases = [signals._scaled(b, s) for b, s in signals._DELAYS]
        pairs = zip(cases, errors, strict=True)
        return [Row(c, "s4", "error / variance", x, "", 0) for c, x in pairs]

    assert signals.delay_holds(delayed(0.2, 1e-3, 4e-3, 0.6))[0]
    for bad in ((0.03, 1e-3, 4e-3, 0.6), (0.9, 0.05, 0.05, 0.6), (0.2, 1e-3, 4e-3, 0.1)):
        assert not signals.delay_holds(delayed(*bad))[0]
