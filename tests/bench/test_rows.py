"""The rows of the bench: what we make of the peers' parameters, and that both sides agree."""

import pytest
import torch

from longscan.bench import authors, compare, peers
from longscan.bench import row as rows
from longscan.registry import mixer_class

S4D = {
    "layer.D": (1, 64), "layer.kernel.inv_dt": (64, 1), "layer.kernel.C": (1, 64, 32, 2),
    "layer.kernel.B": (1, 64, 32, 2), "layer.kernel.A_real": (64, 32),
    "layer.kernel.A_imag": (64, 32), "output_linear.0.weight": (128, 64),
    "output_linear.0.bias": (128,),
}  # fmt: skip
MLSTM = {
    "learnable_skip": (128,), "proj_up.weight": (256, 64), "proj_down.weight": (64, 128),
    "q_proj.weight": (32, 4, 4), "k_proj.weight": (32, 4, 4), "v_proj.weight": (32, 4, 4),
    "conv1d.conv.weight": (128, 1, 4), "conv1d.conv.bias": (128,),
    "mlstm_cell.igate.weight": (4, 384), "mlstm_cell.igate.bias": (4,),
    "mlstm_cell.fgate.weight": (4, 384), "mlstm_cell.fgate.bias": (4,),
    "mlstm_cell.outnorm.weight": (128,),
}  # fmt: skip
MEGA = {
    "gamma": (2, 32), "beta": (2, 32), "norm.norm.weight": (64,), "norm.norm.bias": (64,),
    "move.delta": (64, 16, 1), "move.alpha": (64, 16, 1), "move.beta": (64, 16, 1),
    "move.gamma": (64, 16), "move.omega": (64,), "v_proj.weight": (128, 64),
    "v_proj.bias": (128,), "mx_proj.weight": (288, 64), "mx_proj.bias": (288,),
    "h_proj.weight": (64, 128), "h_proj.bias": (64,), "rel_pos_bias.alpha": (1, 32),
    "rel_pos_bias.beta": (1, 32),
}  # fmt: skip
# The peers' parameters at d_model = 64, so that what we make of them is tested without the peers.
PARAMETERS = {
    "mlstm-xlstm": MLSTM,
    "mlstm-xlstm_chunked": MLSTM,
    "slstm-xlstm": {
        "conv1d.conv.weight": (64, 1, 4), "conv1d.conv.bias": (64,), "fgate.weight": (4, 16, 16),
        "igate.weight": (4, 16, 16), "zgate.weight": (4, 16, 16), "ogate.weight": (4, 16, 16),
        "slstm_cell._recurrent_kernel_": (4, 64, 16), "slstm_cell._bias_": (256,),
        "group_norm.weight": (64,),
    },
    "mlstm_large-transformers": {
        "q.weight": (32, 64), "k.weight": (32, 64), "v.weight": (64, 64),
        "ogate_preact.weight": (64, 64), "igate_preact.weight": (4, 64),
        "igate_preact.bias": (4,), "fgate_preact.weight": (4, 64), "fgate_preact.bias": (4,),
        "multihead_norm.weight": (64,), "out_proj.weight": (64, 64),
    },
    "rwkv4-transformers": {
        "time_decay": (64,), "time_first": (64,), "time_mix_key": (1, 1, 64),
        "time_mix_value": (1, 1, 64), "time_mix_receptance": (1, 1, 64), "key.weight": (64, 64),
        "value.weight": (64, 64), "receptance.weight": (64, 64), "output.weight": (64, 64),
    },
    "s4d-authors": S4D,
    "s4-authors": {**S4D, "layer.kernel.P": (1, 64, 32, 2)},
    "gam-authors": {
        "memory_bank": (512, 64), "causal_conv.weight": (64, 1, 3), "causal_conv.bias": (64,),
        "gate.weight": (128, 64), "gate.bias": (128,),
    },
    "mega-authors": MEGA,
    "mega-authors_chunk": MEGA,
}  # fmt: skip


def row_named(name):
    return next(r for r in peers.ROWS if r.name == name)


@pytest.mark.parametrize("name", PARAMETERS)
def test_translations_fill_our_layers(name):
    row = row_named(name)
    module = row.ours(64).module
    theirs = {k: torch.randn(shape) for k, shape in PARAMETERS[name].items()}
    ours = row.translate(theirs)
    module.load_state_dict(dict(ours))
    assert set(ours) == {k for k, _ in module.named_parameters()}
    assert row.unequal <= set(ours)
    # Every number of theirs is one of ours, up to sign and constants.
    want = torch.cat([t.flatten() for t in theirs.values()]).abs().sort().values
    got = torch.cat([t.flatten() for t in row.gradients(theirs).values()]).abs().sort().values
    assert torch.allclose(got, want, atol=1e-6)


@pytest.mark.filterwarnings("ignore")  # those of the peers are not ours to mend
@pytest.mark.parametrize("row", [r for r in peers.ROWS if r.same], ids=lambda row: row.name)
def test_rows_agree_with_their_peers(row):
    error = row.missing()
    if error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    ours, peer = row.ours(64), row.peer(64)
    compare.equal_weights(row, ours, peer)
    inputs, more = row.inputs(2, 64, 64), row.inputs(2, 5, 64)
    cotangent = torch.randn_like(compare.prefill(ours, inputs))
    for mode in row.modes:
        a, b = (compare.calls(mode, side, inputs, more, cotangent) for side in (ours, peer))
        assert compare.check(row, (a, a()), (b, b()), mode) < 1e-4


def test_walking_reads_every_token_once():
    seen = []

    def step(cache, x):
        seen.append(x)
        return x, cache + x.sum().item()

    x = torch.arange(6.0).view(1, 3, 2)
    assert rows.walk(step, 10.0, x) == 25
    assert torch.equal(torch.cat(seen, 1), x)


def test_names_of_rows_are_those_of_mixers_and_peers():
    """The pages of the mixers find their rows by them."""
    for row in peers.ROWS:
        name, _, peer = row.name.rpartition("-")
        assert peer
        if row.ours(64).module is not None:
            assert isinstance(row.ours(64).module, mixer_class(name))


@pytest.mark.filterwarnings("ignore")
def test_hints_name_what_the_rows_need():
    for row in authors.ROWS:
        assert row.install in (authors.XLSTM, authors.S4, authors.GAM, authors.MEGA)
        assert row.missing() is None or row.install in str(row.missing())
