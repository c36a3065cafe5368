"""What crosses between ranks, counted: numbers of collectives and messages, and bytes."""

import time
from pathlib import Path

import pytest
import torch
from cases import EXACT, Case, build, differences, joined, run, whole

from longscan.ops.attention import attention
from longscan.ops.decay import decay
from longscan.ops.delta import delta
from longscan.parallel import SequenceParallel, cost

B, H, K, V, T = 2, 3, 4, 5, 16

STATE = 8 * B * H * K * V
TRANSITION = {
    "linear": 0,
    "scalar": 8 * B * H,
    "per key": 8 * B * H * K,
    "delta": 8 * B * H * K * K,
}


def _tokens(shards, *shape):
    g = torch.Generator().manual_seed(len(shape))
    x = torch.randn(B, T, *shape, dtype=torch.float64, generator=g)
    return shards.shard(x).clone().requires_grad_()


def _op(shards, family):
    q, k, v = (_tokens(shards, H, n) for n in (K, K, V))
    if family == "delta":
        return delta(q, k, v, torch.sigmoid(_tokens(shards, H)))[0]
    if family == "linear":
        return decay(q, k, v)[0]
    gates = _tokens(shards, H) if family == "scalar" else _tokens(shards, H, K)
    return decay(q, k, v, -gates.abs())[0]


def _counted(group, family, parallel):
    """A task: (bytes, gathers, reductions, messages) of forward and of backward."""
    sequence = SequenceParallel(group, **parallel)
    shards = sequence.shards(T)
    with shards.active():
        o = _op(shards, family)
    forward = _counts(sequence)
    o.sum().backward()
    return forward, _counts(sequence)


def _counts(sequence):
    sequence.finish()
    t = sequence.traffic
    found = (t.bytes, t.gathers, t.reductions, t.messages)
    t.reset()
    return found


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("family", TRANSITION)
def test_one_gather_each_way(ranks, family, size):
    """LASP-2: (P - 1) (U + A) bytes, on all ranks, in one collective."""
    want = ((size - 1) * (STATE + TRANSITION[family]), 1, 0, 0)
    assert want[0] == cost.received("allgather", size, cost.Element(STATE, TRANSITION[family]))
    for forward, backward in ranks.run(_counted, family, {"method": "allgather"}, size=size):
        assert forward == want
        assert backward == want


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("family", TRANSITION)
def test_a_chain_sends_states_alone(ranks, family, size, blocks):
    """ZeCO: U bytes on a rank, however many ranks there are, and no A."""
    parallel = {"method": "allscan", "blocks": blocks}
    found = ranks.run(_counted, family, parallel, size=size)
    for rank, counts in enumerate(found):
        for (n, gathers, reductions, messages), ends in zip(counts, (0, size - 1), strict=True):
            assert n == (0 if rank == ends else STATE)
            assert (gathers, reductions) == (0, 0)
            assert messages == (0 if rank == ends else blocks)


@pytest.mark.parametrize("family", TRANSITION)
def test_doubling(ranks, family):
    """Rank i receives once for each power of two up to i, without A where a sequence begins."""
    pair = STATE + TRANSITION[family]
    want = [0, STATE, pair + STATE, pair + STATE]
    found = ranks.run(_counted, family, {"method": "doubling"})
    assert [forward[0] for forward, _ in found] == want
    assert [backward[0] for _, backward in found] == want[::-1]
    assert max(want) <= cost.received("doubling", 4, cost.Element(STATE, TRANSITION[family]))


@pytest.mark.parametrize("family", TRANSITION)
def test_hosts_of_two(ranks, family):
    pair = STATE + TRANSITION[family]
    found = ranks.run(_counted, family, {"method": "hierarchical", "per_host": 2})
    want = [pair, pair, pair + STATE, pair + STATE]
    assert [forward[0] for forward, _ in found] == want
    assert [backward[0] for _, backward in found] == want[::-1]
    element = cost.Element(STATE, TRANSITION[family])
    assert max(want) == cost.received("hierarchical", 4, element, per_host=2)


def _attended(group):
    sequence = SequenceParallel(group)
    shards = sequence.shards(T)
    with shards.active():
        o, _ = attention(_tokens(shards, 4, K), _tokens(shards, 2, K), _tokens(shards, 2, K))
    forward = dict(sequence.traffic.by_kind), _counts(sequence)
    o.sum().backward()
    return forward, (dict(sequence.traffic.by_kind), _counts(sequence))


