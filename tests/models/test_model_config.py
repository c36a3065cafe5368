"""LanguageModelConfig: patterns, checks, and the way to JSON and back."""

import ema  # noqa: F401  (registers the mixer)
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longscan.models import LanguageModelConfig, parse_pattern

ITEMS = st.tuples(st.sampled_from(["ema", "mamba2", "gla"]), st.integers(1, 3))


@given(st.lists(ITEMS, min_size=1), st.integers(0, 9))
def test_a_pattern_is_repeated_to_the_number_of_layers(items, more):
    text = ", ".join(f"{name} * {n}" if n > 1 else name for name, n in items)
    names = [name for name, n in items for _ in range(n)]
    got = parse_pattern(text, len(names) + more)
    assert len(got) == len(names) + more
    assert list(got) == (names * (more + 1))[: len(got)]


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("", "empty item"),
        ("ema,,ema", "empty item"),
        ("ema,", "empty item"),
        ("gated_deltanett", "did you mean gated_deltanet"),
        ("ema*0", "whole number"),
        ("ema*-1", "whole number"),
        ("ema*two", "whole number"),
        ("2*ema", "cannot read"),
        ("ema*5", "names 5 blocks, but n_layers is 4"),
    ],
)
def test_a_bad_pattern_is_explained(pattern, words):
    with pytest.raises(ValueError, match=words):
        parse_pattern(pattern, 4)
    with pytest.raises(ValueError, match=words):
        LanguageModelConfig(257, pattern=pattern)


def test_json_round_trip():
    config = LanguageModelConfig(
        300,
        d_model=32,
        n_layers=3,
        pattern="ema*2,mamba2",
        mixers={"mamba2": {"dt_limit": (0.0, float("inf"))}},
        mlp="gated",
        d_ff=48,
        activation="gelu",
        norm="layer",
        norm_bias=False,
        norm_eps=1e-6,
        embedding_norm=True,
        dropout=0.25,
        tie_embeddings=False,
        logit_cap=30.0,
    )
    assert LanguageModelConfig.from_json(config.to_json()) == config
    defaults = LanguageModelConfig(300)
    changed = {k for k, v in config.to_dict().items() if v != getattr(defaults, k)}
    assert changed == set(config.to_dict()) - {
        "vocab_size",
        "pad_vocab_multiple",
        "checkpoint_blocks",
    }
    assert config.layers == ("ema", "ema", "mamba2")


def test_a_file_of_the_first_version_still_loads():
    first = {
        "vocab_size": 300, "d_model": 32, "n_layers": 2, "pattern": "ema", "mixers": {},
        "mlp": "swiglu", "d_ff": None, "norm_eps": 1e-5, "tie_embeddings": True,
        "pad_vocab_multiple": 8, "checkpoint_blocks": False,
    }  # fmt: skip
    config = LanguageModelConfig.from_dict(first)
    assert config == LanguageModelConfig(300, d_model=32, n_layers=2, pattern="ema", mlp="gated")
    with pytest.raises(ValueError, match="needs vocab_size"):
        LanguageModelConfig.from_dict({"d_model": 32})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vocab_size": 0}, "vocab_size"),
        ({"d_model": 2.5}, "d_model"),
        ({"n_layers": True}, "n_layers"),
        ({"d_ff": -1}, "d_ff"),
        ({"mlp": "gelu"}, "auto, gated or none"),
        ({"activation": "relu"}, "silu or gelu"),
        ({"norm": "batch"}, "rms or layer"),
        ({"dropout": 1.0}, "probability"),
        ({"logit_cap": 0}, "logit_cap"),
        ({"norm_eps": 0.0}, "norm_eps"),
        ({"mixers": {"mamba2": {}}}, "does not use"),
        ({"mixers": {"emma": {}}}, "did you mean ema"),
        ({"mixers": {"ema": 3}}, "mixer names to settings"),
        ({"mixers": {"ema": {"slowest": object()}}}, "plain JSON"),
        ({"n_layer": 3}, "did you mean n_layers"),
    ],
)
def test_a_bad_field_is_explained(change, words):
    good = LanguageModelConfig(257, pattern="ema")
    with pytest.raises(ValueError, match=words):
        good.replace(**change)
    with pytest.raises(ValueError, match=words):
        LanguageModelConfig.from_dict({**good.to_dict(), **change})


def test_it_does_not_share_the_callers_dictionary():
    settings = {"ema": {"slowest": 3.0}}
    config = LanguageModelConfig(257, pattern="ema", mixers=settings)
    settings["ema"]["slowest"] = 4.0
    assert config.mixers == {"ema": {"slowest": 3.0}}


def test_widths():
    config = LanguageModelConfig(257, d_model=1024, pattern="ema")
    assert config.ff_width == 2752  # 8/3 x 1024 = 2730.67, up to a multiple of 64
    assert config.replace(d_ff=100).ff_width == 100
    assert config.vocab_rows == 264
    assert config.replace(pad_vocab_multiple=1).vocab_rows == 257
    assert config.replace(vocab_size=256).vocab_rows == 256


def test_mlp_follows_the_architecture_unless_told():
    config = LanguageModelConfig(257, pattern="ema,gated_deltanet")
    assert (config.has_mlp("ema"), config.has_mlp("gated_deltanet")) == (False, True)
    assert config.replace(mlp="gated").has_mlp("ema")
    assert not config.replace(mlp="none").has_mlp("gated_deltanet")
