"""An experiment that takes no time, under a name of its own among the claims."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from longscan.claims import Claim
from longscan.claims.results import Row, mean
from longscan.claims.training import Job

LOG: list[str] = []  # what was trained rather than read back
FACTOR = {"size": 1.0}


def experiment(job: Job) -> Iterator[Row]:
    for case, slope in (("steep", 2.0), ("flat", 0.5)):
        for seed in job.seeds:

            def run(case=case, slope=slope, seed=seed):
                LOG.append(f"{case} {seed}")
                line = job.build(lambda: torch.nn.Linear(1, 1), seed)
                steps = job.train(
                    line,
                    lambda g: (line(torch.rand(8, 1, generator=g)) - slope).square().mean(),
                    steps=25,
                    lr=0.1,
                    seed=seed,
                )
                return {"value": slope * FACTOR["size"] + seed, "steps": steps}

            settings = {"slope": slope, **FACTOR}
            yield from job.measure(case, "gla", seed, settings, run, {"value": "2 or so"})


def holds(rows: list[Row]) -> tuple[bool, str]:
    difference = mean(rows, "steep", "value") - mean(rows, "flat", "value")
    return difference > 1, f"The difference is {difference:g}."


CLAIM = Claim(
    "toy", f"{__name__}:experiment", f"{__name__}:holds", "Steep is more than flat.",
    "A paper, arXiv 0000.00000", ("gla",), minutes=0.01, seeds=2,
)  # fmt: skip
