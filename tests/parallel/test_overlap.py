"""States travel while a shard's own tokens are computed, forward and backward.

Proved without a clock: a message is held back until local work is done. Were it waited for before
that work, neither would ever end.
"""

import threading
import time

import pytest
import torch

from longscan.ops import decay as ops
from longscan.parallel import SequenceParallel
from longscan.parallel.wire import Pending, Wire

PATIENCE = 10.0


class _Marked(torch.autograd.Function):
    """x; notes when its backward runs."""

    @staticmethod
    def forward(ctx, x, note):
        ctx.note = note
        return x.view_as(x)

    @staticmethod
    def backward(ctx, d):
        ctx.note()
        return d, None


def _timeline(group, method):
    """A task: what happened on a rank, in order."""
    events, lock = [], threading.Lock()
    done = {"state": threading.Event(), "gradient": threading.Event()}

    def note(what):
        with lock:
            events.append((what, time.monotonic()))

    sequence = SequenceParallel(group, method=method, blocks=2)
    scan, chunked, wait = sequence.scan, ops.decay_chunked, Pending.wait
    start = Wire.start

    def scans(of, row, kind):
        note(f"{kind} begins")

        def held(wire, work, *inputs):
            def later(*inputs):
                if not done[kind].wait(PATIENCE):
                    note(f"{kind} was waited for before local work")
                out = work(*inputs)
                note(f"{kind} ends")
                return out

            return start(wire, later, *inputs)

        Wire.start = held
        try:
            pending = scan(of, row, kind)
        finally:
            Wire.start = start

        class Told(Pending):
            def wait(self):
                note(f"{kind} is waited for")
                return wait(pending)

        return Told(lambda: None)

    def local(q, k, v, log_a, **more):
        note("local begins")
        first = threading.Event()

        def ended():  # the backward of local work is over when it has come to an input of it
            if not first.is_set():
                first.set()
                note("local backward ends")
                done["gradient"].set()

        k = _Marked.apply(k, ended)
        o, s = chunked(q, k, v, log_a, **more)
        o = _Marked.apply(o, lambda: note("local backward begins"))
        note("local ends")
        done["state"].set()
        return o, s

    sequence.scan, ops.decay_chunked = scans, local
    try:
        shards = sequence.shards(256)
        g = torch.Generator().manual_seed(0)
        q, k, v, gates = (
            shards.shard(torch.randn(1, 256, 2, 16, generator=g)).clone().requires_grad_()
            for _ in range(4)
        )
        with shards.active():
            o, _ = ops.decay(q, k, v, -0.01 * gates.abs())
        o.square().sum().backward()
        sequence.finish()
    finally:
        ops.decay_chunked = chunked
    return [what for what, _ in sorted(events, key=lambda e: e[1])]


@pytest.mark.parametrize("method", ["allgather", "allscan", "doubling"])
def test_local_work_runs_while_states_travel(ranks, method):
    for events in ranks.run(_timeline, method):
        for kind, begin, end in (
            ("state", "local begins", "local ends"),
            ("gradient", "local backward begins", "local backward ends"),
        ):
            order = [f"{kind} begins", begin, end, f"{kind} is waited for"]
            assert [e for e in events if e in order] == order, events
            assert f"{kind} was waited for before local work" not in events
            assert events.index(f"{kind} ends") > events.index(end)
