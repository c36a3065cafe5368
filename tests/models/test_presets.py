"""Published sizes have the published numbers of parameters."""

import pytest
import torch

from longscan.models import PRESETS, LanguageModel, preset

# The exact numbers for the authors' layers, tied; None: published only as rounded in the name.
COUNTS = {
    "mamba-130m": 129_135_360,
    "mamba-370m": 371_516_416,
    "mamba-790m": 793_204_224,
    "mamba-1.4b": 1_372_178_432,
    "mamba-2.8b": 2_768_345_600,
    "mamba2-130m": 128_989_632,
    "mamba2-370m": 368_346_624,
    "mamba2-780m": 780_161_280,
    "mamba2-1.3b": 1_343_757_312,
    "mamba2-2.7b": 2_702_599_680,
}
SMALL = {"nano": 1, "micro": 5.7, "mini": 16, "small": 98}  # millions, on bytes


def count(name, **overrides):
    with torch.device("meta"):
        return LanguageModel(preset(name, **overrides)).num_parameters()


@pytest.mark.parametrize("name", COUNTS)
def test_exact_counts(name):
    assert count(name) == COUNTS[name]


@pytest.mark.parametrize("name", [n for n in PRESETS if n not in COUNTS and n not in SMALL])
def test_sizes_are_those_in_the_name(name):
    size = name.rsplit("-", 1)[1]
    want = float(size[:-1]) * {"m": 1e6, "b": 1e9}[size[-1]]
    # An untied head of 32,000 rows comes on top of the size in some papers' names.
    assert 0.99 * want < count(name, tie_embeddings=True) < 1.03 * want


def test_deltaproduct_sizes_are_equal_for_every_number_of_steps():
    for size in ("213m", "392m", "805m"):
        two, three = (count(f"deltaproduct{n}-{size}") for n in (2, 3))
        assert abs(two / three - 1) < 2e-3


@pytest.mark.parametrize("name", SMALL)
def test_our_own(name):
    assert abs(count(name) / 1e6 / SMALL[name] - 1) < 0.05


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_runs(name):
    """Narrow and shallow, but with its own mixers and settings."""
    model = LanguageModel(preset(name, d_model=16, n_layers=4, d_ff=16, vocab_size=99))
    ids = torch.arange(8).view(2, 4)
    loss, _ = model.loss(ids[:, :-1], ids[:, 1:])
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_overrides():
    config = preset("micro", vocab_size=4096, n_layers=2)
    assert (config.vocab_size, config.n_layers, config.d_model) == (4096, 2, 256)
    assert PRESETS["micro"]["n_layers"] == 6


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        ("mamba-130", {}, "did you mean mamba-130m"),
        ("gateddeltanet-1.3b", {}, "did you mean gated_deltanet-1.3b"),
        ("", {}, "known: mamba-130m"),
        ("nano", {"layers": 3}, "did you mean n_layers"),
    ],
)
def test_unknown_names_and_fields(name, overrides, words):
    with pytest.raises(ValueError, match=words):
        preset(name, **overrides)
