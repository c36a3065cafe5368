"""The cost model against sums done by hand, and against what its papers say."""

import math

import pytest

from longscan.parallel import cost
from longscan.parallel.cost import Element, Link, Tokens, blocks, choose, fit, received, seconds

# One second a message, 100 bytes a second: b = 8 s, b' = 10 s.
UNIT, EIGHT = Link(1.0, 100.0), Element(800, 200)
MIB = 2**20
NVLINK, NETWORK = Link(20e-6, 300e9), Link(20e-6, 40e9)


@pytest.mark.parametrize(
    ("method", "by_hand"),
    [
        ("allgather", 1 + 3 * 10),
        ("ring", 3 * (1 + 10)),
        ("allscan", (4 - 2 + 4) * (1 + 8 / 4)),  # the best n is sqrt(2 * 8 / 1) = 4
        ("doubling", 2 * (1 + 10)),
        ("lasp", 3 * (1 + 8)),
    ],
)
def test_seconds_of_four_ranks(method, by_hand):
    assert seconds(method, 4, EIGHT, UNIT) == pytest.approx(by_hand)
    assert seconds(method, 1, EIGHT, UNIT) == 0


def test_blocks_are_the_callers_or_the_best():
    assert seconds("allscan", 4, EIGHT, UNIT, blocks=1) == 3 * 9 == seconds("lasp", 4, EIGHT, UNIT)
    assert seconds("allscan", 4, EIGHT, UNIT, blocks=2) == 4 * 5
    assert blocks(4, 800, UNIT) == 4
    assert blocks(2, 800, UNIT) == 1
    assert blocks(64, 1, NETWORK) == 1


def test_links_that_cost_nothing():
    """A chain with no latency gets as many blocks as numbers; one rank needs no link."""
    assert blocks(4, 800, Link(0.0, 100.0)) == 200
    assert seconds("allscan", 4, EIGHT, Link(0.0, 100.0)) == pytest.approx(202 * 0.04)
    nothing = Link(0.0, math.inf)
    assert blocks(1, 800, nothing) == blocks(8, 800, nothing) == 1
    assert choose(1, EIGHT, nothing) == "allgather"


@pytest.mark.parametrize("ranks", [2, 3, 5, 8, 64, 1000])
@pytest.mark.parametrize("size", [64, 3e4, 2 * MIB, 5e8])
def test_no_other_number_of_blocks_is_faster(ranks, size):
    best = blocks(ranks, size, NETWORK)
    times = {n: seconds("allscan", ranks, Element(size), NETWORK, blocks=n) for n in
             {1, best, best + 1, max(1, best - 1), 2 * best, *range(1, 200)}}  # fmt: skip
    assert times[best] == min(times.values())
    # The bound that n* reaches where it is a whole number: (sqrt((P - 2) a) + sqrt(b))^2.
    b = size / NETWORK.bandwidth
    bound = (math.sqrt((ranks - 2) * NETWORK.latency) + math.sqrt(b)) ** 2
    assert bound * (1 - 1e-12) <= times[best] == seconds("allscan", ranks, Element(size), NETWORK)
    if best > 20:
        assert times[best] < 1.001 * bound


def test_hosts():
    """Four ranks in two hosts: gather inside, one hop between, then on to the other rank."""
    outer = Link(2.0, 50.0)
    hosts = {"per_host": 2, "outer": outer}
    assert seconds("hierarchical", 4, EIGHT, UNIT, **hosts) == (1 + 10) + (2 + 16) + (1 + 8)
    assert seconds("hierarchical", 2, EIGHT, UNIT, **hosts) == 1 + 10  # one host alone
    assert seconds("hierarchical", 4, EIGHT, UNIT) == seconds("allgather", 4, EIGHT, UNIT)
    alone = {"per_host": 1, "outer": outer}
    chain = seconds("allscan", 4, EIGHT, outer)
    assert seconds("hierarchical", 4, EIGHT, UNIT, **alone) == chain
    # The slow link decides for the others, but only where there are two hosts.
    assert seconds("allgather", 4, EIGHT, UNIT, **hosts) == seconds("allgather", 4, EIGHT, outer)
    assert seconds("allgather", 2, EIGHT, UNIT, **hosts) == seconds("allgather", 2, EIGHT, UNIT)


def test_the_papers_examples():
    """A state of 2 MiB: milliseconds as the analysis of ZeCO's cost gives them."""
    e = Element(2 * MIB)
    ms = {m: 1e3 * seconds(m, 64, e, NETWORK) for m in cost.CHOICE}
    assert ms["allgather"] == pytest.approx(3.3, abs=0.05)
    assert ms["allscan"] == pytest.approx(1.8, abs=0.05)
    assert ms["doubling"] == pytest.approx(0.4, abs=0.05)
    small = Link(15e-6, 300e9)
    assert 1e3 * seconds("allgather", 8, e, small) == pytest.approx(0.06, abs=0.005)
    assert 1e3 * seconds("allscan", 8, e, small) == pytest.approx(0.15, abs=0.005)
    assert 1e3 * seconds("allscan", 8, e, NVLINK) == pytest.approx(0.19, abs=0.01)


def test_bytes_of_states():
    assert [received(m, 4, EIGHT) for m in ("allgather", "ring")] == [3000, 3000]
    assert [received(m, 4, EIGHT) for m in ("allscan", "lasp")] == [800, 800]
    assert [received("doubling", p, EIGHT) for p in (1, 2, 3, 4, 5)] == [0, 1000, 2000, 2000, 3000]
    assert received("hierarchical", 4, EIGHT, per_host=2) == 1000 + 800
    assert received("hierarchical", 4, EIGHT, per_host=8) == 3000
    assert all(received(m, 1, EIGHT) == 0 for m in cost.STATES)


