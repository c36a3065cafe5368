"""A rank that dies, or does not answer, gives the others an error in time; nothing hangs."""

import os
import time

import pytest
import torch
from cases import Case, build
from ranks import Lost, fresh

from longscan.parallel import SequenceParallel

TIMEOUT = 4.0


def _dies(group, case, where, how):
    """A task: rank 1 stops at a place in the second block; the others say what they were told."""
    sequence, model = SequenceParallel(group, **case.parallel), build(case)
    if sequence.rank == 1:
        stop = (lambda *_: os._exit(1)) if how == "dies" else (lambda *_: time.sleep(60))
        block = model.blocks[1]
        if where == "forward":
            block.register_forward_pre_hook(stop)
        else:
            block.register_full_backward_pre_hook(stop)
    ids = torch.arange(case.total).remainder(29).expand(case.rows, -1)
    shards = sequence.shards(case.total)
    begun = time.monotonic()
    try:
        loss, _ = model.loss(shards.shard(ids), shards.shard(ids), shards=shards)
        loss.backward()
        sequence.sum_gradients(model.parameters())
        sequence.finish()
    except RuntimeError as problem:
        return time.monotonic() - begun, str(problem)
    return time.monotonic() - begun, None


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize(
    ("pattern", "method", "how"),
    [
        ("gla,gla", "allgather", "dies"),
        ("gated_deltanet,gla", "allscan", "dies"),
        ("attention,gla", "doubling", "dies"),
        ("slstm,slstm", "allgather", "dies"),
        ("gla,gla", "allscan", "sleeps"),
    ],
)
def test_others_are_told(pattern, method, how, where):
    case = Case(pattern, (4, 4, 4), parallel={"method": method})
    with fresh(3, TIMEOUT) as lost:
        lost.patience = 5 * TIMEOUT
        lost.start(_dies, case, where, how)
        found = lost.results(allow_lost=True, without=[1] if how == "sleeps" else [])
    others = [f for f in found if not isinstance(f, Lost)]
    assert len(others) == 2
    for seconds, message in others:
        assert message is not None, "a rank did not notice"
        assert "an exchange with other ranks of the sequence failed" in message
        assert "one of them has stopped" in message
        assert seconds < 3 * TIMEOUT
