"""Training and testing of the small models."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from longscan.claims.training import Accuracy, Job, accuracy, examples, fit, labelled_loss, rate
from longscan.models import LanguageModel, LanguageModelConfig
from longscan.synthetic.copying import lagged

CPU = torch.device("cpu")
MODEL = {"vocab_size": 6, "d_model": 16, "n_layers": 1, "pattern": "gla", "d_ff": 16,
         "mixers": {"gla": {"n_heads": 1, "d_conv": 4}}}  # fmt: skip


def task(generator, length=12):
    return lagged(8, length, lag=1, alphabet=6, generator=generator)


def test_the_same_seed_gives_the_same_training_bit_for_bit():
    def weights(seed):
        model = fit(Job(CPU), MODEL, task, seed=seed, steps=12, lr=1e-2)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    torch.manual_seed(5)
    first = weights(0)
    torch.rand(3)
    assert torch.equal(first, weights(0))
    assert not torch.equal(first, weights(1))


def test_building_leaves_the_callers_random_numbers_alone():
    torch.manual_seed(3)
    want = torch.rand(4)
    torch.manual_seed(3)
    Job(CPU).model(LanguageModelConfig(**MODEL), 7)
    assert torch.equal(torch.rand(4), want)


def test_a_trained_model_solves_its_task_and_an_untrained_one_does_not():
    job = Job(CPU)
    model = fit(job, MODEL, task, seed=0, steps=300, lr=2e-2, until=0.05)
    assert 0 < len(job._losses) < 300  # it stopped early
    good = accuracy(model, examples(job, task, 0))
    raw = accuracy(job.model(LanguageModelConfig(**MODEL), 1), examples(job, task, 0))
    assert good.token > 0.97 > 0.5 > raw.token
    assert good.sequence > 0.7 > raw.sequence


def test_test_examples_are_not_training_examples_and_the_same_for_all():
    job = Job(CPU)
    train = task(job.generator("train", 0))
    first, second = (list(examples(job, task, 0, 2)) for _ in range(2))
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x[0], y[0])
        assert torch.equal(x[1], y[1])
    assert not torch.equal(train[0], first[0][0])
    assert not torch.equal(first[0][0], first[1][0])
    assert not torch.equal(first[0][0], next(examples(job, task, 1))[0])


class Fixed(LanguageModel):
    """Its logits name the token that the input names."""

    def __init__(self):
        super().__init__(LanguageModelConfig(**MODEL))

    def hidden(self, ids, state=None, *, cu_seqlens=None):
        return torch.nn.functional.one_hot(ids, 6).float(), state

    def logits(self, h):
        return h


def test_accuracy_counts_labels_and_whole_sequences():
    inputs = torch.tensor([[0, 1, 2], [3, 4, 5], [0, 0, 0], [1, 1, 1]])
    labels = torch.tensor([[0, 1, -100], [3, 4, 0], [-100, -100, 1], [-100, -100, -100]])
    # 4 of 6 labels; rows 0 and 3 (nothing asked, nothing wrong) of 4
    assert accuracy(Fixed(), [(inputs, labels)]) == Accuracy(4 / 6, 0.5)
    two = [(inputs[:2], labels[:2]), (inputs[2:], labels[2:])]
    assert accuracy(Fixed(), two) == Accuracy(4 / 6, 0.5)


def test_accuracy_in_stretches_is_the_same():
    job = Job(CPU)
    model = fit(job, MODEL, task, seed=0, steps=40, lr=2e-2)
    long = partial(task, length=29)
    whole = accuracy(model, examples(job, long, 0))
    assert 0 < whole.token < 1
    for piece in (1, 7, 29, 100):
        assert accuracy(model, examples(job, long, 0), piece) == whole


def test_rate():
    assert [rate(s, 10, 4, False) for s in (1, 4, 5, 10)] == [0.2, 0.8, 1, 1]
    falling = [rate(s, 10, 2, True) for s in range(1, 11)]
    assert falling[2] == 1
    assert falling[:3] == sorted(falling[:3])
    assert falling[2:] == sorted(falling[2:], reverse=True)
    assert falling[-1] == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))


def test_training_stops_at_a_loss_that_is_not_finite():
    line = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="the loss is nan at step 10"):
        Job(CPU).train(
            line, lambda g: line(torch.ones(1, 1)).sum() * math.nan, steps=20, lr=0.1, seed=0
        )


def test_steps_follow_adamw_with_clipping_and_schedule():
    """Against a loop written out."""

    def make():
        torch.manual_seed(0)
        return torch.nn.Linear(3, 1)

    def loss(model, g):
        return (model(torch.rand(4, 3, generator=g)) * 50).square().mean()

    job, ours, plain = Job(CPU), make(), make()
    options = {"lr": 0.05, "weight_decay": 0.1}
    job.train(ours, partial(loss, ours), steps=7, seed=3, warmup=2, decay=True, **options)
    optimizer = torch.optim.AdamW(plain.parameters(), **options)
    g = job.generator("train", 3)
    for step in range(1, 8):
        optimizer.param_groups[0]["lr"] = 0.05 * rate(step, 7, 2, True)
        optimizer.zero_grad()
        loss(plain, g).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
    torch.testing.assert_close(ours.weight, plain.weight)


def test_choose():
    assert Job(CPU, quick=True).choose(quick=1, cpu=2, gpu=3) == 1
    assert Job(CPU).choose(quick=1, cpu=2, gpu=3) == 2
    gpu = Job(torch.device("cuda"))
    assert gpu.choose(quick=1, cpu=2, gpu=3) == 3
    assert gpu.choose(quick=1, cpu=2) == 2


def test_labelled_loss_ignores_unlabelled_places():
    model = LanguageModel(LanguageModelConfig(**MODEL))
    inputs, labels = task(torch.Generator().manual_seed(0))
    labels[:, ::2] = -100
    got = labelled_loss(model, lambda g: (inputs, labels))(torch.Generator())
    logits, _ = model(inputs)
    want = torch.nn.functional.cross_entropy(
        logits[:, 1::2].flatten(0, 1), labels[:, 1::2].flatten()
    )
    torch.testing.assert_close(got, want)
