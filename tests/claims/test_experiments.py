"""The experiments of the token claims: they run, and their verdicts follow the numbers."""

from __future__ import annotations

import pytest
import torch

from longscan.claims import CLAIMS, copying, recall, sinks, texts, tracking
from longscan.claims.results import Row
from longscan.claims.training import Job
from longscan.cli import load
from longscan.mixers.attention import Attention
from longscan.models import LanguageModel, LanguageModelConfig

CPU = torch.device("cpu")
OURS = (
    "mqar",
    "induction",
    "selective_copying",
    "parity",
    "parity_rotations",
    "parity_memory",
    "s3",
    "s5",
    "attention_sink",
    "memories",
)


@pytest.mark.parametrize("name", OURS)
def test_quick_run(name, tmp_path):
    data = None
    if name == "attention_sink":
        data = tmp_path / "text"
        data.mkdir()
        for i in range(60):
            (data / f"{i}.txt").write_text(f"line {i}: the quick brown fox\n" * 60)
    claim = CLAIMS[name]
    job = Job(CPU, (0,), quick=True, data=data)
    rows = list(load(claim.target)(job))
    assert set(claim.mixers) == {r.mixer for r in rows}
    plan = Job(CPU, (0,), quick=True, data=data, plan=True)
    assert list(load(claim.target)(plan)) == []
    assert plan.planned == [m.key for m in job.measurements]
    assert all(m.steps > 0 and len(m.curve) > 0 for m in job.measurements)
    holds, sentence = load(claim.check)(rows)
    assert isinstance(holds, bool)
    assert sentence.endswith(".")


def rows(metric, **cases):
    return [Row(c, "gla", metric, x, "", 0) for c, x in cases.items()]


def test_tracking_leaves_out_the_trained_length():
    task = lambda length, generator: (torch.zeros(2, length).long(), torch.ones(2, length).long())  # noqa: E731
    _, labels = tracking.beyond(task, 5, torch.Generator())
    assert labels.shape == (2, 20)
    assert (labels[:, :5] == -100).all()
    assert (labels[:, 5:] == 1).all()


def test_words_start_with_a_token_that_is_not_scored():
    g = torch.Generator().manual_seed(0)
    inputs, labels = tracking.words(200, 7, n=5, most=2, generator=g)
    assert inputs.shape == (200, 8)
    assert (inputs[:, 0] == 120).all()
    assert (labels[:, 0] == -100).all()
    assert torch.equal(labels[:, 1], inputs[:, 1])
    assert len(inputs[:, 1:].unique()) == 11  # the identity and ten swaps
    assert len(labels[:, 1:].unique()) > 100


def test_parity_verdict():
    good = {"can a": 1.0, "can b": 0.96, "cannot a": 0.5, "cannot b": 0.55}
    inside = rows(tracking.INSIDE, **good)
    holds, said = tracking.parity_holds(rows(tracking.BEYOND, **good) + inside)
    assert holds
    assert "can b 0.960" in said
    for case in good:
        assert not tracking.parity_holds(rows(tracking.BEYOND, **{**good, case: 0.7}) + inside)[0]


def test_word_problem_verdict():
    def found(**changes):
        whole = {"2 steps": 0.97, "1 step": 0.1, "2 steps, [0, 1]": 0.05}
        beyond = {"2 steps": 0.95, "1 step": 0.3, "2 steps, [0, 1]": 0.2}
        metric, case, value = changes.values() if changes else (None, None, None)
        for name, table in ((tracking.WHOLE, whole), (tracking.BEYOND, beyond)):
            if name == metric:
                table[case] = value
        return tracking.solved(rows(tracking.WHOLE, **whole) + rows(tracking.BEYOND, **beyond))

    holds, said = found()
    assert holds
    assert said.startswith("2 steps: 97% of whole sequences right, 95% of tokens beyond; 1 step")
    for metric in (tracking.WHOLE, tracking.BEYOND):
        assert not found(metric=metric, case="2 steps", value=0.8)[0]
        assert not found(metric=metric, case="1 step", value=0.6)[0]
        assert not found(metric=metric, case="2 steps, [0, 1]", value=0.6)[0]


def test_recall_verdict():
    good = {c: 0.2 for c, *_ in recall._MQAR_CASES} | {"deltanet": 0.99}
    assert recall.mqar_holds(rows(recall.RECALL, **good))[0]
    for case, value in (("deltanet", 0.9), ("gla", 0.95), ("linear_attention", 0.95)):
        assert not recall.mqar_holds(rows(recall.RECALL, **{**good, case: value}))[0]
    other = {**good, "deltanet without convolution": 1.0}
    assert recall.mqar_holds(rows(recall.RECALL, **other))[0]


