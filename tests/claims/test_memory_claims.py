"""The claims about memories that learn at test time and the other linear-time mixers."""

from __future__ import annotations

import json
import lzma

import pytest
import torch

from longscan.claims import CLAIMS, language, needles, outliers, quantised, slots, spectral
from longscan.claims.cost import layer_cost, mib_at, ms_at
from longscan.claims.recall import RECALL
from longscan.claims.results import Row
from longscan.claims.training import Job
from longscan.cli import load
from longscan.models import LanguageModel, LanguageModelConfig

CPU = torch.device("cpu")
OURS = (
    "outliers", "test_time_recall", "needles", "staleness", "language", "gam_reach",
    "wersa_kernel", "reviews", "longvq_cost",
)  # fmt: skip
UNTRAINED = ("outliers", "wersa_kernel", "longvq_cost")


@pytest.fixture
def data(tmp_path):
    """A folder with a little text and a few reviews."""
    for i in range(60):
        (tmp_path / f"{i}.txt").write_text(f"line {i}: the quick brown fox\n" * 60)
    (tmp_path / "movie_reviews").mkdir()
    for name in ("train", "test"):
        lines = [json.dumps({"text": "so " * (20 + i), "label": i % 2}) for i in range(20)]
        packed = lzma.compress("\n".join(lines).encode())
        (tmp_path / "movie_reviews" / f"{name}.jsonl.xz").write_bytes(packed)
    return tmp_path


@pytest.mark.parametrize("name", OURS)
def test_quick_run(name, data):
    claim = CLAIMS[name]
    job = Job(CPU, (0,), quick=True, data=data)
    rows = list(load(claim.target)(job))
    assert set(claim.mixers) == {r.mixer for r in rows}
    plan = Job(CPU, (0,), quick=True, data=data, plan=True)
    assert list(load(claim.target)(plan)) == []
    assert plan.planned == [m.key for m in job.measurements]
    if name not in UNTRAINED:
        assert any(m.steps > 0 and len(m.curve) > 0 for m in job.measurements)
    holds, sentence = load(claim.check)(rows)
    assert isinstance(holds, bool)
    assert sentence.endswith(".")


def rows(metric, **cases):
    return [Row(c, "gla", metric, x, "", 0) for c, x in cases.items()]


# -- outliers


def test_outliers_leave_a_tenth_dirty():
    size = {"d": 6, "pairs": 20, "sequences": 3}
    g = torch.Generator().manual_seed(0)
    k, (v, seen), clean = outliers.pairs(size, True, g)
    assert clean.sum(1).tolist() == [18] * 3
    assert torch.equal((seen == v).all(-1), clean)
    torch.testing.assert_close(k.norm(dim=-1), torch.ones(3, 20, dtype=torch.float64))
    torch.testing.assert_close(v.norm(dim=-1), torch.full((3, 20), 6**0.5 / 2).double())
    _, (v, seen), clean = outliers.pairs(size, False, g)
    assert clean.all()
    assert torch.equal(seen, v)


def test_outliers_verdict():
    good = dict.fromkeys(outliers._BIASES, 0.7) | {"l2": 0.99}
    clean = rows(outliers.CLEAN, **dict.fromkeys(good, 0.6))
    assert outliers.outliers_hold(rows(outliers.DIRTY, **good) + clean)[0]
    for case, value in (("l2", 0.8), ("Huber of the norm", 0.85), ("Yaad as printed", 0.9)):
        assert not outliers.outliers_hold(rows(outliers.DIRTY, **{**good, case: value}) + clean)[0]
    other = {**good, "l3 (Moneta's)": 30.0}
    assert outliers.outliers_hold(rows(outliers.DIRTY, **other) + clean)[0]


# -- language


@pytest.mark.parametrize("mixer", ["gla", "titans", "transformer_vq", "gam"])
def test_models_are_matched_in_parameters(mixer):
    size = language._SIZES["cpu"]
    counts = [
        LanguageModel(LanguageModelConfig(**language.configuration(size, m))).num_parameters()
        for m in (language.RIVALS[0], mixer)
    ]
    assert abs(counts[1] / counts[0] - 1) < 0.005


def test_a_model_that_cannot_be_matched_is_refused():
    model = {"vocab_size": 8, "d_model": 16, "n_layers": 1, "pattern": "gla", "mlp": "gated"}
    with pytest.raises(ValueError, match="more than 100"):
        language.matched(model, 100)


def test_language_verdict():
    every = (*language.RIVALS, *language._MEMORIES, *language._OTHERS)
    good = dict.fromkeys(every, 2.0) | dict.fromkeys(language._JUDGED, 1.9)
    assert language.language_holds(rows(language.BITS, **good))[0]
    for worse in language._JUDGED:
        assert not language.language_holds(rows(language.BITS, **{**good, worse: 2.01}))[0]


