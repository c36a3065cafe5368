"""`delta` by kernels on shards of a sequence, in Triton's interpreter, against the definition."""

import os
from datetime import timedelta
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn import functional as F

LENGTHS = [30, 130, 40]
"""The rank in the middle has three segments, of 64 tokens at most."""
PACKED = [0, 20, 180, 200]
LIMIT = 1e-2
"""Of the largest entry, as for the same kernels on whole sequences in bfloat16."""


def _inputs(packed: bool) -> list[torch.Tensor]:
    torch.manual_seed(0)
    batch, total, heads, k, v = 1 if packed else 2, sum(LENGTHS), 2, 16, 16
    rows = len(PACKED) - 1 if packed else batch
    return [
        torch.randn(batch, total, heads, k) * k**-0.5,
        F.normalize(torch.randn(batch, total, heads, k), dim=-1),
        torch.randn(batch, total, heads, v),
        torch.rand(batch, total, heads),
        -0.05 * torch.rand(batch, total, heads),
        0.1 * torch.randn(rows, heads, k, v),
        torch.randn(batch, total, heads, v),
        torch.randn(rows, heads, k, v),
    ]


def _worker(rank: int, folder: str, fault: bool) -> None:
    torch.set_num_threads(1)
    os.environ["TRITON_INTERPRET"] = "1"
    import_module("interpreter").mend()
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(LENGTHS),
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    from longscan.ops import _delta_fused, _delta_shards
    from longscan.ops.delta import delta
    from longscan.parallel import SequenceParallel

    _delta_fused.SHORTEST = _delta_fused.LEAST = 1
    if fault:  # products of the wrong side
        right = _delta_shards._Segments.products
        _delta_shards._Segments.products = lambda self, a, reverse: right(self, a, reverse).mT
    sequence, found = SequenceParallel(method="allgather"), {}
    for packed in (False, True):
        *tokens, state, do, d_final = _inputs(packed)
        bounds = torch.tensor(PACKED) if packed else None
        shards = sequence.shards(sum(LENGTHS), cu_seqlens=bounds, lengths=LENGTHS)
        local = [shards.shard(x) for x in tokens]
        local = [x.bfloat16() if i < 3 else x.clone() for i, x in enumerate(local)]
        state = state[shards.rows].clone() if packed else state.clone()
        for x in (*local, state):
            x.requires_grad_()
        with shards.active():
            o, final = delta(*local, state=state, cu_seqlens=shards.cu_seqlens)
        assert type(o.grad_fn).__name__ == "ToCopyBackward0" or "_Spread" in str(final.grad_fn)
        d_local = torch.zeros_like(final)  # only where a sequence ends does its state have one
        ends = [e for e in shards.sequences[1:] if shards.low < e <= shards.high]
        if packed:
            for at, end in enumerate(ends):
                d_local[at] = d_final[shards.sequences.index(end) - 1]
        elif not shards.onward:
            d_local = d_final
        ((o * shards.shard(do)).sum() + (final * d_local).sum()).backward()
        found[packed] = [o.detach().float(), *(x.grad.float() for x in local)]
        # A state counts where its sequence begins.
        begins = slice(1 if shards.continues else 0, None) if packed else slice(None)
        if packed or not shards.continues:
            found[packed].append(state.grad[begins])
        ended = slice(0, len(ends)) if packed else slice(None)
        if packed or not shards.onward:
            found[packed].append(final[ended].detach())
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()


def _errors(folder: Path, fault: bool) -> list[float]:
    mp.spawn(_worker, (str(folder), fault), nprocs=len(LENGTHS))
    from longscan.ops.delta import delta

    out = []
    for packed in (False, True):
        *tokens, state, do, d_final = (x.double() for x in _inputs(packed))
        given = [x.requires_grad_() for x in (*tokens, state)]
        bounds = torch.tensor(PACKED) if packed else None
        o, final = delta(*given[:5], state=given[5], cu_seqlens=bounds, backend="reference")
        ((o * do).sum() + (final * d_final).sum()).backward()
        parts = [torch.load(folder / f"{rank}.pt")[packed] for rank in range(len(LENGTHS))]
        want = [o.detach(), *(x.grad for x in given), final.detach()]
        for i in range(6):
            got = torch.cat([p[i] for p in parts], 1)
            out.append(((got - want[i]).abs().max() / want[i].abs().max()).item())
        rest = [[x for p in parts for x in p[6:][j : j + 1]] for j in range(2)]
        if packed:
            got = [torch.cat(x) for x in rest]
        else:
            got = [parts[0][6], parts[-1][6]]
        for x, y in zip(got, want[6:], strict=True):
            out.append(((x - y).abs().max() / y.abs().max()).item())
    return out


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers find the interpreter's mending beside this file."""
    here = str(Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([here, os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def test_shards_by_kernels_are_whole_sequences(tmp_path: Path) -> None:
    assert max(_errors(tmp_path, False)) < LIMIT


@pytest.mark.slow
def test_a_wrong_product_of_maps_is_noticed(tmp_path: Path) -> None:
    assert max(_errors(tmp_path, True)) > 3 * LIMIT
