"""Each registered mixer makes a language model that trains, is saved, and generates."""

import pytest
import torch

from longscan import registry
from longscan.language.evaluate import evaluate
from longscan.language.generate import generate_ids
from longscan.language.tokenizer import ByteTokenizer
from longscan.models import LanguageModel, LanguageModelConfig
from longscan.state import State


@pytest.mark.parametrize("name", registry.names())
def test_trains_is_saved_and_generates(name, tmp_path):
    torch.manual_seed(0)
    model = LanguageModel(LanguageModelConfig(257, d_model=16, n_layers=2, pattern=name))
    model = model.double()
    ids = torch.arange(40).view(1, 40) * 5 % 257
    bounds = torch.tensor([0, 1, 17, 39])

    optimiser = torch.optim.AdamW(model.parameter_groups(weight_decay=0.1, lr=3e-3))
    losses = []
    for _ in range(4):
        loss, _ = model.loss(ids[:, :-1], ids[:, 1:], cu_seqlens=bounds)
        optimiser.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()

    state: State | None = None
    for a, b in ((0, 1), (1, 17), (17, 39)):
        _, state = model(ids[:, a:b], state)
    state.save(tmp_path / "state.safetensors")
    kept = State.load(tmp_path / "state.safetensors")
    torch.testing.assert_close(model(ids[:, 39:], kept)[0][:, 0], model(ids)[0][:, 39])

    model.save(tmp_path)
    again = LanguageModel.load(tmp_path).eval()
    torch.testing.assert_close(again(ids)[0], model.float()(ids)[0])

    model.double()
    prompts = [[256, 5, 6], [256], list(range(30))]
    together = list(generate_ids(model, prompts, max_new_tokens=5, seed=1, segment=12))
    alone = [t for (t,) in generate_ids(model, prompts[:1], max_new_tokens=5, seed=1)]
    assert [step[0] for step in together] == alone

    texts = ["ab", "a longer text than that", "c"]
    one = evaluate(model, ByteTokenizer(), texts, segment=3, lanes=1)
    assert evaluate(model, ByteTokenizer(), texts).nats == pytest.approx(one.nats, rel=1e-10)