def test_staleness_verdict():
    def found(**exact):
        out = []
        for m in language._STALE:
            for chunk, x in zip(language.CHUNKS, (exact.get(m, 2.0), 2.0, 2.5), strict=True):
                out += rows(language.at_chunk(chunk), **{m: x})
        return language.staleness_holds(out)

    holds, said = found(yaad=2.01)
    assert holds
    assert "yaad 2.000, exact +0.010, chunks of 64 +0.500" in said
    assert not found(yaad=2.03)[0]


# -- recall


def test_recall_verdict():
    def found(**changes):
        got = dict.fromkeys(needles.MIXERS, (0.97, 0.1)) | changes
        out = [
            Row(f"{mixer}, lr {lr}", mixer, RECALL, value, "", 0)
            for mixer, values in got.items()
            for lr, value in zip((1e-3, 3e-3), values, strict=True)
        ]
        return needles.test_time_recall_holds(out)[0]

    assert found()
    assert found(titans=(0.1, 0.99))
    assert not found(yaad=(0.9, 0.8))
    assert found(**{needles.RIVAL: (0.1, 0.1)})


def test_needles_verdict():
    def found(near, far):
        return needles.needles_hold(rows(needles.at(64), **near) + rows(needles.at(1024), **far))

    near = dict.fromkeys(needles.MIXERS, 0.95)
    far = dict.fromkeys(needles.MIXERS, 0.8) | {needles.RIVAL: 0.3}
    holds, said = found(near, far)
    assert holds
    assert "Found at T = 64, 1024: gated_deltanet 95.0%, 30.0%" in said
    assert not found({**near, "titans": 0.8}, far)[0]
    assert not found(near, {**far, "titans": 0.2})[0]


# -- slots


def test_gam_verdict():
    def found(field=5.0, **changes):
        got = {slots.case_of(*task): 1.0 for task in slots._TASKS}
        got |= {"gam, lag 16": 0.12, "gam, one token kept": 0.2, "gam_written, 4 pairs": 0.3}
        case = "2 layers, 3 taps"
        fields = rows(slots.REACH, **{case: field}) + rows(slots.EXPECTED, **{case: 5.0})
        return slots.gam_reach_holds(fields + rows(RECALL, **{**got, **changes}))[0]

    assert found()
    assert not found(field=6.0)
    assert not found(**{"gam, lag 16": 0.5})
    assert not found(**{"gam, lag 2": 0.5})
    assert not found(**{"gam, one token kept": 0.5})
    assert not found(**{"gam_written, one token kept": 0.5})


# -- WERSA


def test_the_arc_cosine_kernel():
    assert spectral.arc_cosine(1.0) == pytest.approx(0.5)
    assert spectral.arc_cosine(-1.0) == pytest.approx(0.0)
    assert spectral.arc_cosine(0.0) == pytest.approx(0.15915, abs=1e-5)


def test_kernel_verdict():
    shared = {spectral.product_at(c): spectral.arc_cosine(c) for c in spectral.COSINES}

    def found(split):
        out = []
        for metric, value in shared.items():
            out += rows(metric, shared=value, split=split.get(metric, 0.159))
        return spectral.wersa_kernel_holds(out)

    holds, said = found({})
    assert not holds
    assert "within 0.0% of its largest value" in said
    assert found({spectral.product_at(1.0): 0.4})[0]


def test_reviews_verdict():
    def found(accuracy, ms, attention=0.7):
        right = dict.fromkeys(spectral._READERS, attention) | {"wersa": accuracy}
        took = dict.fromkeys(spectral._READERS, 10.0) | {"wersa": ms}
        near = dict.fromkeys(spectral._READERS, 5.0)
        return spectral.reviews_hold(
            rows(spectral.ACCURACY, **right) + rows(ms_at(128), **near) + rows(ms_at(4096), **took)
        )[0]

    assert found(0.68, 5.0)
    assert not found(0.66, 5.0)
    assert not found(0.8, 11.0)
    assert not found(0.5, 5.0, attention=0.5)


# -- cost


def test_quantised_verdict():
    def found(wrong=1e-12, ours=(1.0, 2.0, 4.0), dense=(1.0, 4.0, 16.0)):
        out = rows(quantised.WRONG, causal=wrong)
        for t, a, b in zip((10, 20, 40), ours, dense, strict=True):
            out += rows(ms_at(t), **{"longvq, cost": a, "attention, cost": b})
        return quantised.longvq_cost_holds(out)[0]

    assert found()
    assert not found(wrong=1e-6)
    assert not found(ours=(1.0, 4.0, 15.0))
    assert not found(dense=(1.0, 2.0, 3.0))


def test_the_cost_of_a_layer_grows():
    cost = layer_cost(Job(CPU), "gla", {}, d_model=32, lengths=[16, 2048])
    assert set(cost) == {ms_at(16), ms_at(2048)}
    assert cost[ms_at(2048)] > 2 * cost[ms_at(16)] > 0
    assert mib_at(16) not in cost