@pytest.mark.parametrize("size", [2, 4])
def test_softmax_attention(ranks, size):
    """LASP-2H: a gather of keys and values, and one reduction of their gradients."""
    want = (size - 1) * 8 * B * (T // size) * 2 * (2 * K)
    for (there, ahead), (back, behind) in ranks.run(_attended, size=size):
        assert (ahead[1], ahead[2], there["keys and values"]) == (1, 0, want)
        assert (behind[1], behind[2], back["gradients of keys and values"]) == (0, 1, want)


def _layers(group, case):
    """A task: traffic of a model's forward and backward."""
    sequence, model = SequenceParallel(group, **case.parallel), build(case)
    ids = torch.arange(case.total).remainder(29).expand(case.rows, -1)
    shards = sequence.shards(case.total, lengths=case.lengths, final_states=False)
    logits, _ = model(shards.shard(ids), shards=shards)
    forward = dict(sequence.traffic.by_kind), _counts(sequence)
    logits.square().sum().backward()
    return forward, (dict(sequence.traffic.by_kind), _counts(sequence))


@pytest.mark.parametrize(
    ("pattern", "gathers", "softmax"),
    [("gla,gla,gla", 3, 0), ("gated_deltanet,attention", 1, 1), ("mlstm,mamba2", 2, 0)],
)
def test_layers_of_a_model(ranks, pattern, gathers, softmax):
    """One all-gather for each linear layer and direction; of a softmax layer one gather, and a
    reduction in the backward; convolutions of a layer have a message to the neighbour each way."""
    case = Case(pattern, (5, 5, 5, 5))
    for (_, ahead), (_, behind) in ranks.run(_layers, case):
        assert ahead[1:3] == (gathers + softmax, 0)
        assert behind[1:3] == (gathers, softmax)


# Blocks that are computed again.


def _again(group, case):
    sequence, model = SequenceParallel(group, **case.parallel), build(case)
    found = run(case, model, sequence)
    return found, dict(sequence.traffic.by_kind)


RECOMPUTED = [
    (pattern, packed, {"method": "allgather"})
    for pattern in ("gla,gla", "gated_deltanet,mamba", "mlstm,slstm", "rwkv7,rwkv7", "s4d,mamba2")
    for packed in (None, (0, 3, 18, 20))
] + [
    (pattern, (0, 3, 18, 20), {"method": method, "blocks": 2})
    for pattern in ("gla,gated_deltanet", "mlstm,mamba")
    for method in ("allscan", "doubling")
]


@pytest.mark.parametrize(("pattern", "packed", "method"), RECOMPUTED)
def test_recomputation_sends_nothing(ranks, pattern, packed, method):
    """Gradients and bytes are those of a model that keeps everything."""
    once = Case(pattern, (6, 2, 7, 5), packed=packed, warm=True, parallel=method)
    twice = Case(pattern, (6, 2, 7, 5), packed=packed, warm=True, parallel=method, again=True)
    kept = [traffic for _, traffic in ranks.run(_again, once)]
    ranks.start(_again, twice)
    want = whole(twice)
    found = ranks.results()
    assert [traffic for _, traffic in found] == kept
    got = joined([f for f, _ in found])
    wrong = {k: e for k, e in differences(got, want).items() if e > EXACT["float64"]}
    assert not wrong, wrong


@pytest.mark.parametrize("pattern", ["attention,gla", "sliding_attention,gla"])
def test_recomputed_attention(ranks, pattern):
    """Keys and values are gathered anew: they are as large as what recomputation saves."""
    case = Case(pattern, (6, 2, 7, 5), again=True, warm=True)
    ranks.start(_again, case)
    want = whole(case)
    got = joined([f for f, _ in ranks.results()])
    wrong = {k: e for k, e in differences(got, want).items() if e > EXACT["float64"]}
    assert not wrong, wrong


# Against what the operating system counts.

LOOPBACK = Path("/sys/class/net/lo/statistics/rx_bytes")


def _large(group, parallel):
    """A task: bytes counted in a forward and backward with states of 1.5 MiB."""
    sequence = SequenceParallel(group, **parallel)
    shards = sequence.shards(8)
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 8, 12, 128, generator=g)
    v = torch.cat([v, v], -1)
    q, k, v = (shards.shard(x).clone().requires_grad_() for x in (q, k, v))
    with shards.active():
        o, _ = decay(q, k, v)
    o.sum().backward()
    sequence.finish()
    return sequence.traffic.bytes


@pytest.mark.skipif(not LOOPBACK.exists(), reason="no counter of the loopback device")
@pytest.mark.parametrize("method", ["allgather", "allscan", "doubling"])
def test_bytes_of_the_loopback_device(ranks, method):
    """Sums over ranks agree within framing; others may use the device, so the least of some."""
    found = []
    for _ in range(6):
        before = int(LOOPBACK.read_text())
        counted = sum(ranks.run(_large, {"method": method, "blocks": 4}))
        found.append((int(LOOPBACK.read_text()) - before) / counted)
        assert found[-1] >= 1.0
        if found[-1] < 1.05:
            break
        time.sleep(0.2)
    assert min(found) < 1.05, f"{min(found):.3f} times what was counted"
