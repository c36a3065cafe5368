"""Causality of every registered mixer, and that the self-tests notice what is wrong."""

import copy

import ema
import pytest
import torch
from torch import nn

from longscan import cli, registry, verify
from longscan.models import Bidirectional, Stack, StackConfig
from longscan.state import State
from longscan.verify import CausalityError, check_causal

F64 = torch.float64


@pytest.mark.parametrize("name", registry.names())
def test_every_mixer_is_causal(name):
    """No gradient at all, in float32 as used and in float64, beyond a chunk of 64."""
    torch.manual_seed(0)
    mixer = registry.mixer_class(name)(32)
    before = [p.clone() for p in mixer.parameters()]
    report = check_causal(mixer)
    assert report.forbidden == 80 * 79 // 2 + 80 * 80 - sum(
        n * (n + 1) // 2 for n in (1, 19, 20, 40)
    )
    assert 0 < report.seen <= 1
    check_causal(mixer.double(), length=33, seed=1)
    assert all(torch.equal(p, q) for p, q in zip(before, mixer.float().parameters(), strict=True))


def test_a_stack_is_causal():
    torch.manual_seed(0)
    config = StackConfig(d_model=16, n_layers=3, pattern="ema,gated_deltanet,attention")
    assert check_causal(Stack(config).double(), d_model=16).seen == 1


class FFT(ema.MovingAverage):
    """The same moving average as a long convolution by FFT: its rounding errors look ahead."""

    def forward(self, x, state=None, *, cu_seqlens=None):
        if cu_seqlens is not None:
            parts = x.split(cu_seqlens.diff().tolist(), 1)
            return torch.cat([self.forward(p)[0] for p in parts], 1), State()
        n = x.shape[1]
        u = self.in_proj(x) * self.table
        log_a = -self.rate.exp()
        kernel = (log_a * torch.arange(n).to(x)[:, None]).exp() * -torch.expm1(log_a)
        h = torch.fft.irfft(
            torch.fft.rfft(u, 2 * n, 1) * torch.fft.rfft(kernel, 2 * n, 0), 2 * n, 1
        )
        return self.out_proj(h[:, :n]), State()


class Ahead(ema.MovingAverage):
    """Sees one token ahead, behind a weight that starts at 0."""

    def __init__(self, d_model):
        super().__init__(d_model)
        self.leak = nn.Parameter(torch.zeros(d_model))

    def forward(self, x, state=None, *, cu_seqlens=None):
        y, state = super().forward(x, state, cu_seqlens=cu_seqlens)
        return y + self.leak * torch.cat([x[:, 1:], x[:, :1] * 0], 1), state


class Mixes(ema.MovingAverage):
    """Forgets that a row is packed."""

    def forward(self, x, state=None, *, cu_seqlens=None):
        return super().forward(x, state)


class Poisoned(ema.MovingAverage):
    """Multiplies the future by 0, and something there is infinite."""

    def forward(self, x, state=None, *, cu_seqlens=None):
        y, state = super().forward(x, state, cu_seqlens=cu_seqlens)
        return y + 0 * (x.flip(1) * float("inf")).nan_to_num(0), state


@pytest.mark.parametrize(
    ("mixer", "pair", "words"),
    [
        (FFT, (0, 1), "comes later"),
        (lambda d: Bidirectional(d, "ema"), (0, 1), "comes later"),
        (Ahead, (0, 1), "output 0 depends on input 1, which comes later: its gradient is"),
        (Mixes, (1, 0), "another packed sequence"),
        (Poisoned, (0, 1), "gradient is nan"),
    ],
)
def test_a_leak_is_found(mixer, pair, words):
    torch.manual_seed(0)
    mixer = mixer(16).double()
    if isinstance(mixer, FFT):
        x = torch.randn(1, 50, 16, dtype=F64)
        want = super(FFT, mixer).forward(x)[0]
        torch.testing.assert_close(mixer(x)[0], want, rtol=1e-10, atol=1e-10)
    with pytest.raises(CausalityError, match=words) as caught:
        check_causal(mixer)
    assert (caught.value.t, caught.value.s) == pair
    if isinstance(mixer, FFT):
        assert 0 < caught.value.size < 1e-12, "small, but not nothing"


