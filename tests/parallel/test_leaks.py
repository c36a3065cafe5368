"""A step leaves nothing behind that only the collector of circles would free."""

import gc

import pytest
import torch
from cases import Case, build

from longscan.parallel import SequenceParallel


def _tensors(group, pattern, method):
    """A task: tensors alive after two steps, and after two more, with the collector off."""
    sequence, model = SequenceParallel(group, method=method), build(Case(pattern, (20, 20)))
    ids = torch.randint(0, 10, (2, 40))

    def steps():
        for _ in range(2):
            shards = sequence.shards(40, final_states=False)
            own = shards.shard(ids)
            model.loss(own, own, shards=shards)[0].backward()
        sequence.finish()
        return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        steps()  # what is kept for good is there now
        return steps(), steps()
    finally:
        gc.enable()


PATTERNS = ["gla", "gated_deltanet", "mlstm", "mamba", "attention", "sliding_attention", "slstm"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_steps_leave_no_tensors(ranks, pattern):
    for before, after in ranks.run(_tensors, pattern, "allgather", size=2):
        # The thread that sends may hold those of its last message; a graph has dozens a step.
        assert after <= before + 8
