import numpy as np
import pytest
import torch
from helpers import golden

from longscan.synthetic.signals import tones, white_noise


def test_white_noise_is_the_authors_bit_for_bit():
    want = golden("s4/white_signal")["whitesignal_seed0"]
    got = white_noise(1.0, 0.00025, 1000, batch=1, rng=np.random.RandomState(0))
    assert torch.equal(got[0], want)


def test_white_noise_is_limited_and_begins_at_zero():
    x = white_noise(400, 1.0, 0.125, batch=50, rng=np.random.RandomState(3))
    assert x.shape == (50, 400)
    assert x[:, 0].abs().max() == 0
    power = torch.fft.rfft(x).abs().square()
    high = torch.fft.rfftfreq(400) > 0.125
    assert power[:, high].max() < 1e-20 * power.max()
    # The mean is that of the first sample; around it the noise has the rms asked for.
    assert abs(x.var(1).mean().sqrt().item() - 0.5) < 0.02
    with pytest.raises(ValueError, match="no frequency"):
        white_noise(400, 1.0, -1.0, batch=1, rng=np.random.RandomState(0))


def test_tones_lie_in_the_octave_of_their_class():
    g = torch.Generator().manual_seed(0)
    x, label = tones(300, 256, g, noise=0.0)
    assert x.shape == (300, 256, 1)
    assert x.dtype == torch.float32
    cycles = torch.fft.rfft(x[..., 0], 2048).abs().argmax(-1) / 8
    assert ((cycles / 4).log2() - label).min() > -0.1
    assert ((cycles / 4).log2() - label).max() < 1.1
    assert label.bincount(minlength=4).min() > 40


def test_every_second_sample_of_a_tone_holds_all_of_it():
    g = torch.Generator().manual_seed(1)
    x, _ = tones(20, 256, g)
    power = torch.fft.rfft(x[..., 0]).abs().square()
    # A tone that does not end with the window leaks a little into all frequencies.
    assert (power[:, 65:].sum(1) / power.sum(1)).max() < 0.02
    with pytest.raises(ValueError, match="at least 256"):
        tones(1, 128, g)
