"""Training steps of models whose sequences are shared by ranks, beside data parallel ones.

A step is that of `bench gpu --models`: weights in float32, bfloat16 autocast, fused AdamW. Behind
the backward one all-reduce sums all gradients, the same for all methods (but under FSDP2).
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longscan.bench.gpu_models import RUN, SIZES, SOFT, clocked, cudnn, flops, room_made
from longscan.bench.parallel_group import Here
from longscan.bench.parallel_models import LINEAR, config
from longscan.bench.parallel_peers import PEERS, PeerShards, fused
from longscan.models import LanguageModel
from longscan.parallel import SequenceParallel, Shards

DATA = "data"
METHODS = (DATA, "allgather", "allscan", "doubling", "hierarchical")
SOFT_METHODS = (DATA, "lasp2h", *PEERS)
KEPT = {"tiny": 128, "340m": 32768}
"""Tokens of a rank from above which blocks are computed again in the backward."""
LENGTHS = {"tiny": (64, 128), "340m": (16384, 65536, 262144)}
EACH = {"tiny": 64, "340m": 16384}
"""Tokens of a rank at which methods are judged."""
MOST = {"tiny": 1024, "340m": 2**23}
"""Tokens, where the search for the longest ends."""
SECONDS, LONG = 2.0, 25.0
"""Under the clock for a row; of a step that is not begun."""
GOALS = {"gla": 0.95, "gated_deltanet": 0.9}


class Trainer:
    """A model, its gradients in one buffer, and steps of it."""

    def __init__(self, here: Here, mixer: str) -> None:
        self.here, self.mixer = here, mixer
        torch.manual_seed(0)
        with here.device:
            self.model = LanguageModel(config(here.size, mixer))
        self.optimiser = adamw(self.model)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.flat = torch.zeros(sum(p.numel() for p in parameters), device=here.device)
        sizes = [p.numel() for p in parameters]
        for p, g in zip(parameters, self.flat.split(sizes), strict=True):
            p.grad = g.view_as(p)

    def tokens(self, batch: int, length: int) -> Tensor:
        torch.manual_seed(2)
        vocab = self.model.config.vocab_size
        return torch.randint(vocab, (batch, length + 1), device=self.here.device)

    def again(self, on: bool) -> None:
        """Whether blocks are computed again in the backward."""
        if self.model.config.checkpoint_blocks != on:
            self.model.config = self.model.config.replace(checkpoint_blocks=on)

    def step(self, ids: Tensor, targets: Tensor, shards: Shards | None) -> Tensor:
        """Of all ranks together: a mean over their tokens."""
        with torch.autocast(self.here.device.type, torch.bfloat16):
            loss, _ = self.model.loss(ids, targets, shards=shards)
        (loss if shards is not None else loss / self.here.ranks).backward()
        dist.all_reduce(self.flat)
        self.optimiser.step()
        self.flat.zero_()
        return loss.detach()


def adamw(model: LanguageModel) -> torch.optim.Optimizer:
    groups = model.parameter_groups(weight_decay=0.1, lr=1e-4)
    return torch.optim.AdamW(groups, 1e-4, betas=(0.9, 0.95), fused=True)


def call_of(trainer: Trainer, method: str, tokens: int) -> tuple[Callable[[], Tensor], Any]:
    """A training step of `tokens` over all ranks, as one sequence or (DATA) one for each rank; and
    the sequence's ranks, None for DATA."""
    here = trainer.here
    trainer.again(tokens // here.ranks > KEPT[here.size])
    if method == DATA:
        ids = trainer.tokens(1, tokens // here.ranks)
        ids = (ids + here.rank) % trainer.model.config.vocab_size
        return lambda: trainer.step(ids[:, :-1], ids[:, 1:], None), None
    known = "allgather" if method in (*PEERS, "lasp2h") else method
    sequence = SequenceParallel(here.group, method=known)
    ids = trainer.tokens(1, tokens)

    def call() -> Tensor:
        if method in PEERS:
            shards: Shards = PeerShards(sequence, tokens, method)
        else:
            shards = sequence.shards(tokens, final_states=False)
        return trainer.step(shards.shard(ids[:, :-1]), shards.shard(ids[:, 1:]), shards)

    return call, sequence


def timed(here: Here, call: Callable[[], Any], once: bool = False) -> tuple[list[float], float]:
    """Seconds of steps, those of the slowest rank, and of the first, with all compiling, which is
    the only one if `once`. Where the allocator had to find room, the first is negative."""
    first = here.agreed(clocked(call, here.gpu) / 1e3)
    if once:
        return here.worst(first), first
    if first < 1:
        call()
    tries = room_made(here.gpu)
    here.wait()
    times = [clocked(call, here.gpu) / 1e3]
    second = here.agreed(times[0])
    if second < 0.5:
        times = []
    run = RUN if here.gpu and second < SECONDS / RUN / 2 else 1
    for _ in range(max(2 - len(times), min(6, round(SECONDS / second / run)))):
        here.wait()
        times.append(clocked(lambda: [call() for _ in range(run)], here.gpu) / 1e3 / run)
    return here.worst(*times), -first if room_made(here.gpu) > tries else first


def begin(here: Here) -> None:
    """Memory as if nothing had run."""
    gc.collect()
    if here.gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def mib(here: Here) -> float:
    return here.worst(torch.cuda.max_memory_allocated() / 2**20 if here.gpu else 0.0)[0]


def lengths(size: str, ranks: int) -> list[int]:
    """Tokens over all ranks, those at which methods are judged first, the longest last."""
    goal = EACH[size] * ranks
    return [goal, *sorted((n for n in LENGTHS[size] if n != goal), key=lambda n: n > 4 * goal)]


def training(here: Here, what: str) -> None:
    """Rows training/MIXER/METHOD/T; what: "MIXER T"."""
    mixer, tokens = what.split()[0], int(what.split()[1])
    goal = tokens == EACH[here.size] * here.ranks
    methods = SOFT_METHODS if mixer == SOFT else METHODS[: None if goal else -1]
    names = {m: f"training/{mixer}/{m}/T{tokens}" for m in methods}
    if here.agreed(all(n in here.done for n in names.values())):
        return
    begin(here)
    trainer = Trainer(here, mixer)
    for method, name in names.items():
        if here.todo(name):
            row(here, trainer, "training", mixer, method, tokens)


def row(here: Here, trainer: Trainer, part: str, mixer: str, method: str, tokens: int) -> float:
    """Measure and write one; MiB at its peak."""
    begin(here)
    call, sequence = call_of(trainer, method, tokens)
    with kernels(here, mixer, method):
        # Minutes otherwise, and its kernels have run at other lengths before.
        late = mixer == SOFT and tokens > 4 * EACH[here.size] * here.ranks
        times, first = timed(here, call, once=late)
    peak = mib(here)
    received = sequence.traffic.bytes if sequence is not None else 0
    middle = statistics.median(times)
    whole = tokens // here.ranks if method == DATA else tokens
    kernel = ""
    if here.gpu and method == "ring":
        kernel = fused(here.device, SIZES[here.size]["head"])
    here.write(
        part, case=mixer, method=method, tokens=tokens, seconds=times, first=abs(first),
        room_made=first < 0, tokens_s=tokens / middle, mib=peak,
        computed_again=trainer.model.config.checkpoint_blocks,
        parameters=trainer.model.num_parameters(), received=received,
        flops=flops(trainer.model, whole) * tokens,
        kernel=kernel,
    )  # fmt: skip
    return peak


def kernels(here: Here, mixer: str, method: str) -> AbstractContextManager:
    """cuDNN's attention wherever the call is one that it takes: ours has a mask."""
    return cudnn(here.gpu and mixer == SOFT and method in (DATA, "ulysses"))


def warm(here: Here, mixer: str) -> None:
    """Compile the kernels of a model, beside other work; writes nothing that is kept."""
    trainer = Trainer(here, mixer)
    tokens = EACH[here.size] * here.ranks // 4
    for method in (DATA, "allgather"):
        call_of(trainer, method, tokens)[0]()
    here.wait()


def longest(here: Here, mixer: str) -> None:
    """Rows longest/MIXER/T, twice as long each time, until memory or patience ends."""
    method = "ulysses" if mixer == SOFT else "allgather"
    tokens = max(LENGTHS[here.size])
    name = "longest/{}/T{}".format
    trainer: Trainer | None = None
    seen: list[tuple[int, float]] = []
    took = 0.0
    while tokens <= MOST[here.size]:
        if here.agreed(any(here.done.get(name(mixer, n)) for n in (tokens, tokens // 2))):
            return
        if not here.todo(name(mixer, tokens)):
            if here.agreed(here.late):
                return
            tokens *= 2
            continue
        if trainer is None:
            trainer = Trainer(here, mixer)
            call_of(trainer, method, EACH[here.size] * here.ranks)[0]()  # kernels, momenta
        expected = took * (4 if mixer == SOFT else 2)
        if here.agreed(expected) > LONG:
            here.write("longest", case=mixer, method=method, tokens=tokens,
                       why=f"not tried: about {expected:.0f} s a step")  # fmt: skip
            return
        if len(seen) > 1 and here.gpu:
            (a, low), (b, high) = seen[-2:]
            need = high + (high - low) / (b - a) * (tokens - b)
            have = torch.cuda.get_device_properties(here.device).total_memory / 2**20
            if here.agreed(need > 1.1 * have):
                here.write("longest", case=mixer, method=method, tokens=tokens, need_mib=need,
                           why=f"not tried: {need / 1024:.0f} GiB")  # fmt: skip
                return
        begin(here)
        call, _ = call_of(trainer, method, tokens)
        trainer.again(True)
        with kernels(here, mixer, method):
            took = here.worst(clocked(call, here.gpu) / 1e3)[0]
        peak = mib(here)
        seen.append((tokens, peak))
        here.write(
            "longest", case=mixer, method=method, tokens=tokens, seconds=[took],
            tokens_s=tokens / took, mib=peak, computed_again=True,
        )  # fmt: skip
        tokens *= 2


STEPS, SAME = 5, 2e-3
"""Steps whose losses are compared, and their largest relative difference."""


def fsdp(here: Here, mixer: str = "gated_deltanet") -> None:
    """FSDP2 and shared sequences on the same ranks: losses beside data parallel, and speed."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    each = EACH[here.size]
    tokens = each * here.ranks
    if not here.todo(f"fsdp/{mixer}/T{tokens}"):
        return
    trainer = Trainer(here, mixer)
    rows = trainer.tokens(here.ranks, each)
    mine = rows[here.rank : here.rank + 1]
    plain = []
    for _ in range(STEPS):
        loss = trainer.step(mine[:, :-1], mine[:, 1:], None)
        dist.all_reduce(loss)
        plain.append(loss.item() / here.ranks)
    parameters = trainer.model.num_parameters()
    del trainer, loss
    begin(here)
    mesh = init_device_mesh(here.device.type, (here.ranks,))
    torch.manual_seed(0)
    with here.device:
        model = LanguageModel(config(here.size, mixer))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "loss")
    optimiser = adamw(model)
    sequence = SequenceParallel(here.group, method="allgather")

    def step(ids: Tensor) -> Tensor:
        shards = sequence.shards(ids.shape[1] - 1, final_states=False)
        x, y = shards.shard(ids[:, :-1]), shards.shard(ids[:, 1:])
        with torch.autocast(here.device.type, torch.bfloat16):
            loss, _ = model.loss(x, y, shards=shards)
        (loss * here.ranks).backward()  # a rank's gradient is a share of a sum, FSDP takes means
        optimiser.step()
        optimiser.zero_grad()
        return loss.detach()

    spread = [step(rows).item() for _ in range(STEPS)]
    error = max(abs(a - b) / abs(a) for a, b in zip(plain, spread, strict=True))
    begin(here)
    ids = torch.randint(model.config.vocab_size, (1, tokens + 1), device=here.device)
    dist.broadcast(ids, 0)
    times, first = timed(here, lambda: step(ids))
    here.write(
        "fsdp", case=mixer, method="fsdp2 x allgather", tokens=tokens, losses=[plain, spread],
        error=here.worst(error)[0], limit=SAME, met=here.worst(error)[0] <= SAME, seconds=times,
        first=abs(first), tokens_s=tokens / statistics.median(times), mib=mib(here),
        parameters=parameters,
    )  # fmt: skip


MIXERS = (*LINEAR, SOFT)
