"""What `longscan bench scaling` makes of what `longscan bench parallel` measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from longscan.bench.gpu_models import SIZES
from longscan.bench.parallel_group import Row, of, trained
from longscan.bench.parallel_models import shape
from longscan.bench.parallel_train import DATA, EACH
from longscan.parallel.cost import Link
from longscan.parallel.scan import METHODS


def _calibrated(rows: Sequence[Row]) -> Any:
    """What `longscan bench scaling` needs, None if links were not measured."""
    from dataclasses import replace

    from longscan.bench.scaling_cases import H100
    from longscan.bench.scaling_exchange import Calibration

    links = [r for r in of(rows, "exchange") if "link" in r]
    if not links:
        return None
    r = max(links, key=lambda r: (r["device"] != "cpu", r["ranks"]))
    link, gather = Link(**r["link"]), Link(**r["gather"])
    source = f"links inside a host are measured: {r['ranks']} x {r['device']}, {r['about']}"
    compute = None
    assert H100.compute is not None
    speeds = [
        t["flops"] / statistics.median(t["seconds"]) / t["ranks"]
        for t in trained(rows)
        if t["method"] == DATA and t["case"] == "gla" and t["size"] == "340m"
        and t["tokens"] == EACH["340m"] * t["ranks"] and t["device"] == r["device"]
    ]  # fmt: skip
    if speeds:
        compute = replace(H100.compute, flops=speeds[0])
        source += "; speed of products measured in data parallel training of a 340M GLA model"
    on_gpus = r["device"] != "cpu"
    outer = H100.outer if on_gpus else link
    if on_gpus:
        source += f"; the link between hosts, and what else a layer takes, as in `{H100.name}`"
    name = f"{'nccl' if on_gpus else 'gloo'}-{r['ranks']}"
    return Calibration(
        name, source, link, outer, per_host=r["ranks"], gather=gather, compute=compute,
        combine=H100.combine,
    )  # fmt: skip


def calibration(rows: Sequence[Row]) -> str:
    """JSON for `longscan bench scaling --calibration`.

    Raises: ValueError if no links were measured.
    """
    from longscan.bench.scaling_exchange import save

    found = _calibrated(rows)
    if found is None:
        raise ValueError("no links were measured: run with --only exchange first")
    return save(found)


def simulated(rows: Sequence[Row]) -> dict[str, float]:
    """SP / DP of training rows, as the simulation has it with the links measured here."""
    from longscan.bench.scaling_step import Model, step

    c = _calibrated(rows)
    if c is None or c.compute is None:
        return {}
    out = {}
    for r in trained(rows):
        if r["method"] not in METHODS or r["size"] != "340m":
            continue
        s, size = shape(r["size"], r["case"]), SIZES[r["size"]]
        kind = {1: "head", s.d_key: "key", s.d_key**2: "matrix"}[s.transition]
        layers = {"mamba2": 2 * size["blocks"], "gated_deltanet": size["blocks"] * 7 // 8}
        weights = r["parameters"] - size["vocab"] * size["d_model"]
        model = Model(
            r["case"], weights, layers.get(r["case"], size["blocks"]), size["d_model"], s.heads,
            s.d_key, s.d_value, kind, "",
        )  # fmt: skip
        out[r["name"]] = step(model, c, r["method"], r["ranks"], r["tokens"]).relative
    return out