def test_induction_verdict():
    def found(**more):
        out = []
        for t in (32, 64, 128, 1024):
            at = {"mamba": 1.0, "s4d": 1.0 if t == 32 else 0.3, "attention": 0.2}
            if t == 1024:
                at["mamba"] = 0.4
            if t == 128:
                at |= more
            out += rows(f"accuracy at T={t}", **at)
        return recall.induction_holds(out)

    holds, said = found()
    assert holds
    assert "trained at T=32, mamba is right in 100.0% or more to T=128" in said
    assert "at T=1024 mamba is right in 40.0%" in said
    assert not found(mamba=0.9)[0]
    assert not found(s4d=0.7)[0]
    assert not found(attention=0.7)[0]


def test_copying_verdict():
    good = {"mamba": 0.99, "s4d": 0.8, "retention": 0.9}
    assert copying.selective_copying_holds(rows(recall.RECALL, **good))[0]
    assert not copying.selective_copying_holds(rows(recall.RECALL, **{**good, "s4d": 0.97}))[0]
    assert not copying.selective_copying_holds(rows(recall.RECALL, **{**good, "mamba": 0.9}))[0]


def test_look_measures_the_first_tokens_attention_and_the_loss():
    config = LanguageModelConfig(
        vocab_size=257, d_model=16, n_layers=2, pattern="gated_attention",
        mixers={"gated_attention": {"n_heads": 2}},
    )  # fmt: skip
    torch.manual_seed(0)
    model = LanguageModel(config)
    ids = torch.randint(257, (3, 9))
    labels = torch.randint(257, (3, 9))
    got = sinks.look(model, iter([(ids, labels), (ids, labels)]))
    x, masses = model.embedding(ids), []
    for block in model.blocks:
        mixer = block.mixer
        assert isinstance(mixer, Attention)
        masses.append(mixer.weights(block.norm(x))[:, :, 1:, 0].mean().item())
        x = block(x)[0]
    for i, mass in enumerate(masses):
        assert got[f"{sinks.SINK}, layer {i}"] == pytest.approx(mass)
    assert got[sinks.SINK] == pytest.approx(sum(masses) / 2)
    assert got[sinks.EVEN] == pytest.approx(sum(1 / n for n in range(2, 10)) / 8)
    assert got[sinks.LOSS] == pytest.approx(model.loss(ids, labels)[0].item())
    assert not any(b._forward_hooks or b.mixer._forward_pre_hooks for b in model.blocks)


def test_sink_verdict():
    def found(sink=0.4, gate=0.1, loss_gate=1.0):
        (plain, gated), out = sinks._CASES, []
        out += rows(sinks.SINK, **{plain: sink, gated: gate})
        out += rows(sinks.LOSS, **{plain: 1.01, gated: loss_gate})
        return sinks.attention_sink_holds(out + rows(sinks.EVEN, **{plain: 0.03, gated: 0.03}))

    assert found()[0]
    assert not found(gate=0.3)[0]
    assert not found(loss_gate=1.02)[0]
    holds, said = found(sink=0.05, gate=0.01)
    assert not holds
    assert "No sink forms" in said


def test_windows_are_text_behind_a_bos(tmp_path):
    (tmp_path / "a.txt").write_bytes(bytes(range(10, 250)) * 100)
    size = {"length": 12, "batch": 5, "megabytes": 1.0}
    g = torch.Generator().manual_seed(0)
    inputs, labels = texts.windows(tmp_path, "train", size, g)
    assert inputs.shape == labels.shape == (5, 12)
    assert (inputs[:, 0] == texts.BOS).all()
    assert torch.equal(inputs[:, 1:], labels[:, :-1])
    step = (labels[:, 1:] - labels[:, :-1]) % 240
    assert (step == 1).all()


def test_both_sides_of_the_sink_have_equally_many_parameters():
    job = Job(CPU, (0,), plan=True)
    sizes = []
    job.measure = lambda case, mixer, seed, settings, run, said: (  # type: ignore[method-assign]
        sizes.append(LanguageModel(LanguageModelConfig(**settings["model"])).num_parameters()),
        iter(()),
    )[1]
    list(sinks.attention_sink(job))
    assert len(sizes) == 2
    assert abs(sizes[0] - sizes[1]) / sizes[0] < 0.01
