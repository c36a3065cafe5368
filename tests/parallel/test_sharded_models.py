"""T7: a model over 2 and 4 processes equals one process, for every mixer of the registry.

Logits or loss, final states, gradients of all parameters and of the states that entered.
"""

import random

import pytest
import torch
from cases import EXACT, Case, agree, build, differences, inputs, joined, whole
from helpers import error

from longscan import registry
from longscan.mixers._codebook import Codebook
from longscan.parallel import SequenceParallel, scan

# Processes know the mixers of the package, not those that other tests add.
MIXERS = [n for n in registry.names() if str(registry.entry(n).target).startswith("longscan.")]
every_mixer = pytest.mark.parametrize("name", MIXERS)

# One for each form of a transition, and what crosses besides states.
FORMS = {
    "identity": "linear_attention",
    "scalar": "mamba2",
    "per key": "gla",
    "per channel": "mamba",
    "complex": "s4d",
    "dense": "lssl",
    "delta rule": "gated_deltanet",
    "low rank": "rwkv7",
    "scaled": "mlstm",
    "scaled, by channel": "rwkv4",
    "slots": "gam_written",
    "rotating": "mamba3",
}
METHODS = {
    "allscan, 3 blocks": {"method": "allscan", "blocks": 3},
    "doubling": {"method": "doubling"},
    "hosts of 2": {"method": "hierarchical", "per_host": 2},
    "hosts of 3 and 1": {"method": "hierarchical", "per_host": 3},
}


def two(name):
    """The pattern of two blocks."""
    return f"{name},{name}"


@every_mixer
def test_batch_on_four(ranks, name):
    """Shards of unequal lengths, one shorter than a convolution's window; states entered."""
    agree(ranks, Case(two(name), (7, 2, 11, 9), rows=3, warm=True))


@every_mixer
def test_packed_on_four(ranks, name):
    """Sequences begin in shards and pass whole ones, one of a single token; states entered."""
    agree(ranks, Case(two(name), (7, 1, 11, 9), packed=(0, 3, 12, 22, 28), warm=True))


@every_mixer
def test_loss_on_two(ranks, name):
    """One row, of which one rank holds one token."""
    agree(ranks, Case(two(name), (22, 1), rows=1, loss=True))


@every_mixer
def test_packed_loss_on_two(ranks, name):
    agree(ranks, Case(two(name), (1, 22), packed=(0, 4, 17, 23), loss=True))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("name", FORMS.values(), ids=FORMS)
def test_methods(ranks, name, method):
    packed = (0, 2, 20) if method["method"] == "doubling" or method.get("per_host") == 3 else None
    lengths = (5, 1, 8, 6) if packed else (5, 3, 7, 6)
    agree(ranks, Case(two(name), lengths, packed=packed, warm=True, parallel=method))


@pytest.mark.parametrize("name", ["gated_deltanet", "mlstm"])
def test_auto(ranks, name):
    agree(ranks, Case(two(name), (5, 3, 7, 6), parallel={"method": "auto"}))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@every_mixer
def test_all_methods(ranks, name, method):
    agree(ranks, Case(two(name), (7, 2, 11, 9), warm=True, parallel=method))
    agree(ranks, Case(two(name), (7, 1, 11), packed=(0, 3, 15, 19), loss=True, parallel=method))


def _any(seed):
    """A random case: mixers, shards, packing, method."""
    r = random.Random(seed)
    pattern = ",".join(r.choice(MIXERS) for _ in range(r.choice([1, 2, 3])))
    packed, size = None, r.choice([2, 3, 4, 4])
    lengths = tuple(r.choice([1, 2, 3, 5, 9]) for _ in range(size))
    total = sum(lengths)
    if min(lengths) == 1 or r.random() < 0.5:
        cuts = r.sample(range(1, total), min(total - 1, r.choice([0, 1, 2, 3, 6])))
        packed = (0, *sorted(cuts), total)
    method = {"method": r.choice(list(scan.METHODS)), "blocks": r.choice([1, 2, 3, 7, 50])}
    method |= {"per_host": r.choice([1, 2, 3, 4]), "micro_batches": r.choice([None, 1, 2, 8])}
    return Case(
        pattern,
        lengths,
        rows=r.choice([1, 2, 3, 5]),
        packed=packed,
        warm=r.random() < 0.5,
        loss=r.random() < 0.4,
        parallel=method,
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(150))
def test_any(ranks, seed):
    agree(ranks, _any(seed))


