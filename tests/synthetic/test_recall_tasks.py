"""MQAR, copying and induction against slow evaluators that know only the rule of the task."""

import pytest
import torch

from longscan.synthetic.copying import copying, lagged
from longscan.synthetic.induction import associative_recall, induction, induction_head
from longscan.synthetic.mqar import mqar
from longscan.synthetic.needle import MARKER, QUERY, needle


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(pair):
    return zip(pair[0].tolist(), pair[1].tolist(), strict=True)


# Every call with its generator; what all generators promise is tested on each.
CALLS = {
    "mqar": lambda n, g: mqar(n, 32, pairs=5, vocab=40, generator=g),
    "copying": lambda n, g: copying(n, 12, tokens=4, alphabet=7, selective=True, generator=g),
    "lagged": lambda n, g: lagged(n, 12, lag=3, alphabet=7, generator=g),
    "induction": lambda n, g: induction(n, 20, generator=g),
    "induction_head": lambda n, g: induction_head(n, triggers=3, generator=g),
    "associative_recall": lambda n, g: associative_recall(n, generator=g),
    "needle": lambda n, g: needle(n, 40, needles=3, generator=g),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_seeded_fresh_and_int64(call):
    g = gen()
    first, second = call(6, g), call(6, g)
    again = call(6, gen())
    for a, b, c in zip(first, second, again, strict=True):
        assert a.dtype == torch.int64
        assert a.shape == first[0].shape
        assert not torch.equal(a, b)
        assert torch.equal(a, c)


# -- MQAR


def mqar_labels(row, pairs, vocab):
    """What a reader with a dictionary answers: keys are below vocab/2 and not 0."""
    memory = {row[2 * i]: row[2 * i + 1] for i in range(pairs)}
    asked = [-100] * (2 * pairs)
    return asked + [memory[t] if 0 < t < vocab // 2 else -100 for t in row[2 * pairs :]]


@pytest.mark.parametrize(("length", "pairs", "power"), [(64, 16, 0.01), (40, 3, 1.0), (8, 2, 0.5)])
def test_mqar_labels_are_the_values_of_the_keys_asked(length, pairs, power):
    vocab = 2 * pairs + 10
    options = {"pairs": pairs, "vocab": vocab, "power": power, "random_non_queries": False}
    data = mqar(50, length, generator=gen(), **options)
    for row, labels in rows(data):
        assert labels == mqar_labels(row, pairs, vocab)
        keys, values = row[: 2 * pairs : 2], row[1 : 2 * pairs : 2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert all(0 < k < vocab // 2 <= v < vocab for k, v in zip(keys, values, strict=True))
        places = [t for t, label in enumerate(labels) if label != -100]
        assert all(t % 2 == 0 for t in places)
        assert sorted(row[t] for t in places) == sorted(keys)
        assert all(row[t] == 0 for t in range(2 * pairs, length) if t not in places)


def test_mqar_slots_are_drawn_by_the_power_law_without_replacement():
    power, slots, n = 0.01, 4, 40_000
    weight = torch.arange(1, slots + 1, dtype=torch.float64) ** (power - 1)
    inputs, labels = mqar(
        n, 2 * slots + 4, pairs=2, vocab=64, random_non_queries=False, power=power, generator=gen()
    )
    # Where the first key is asked is the first draw, where the second is asked the second.
    for draw in range(2):
        here = (inputs[:, 4:] == inputs[:, 2 * draw, None]) & (labels[:, 4:] != -100)
        got = torch.bincount(here.long().argmax(1) // 2, minlength=slots) / n
        p = weight / weight.sum()
        if draw == 1:  # P(second = i) = sum over first j != i of p_j p_i / (1 - p_j)
            p = torch.stack(
                [
                    sum(p[j] * p[i] / (1 - p[j]) for j in range(slots) if j != i)
                    for i in range(slots)
                ]
            )
        torch.testing.assert_close(got.double(), p, atol=0.01, rtol=0)


def test_mqar_fills_with_random_tokens_and_keeps_the_rest():
    options = {"pairs": 4, "vocab": 30, "generator": gen()}
    inputs, labels = mqar(200, 64, random_non_queries=True, **options)
    asked = labels != -100
    free = ~asked
    free[:, :8] = False
    assert asked.sum(1).eq(4).all()
    for row, want in rows((inputs, labels)):
        memory = {row[2 * i]: row[2 * i + 1] for i in range(4)}
        assert all(w == -100 or memory[t] == w for t, w in zip(row, want, strict=True))
    share = torch.bincount(inputs[free], minlength=30) / free.sum()
    torch.testing.assert_close(share, torch.full((30,), 1 / 30), atol=0.01, rtol=0)


@pytest.mark.parametrize(("length", "pairs", "vocab"), [(15, 3, 64), (16, 5, 64), (64, 16, 32)])
def test_mqar_refuses_what_does_not_fit(length, pairs, vocab):
    with pytest.raises(ValueError, match=r"length|vocabulary"):
        mqar(2, length, pairs=pairs, vocab=vocab, generator=gen())


# -- copying


@pytest.mark.parametrize("selective", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_copying_asks_for_the_tokens_in_their_order(selective, reverse):
    length, tokens, alphabet = 20, 6, 9
    data = copying(
        300, length, tokens=tokens, alphabet=alphabet, selective=selective, reverse=reverse,
        generator=gen(),
    )  # fmt: skip
    places = []
    for row, labels in rows(data):
        body, end = row[: length + tokens], row[length + tokens :]
        assert end == [alphabet - 1] * tokens
        said = [t for t in body if t != 0]
        assert len(said) == tokens
        assert all(1 <= t <= alphabet - 2 for t in said)
        assert labels == [-100] * (length + tokens) + (said[::-1] if reverse else said)
        places += [t for t, token in enumerate(body) if token]
    if selective:
        counts = torch.bincount(torch.tensor(places), minlength=length + tokens).float()
        assert counts.min() > 0.6 * counts.mean()
        assert len(counts) == length + tokens
    else:
        assert set(places) == set(range(tokens))


@pytest.mark.parametrize("lag", [0, 1, 7, 10])
def test_lagged_is_the_input_of_before(lag):
    for row, labels in rows(lagged(20, 10, lag=lag, alphabet=6, generator=gen())):
        assert labels == [row[t - lag] if t >= lag else 0 for t in range(10)]
        assert all(1 <= t <= 4 for t in row)


# -- induction


def test_induction_asks_for_what_stood_behind_the_trigger():
    seen = set()
    for row, labels in rows(induction(3000, 12, vocab=6, generator=gen())):
        first = row.index(5)
        assert row.count(5) == 2
        assert row[-1] == 5
        assert labels == [-100] * 11 + [row[first + 1]]
        seen.add(first)
    assert seen == set(range(10))


@pytest.mark.parametrize("triggers", [1, 4])
@pytest.mark.parametrize("every", [False, True])
def test_induction_head(triggers, every):
    counts = set()
    data = induction_head(400, 12, vocab=20, triggers=triggers, every=every, generator=gen())
    for row, labels in rows(data):
        places = [t for t in range(12) if row[t] == 18]
        counts.add(len(places))
        answer = row[places[0] + 1]
        assert row[-1] == 18
        assert all(row[t + 1] == answer for t in places)
        assert answer < 18
        assert max(places) < 10
        want = row[1:] if every else [-100] * 12
        assert labels == [*want, answer]
    assert max(counts) == (1 if triggers == 1 else 4)
    assert min(counts) == 1


@pytest.mark.parametrize("every", [False, True])
def test_associative_recall(every):
    for row, labels in rows(associative_recall(200, 11, vocab=20, every=every, generator=gen())):
        keys, values, (prefix, asked) = row[:10:2], row[1:10:2], row[10:]
        memory = {}
        for k, v in zip(keys, values, strict=True):
            assert memory.setdefault(k, v) == v
            assert k < 9 <= v < 18
        assert prefix == 18
        want = row[1:] if every else [-100] * 11
        assert labels == [*want, memory[asked]]


# -- needles


@pytest.mark.parametrize(
    ("length", "needles", "queries"), [(64, 1, 1), (40, 6, 1), (20, 6, 1), (5, 1, 1), (30, 6, 6)]
)
def test_the_asked_needle_is_answered(length, needles, queries):
    data = needle(60, length, needles=needles, queries=queries, generator=gen())
    depths, places = set(), set()
    for row, labels in rows(data):
        starts = [i for i, t in enumerate(row) if t == MARKER]
        assert len(starts) == needles
        found = {row[i + 1]: row[i + 2] for i in starts}
        assert len(found) == needles
        assert all(1 <= k <= 64 < v <= 128 for k, v in found.items())
        end = length - 2 * queries
        noise = [t for i, t in enumerate(row[:end]) if all(not s <= i < s + 3 for s in starts)]
        assert all(129 <= t <= 253 for t in noise)
        assert row[end::2] == [QUERY] * queries
        asked = row[end + 1 :: 2]
        assert len(set(asked)) == queries
        assert labels[:end] == [-100] * end
        assert labels[end::2] == [-100] * queries
        assert labels[end + 1 :: 2] == [found[k] for k in asked]
        depths.update(starts)
        places.add(list(found).index(row[-1]))
    assert places == set(range(needles)), "any needle may be asked for"
    if end > 3 * needles and queries == 1:
        assert min(depths) < length // 4 < 3 * length // 5 < max(depths) + 3


def test_needles_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="fit"):
        needle(1, 10, needles=3, generator=gen())
    with pytest.raises(ValueError, match="fit"):
        needle(1, 400, needles=65, generator=gen())
    with pytest.raises(ValueError, match="2 needles to ask"):
        needle(1, 40, needles=2, queries=3, generator=gen())
