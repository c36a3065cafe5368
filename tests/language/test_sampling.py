"""Every filter by the property that defines it."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longscan.language.sampling import (
    Sampling,
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalise_repetition,
)

numbers = st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=12)


@settings(deadline=None)
@given(numbers, st.integers(1, 14))
def test_top_k_keeps_the_k_likeliest(values, k):
    x = torch.tensor(values)
    y = keep_top_k(x, k)
    kept = y > -torch.inf
    assert kept.sum() == min(k, len(values))
    assert torch.equal(y[kept], x[kept])
    assert kept.all() or x[kept].min() >= x[~kept].max()


@settings(deadline=None)
@given(numbers, st.floats(0.01, 1.0))
def test_top_p_keeps_the_smallest_set_of_that_mass(values, p):
    x = torch.tensor(values, dtype=torch.float64)
    y = keep_top_p(x, p)
    kept, prob = y > -torch.inf, x.softmax(-1)
    assert torch.equal(y[kept], x[kept])
    assert prob[kept].sum() >= p - 1e-9
    # Without its least likely member the set would fall short.
    assert prob[kept].sum() - prob[kept].min() < p + 1e-9
    assert kept.all() or x[kept].min() >= x[~kept].max()


@settings(deadline=None)
@given(numbers, st.floats(0.001, 1.0))
def test_min_p_is_relative_to_the_likeliest(values, p):
    x = torch.tensor(values, dtype=torch.float64)
    y = keep_min_p(x, p)
    kept, prob = y > -torch.inf, x.softmax(-1)
    assert torch.equal(y[kept], x[kept])
    assert kept[x.argmax()]
    assert (prob[kept] >= p * prob.max() * (1 - 1e-9)).all()
    assert (prob[~kept] <= p * prob.max() * (1 + 1e-9)).all()


@settings(deadline=None)
@given(numbers, st.floats(1.0, 3.0))
def test_repetition_penalty_lowers_what_was_seen_and_nothing_else(values, penalty):
    x = torch.tensor(values)
    seen = torch.arange(len(values)) % 2 == 0
    y = penalise_repetition(x, seen, penalty)
    assert torch.equal(y[~seen], x[~seen])
    assert (y[seen] <= x[seen]).all()
    up = x[seen] > 0
    torch.testing.assert_close(y[seen][up], x[seen][up] / penalty)  # CTRL's rule
    assert torch.equal(penalise_repetition(x, seen, 1.0), x)


def test_filters_work_row_by_row():
    x = torch.randn(3, 5, 9, generator=torch.Generator().manual_seed(0))
    for f in (
        lambda x: keep_top_k(x, 3),
        lambda x: keep_top_p(x, 0.6),
        lambda x: keep_min_p(x, 0.3),
    ):
        assert torch.equal(f(x)[1, 2], f(x[1, 2]))


def test_draws_follow_the_distribution():
    logits = torch.tensor([0.0, -torch.inf, 1.0, -1.0, -torch.inf])
    n = 20_000
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    counts = draw(logits.expand(n, -1), u).bincount(minlength=5)
    torch.testing.assert_close(counts / n, logits.softmax(-1), atol=2e-4, rtol=0)
    assert counts[1] == counts[4] == 0


@settings(deadline=None)
@given(numbers, st.sets(st.integers(0, 11)))
def test_a_draw_never_takes_what_a_filter_dropped(values, dropped):
    x = torch.tensor(values)
    for i in dropped - {0}:
        if i < len(values):
            x[i] = -torch.inf
    for u in (0.0, 0.5, 1 - 2**-53):
        assert x[draw(x[None], torch.tensor([u], dtype=torch.float64))] > -torch.inf


def test_order_and_greedy():
    x = torch.tensor([[1.0, 3.0, 2.0, 2.9]])
    u = torch.tensor([0.999], dtype=torch.float64)
    assert Sampling(temperature=0).choose(x, u).item() == 1
    seen = torch.tensor([[False, True, False, False]])
    assert Sampling(temperature=0, repetition_penalty=1.5).choose(x, u, seen).item() == 3
    assert torch.equal(Sampling(temperature=2.0).filtered(x), x / 2)
    # top-k first, then top-p and min-p of what it left, all of the tempered logits
    got = Sampling(temperature=0.5, top_k=3, top_p=0.6, min_p=0.9).filtered(x)
    want = keep_min_p(keep_top_p(keep_top_k(x / 0.5, 3), 0.6), 0.9)
    assert torch.equal(got, want)
    off = Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
    assert torch.equal(off.filtered(x), x)
    almost_greedy = Sampling(temperature=1e-4)
    rng = random.Random(0)
    us = torch.tensor([rng.random() for _ in range(50)], dtype=torch.float64)
    assert almost_greedy.choose(x.expand(50, -1), us).eq(1).all()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
    ],
)
def test_options_out_of_range(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        Sampling(**options)