@pytest.mark.parametrize(
    "pattern",
    [
        "gated_deltanet,attention,sliding_attention",
        "mlstm,slstm",
        "rwkv7,rwkv_channel_mix,rwkv7,rwkv_channel_mix",
        "mamba2,titans_mag,gated_attention",
    ],
)
@pytest.mark.parametrize("packed", [None, (0, 5, 6, 25, 29)])
def test_hybrids(ranks, pattern, packed):
    agree(ranks, Case(pattern, (8, 2, 10, 9), packed=packed, warm=packed is None))


@pytest.mark.parametrize("name", ["gla", "gated_deltanet", "mamba", "mamba2", "mlstm", "attention"])
def test_float32(ranks, name):
    agree(ranks, Case(two(name), (7, 2, 11, 9), warm=True, dtype="float32"))


@pytest.mark.parametrize("name", ["gla", "gated_deltanet", "sliding_attention", "slstm"])
def test_three(ranks, name):
    agree(ranks, Case(two(name), (4, 5, 6), warm=True))
    agree(ranks, Case(two(name), (1, 1, 4), packed=(0, 6), loss=True))


@pytest.mark.parametrize("lengths", [(1, 2, 20, 3), (20, 1, 1, 1), (1, 1, 1, 20), (3, 30, 1, 6)])
@pytest.mark.parametrize("warm", [False, True])
def test_attention_over_very_unequal_shards(ranks, lengths, warm):
    """Queries are lent by ranks with much to do to those with little, if there are enough."""
    agree(ranks, Case("attention,gated_attention", lengths, rows=1, warm=warm))
    agree(ranks, Case("attention,sliding_attention", lengths, packed=(0, sum(lengths)), warm=warm))


@pytest.mark.parametrize("name", ["gla", "sliding_attention", "slstm"])
def test_one(ranks, name):
    """A group of one sends nothing and changes nothing."""
    agree(ranks, Case(two(name), (9,), warm=True))


# Beyond one forward and one backward of everything.


def _trailing(group, case):
    """The loss where the last rank has no target, and that of no targets at all."""
    model, sequence = build(case), SequenceParallel(group, **case.parallel)
    shards = sequence.shards(case.total, lengths=case.lengths)
    losses = []
    for targets in _targets(case):
        loss, _ = model.loss(shards.shard(_ids(case)), shards.shard(targets), shards=shards)
        loss.backward()
        losses.append(loss.detach())
    sequence.sum_gradients(model.parameters())
    return losses, [p.grad for p in model.parameters()]


def _ids(case):
    return torch.arange(case.rows * case.total).view(case.rows, -1) * 7 % 29


def _targets(case):
    some = _ids(case).roll(-1, 1)
    some[:, -case.lengths[-1] :] = -100
    return some, torch.full_like(some, -100)


def test_ranks_without_targets(ranks):
    """They take part in the backward; every rank has the same loss, to the last digit."""
    case = Case("gla,gated_deltanet", (5, 2, 6, 4))
    ranks.start(_trailing, case)
    model = build(case)
    want = [model.loss(_ids(case), targets)[0] for targets in _targets(case)]
    sum(want).backward()
    found = ranks.results()
    for losses, grads in found:
        assert losses == found[0][0]
        assert error(losses[0], want[0].detach()) <= EXACT["float64"]
        assert losses[1] == want[1] == 0
        for g, p in zip(grads, model.parameters(), strict=True):
            assert error(g, p.grad) <= EXACT["float64"]


def _tuned(group, case, frozen):
    """A task: gradients where some need none."""
    model = build(case)
    for name, p in model.named_parameters():
        p.requires_grad_(not name.startswith(frozen))
    return _partly(model, case, SequenceParallel(group, **case.parallel))


