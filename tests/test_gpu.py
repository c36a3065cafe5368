"""On a CUDA device everything runs unchanged: the same numbers, training in bfloat16, decoding.

Run by `make test-gpu`.
"""

import pytest
import torch
from helpers import TOLERANCE, error

from longscan.models.config import LanguageModelConfig
from longscan.models.language_model import LanguageModel
from longscan.registry import mixer_class, names

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# In bfloat16 a key near the border of two codewords may get the other one: single outputs then
# differ (0.13 of the largest on an H100), all of them together do not.
QUANTISED = ("transformer_vq",)
every_mixer = pytest.mark.parametrize("name", names())


def build(name, d=64):
    torch.manual_seed(0)
    m = mixer_class(name)(d).double().eval()
    with torch.no_grad():
        for p in m.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return m


@every_mixer
@pytest.mark.parametrize("packed", [False, True])
def test_same_as_on_the_cpu(name, packed):
    """float64 on the device equals float64 here: outputs, states, gradients; packed or not."""
    cu = [0, 3, 70, 71, 300] if packed else None
    x = torch.randn(1, 300, 64, dtype=torch.float64)
    results = []
    for device in ("cpu", "cuda"):
        m = build(name).to(device)
        xd = x.detach().clone().to(device).requires_grad_()
        y, state = m(xd, cu_seqlens=None if cu is None else torch.tensor(cu, device=device))
        y.square().sum().backward()
        assert xd.grad is not None
        results.append([y, xd.grad, *state.flatten().values(), *(p.grad for p in m.parameters())])
    for a, b in zip(*results, strict=True):
        assert error(b.cpu(), a.double()) < TOLERANCE["float64"]


@every_mixer
def test_steps_equal_whole(name):
    m = build(name).cuda()
    x = torch.randn(2, 12, 64, dtype=torch.float64, device="cuda")
    whole, _ = m(x)
    state, ys = None, []
    for t in range(12):
        y, state = m(x[:, t : t + 1], state)
        ys.append(y)
    assert error(torch.cat(ys, 1), whole) < TOLERANCE["float64"]


@every_mixer
def test_bfloat16_training_learns(name):
    """bf16 autocast over float32 weights, packed documents; a repeated batch is learnt."""
    torch.manual_seed(0)
    model = LanguageModel(LanguageModelConfig(97, d_model=128, n_layers=2, pattern=name)).cuda()
    ids = torch.randint(0, 97, (1, 512), device="cuda")
    targets = ids.roll(-1, 1)
    cu = torch.tensor([0, 100, 355, 512], device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss, state = model.loss(ids, targets, cu_seqlens=cu)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(4.57, abs=0.3), "log 97 at the start"
    assert losses[-1] < 0.5 * losses[0]
    recurrent = [t for k, t in state.flatten().items() if k.endswith((".s", ".ssm"))]
    assert all(t.dtype == torch.float32 for t in recurrent)


@every_mixer
def test_bfloat16_is_close_to_float32(name):
    m = build(name).float().cuda()
    x = torch.randn(2, 200, 64, device="cuda")
    want, _ = m(x)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        got, _ = m(x)
    if name in QUANTISED:
        assert (got.float() - want).norm() < 0.05 * want.norm()
    else:
        assert error(got.float(), want) < 0.05
