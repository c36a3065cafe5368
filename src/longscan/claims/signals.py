"""What time-invariant systems remember: timescales, delays, other sampling rates."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan.claims.results import Row, mean
from longscan.claims.training import Job
from longscan.mixers._hippo import hippo
from longscan.mixers.s4 import S4
from longscan.models import Classifier, ClassifierConfig
from longscan.ops.lti import lti
from longscan.synthetic.signals import tones, white_noise

ERROR = "test error"

# -- what a basis can remember, without training ------------------------------------------------

_TIMESCALE = {
    "quick": {"length": 80, "lag": 20, "d_state": 16, "train": 4, "test": 2, "band": 0.125},
    "cpu": {"length": 400, "lag": 100, "d_state": 64, "train": 16, "test": 8, "band": 0.125},
}
_BASES = ("legs", "legt", "fout")
_SCALES = (0.5, 1.0, 1.9, 2.2, 4.0)


def trajectories(basis: str, n: int, dt: float, u: Tensor) -> Tensor:
    """The states [B, T, n] of a HiPPO system with a bilinear step dt, driven by u [B, T]."""
    a, b = hippo(basis, n)
    eye = torch.eye(n, dtype=torch.float64)
    a, b = a.to(u.device), b.to(u.device)
    inverse = torch.linalg.inv(eye.to(u.device) - dt / 2 * a)
    step, drive = inverse @ (eye.to(u.device) + dt / 2 * a), inverse @ (dt * b)
    y, _ = lti(u.unsqueeze(-1), step[None], drive[None], eye.to(u.device).unsqueeze(1))
    return y.squeeze(-1)


def remember(basis: str, scale: float, size: dict[str, Any], seed: int) -> dict[str, float]:
    """The test error of the best linear readout of the input `lag` tokens ago."""
    lag, count = size["lag"], size["train"] + size["test"]
    rng = np.random.RandomState(seed)
    u = white_noise(size["length"], 1.0, size["band"], batch=count, rng=rng)
    target = F.pad(u, (lag, 0))[:, : u.shape[1]]
    x = torch.cat([trajectories(basis, size["d_state"], scale / lag, u), u.unsqueeze(-1)], -1)
    known, new = x[: size["train"]].flatten(0, 1), x[size["train"] :].flatten(0, 1)
    gram = known.mT @ known
    ridge = 1e-9 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    w = torch.linalg.solve(gram + ridge, known.mT @ target[: size["train"]].flatten())
    return {ERROR: (new @ w - target[size["train"] :].flatten()).square().mean().item()}


def timescale(job: Job) -> Iterator[Row]:
    """White noise delayed by `lag`, read off the state of fixed bases at several steps dt."""
    size = job.choose(**_TIMESCALE)
    for basis in _BASES:
        for scale in _SCALES:
            for seed in job.seeds:
                run = partial(remember, basis, scale, size, seed)
                case = _scaled(basis, scale)
                yield from job.measure(case, "s4", seed, {**size, "scale": scale}, run)


def _scaled(basis: str, scale: float) -> str:
    return f"{basis}, dt lag = {scale:g}"


def timescale_holds(rows: list[Row]) -> tuple[bool, str]:
    """Windowed bases are sharp within 2 / dt and blind beyond it; LegS fades smoothly."""
    got = {(b, s): mean(rows, _scaled(b, s), ERROR) for b in _BASES for s in _SCALES}
    legs = [got["legs", s] for s in _SCALES]
    sharp = all(got[b, 1.9] < got["legs", 1.9] / 10 for b in ("legt", "fout"))
    blind = all(got[b, 2.2] > 0.1 for b in ("legt", "fout"))
    smooth = max(legs) < 3 * min(legs)
    said = (
        f"At dt lag = 1.9 the error is {got['legt', 1.9]:.1e} for legt, {got['fout', 1.9]:.1e} for "
        f"fout and {got['legs', 1.9]:.1e} for legs; at 2.2, beyond the window of the first two, "
        f"{got['legt', 2.2]:.2f}, {got['fout', 2.2]:.2f} and {got['legs', 2.2]:.2f}; over all "
        f"steps legs changes {max(legs) / min(legs):.1f}-fold."
    )
    return sharp and blind and smooth, said


# -- learning a delay ---------------------------------------------------------------------------

_DELAY = {
    "quick": {"length": 40, "lag": 10, "d_state": 8, "band": 0.25, "steps": 3, "batch": 2,
              "lr": 1e-2},
    "cpu": {"length": 400, "lag": 100, "d_state": 102, "band": 0.25, "steps": 1000, "batch": 16,
            "lr": 1e-2},
}  # fmt: skip
_DELAYS = (("legs", 1.9), ("legt", 1.9), ("fout", 1.9), ("legt", 8.0), ("fout", 8.0))


def linear_s4(size: dict[str, Any], basis: str, scale: float) -> nn.Module:
    """Four linear S4 systems between two projections: no norm, activation or residual."""
    dt = scale / size["lag"]
    layer = S4(
        4, d_state=size["d_state"], basis=basis, dt_range=(dt, dt), activation=None, output=None
    )
    for name in ("inv_dt", "A_real", "A_imag", "P", "B"):
        layer.get_parameter(name).requires_grad_(False)  # what remembers stays as it is
    return nn.ModuleList([nn.Linear(1, 4), layer, nn.Linear(4, 1)])


def learn_delay(
    job: Job, basis: str, scale: float, size: dict[str, Any], seed: int
) -> dict[str, float]:
    """Train to give back the input of `lag` tokens ago; the error relative to its variance."""
    model = job.build(lambda: linear_s4(size, basis, scale), seed)
    enter, layer, leave = model

    def error(rng: np.random.RandomState, batch: int) -> tuple[Tensor, Tensor]:
        u = white_noise(size["length"], 1.0, size["band"], batch=batch, rng=rng)
        u = u.to(job.device, torch.float32)
        target = F.pad(u, (size["lag"], 0))[:, : u.shape[1]]
        y = leave(layer(enter(u.unsqueeze(-1)))[0]).squeeze(-1)
        return (y - target).square().mean(), target.var()

    rng = np.random.RandomState(seed + 1)
    job.train(
        model,
        lambda generator: error(rng, size["batch"])[0],
        steps=size["steps"], lr=size["lr"], seed=seed, weight_decay=0.0, decay=True,
    )  # fmt: skip
    with torch.no_grad():
        got, variance = error(np.random.RandomState(seed + 10**6), 64 if not job.quick else 2)
    return {"error / variance": (got / variance).item()}


def delay(job: Job) -> Iterator[Row]:
    """A linear S4 layer learns to delay band-limited noise."""
    size = job.choose(**_DELAY)
    for basis, scale in _DELAYS:
        for seed in job.seeds:
            run = partial(learn_delay, job, basis, scale, size, seed)
            settings = {**size, "basis": basis, "scale": scale}
            yield from job.measure(_scaled(basis, scale), "s4", seed, settings, run)


def delay_holds(rows: list[Row]) -> tuple[bool, str]:
    """With the lag inside the window FouT and LegT learn it, LegS ten times worse."""
    got = {(b, s): mean(rows, _scaled(b, s), "error / variance") for b, s in _DELAYS}
    inside = [got["legt", 1.9], got["fout", 1.9]]
    said = (
        f"With the lag at 0.95 of the window 2 / dt the error is {got['legt', 1.9]:.1e} of the "
        f"variance for legt, {got['fout', 1.9]:.1e} for fout, {got['legs', 1.9]:.1e} for legs at "
        f"the same dt; with a lag of 4 windows {got['legt', 8.0]:.2f} and {got['fout', 8.0]:.2f}."
    )
    sharp = max(inside) < 0.02 and got["legs", 1.9] > 10 * max(inside)
    return sharp and min(got["legt", 8.0], got["fout", 8.0]) > 0.5, said


# -- other sampling rates -----------------------------------------------------------------------

_RESAMPLING = {
    "quick": {"length": 256, "d_model": 16, "steps": 3, "batch": 4, "examples": 8, "lr": 4e-3},
    "cpu": {"length": 256, "d_model": 32, "steps": 250, "batch": 32, "examples": 500, "lr": 4e-3},
}
FULL, SCALED, UNSCALED = "accuracy", "every second sample, 2 dt", "every second sample, same dt"
_SPEECH = {
    "lssl": {FULL: "0.959", SCALED: "0.887"},
    "s4": {FULL: "0.961", SCALED: "0.913"},
    "s4d": {FULL: "0.962", SCALED: "0.918"},
}


def set_rate(model: nn.Module, rate: float) -> None:
    """Tell all time-invariant mixers that the time between samples is `rate` times training's."""
    for part in model.modules():
        if hasattr(part, "rate"):
            part.rate = rate  # type: ignore[assignment]