def _partly(model, case, sequence):
    ids, targets, state = inputs(case, model)
    more = {}
    if sequence is not None:
        shards = sequence.shards(case.total, lengths=case.lengths)
        ids, targets, more = shards.shard(ids), shards.shard(targets), {"shards": shards}
    loss, _ = model.loss(ids, targets, state, **more)
    loss.backward()
    found = {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    for name, t in ({} if state is None else state.flatten()).items():
        if t.is_floating_point() and t.grad is not None:
            found[f"gradient of first state {name}"] = t.grad
    if sequence is not None:
        sequence.finish()
    return found


def _summed(parts):
    names = {n for p in parts for n in p}
    return {n: sum(p[n] for p in parts if n in p) for n in names}


@pytest.mark.parametrize("frozen", ["embedding", "blocks.0", ("embedding", "blocks.0")])
@pytest.mark.parametrize("name", ["gla", "gated_deltanet", "mlstm", "sliding_attention", "slstm"])
def test_frozen_parameters(ranks, name, frozen):
    case = Case(two(name), (5, 2, 6, 4))
    model = build(case)
    for n, p in model.named_parameters():
        p.requires_grad_(not n.startswith(frozen))
    want = _partly(model, case, None)
    got = _summed(ranks.run(_tuned, case, frozen))
    wrong = {k: e for k, e in differences(got, want).items() if e > EXACT["float64"]}
    assert not wrong, wrong


@pytest.mark.parametrize("name", ["gla", "gated_deltanet", "mlstm", "rwkv7", "slstm"])
def test_only_first_states_learn(ranks, name):
    """State tuning: all parameters frozen, the states that enter are what is trained."""
    case, frozen = Case(two(name), (5, 2, 6, 4), warm=True), ("embedding", "blocks", "norm", "head")
    model = build(case)
    model.requires_grad_(False)
    want = _partly(model, case, None)
    got = _summed(ranks.run(_tuned, case, frozen))
    assert want
    wrong = {k: e for k, e in differences(got, want).items() if e > EXACT["float64"]}
    assert not wrong, wrong


def _twice(model, sequence, length):
    """Two calls, the second from the states of the first, and one backward through both."""
    torch.manual_seed(5)
    ids = torch.randint(29, (2, 2 * length))
    state, total = None, 0.0
    for part in ids.split(length, 1):
        more = {}
        if sequence is not None:
            shards = sequence.shards(length)
            part, more = shards.shard(part), {"shards": shards}
        logits, state = model(part, state, **more)
        total = total + logits.square().sum()
    total.backward()
    return [p.grad for p in model.parameters()]


def _two_calls(group, case):
    model, sequence = build(case), SequenceParallel(group, **case.parallel)
    grads = _twice(model, sequence, case.total)
    sequence.sum_gradients(model.parameters())
    sequence.finish()
    return [p.grad for p in model.parameters()] if sequence.rank == 0 else len(grads)


@pytest.mark.parametrize("name", ["gla", "gated_deltanet", "mlstm", "sliding_attention", "slstm"])
def test_states_of_an_earlier_call(ranks, name):
    case = Case(two(name), (3, 3, 3, 3))
    ranks.start(_two_calls, case)
    want = _twice(build(case), None, case.total)
    for got, w in zip(ranks.results()[0], want, strict=True):
        assert (got - w).abs().max() <= 1e-9 * max(1.0, w.abs().max().item())


def _without_gradients(group, case):
    model, sequence = build(case), SequenceParallel(group, **case.parallel)
    ids, _, _ = inputs(case, model)
    shards = sequence.shards(case.total, lengths=case.lengths, final_states=False)
    with torch.inference_mode():
        logits, state = model(shards.shard(ids), shards=shards)
        sequence.finish()
        return shards.join(logits), len(state)


@pytest.mark.parametrize("name", ["gla", "gated_deltanet", "mlstm", "attention", "slstm"])
def test_without_gradients_or_final_states(ranks, name):
    case = Case(two(name), (3, 4, 5, 6))
    want = whole(case)["logits"]
    for logits, states in ranks.run(_without_gradients, case):
        assert states == 0
        assert error(logits, want) <= EXACT["float64"]


def _learned(model, case, sequence=None):
    """Two steps of a model whose codebooks learn from keys: losses, gradients, codebooks."""
    ids, targets, _ = inputs(case, model)
    more = {"cu_seqlens": case.bounds}
    if sequence is not None:
        shards = sequence.shards(case.total, lengths=case.lengths, cu_seqlens=case.bounds)
        ids, targets, more = shards.shard(ids), shards.shard(targets), {"shards": shards}
    books = [m for m in model.train().modules() if isinstance(m, Codebook)]
    assert books
    for book in books:
        book.started.fill_(True)
    found = {}
    for step in (1, 2):
        loss, _ = model.loss(ids, targets, **more)
        loss.backward()
        found[f"loss of step {step}"] = loss.detach()
    for i, book in enumerate(books):
        found |= {f"words {i}": book.c_sum, f"words {i} counted": book.c_count}
    for n, p in model.named_parameters():
        found[f"gradient of {n}"] = p.grad
    if sequence is not None:
        sequence.finish()
    return found


def _learned_on_shards(group, case):
    return _learned(build(case), case, SequenceParallel(group, **case.parallel))


@pytest.mark.parametrize("packed", [None, (0, 3, 10, 18)])
@pytest.mark.parametrize("name", ["transformer_vq", "longvq"])
def test_codebooks_learn(ranks, name, packed):
    case = Case(two(name), (5, 3, 6, 4), rows=3, packed=packed)
    ranks.start(_learned_on_shards, case)
    want = _learned(build(case), case)
    got = joined(ranks.results())
    wrong = {k: e for k, e in differences(got, want).items() if not e <= EXACT["float64"]}
    assert not wrong, wrong


def _asked(group, case):
    """Gradients by torch.autograd.grad, which goes through what leads to its inputs alone."""
    model, sequence = build(case), SequenceParallel(group, **case.parallel)
    ids, targets, _ = inputs(case, model)
    shards = sequence.shards(case.total, lengths=case.lengths)
    loss, _ = model.loss(shards.shard(ids), shards.shard(targets), shards=shards)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    sequence.finish()
    return {
        f"gradient of {n}": g for (n, _), g in zip(model.named_parameters(), grads, strict=True)
    }


@pytest.mark.parametrize("name", ["gla", "gated_deltanet", "mlstm", "rwkv7", "attention", "slstm"])
def test_gradients_of_some_inputs(ranks, name):
    case = Case(two(name), (5, 2, 6, 4), loss=True)
    want = _partly(build(case), case, None)
    wrong = differences(_summed(ranks.run(_asked, case)), want)
    assert max(wrong.values()) <= EXACT["float64"], wrong


def _on_a_mesh(_, case):
    """Two copies of the model, each with sequences of its own on two ranks."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    model, sequence = build(case), SequenceParallel(mesh["sp"])
    torch.manual_seed(7)
    ids = torch.randint(29, (4, case.total))
    mine = ids.chunk(2)[mesh["dp"].get_local_rank()]
    shards = sequence.shards(case.total)
    loss, _ = model.loss(shards.shard(mine), shards.shard(mine.roll(1, 1)), shards=shards)
    loss.backward()
    sequence.sum_gradients(model.parameters())
    return loss.detach(), [p.grad for p in model.parameters()]


def test_two_groups_of_two(ranks):
    case = Case("gla,gated_deltanet", (6, 6))
    ranks.start(_on_a_mesh, case)
    torch.manual_seed(7)
    halves = torch.randint(29, (4, case.total)).chunk(2)
    found = ranks.results()
    for i, half in enumerate(halves):
        model = build(case)
        loss, _ = model.loss(half, half.roll(1, 1))
        loss.backward()
        for got, grads in found[2 * i : 2 * i + 2]:
            assert error(got, loss.detach()) <= EXACT["float64"]
            for g, p in zip(grads, model.parameters(), strict=True):
                assert error(g, p.grad) <= EXACT["float64"]