def test_a_mixer_that_does_nothing_is_no_proof():
    class Nothing(ema.MovingAverage):
        def forward(self, x, state=None, *, cu_seqlens=None):
            return 0 * x, State()

    with pytest.raises(ValueError, match="nothing was tested"):
        check_causal(Nothing(8))


def test_perturbed_is_a_copy():
    m = ema.MovingAverage(8)
    p = verify.perturbed(m)
    assert torch.equal(m.table, torch.ones_like(m.table))
    assert not any(torch.equal(a, b) for a, b in zip(m.parameters(), p.parameters(), strict=True))
    again = verify.perturbed(m)
    assert all(torch.equal(a, b) for a, b in zip(p.parameters(), again.parameters(), strict=True))


# --- the command ----------------------------------------------------------------------------


def test_the_command(capsys, monkeypatch):
    monkeypatch.setenv("LONGSCAN_BACKEND", "torch")
    assert cli.main(["verify", "gla", "attention", "--length", "20"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["causal", "split", "steps", "gradients", "float32", "seconds"]
    assert [line.split()[:3] for line in lines[1:]] == [
        ["gla", "ok", "yes"],
        ["attention", "ok", "yes"],
    ]
    import os

    assert os.environ["LONGSCAN_BACKEND"] == "torch"


class Wrong(ema.MovingAverage):
    """Wrong in one way, by name."""

    how = ""

    def forward(self, x, state=None, *, cu_seqlens=None):
        y, out = super().forward(x, state, cu_seqlens=cu_seqlens)
        if self.how == "split" and x.shape[1] > 1 and state is not None:
            y = 1.001 * y
        if self.how == "steps" and x.shape[1] == 1:
            out = out.map(lambda t: 1.001 * t)
        if self.how == "gradients" and verify.os.environ.get("LONGSCAN_BACKEND") == "reference":
            y = y - 0.001 * (y - y.detach())
        if self.how == "float32" and x.dtype == torch.float32:
            y = y.bfloat16().float()
        if self.how == "causal":
            y = y + x.flip(1)
        return y, out


@pytest.mark.parametrize("how", ["causal", "split", "steps", "gradients", "float32", ""])
def test_the_command_finds_what_is_wrong(how, capsys, monkeypatch):
    entry = registry.Entry("wrong", Wrong, "Wrong", "none", 2025, "linear")
    monkeypatch.setitem(registry._entries, "wrong", entry)
    monkeypatch.setattr(Wrong, "how", how)
    assert cli.main(["verify", "wrong", "--d-model", "16"]) == (1 if how else 0)
    out = capsys.readouterr().out
    assert ("FAIL" in out) == bool(how)
    torch.manual_seed(0)
    found, passed = verify.verify("wrong", d_model=16)
    assert passed == (not how)
    if how:
        assert ">" in found[how] or "depends" in found[how]


def test_bad_options(capsys):
    assert cli.main(["verify", "glaa"]) == 1
    assert "did you mean gla" in capsys.readouterr().err
    assert cli.main(["verify", "gla", "--length", "3"]) == 1
    assert "at least 8" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert cli.main(["verify", "gla", "--device", "cuda"]) == 1
        assert "no CUDA device" in capsys.readouterr().err


def test_errors_that_are_no_numbers_fail():
    nan = torch.tensor([1.0, float("nan")])
    assert verify.error(nan, copy.deepcopy(nan)) == float("inf")
    assert verify.error(torch.ones(2), torch.ones(3)) == float("inf")
    assert verify.error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])) == 0.5
