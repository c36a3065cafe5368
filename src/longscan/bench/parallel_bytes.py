"""What ranks receive, counted where messages are handed over, and when they wait for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from longscan.bench.gpu_models import SOFT
from longscan.bench.parallel_group import Here
from longscan.bench.parallel_models import LINEAR, config, shape
from longscan.bench.parallel_peers import PEERS, PeerShards
from longscan.models import LanguageModel
from longscan.parallel import SequenceParallel, Shards
from longscan.parallel.scan import METHODS
from longscan.parallel.wire import Pending

ASIDE = ("loss", "halo", "halo gradient", "measuring")
"""Kinds of messages that are not those of states, or of keys and values."""


def received(here: Here, what: str) -> None:
    """Rows bytes/MIXER/METHOD: of a layer of the tiny models, by the rank that receives most."""
    for mixer, methods in (*((m, METHODS) for m in LINEAR), (SOFT, ("lasp2h", *PEERS))):
        if mixer == SOFT and here.ranks > 4:
            methods = methods[:2]  # the tiny model has 4 heads
        for method in methods:
            if here.todo(f"bytes/P{here.ranks}/{mixer}/{method}"):
                _count(here, mixer, method)


def _count(here: Here, mixer: str, method: str) -> None:
    torch.manual_seed(0)
    layers = 2
    with here.device:
        model = LanguageModel(config("tiny", mixer, n_layers=layers))
    known = method if method in METHODS else "allgather"
    # Several hosts, where there are ranks enough.
    sequence = SequenceParallel(
        here.group, method=known, blocks=4, per_host=max(1, here.ranks // 2)
    )
    tokens = 64 * here.ranks
    if method in PEERS:
        shards: Shards = PeerShards(sequence, tokens, method)
    else:
        shards = sequence.shards(tokens, final_states=False)
    ids = torch.randint(model.config.vocab_size, (1, tokens + 1), device=here.device)
    traffic = sequence.traffic

    def since(before: dict[str, int]) -> dict[str, int]:
        return {k: n - before.get(k, 0) for k, n in traffic.by_kind.items()}

    loss, _ = model.loss(shards.shard(ids[:, :-1]), shards.shard(ids[:, 1:]), shards=shards)
    forward = since({})
    before = dict(traffic.by_kind)
    launched = traffic.gathers, traffic.reductions, traffic.messages
    loss.backward()
    sequence.finish()
    backward = since(before)
    counted = [
        here.worst(sum(n for kind, n in of.items() if kind not in ASIDE) / layers)[0]
        for of in (forward, backward)
    ]
    halo = here.worst(forward.get("halo", 0) / layers)[0]
    numbers: dict[str, Any] = {"forward": counted[0], "backward": counted[1], "halo": halo}
    if mixer != SOFT:
        of = shape("tiny", mixer)
        numbers |= {"state": of.state, "transition": 4 * of.heads * of.transition}
    here.write(
        "received", case=mixer, method=method, tokens=tokens, d_model=model.config.d_model,
        itemsize=4, per_host=sequence.per_host, launched=launched, layers=layers, **numbers,
    )  # fmt: skip


# --- when -----------------------------------------------------------------------------------


def timeline(here: Here, what: str) -> None:
    """Row timeline/METHOD: spans of a training step on each rank, in seconds from its beginning."""
    for method in ("allgather", "allscan"):
        if not here.todo(f"timeline/{method}"):
            continue
        torch.manual_seed(0)
        with here.device:
            model = LanguageModel(config("tiny", "gla", n_layers=2))
        sequence = SequenceParallel(here.group, method=method, blocks=4)
        tokens = 2048 * here.ranks
        ids = torch.randint(model.config.vocab_size, (1, tokens + 1), device=here.device)
        shards = sequence.shards(tokens, final_states=False)
        spans: list[tuple[str, float, float]] = []
        for turn in range(3):
            model.zero_grad()
            if turn == 2:
                _record(sequence, spans)
            here.wait()
            began = time.perf_counter()
            x, y = shards.shard(ids[:, :-1]), shards.shard(ids[:, 1:])
            loss, _ = model.loss(x, y, shards=shards)
            forward = time.perf_counter()
            loss.backward()
            ended = time.perf_counter()
        spans += [("forward", began, forward), ("backward", forward, ended)]
        mine = [(kind, a - began, b - began) for kind, a, b in spans]
        everyone: list[Any] = [None] * here.ranks
        dist.all_gather_object(everyone, mine)
        here.write(
            "timeline", case="gla", method=method, tokens=tokens, spans=everyone,
            hidden=[hidden(s) for s in everyone],
        )  # fmt: skip


def _record(sequence: SequenceParallel, spans: list[tuple[str, float, float]]) -> None:
    """From here on note when exchanges of states ran, when the caller waited for them, and what
    lay between their beginning and that: work that runs beside them."""
    start = sequence.wire.start
    scan = sequence.scan

    def noted(of: Any, row: Any, kind: str) -> Pending:
        def watched(work: Callable[..., Any], *inputs: Any) -> Pending:
            def run(*inputs: Any) -> Any:
                at = time.perf_counter()
                out = work(*inputs)
                spans.append(("exchange", at, time.perf_counter()))
                return out

            return start(run, *inputs)

        sequence.wire.start = watched
        try:
            pending = scan(of, row, kind)
        finally:
            sequence.wire.start = start
        begun = time.perf_counter()

        def wait() -> Any:
            at = time.perf_counter()
            out = pending.wait()
            spans.extend([("beside", begun, at), ("waiting", at, time.perf_counter())])
            return out

        return Pending(wait)

    sequence.scan = noted


def hidden(spans: Sequence[tuple[str, float, float]]) -> float:
    """The part of the exchanges' time in which the caller did not wait for them."""
    whole = sum(b - a for kind, a, b in spans if kind == "exchange")
    waited = 0.0
    for _, a, b in (s for s in spans if s[0] == "exchange"):
        for _, c, d in (s for s in spans if s[0] == "waiting"):
            waited += max(0.0, min(b, d) - max(a, c))
    return 1 - waited / whole if whole else 1.0


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """The time lines of the methods, a lane for each rank."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2.6 * len(rows) + 0.6))
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    colours = {"forward": "#dbe7f3", "backward": "#e8e0ef", "beside": "#7fb069",
               "waiting": "#d9822b", "exchange": "#2b6cb0"}  # fmt: skip
    words = {"beside": "local scan beside an exchange", "waiting": "waiting for it",
             "exchange": "exchange of states"}  # fmt: skip
    for axis, row in zip(axes, rows, strict=True):
        for rank, spans in enumerate(row["spans"]):
            for kind, a, b in sorted(spans, key=lambda s: list(colours).index(s[0])):
                low, tall = (rank + 0.05, 0.35) if kind == "exchange" else (rank + 0.45, 0.45)
                axis.broken_barh([(1e3 * a, 1e3 * (b - a))], (low, tall), color=colours[kind],
                                 label=words.get(kind, kind))  # fmt: skip
        n = len(row["spans"])
        axis.set(yticks=[r + 0.5 for r in range(n)], yticklabels=[f"rank {r}" for r in range(n)],
                 xlabel="ms", title=row["method"])  # fmt: skip
        axis.title.set_fontsize(9)
    handles, labels = axes[0].get_legend_handles_labels()
    kept = dict(zip(labels, handles, strict=True))
    figure.legend(kept.values(), kept.keys(), fontsize=8, ncols=len(kept), loc="upper center")
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.3 / figure.get_figheight()))
    figure.savefig(path, dpi=110)
