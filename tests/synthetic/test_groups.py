"""Groups obey their axioms; word problems and parity against a loop over permutations."""

import math
from itertools import pairwise
from itertools import permutations as all_permutations

import pytest
import torch

from longscan.synthetic import groups

GROUPS = {
    "Z2": (groups.cyclic(2), 2),
    "Z60": (groups.cyclic(60), 60),
    "S3": (groups.symmetric(3), 6),
    "S4": (groups.symmetric(4), 24),
    "S5": (groups.symmetric(5), 120),
    "A4": (groups.alternating(4), 12),
    "A5": (groups.alternating(5), 60),
    "A4xZ5": (groups.product(groups.alternating(4), groups.cyclic(5)), 60),
}


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("table", "order"), GROUPS.values(), ids=GROUPS)
def test_group_axioms(table, order):
    everyone = torch.arange(order)
    assert table.shape == (order, order)
    assert torch.equal(table[0], everyone)
    assert torch.equal(table[:, 0], everyone)
    assert torch.equal(table.sort(1).values, everyone.expand(order, -1))  # every inverse exists
    a, b, c = torch.randint(order, (3, 2000), generator=gen())
    assert torch.equal(table[table[a, b], c], table[a, table[b, c]])


@pytest.mark.parametrize("name", ["S3", "S4", "S5", "A4", "A5"])
def test_permutation_groups_compose_left_first(name):
    n, even = int(name[1]), name[0] == "A"
    found = groups.permutations(n, even=even)
    assert found[0].tolist() == list(range(n))
    assert len(found) == math.factorial(n) // (2 if even else 1)
    assert len({tuple(p) for p in found.tolist()}) == len(found)
    table = GROUPS[name][0]
    for x, y in torch.randint(len(found), (50, 2), generator=gen()).tolist():
        p, q = found[x].tolist(), found[y].tolist()
        assert found[table[x, y]].tolist() == [q[p[i]] for i in range(n)]


def test_only_solvable_controls_are_solvable():
    """The group made by all commutators, again and again, reaches {1} or not."""

    def core(table):
        inverse = (table == 0).long().argmax(1)
        members = set(range(len(table)))
        while True:
            made = {0} | {
                int(table[table[a, b], table[inverse[a], inverse[b]]])
                for a in members
                for b in members
            }
            while True:
                more = made | {int(table[a, b]) for a in made for b in made}
                if more == made:
                    break
                made = more
            if made == members:
                return len(members)
            members = made

    tables = {n: t.tolist() for n, (t, _) in GROUPS.items()}
    assert core(torch.tensor(tables["S4"])) == 1
    assert core(torch.tensor(tables["A4xZ5"])) == 1
    assert core(torch.tensor(tables["A5"])) == 60


def test_moving_few_things():
    assert groups.moving(5, 2).tolist()[0] == 0
    assert len(groups.moving(5, 2)) == 1 + 10
    assert len(groups.moving(5, 3)) == 1 + 10 + 20
    brute = [
        i
        for i, p in enumerate(all_permutations(range(4)))
        if sum(map(int.__ne__, p, range(4))) <= 3
    ]
    assert groups.moving(4, 3).tolist() == brute


@pytest.mark.parametrize("length", [1, 2, 3, 8, 13, 33])
def test_word_problem_is_the_running_product(length):
    found = groups.permutations(5).tolist()
    inputs, labels = groups.word_problem(6, length, table=groups.symmetric(5), generator=gen())
    assert inputs.shape == labels.shape == (6, length)
    for xs, ys in zip(inputs.tolist(), labels.tolist(), strict=True):
        acc = list(range(5))
        for x, y in zip(xs, ys, strict=True):
            acc = [found[x][acc[i]] for i in range(5)]
            assert found[y] == acc


def test_word_problem_options():
    swaps = groups.moving(3, 2)
    inputs, labels = groups.word_problem(
        200, 10, table=groups.symmetric(3), elements=swaps, bos=True, generator=gen()
    )
    assert inputs.shape == (200, 10)
    assert (inputs[:, 0] == 6).all()
    assert (labels[:, 0] == 6).all()
    assert set(inputs[:, 1:].unique().tolist()) == set(swaps.tolist())
    assert set(labels[:, 1:].unique().tolist()) == set(range(6))
    plain = groups.word_problem(200, 9, table=groups.symmetric(3), elements=swaps, generator=gen())
    assert torch.equal(plain[1], labels[:, 1:])


@pytest.mark.parametrize("every", [False, True])
def test_parity_and_relatives(every):
    def check(pair, rule):
        for xs, ys in zip(pair[0].tolist(), pair[1].tolist(), strict=True):
            want = [rule(xs[: t + 1]) for t in range(len(xs))]
            assert ys == (want if every else [-100] * (len(xs) - 1) + want[-1:])

    options = {"every": every, "generator": gen()}
    check(groups.parity(30, 11, **options), lambda xs: sum(xs) % 2)
    changes = lambda xs: sum(a != b for a, b in pairwise(xs)) % 2  # noqa: E731
    check(groups.even_pairs(30, 11, **options), changes)
    check(groups.cycle_navigation(30, 11, **options), lambda xs: sum(x - 1 for x in xs) % 5)