def test_bytes_of_a_chain_do_not_grow_with_ranks():
    ranks = [2, 3, 8, 64, 1024]
    assert {received("allscan", p, EIGHT) for p in ranks} == {800}
    gathered = [received("allgather", p, EIGHT) / (p - 1) for p in ranks]
    assert set(gathered) == {1000}
    doubled = [received("doubling", p, EIGHT) for p in ranks]
    assert doubled == sorted(doubled)
    assert doubled[-1] == 10 * 1000


def test_tokens():
    """B = 2, N = 1000, D = 64 in two bytes: 4 B N D (P - 1) / P^2, and 2 (P - 1) B N / P D."""
    t = Tokens(1000, 64, batch=2)
    bnd = 2 * 1000 * 64 * 2
    assert received("ulysses", 4, t) == 4 * bnd * 3 / 16 == received("ulysses", 4, t, backward=True)
    for m in ("ring_attention", "lasp2h"):
        assert received(m, 4, t) == 2 * 3 * bnd / 4
        assert received(m, 4, t, backward=True) == 4 * 3 * bnd / 4
    grouped = Tokens(1000, 64, kv_width=16, batch=2)
    assert received("ring_attention", 4, grouped) == 2 * 3 * bnd / 4 / 4
    assert received("ulysses", 4, grouped) == (2 + 2 / 4) * bnd * 3 / 16
    link = Link(0.5, 1000.0)
    ring = 3 * (0.5 + 2 * bnd / 4 / 1000)
    assert seconds("ring_attention", 4, t, link) == pytest.approx(ring)
    assert seconds("ulysses", 4, t, link) == pytest.approx(2 * 0.5 + 4 * bnd * 3 / 16 / 1000)
    forward, backward = (seconds("lasp2h", 4, t, link, backward=b) for b in (False, True))
    assert backward == pytest.approx(2 * forward)


def test_tokens_cost_more_the_more_they_are_and_states_do_not():
    more, fewer = Tokens(2**20, 2048), Tokens(2**14, 2048)
    assert received("ring_attention", 8, more) == 64 * received("ring_attention", 8, fewer)
    assert received("ulysses", 64, more) < received("ulysses", 8, more)


@pytest.mark.parametrize("ranks", range(3, 9))
def test_few_ranks_of_a_host_gather_small_states(ranks):
    assert choose(ranks, Element(64 * 1024, 1024), NVLINK) == "allgather"


def test_many_ranks_do_not_gather():
    hosts = {"per_host": 8, "outer": NETWORK}
    assert choose(1024, Element(2 * MIB, 4096), NVLINK, **hosts) == "doubling"
    # With one-sided writes and transitions as large as states, a chain is the fastest.
    fast = Link(1e-7, 40e9)
    assert choose(64, Element(4 * MIB, 4 * MIB), fast) == "allscan"
    assert choose(16, Element(2 * MIB, 4096), NVLINK, **hosts) == "hierarchical"


@pytest.mark.parametrize("ranks", [2, 7, 16, 100])
def test_the_choice_is_the_fastest(ranks):
    for e in (Element(1e3), Element(1e6, 1e3), Element(1e8, 1e8)):
        hosts = {"per_host": 8, "outer": NETWORK}
        best = seconds(choose(ranks, e, NVLINK, **hosts), ranks, e, NVLINK, **hosts)
        assert best == min(seconds(m, ranks, e, NVLINK, **hosts) for m in cost.CHOICE)


def test_a_link_from_times():
    link = Link(12e-6, 7e9)
    exact = [(float(4**k), link.seconds(4**k)) for k in range(4, 12)]
    found = fit(exact)
    assert found.latency == pytest.approx(link.latency)
    assert found.bandwidth == pytest.approx(link.bandwidth)
    off = [(x, t * (1.1 if i % 2 else 0.9)) for i, (x, t) in enumerate(exact)]
    assert fit(off).latency == pytest.approx(link.latency, rel=0.2)
    assert fit(off).bandwidth == pytest.approx(link.bandwidth, rel=0.2)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Link(-1, 1), "0 seconds or more"),
        (lambda: Link(0, 0), "above 0"),
        (lambda: Link(math.nan, 1), "0 seconds or more"),
        (lambda: Element(0), "a state has bytes"),
        (lambda: Element(1, -1), "not fewer than 0"),
        (lambda: seconds("allreduce", 2, EIGHT, UNIT), "unknown method 'allreduce'"),
        (lambda: seconds("allscan", 2, Tokens(1, 1), UNIT), "moves Element"),
        (lambda: received("ulysses", 2, EIGHT), "moves Tokens"),
        (lambda: seconds("allscan", 0, EIGHT, UNIT), "at least one rank"),
        (lambda: seconds("allscan", 2, EIGHT, UNIT, blocks=0), "one block"),
        (lambda: seconds("allscan", 2, EIGHT, UNIT, per_host=2), "go together"),
        (lambda: seconds("allscan", 2, EIGHT, UNIT, per_host=0, outer=UNIT), "one rank a host"),
        (lambda: fit([(8.0, 1.0), (8.0, 1.1)]), "several sizes"),
        (lambda: fit([(8.0, 1.0), (800.0, 0.5)]), "too noisy"),
    ],
)
def test_what_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
