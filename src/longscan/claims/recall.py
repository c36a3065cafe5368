"""Recall: multi-query associative recall, and induction heads far beyond the trained length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from longscan.claims.results import Row, mean
from longscan.claims.training import Job, accuracy, examples, fit
from longscan.synthetic.induction import induction as induction_task
from longscan.synthetic.mqar import mqar as mqar_task

RECALL = "accuracy"

_MQAR = {
    "quick": {"length": 16, "pairs": 4, "vocab": 16, "d_model": 16, "d_key": 4, "batch": 4,
              "steps": 3, "tests": 1, "lr": 3e-3},
    "cpu": {"length": 48, "pairs": 12, "vocab": 48, "d_model": 64, "d_key": 8, "batch": 64,
            "steps": 1000, "tests": 8, "lr": 4e-3},
    "gpu": {"length": 256, "pairs": 64, "vocab": 1024, "d_model": 128, "d_key": 16, "batch": 128,
            "steps": 4000, "tests": 8, "lr": 2e-3},
}  # fmt: skip
_MQAR_CASES: tuple[tuple[str, str, dict[str, Any], str], ...] = (
    ("deltanet", "deltanet", {"d_conv": 4}, "1.00 at every width (T 512, 64 pairs)"),
    ("gla", "gla", {"d_conv": 4}, "below 1 at small widths (curve)"),
    ("linear_attention", "linear_attention", {"d_conv": 4}, ""),
    ("deltanet without convolution", "deltanet", {"d_conv": 0}, "1.00, after longer training"),
)


def recall(
    job: Job,
    seed: int,
    task: Callable[..., Any],
    tests: int,
    model: dict[str, Any],
    **training: Any,
) -> dict[str, float]:
    """Train and test on the same kind of sequences."""
    lm = fit(job, model, lambda g: task(generator=g), seed=seed, **training)
    got = accuracy(lm, examples(job, lambda g: task(generator=g), seed, tests))
    return {RECALL: got.token}


def mqar(job: Job) -> Iterator[Row]:
    """More pairs than key channels of a head; two layers, two heads."""
    size = job.choose(**_MQAR)
    for case, mixer, options, said in _MQAR_CASES:
        heads = {"n_heads": 2, "d_key": size["d_key"], "d_value": size["d_model"] // 2}
        model = {
            "vocab_size": size["vocab"],
            "d_model": size["d_model"],
            "n_layers": 2,
            "pattern": mixer,
            "mixers": {mixer: {**heads, **options}},
        }
        training = {
            "steps": size["steps"], "lr": size["lr"], "warmup": 50, "until": 0.01,
        }  # fmt: skip
        task = partial(
            mqar_task, size["batch"], size["length"], pairs=size["pairs"], vocab=size["vocab"],
            random_non_queries=False,
        )  # fmt: skip
        for seed in job.seeds:
            run = partial(recall, job, seed, task, size["tests"], model, **training)
            settings = {**size, "model": model, **training}
            yield from job.measure(case, mixer, seed, settings, run, {RECALL: said})


def mqar_holds(rows: list[Row]) -> tuple[bool, str]:
    """The delta rule recalls 95 %, additive models at least 10 points less."""
    got = {case: mean(rows, case, RECALL) for case, *_ in _MQAR_CASES}
    delta = got["deltanet"]
    best = max(("gla", "linear_attention"), key=got.__getitem__)
    said = (
        f"deltanet recalls {delta:.1%}, {best}, the better of the additive ones, {got[best]:.1%} "
        f"(deltanet without its convolution: {got['deltanet without convolution']:.1%})."
    )
    return delta >= 0.95 and got[best] <= delta - 0.10, said


_INDUCTION = {
    "quick": {"length": 8, "vocab": 16, "d_model": 16, "batch": 4, "steps": 3, "d_state": 4,
              "lengths": [8, 32], "piece": 8, "examples": 8, "lr": 2e-3},
    "cpu": {"length": 32, "vocab": 16, "d_model": 32, "batch": 64, "steps": 1500, "d_state": 8,
            "lengths": [32, 64, 128, 256, 1024, 4096], "piece": 1024, "examples": 128, "lr": 4e-3},
    "gpu": {"length": 256, "vocab": 16, "d_model": 64, "batch": 64, "steps": 4000, "d_state": 16,
            "lengths": [256, 512, 1024, 4096, 16384], "piece": 2048, "examples": 128, "lr": 2e-3},
}  # fmt: skip
_INDUCTION_CASES = ("mamba", "attention", "s4d")
_INDUCTION_SAID = {
    ("mamba", 256): "1.00", ("mamba", 1024): "1.00", ("mamba", 16384): "1.00",
    ("attention", 256): "1.00", ("attention", 1024): "0.27 (absolute positions)",
}  # fmt: skip


def induce(
    job: Job, seed: int, size: dict[str, Any], model: dict[str, Any], **training: Any
) -> dict[str, float]:
    """Train at one length, test at several, long sequences in stretches that carry the state."""
    task = partial(induction_task, vocab=size["vocab"])
    lm = fit(
        job,
        model,
        lambda g: task(size["batch"], size["length"], generator=g),
        seed=seed,
        **training,
    )
    out = {}
    for length in size["lengths"]:
        at_once = max(1, min(size["examples"], 2**16 // length))
        batches = examples(
            job,
            lambda g, n=at_once, t=length: task(n, t, generator=g),
            seed,
            size["examples"] // at_once,
        )
        out[f"accuracy at T={length}"] = accuracy(lm, batches, size["piece"]).token
    return out


def induction(job: Job) -> Iterator[Row]:
    """Trained at one length, tested at lengths up to 64 times that; two layers."""
    size = job.choose(**_INDUCTION)
    for mixer in _INDUCTION_CASES:
        options = {"mamba": {"d_state": size["d_state"]}, "attention": {"n_heads": 2}}
        model = {
            "vocab_size": size["vocab"],
            "d_model": size["d_model"],
            "n_layers": 2,
            "pattern": mixer,
            "mixers": {mixer: options.get(mixer, {})},
        }
        # Attention learns this at a quarter of the rate that is best for the others, or not at all.
        lr = size["lr"] / 4 if mixer == "attention" else size["lr"]
        training = {"steps": size["steps"], "lr": lr, "until": 0.003}
        said = {f"accuracy at T={t}": _INDUCTION_SAID.get((mixer, t), "") for t in size["lengths"]}
        for seed in job.seeds:
            run = partial(induce, job, seed, size, model, **training)
            settings = {**size, "model": model, **training}
            yield from job.measure(mixer, mixer, seed, settings, run, said)


def induction_holds(rows: list[Row]) -> tuple[bool, str]:
    """To 4 times the trained length Mamba is right in 95 %, the others at that length below 60 %.

    What becomes of it farther out is said, not judged.
    """
    lengths = list(dict.fromkeys(int(r.metric.rpartition("=")[2]) for r in rows))
    trained, farthest = lengths[0], lengths[-1]

    def at(case: str, length: int) -> float:
        return mean(rows, case, f"accuracy at T={length}")

    worst = min(at("mamba", t) for t in lengths if t <= 4 * trained)
    others = {case: at(case, 4 * trained) for case in _INDUCTION_CASES[1:]}
    learnt = ", ".join(f"{case} {at(case, trained):.1%}" for case in others)
    said = (
        f"trained at T={trained}, mamba is right in {worst:.1%} or more to T={4 * trained}, "
        + ", ".join(f"{case} in {x:.1%} there" for case, x in others.items())
        + f" (at T={trained}: {learnt}); at T={farthest} mamba is right in "
        f"{at('mamba', farthest):.1%}, where the paper has 100% to 4000 times the trained length."
    )
    return worst >= 0.95 and max(others.values()) < 0.6, said