def hear(job: Job, mixer: str, size: dict[str, Any], seed: int) -> dict[str, float]:
    """Train at one sampling rate, test at it and at half of it with and without a doubled dt."""
    config = ClassifierConfig(
        d_model=size["d_model"], n_layers=2, pattern=mixer, n_classes=4, d_input=1
    )
    model: Classifier = job.build(lambda: Classifier(config), seed)

    def loss(generator: torch.Generator) -> Tensor:
        return model.loss(*tones(size["batch"], size["length"], generator))

    job.train(model, loss, steps=size["steps"], lr=size["lr"], seed=seed, decay=True)
    x, label = tones(size["examples"], size["length"], job.generator("test", seed))
    model.eval()
    out = {}
    for metric, every, rate in ((FULL, 1, 1.0), (SCALED, 2, 2.0), (UNSCALED, 2, 1.0)):
        set_rate(model, rate)
        with torch.no_grad():
            guess = torch.cat([model(part[:, ::every]).argmax(-1) for part in x.split(100)])
        out[metric] = (guess == label).double().mean().item()
    return out


def resampling(job: Job) -> Iterator[Row]:
    """Which octave is a tone in? Learned at one sampling rate, asked at half of it."""
    size = job.choose(**_RESAMPLING)
    for mixer in _SPEECH:
        for seed in job.seeds:
            run = partial(hear, job, mixer, size, seed)
            yield from job.measure(mixer, mixer, seed, size, run, _SPEECH[mixer])


def resampling_holds(rows: list[Row]) -> tuple[bool, str]:
    """A doubled dt costs at most 10 points, the old dt at least 20 more."""
    got = {m: [mean(rows, m, metric) for metric in (FULL, SCALED, UNSCALED)] for m in _SPEECH}
    said = "; ".join(
        f"{m} {full:.1%}, at half the rate {new:.1%} with 2 dt and {old:.1%} with the old dt"
        for m, (full, new, old) in got.items()
    )
    good = all(new >= full - 0.1 and old <= new - 0.2 for full, new, old in got.values())
    return good, said + "."
