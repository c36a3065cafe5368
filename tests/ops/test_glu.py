"""Gated linear units against their formula."""

import pytest
import torch
from helpers import assert_close
from torch.nn import functional as F

from longscan.ops.glu import glu


@pytest.mark.parametrize(("activation", "act"), [("silu", F.silu), ("gelu", F.gelu)])
def test_glu(activation, act):
    x = torch.randn(2, 3, 10, dtype=torch.float64, requires_grad=True)
    y = glu(x, activation)
    assert_close(y, act(x[..., :5]) * x[..., 5:], "float64")
    assert torch.autograd.gradcheck(lambda x: glu(x, activation), x)
    assert torch.autograd.gradgradcheck(lambda x: glu(x, activation), x)


def test_bad_input_is_refused():
    """Before a kernel is chosen, which would take any name for SiLU."""
    with pytest.raises(ValueError, match="activation"):
        glu(torch.zeros(3, 4), "relu")
    with pytest.raises(ValueError, match="5 columns"):
        glu(torch.zeros(3, 5))
