"""Activation checkpointing changes no gradient, whatever the mixer and whatever enters."""

import pytest
import torch

from longscan import registry
from longscan.models import LanguageModel, LanguageModelConfig


def _gradients(name: str, again: bool) -> list[torch.Tensor]:
    torch.manual_seed(0)
    config = LanguageModelConfig(
        vocab_size=11, d_model=16, n_layers=1, pattern=name, mlp="none", checkpoint_blocks=again
    )
    model = LanguageModel(config).double().train()
    ids = torch.randint(0, 11, (2, 60))
    _, state = model(ids[:, :20])  # T of the second part is longer than chunks of memories are
    loss, _ = model.loss(ids[:, 20:-1], ids[:, 21:], state)
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros(()) if g is None else g for g in found]


@pytest.mark.parametrize("name", registry.names())
def test_blocks_computed_again(name: str) -> None:
    for once, twice in zip(_gradients(name, False), _gradients(name, True), strict=True):
        torch.testing.assert_close(twice, once, rtol=1e-9, atol=1e-12)
