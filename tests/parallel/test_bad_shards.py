"""What does not fit is a ValueError that says so, before anything is sent."""

import pytest
import torch
from cases import Case, build

from longscan.models import LanguageModel, LanguageModelConfig
from longscan.parallel import SequenceParallel

CASE = Case("gla,gla", (4, 5))


def _raised(call):
    """The message of a ValueError, or None."""
    try:
        call()
    except ValueError as problem:
        return str(problem)
    return None


def _wrong_sizes(group):
    sequence = SequenceParallel(group)
    messages = [
        _raised(lambda: sequence.shards(9, lengths=[4, 4])),
        _raised(lambda: sequence.shards(9, lengths=[3, 3, 3])),
        _raised(lambda: sequence.shards(9, lengths=[9, 0])),
        _raised(lambda: sequence.shards(1)),
        _raised(lambda: sequence.shards(9, cu_seqlens=torch.tensor([0, 4, 8]))),
        _raised(lambda: sequence.shards(9).shard(torch.zeros(2, 8))),
    ]
    return messages, sequence.traffic


def test_wrong_sizes(ranks):
    for messages, traffic in ranks.run(_wrong_sizes, size=2):
        for message, words in zip(
            messages,
            ("add up to 8, not 9", "3 lengths for 2 ranks", "every rank needs one",
             "every rank needs one", "cu_seqlens", "cut 9 tokens"),
            strict=True,
        ):  # fmt: skip
            assert message is not None
            assert words in message
        _nothing(traffic)


def _nothing(traffic):
    assert (traffic.bytes, traffic.gathers, traffic.reductions, traffic.messages) == (0, 0, 0, 0)


def _wrong_calls(group):
    sequence, model = SequenceParallel(group), build(CASE)
    ids = torch.zeros(2, 9, dtype=torch.int64)
    shards = sequence.shards(9, lengths=[4, 5])
    packed = sequence.shards(9, cu_seqlens=torch.tensor([0, 3, 9]))
    short = sequence.shards(9, lengths=[8, 1] if sequence.rank else [1, 8])
    mine, bounds = shards.shard(ids), torch.tensor([0, mine_length(shards)])
    mask = torch.ones_like(mine)
    messages = [
        _raised(lambda: model(ids, shards=shards)),
        _raised(lambda: model(mine[:1], cu_seqlens=bounds, shards=shards)),
        _raised(lambda: model(mine, attention_mask=mask, shards=shards)),
        _raised(lambda: model(packed.shard(ids), shards=packed)),
        _raised(lambda: model(short.shard(ids), shards=short)),
    ]
    return messages, sequence.traffic


def mine_length(shards):
    return shards.length


def test_wrong_calls(ranks):
    """Whole ids, boundaries beside shards, a mask beside shards, a batch for a packed row, a batch
    of shards of one token."""
    for messages, traffic in ranks.run(_wrong_calls, size=2):
        for message, words in zip(
            messages,
            ("shards.shard", "SequenceParallel.shards", "not both", "one row, not 2",
             "two tokens on every rank"),
            strict=True,
        ):  # fmt: skip
            assert message is not None, words
            assert words in message
        _nothing(traffic)


def _one_token_somewhere(group):
    """Only rank 1 holds one token of a batch: all ranks must hear of it."""
    sequence, model = SequenceParallel(group), build(CASE)
    ids = torch.zeros(2, 9, dtype=torch.int64)
    shards = sequence.shards(9, lengths=[8, 1])
    return _raised(lambda: model(shards.shard(ids), shards=shards)), sequence.traffic


def test_one_token_on_another_rank(ranks):
    for message, traffic in ranks.run(_one_token_somewhere, size=2):
        assert message is not None
        assert "two tokens on every rank" in message
        _nothing(traffic)


def _bidirectional(group, name):
    sequence = SequenceParallel(group)
    torch.manual_seed(0)
    config = LanguageModelConfig(
        29, d_model=16, n_layers=1, pattern=name, mixers={name: {"bidirectional": True}}
    )
    model = LanguageModel(config)
    ids = torch.zeros(2, 8, dtype=torch.int64)
    shards = sequence.shards(8)
    return _raised(lambda: model(shards.shard(ids), shards=shards)), sequence.traffic


@pytest.mark.parametrize("name", ["s4d", "s4", "mega"])
def test_bidirectional_mixers(ranks, name):
    for message, traffic in ranks.run(_bidirectional, name, size=2):
        assert message is not None
        assert "bidirectional" in message
        _nothing(traffic)


def _wrong_settings(group):
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    return [
        _raised(lambda: SequenceParallel(mesh)),
        _raised(lambda: SequenceParallel(group, method="ring")),
        _raised(lambda: SequenceParallel(group, blocks=0)),
        _raised(lambda: SequenceParallel(group, per_host=0)),
        _raised(lambda: SequenceParallel(group, micro_batches=-1)),
    ]


def test_wrong_settings(ranks):
    for messages in ranks.run(_wrong_settings):
        for message, words in zip(
            messages,
            ('mesh["sp"]', "allgather, allscan, doubling, hierarchical, auto", "blocks must",
             "per_host must", "micro_batches must"),
            strict=True,
        ):  # fmt: skip
            assert message is not None
            assert words in message


def test_no_process_group():
    with pytest.raises(RuntimeError, match="init_process_group"):
        SequenceParallel()
