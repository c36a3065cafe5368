"""Real-valued signals: band-limited noise, and tones that a class is told by."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def white_noise(
    period: float,
    dt: float,
    limit: float,
    *,
    batch: int,
    rng: np.random.RandomState,
    rms: float = 0.5,
) -> Tensor:
    """Noise without frequencies above `limit`, starting at 0.

    Shapes: [batch, 2 ceil(period / dt / 2)], float64. limit: in cycles per unit of `period`.
    rms: of the noise before its first sample is subtracted.
    Raises: ValueError if no frequency is left.
    Source: the delay task of HTTYH (arXiv 2206.12037); equal to its generator, bit for bit, when
    `rng` is seeded alike.
    """
    half = math.ceil(period / dt / 2)
    shape = (batch, half + 1)
    sigma = rms * math.sqrt(0.5)
    # The order of the draws is that of the authors' generator.
    imaginary = rng.normal(0.0, sigma, size=shape)
    imaginary[:, -1] = 0.0
    coefficients = 1j * imaginary
    coefficients += rng.normal(0.0, sigma, size=shape)
    coefficients[:, 0] = 0.0
    too_high = np.fft.rfftfreq(2 * half, dt) > limit
    coefficients[:, too_high] = 0.0
    left = 1.0 - too_high.sum() / half
    if left <= 0:
        raise ValueError(
            f"no frequency up to {limit} is left; the lowest of this length is {1 / period:g}"
        )
    signal = np.fft.irfft(coefficients / np.sqrt(left) * np.sqrt(2 * half), axis=-1)
    return torch.from_numpy(signal - signal[:, :1])


def tones(
    batch: int, length: int, generator: torch.Generator, *, classes: int = 4, noise: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Tones in noise; the class is the octave of the frequency.

    Class c has a frequency log-uniform in [4, 8] 2^c cycles over the whole length; phase and
    loudness tell nothing. The noise is limited to the band of the tones, so that every second
    sample of a signal still holds all of it.
    Shapes: signals [batch, length, 1] float32, classes [batch] int64.
    Raises: ValueError if every second sample could not hold the highest tone.
    """
    highest = 8 * 2 ** (classes - 1)
    if highest > length // 4:
        raise ValueError(
            f"{classes} octaves reach {highest} cycles, too many for a length of {length}: "
            f"at least {4 * highest}"
        )
    device = generator.device

    def uniform() -> Tensor:
        return torch.rand(batch, 1, generator=generator, device=device)

    label = torch.randint(classes, (batch,), generator=generator, device=device)
    cycles = 4 * 2 ** (label.unsqueeze(1) + uniform())
    time = torch.arange(length, device=device) / length
    tone = torch.sin(2 * math.pi * (cycles * time + uniform())) * (0.5 + uniform())
    spectrum = torch.fft.rfft(torch.randn(batch, length, generator=generator, device=device))
    spectrum[:, highest + 1 :] = 0
    band = torch.fft.irfft(spectrum, length)
    band = band / band.square().mean().sqrt()
    return (tone + noise * band).unsqueeze(-1), label
