"""The residual stream between blocks, whole or as a sum that is still to be made."""

from typing import Any

import pytest
import torch
from helpers import assert_close

from longscan.models import LanguageModel, LanguageModelConfig


def model(**more):
    torch.manual_seed(0)
    return LanguageModel(LanguageModelConfig(11, d_model=16, n_layers=3, **more)).double()


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("pattern", ["rwkv7", "attention", "mega,gla"])
def test_a_pair_stands_for_its_sum(pattern, norm):
    """Gradients too; a mixer without the block's norm, and what layers share, included."""
    m = model(pattern=pattern, norm=norm)
    grads = []
    for pair in (False, True):
        x = torch.randn(1, 7, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        x.requires_grad_()
        stream: Any = (x, None) if pair else x
        first = None
        for block in m.blocks:
            stream, _, first = block(stream, first=first)
        assert isinstance(stream, tuple) == pair
        y = stream[0] + stream[1] if pair else stream
        leaves = [x, *(p for n, p in m.named_parameters() if n.startswith("blocks."))]
        grads.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for a, b in zip(*grads, strict=True):
        assert_close(a, b, "float64")


def test_hooks_see_whole_streams(monkeypatch):
    """Where a kernel makes the sums, a model that is watched makes them as ever."""
    import longscan.models.stack as module

    monkeypatch.setattr(module, "adds", lambda x: True)
    m, ids = model(pattern="gla"), torch.arange(7).view(1, 7)
    seen = []
    plain = m(ids)[0]
    hook = m.blocks[1].register_forward_hook(lambda _, args, out: seen.extend([args[0], out[0]]))
    assert_close(m(ids)[0], plain, "float64")
    hook.remove()
    assert all(isinstance(x, torch.Tensor) and x.shape == (1, 7, 16) for x in seen)
    assert len(seen) == 2


def test_backward_hooks_see_gradients_of_whole_streams(monkeypatch):
    import longscan.models.stack as module

    monkeypatch.setattr(module, "adds", lambda x: True)
    m, seen = model(pattern="gla"), []
    m.blocks[1].register_full_backward_hook(lambda _, given, got: seen.extend([given[0], got[0]]))
    m(torch.arange(7).view(1, 7))[0].square().sum().backward()
    assert [x.shape for x in seen] == [(1, 7, 16)] * 2


@pytest.mark.parametrize("name", ["norm", "blocks.0.norm", "blocks.0.mlp_norm"])
def test_norms_are_called_where_something_hangs_on_them(name):
    """Hooks of norms run; modules of other classes, as sharding makes them, are called too."""
    m, ids, seen = model(pattern="gla"), torch.arange(7).view(1, 7), []
    norm = m.get_submodule(name)
    hook = norm.register_forward_hook(lambda _, args, y: seen.append(y))
    m(ids)
    assert [y.shape for y in seen] == [(1, 7, 16)]
    hook.remove()
    norm.__class__ = type(
        "Sharded", (type(norm),), {"forward": lambda self, x: seen.append(x) or x}
    )
    m(ids)
    assert len(seen) == 2
