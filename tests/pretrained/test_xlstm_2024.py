"""An xLSTM[a:b] language model of the 2024 package: logits, loss, all gradients, steps, states."""

import pytest
import torch
from helpers import assert_close, error, golden

from longscan.models import LanguageModel
from longscan.models.checkpoint import CheckpointError
from longscan.pretrained.xlstm_2024 import (
    load_xlstm_2024,
    xlstm_2024_config,
    xlstm_2024_state_dict,
)

CONFIG = {
    "vocab_size": 13,
    "embedding_dim": 32,
    "num_blocks": 3,
    "context_length": 32,
    "slstm_at": [1],
    "mlstm_block": {"mlstm": {"num_heads": 4, "conv1d_kernel_size": 4, "qkv_proj_blocksize": 4}},
    "slstm_block": {
        "slstm": {"num_heads": 4, "conv1d_kernel_size": 4, "backend": "vanilla"},
        "feedforward": {"proj_factor": 1.3, "act_fn": "gelu"},
    },
}
KERNEL = "xlstm_block_stack.blocks.1.xlstm.slstm_cell._recurrent_kernel_"
BIAS = "xlstm_block_stack.blocks.1.xlstm.slstm_cell._bias_"


@pytest.fixture(scope="module")
def file():
    return {**golden("xlstm/lm_1to1"), **golden("xlstm/lm_1to1_grads")}


def part(file, prefix):
    return {k[len(prefix) :]: v for k, v in file.items() if k.startswith(prefix)}


def build(file):
    config = xlstm_2024_config(CONFIG)
    model = LanguageModel(config).double()
    model.load_state_dict(xlstm_2024_state_dict(part(file, "param."), config))
    return model


def test_logits_loss_and_gradients(file):
    """The file's are of the parallel mLSTM, which adds its eps in other units: 1e-8 and 1e-6."""
    model, ids = build(file), file["in.idx"]
    logits, _ = model(ids)
    assert error(logits, file["out.logits"]) < 1e-8
    loss, _ = model.loss(ids[:, :-1], ids[:, 1:])
    assert_close(loss, file["out.loss"], "golden64", "loss")
    loss.backward()
    theirs = part(file, "grad.")
    assert theirs.keys() == part(file, "param.").keys()
    # A gradient moves as a difference of parameters does.
    moved, origin = (
        xlstm_2024_state_dict(t, model.config)
        for t in (theirs, {k: torch.zeros_like(v) for k, v in theirs.items()})
    )
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert_close(p.grad, moved[name] - origin[name], "stored32", name)


def test_steps_and_states(file):
    """One token at a time both sides compute the same formula."""
    model, ids = build(file), file["in.idx"]
    state, out = None, []
    with torch.no_grad():
        for t in range(ids.shape[1]):
            logits, state = model(ids[:, t : t + 1], state)
            out.append(logits)
        whole, final = model(ids)
    assert_close(torch.cat(out, 1), file["out.logits_step"], "golden64", "logits")
    assert_close(whole, file["out.logits_step"], "golden64", "logits of the whole")
    for now in (state, final):
        own = now.child("1")
        cell = torch.stack([own.tensor(k).flatten(1) for k in ("y", "c", "n", "m")])
        assert_close(cell, file["state.block_1.slstm_state"], "golden64", "y, c, n, m")
        # The package keeps one input more than the next token needs.
        window = file["state.block_1.conv_state.0"][:, 1:]
        assert_close(own.tensor("conv"), window, "golden64", "conv")
        own = now.child("0")
        c, n = own.tensor("s").split([16, 1], -1)
        for k, got in enumerate((c, n, own.tensor("m").unsqueeze(-1))):
            assert_close(got, file[f"state.block_0.mlstm_state.{k}"], "golden64", f"mLSTM {k}")


def test_either_backend_of_the_cell(file):
    """The CUDA backend stores the kernel [N, D, 4 D] and the bias [N, 4, D]."""
    config, theirs = xlstm_2024_config(CONFIG), part(file, "param.")
    want = xlstm_2024_state_dict(theirs, config)
    other = dict(theirs)
    kernel, bias = torch.empty(4, 8, 32, dtype=torch.float64), torch.empty(4, 32).double()
    for head in range(4):
        for gate in range(4):
            rows = slice(8 * gate, 8 * gate + 8)
            kernel[head, :, rows] = theirs[KERNEL][head, rows].T
            at = 32 * gate + 8 * head
            bias[head, rows] = theirs[BIAS][at : at + 8]
    other[KERNEL], other[BIAS] = kernel, bias.flatten()
    got = xlstm_2024_state_dict(other, config)
    for name, value in want.items():
        assert torch.equal(got[name], value), name
    with pytest.raises(CheckpointError, match="neither the vanilla"):
        xlstm_2024_state_dict({**theirs, KERNEL: kernel[:, :, :8]}, config)


def test_loading_in_float32(file):
    model = load_xlstm_2024(part(file, "param."), CONFIG)
    logits, _ = model(file["in.idx"])
    assert logits.dtype == torch.float32
    assert_close(logits, file["out.logits"], "float32", "logits")


def test_a_tied_head(file):
    theirs = part(file, "param.")
    theirs["lm_head.weight"] = theirs["token_embedding.weight"]
    model = load_xlstm_2024(theirs, {**CONFIG, "tie_weights": True})
    assert model.head is None
    untied = load_xlstm_2024(theirs, CONFIG)
    assert torch.equal(model(file["in.idx"])[0], untied(file["in.idx"])[0])


def test_configs():
    """The package's own defaults and words for which block is which."""
    config = xlstm_2024_config({"vocab_size": 9, "embedding_dim": 96, "num_blocks": 2,
                                "mlstm_block": {}})  # fmt: skip
    assert config.layers == ("mlstm", "mlstm")
    assert config.mixers["mlstm"]["expand"] * 96 == 192
    base = {"vocab_size": 9, "embedding_dim": 96, "num_blocks": 2, "slstm_block": {}}
    for more in ({}, {"mlstm_block": {}, "slstm_at": "all"}):
        config = xlstm_2024_config({**base, **more})
        assert config.layers == ("slstm", "slstm")
    assert config.ff_width == 128  # 1.3 * 96 = 124.8, rounded up to a multiple of 64
    LanguageModel(config)
    own = {"feedforward": {"act_fn": "swish", "proj_factor": 2.0, "round_proj_up_dim_up": False}}
    config = xlstm_2024_config({**base, "slstm_block": own})
    assert (config.activation, config.ff_width) == ("silu", 192)


def test_what_does_not_fit_is_named(file):
    theirs = part(file, "param.")
    cell = CONFIG["slstm_block"]["slstm"]
    for change, message in [
        ({"bias": True}, "bias True"),
        ({"add_post_blocks_norm": False}, "add_post_blocks_norm"),
        ({"slstm_block": {"feedforward": {"act_fn": "relu"}}}, "MLP uses 'relu'"),
        ({"slstm_block": {"slstm": {**cell, "function": "lstm"}}}, "function 'lstm'"),
        ({"slstm_at": []}, r"no tensor .*blocks\.1\.xlstm\.proj_up"),
        ({"num_blocks": 2}, "without a place"),
        ({"embedding_dim": 64}, "another shape"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            load_xlstm_2024(theirs, {**CONFIG, **change})
    with pytest.raises(CheckpointError, match="missing"):
        load_xlstm_2024({k: v for k, v in theirs.items() if "1.xlstm.conv1d" not in k}, CONFIG)
