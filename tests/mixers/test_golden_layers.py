"""Single layers against the authors' code: outputs and gradients of every parameter."""

import pytest
import torch
from helpers import assert_close, golden

from longscan.pretrained.layers import kimi_layer, layer_state_dict, qwen_next_layer
from longscan.registry import mixer_class

CASES = {
    "gla/layer_default": ("gla", {"n_heads": 2}),
    "gla/layer_shortconv": ("gla", {"n_heads": 4, "d_key": 8, "d_value": 16, "d_conv": 4}),
    "deltanet/layer_deltanet": ("deltanet", {"n_heads": 2}),
    "deltanet/layer_deltanet_elu_sum_noconv": (
        "deltanet",
        {"n_heads": 2, "qk_activation": "elu", "qk_norm": "sum", "d_conv": 0},
    ),
    "deltanet/layer_gated_deltanet": ("gated_deltanet", {"n_heads": 2, "d_key": 16}),
    "deltanet/layer_kda": ("kda", {"n_heads": 2}),
    "deltaproduct/layer_n2_gated": ("deltaproduct", {"n_heads": 2}),
    "deltaproduct/layer_n3_nogate_noconv": (
        "deltaproduct",
        {"n_heads": 2, "n_steps": 3, "forget_gate": False, "output_gate": False, "d_conv": 0},
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_layer_equals_authors(name, backend, monkeypatch):
    monkeypatch.setenv("LONGSCAN_BACKEND", backend)
    mixer, options = CASES[name]
    file = golden(name)
    params = {k[6:]: v for k, v in file.items() if k.startswith("param.")}
    layer = mixer_class(mixer)(file["in_x"].shape[-1], **options).double()
    layer.load_state_dict(layer_state_dict(mixer, {k: v.double() for k, v in params.items()}))
    x = file["in_x"].double().requires_grad_()
    y, _ = layer(x)
    assert_close(y, file["out_y"], "golden64", "y")
    (y * file["cot_y"]).sum().backward()
    assert x.grad is not None
    assert_close(x.grad, file["grad_x"], "stored32", "dx")
    want = {k[10:]: v for k, v in file.items() if k.startswith("gradparam.")}
    assert want.keys() == params.keys()
    for ours, grad in layer_state_dict(mixer, want).items():
        got = layer.get_parameter(ours).grad
        assert got is not None
        assert_close(got, grad, "stored32", ours)


@pytest.mark.parametrize("name", CASES)
def test_layer_in_float32(name):
    mixer, options = CASES[name]
    file = golden(name)
    params = {k[6:]: v for k, v in file.items() if k.startswith("param.")}
    layer = mixer_class(mixer)(file["in_x"].shape[-1], **options)
    layer.load_state_dict(layer_state_dict(mixer, params))
    y, _ = layer(file["in_x"])
    assert y.dtype == torch.float32
    assert_close(y, file["out_y"], "float32", "y")


@pytest.mark.parametrize("name", ["qwen3_next", "kimi"])
def test_layers_of_hugging_face_models(name):
    """The first delta-rule layer of a tiny Qwen3-Next and of a tiny Kimi Linear."""
    file = golden(f"deltanet/{name}_layer0")
    tensors = {k[6:]: v for k, v in file.items() if k.startswith("param.")}
    if name == "kimi":
        layer = mixer_class("kda")(48, n_heads=3, gate_bias=False)
        layer.load_state_dict(kimi_layer(tensors))
    else:
        sizes = {"n_heads": 2, "n_value_heads": 4, "d_key": 8, "d_value": 12}
        layer = mixer_class("gated_deltanet")(48, **sizes, norm_eps=1e-6)
        layer.load_state_dict(qwen_next_layer(tensors, **sizes))
    y, _ = layer(file["in"])
    assert_close(y, file["out"], "float32", "y")
