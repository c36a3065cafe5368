"""ProtMamba, a Mamba trained on proteins: one file with its config inside."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers import assert_close
from safetensors.torch import load_file
from torch.nn import functional as F

from longscan.pretrained.models import from_pretrained

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "checkpoints"


def test_trained_model():
    file = SHARED / "protmamba_example.safetensors"
    if not file.exists():
        pytest.skip(f"{file.name} is not there (shared test data)")
    want = load_file(str(SHARED / "protmamba_reference_logits.safetensors"))
    model = from_pretrained(file)
    assert model.config.layers == ("mamba",) * 8
    ids = want["input_ids"][None]
    with torch.no_grad():
        whole, _ = model(ids)
        a, state = model(ids[:, :1000])
        b, state = model(ids[:, 1000:-2], state)
        c, state = model(ids[:, -2:-1], state)
        d, _ = model(ids[:, -1:], state)
    assert_close(whole[0], want["logits"], "golden32", "logits")
    assert_close(torch.cat([a, b, c, d], 1)[0], want["logits"], "golden32", "in parts and steps")
    # Perplexity of each of the six proteins, as published with the reference.
    first = ids[0, 0]
    starts = [*(ids[0] == first).nonzero().flatten().tolist(), ids.shape[1]]
    losses = F.cross_entropy(whole[0, :-1], ids[0, 1:], reduction="none")
    found = [losses[i : j - 1].mean().exp().item() for i, j in pairwise(starts)]
    assert [round(p) for p in found] == [1168, 1139, 1463, 1048, 1274, 1084]
