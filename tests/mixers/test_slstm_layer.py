"""The sLSTM layer: initialisation, settings, and its formula written out."""

import math

import pytest
import torch
from helpers import assert_close
from torch.nn import functional as F

from longscan.mixers.slstm import SLSTM
from longscan.models import LanguageModel, LanguageModelConfig
from longscan.ops.slstm import slstm_reference


def test_the_layer_written_out():
    """Each gate from its own input, head by head; with and without the convolution."""
    for d_conv in (4, 0):
        torch.manual_seed(0)
        m = SLSTM(12, n_heads=3, d_conv=d_conv, recurrent_init="standard").double()
        x = torch.randn(2, 9, 12, dtype=torch.float64)
        u = x
        if m.conv1d is not None:
            taps, bias = m.conv1d.weight, m.conv1d.bias
            u = F.silu(F.conv1d(F.pad(x.mT, (3, 0)), taps, bias, groups=12).mT)
        else:
            assert "conv" not in m.init_state(2)
        gates = torch.empty(2, 9, 3, 4, 4, dtype=torch.float64)
        for g, (p, src) in enumerate(((m.i_proj, u), (m.f_proj, u), (m.z_proj, x), (m.o_proj, x))):
            for h in range(3):
                gates[:, :, h, g] = src[..., 4 * h : 4 * h + 4] @ p.weight[h].T
        h, _ = slstm_reference(gates, m.recurrent, m.gate_bias)
        centred = h - h.mean(-1, True)
        want = centred / (centred.square().mean(-1, True) + 1e-5).sqrt()
        y, _ = m(x)
        assert_close(y, want.flatten(2), "float64", f"d_conv {d_conv}")


def test_initialisation():
    torch.manual_seed(0)
    m = SLSTM(256, layer=1, n_layers=4)
    assert m.recurrent.abs().max() == 0
    assert m.gate_bias[:, [0, 2, 3]].abs().max() == 0
    for j in (0, 1, 20, 63):
        want = 5 - 12 * (j / 63) ** (0.3 + 1.3 / 3)
        assert torch.allclose(m.gate_bias[:, 1, j], torch.full((4,), want), atol=1e-5)
    for p in (m.i_proj, m.f_proj, m.z_proj, m.o_proj):
        assert abs(p.weight.std().item() / math.sqrt(2 / (5 * 256)) - 1) < 0.05
    small = SLSTM(256, bias_init="small", recurrent_init="standard")
    assert torch.allclose(small.gate_bias[:, 1], torch.linspace(3, 6, 64).expand(4, -1))
    assert 0.99 / 16 < small.recurrent.abs().max() < 1 / 16
    assert torch.allclose(SLSTM(256).gate_bias[:, 1, 1], torch.tensor(5 - 12 * (1 / 63) ** 0.3))


def test_heads_of_one_channel():
    m = SLSTM(4, n_heads=4)
    y, _ = m(torch.randn(1, 5, 4))
    assert torch.isfinite(m.gate_bias).all()
    assert y.abs().max() == 0, "one channel is its own mean"


def test_models_tell_layers_their_place():
    config = LanguageModelConfig(
        vocab_size=9, d_model=32, n_layers=4, pattern="slstm,gla", mixers={"slstm": {"n_heads": 2}}
    )
    model = LanguageModel(config)
    mixers = [b.mixer for b in model.blocks if isinstance(b.mixer, SLSTM)]
    assert [(m.layer, m.n_layers) for m in mixers] == [(0, 2), (1, 2)]


def test_recurrent_weights_are_not_decayed():
    """As in the authors' code."""
    config = LanguageModelConfig(vocab_size=9, d_model=32, n_layers=1, pattern="slstm")
    model = LanguageModel(config)
    groups = model.parameter_groups(weight_decay=0.1, lr=1e-3)
    m = model.blocks[0].mixer
    for g in groups:
        for p in (m.recurrent, m.gate_bias):
            assert g["weight_decay"] == 0 or all(q is not p for q in g["params"])
        for p in (m.i_proj.weight, m.o_proj.weight):
            assert g["weight_decay"] > 0 or all(q is not p for q in g["params"])


def test_bad_settings_are_refused():
    for settings, message in [
        ({"n_heads": 5}, "must divide"),
        ({"recurrent_init": "ones"}, "zeros or standard"),
        ({"bias_init": "zeros"}, "powerlaw or small"),
        ({"layer": 2, "n_layers": 2}, "must lie in"),
    ]:
        with pytest.raises(ValueError, match=message):
            SLSTM(32, **settings)
