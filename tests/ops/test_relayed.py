"""Layers that run part after part of the rows: they learn from all, and add all to the loss."""

import copy

import pytest
import torch
from helpers import assert_close

from longscan.mixers._codebook import Codebook
from longscan.mixers.transformer_vq import TransformerVQ
from longscan.ops import _relayed

F64 = torch.float64
PARTS = (slice(0, 1), slice(1, 2), slice(2, 4))


def _codebooks():
    torch.manual_seed(0)
    one = Codebook(2, 6, 3, decay=0.5, patience=3).double().train()
    keys = [torch.randn(4, 7, 2, 3, dtype=F64) for _ in range(4)]
    one(keys[0])
    return one, copy.deepcopy(one), keys[1:]


def test_a_codebook_learns_from_all_parts_at_once():
    one, other, keys = _codebooks()
    for k in keys:
        whole = one(k)
        with _relayed.relayed():
            before = other.pending.clone()
            parts = [other(k[part]) for part in PARTS]
            assert other.pending.count_nonzero() == 0, "folded in once, and not yet noted"
            assert before.count_nonzero() > 0
        assert torch.equal(torch.cat([p.codes for p in parts]), whole.codes)
        assert_close(torch.cat([p.k_hat for p in parts]), whole.k_hat, "float64", "codewords")
        assert_close(parts[-1].commit, whole.commit, "float64", "penalty")
        for name, buffer in one.named_buffers():
            got = dict(other.named_buffers())[name]
            assert_close(got.double(), buffer.double(), "float64", name)


def test_a_codebook_without_keys_starts_with_those_of_the_first_forward():
    book = Codebook(1, 4, 3).double().train()
    k = torch.randn(2, 8, 1, 3, dtype=F64)
    with _relayed.relayed():
        first = book(k).book.clone()
    assert not book.started
    with _relayed.relayed():
        second = book(k).book
    assert book.started
    assert not torch.equal(first, second)
    among = (second[0].unsqueeze(1) == k.flatten(0, 2)).all(-1).any(1)
    assert among.all(), "codewords are keys of the first forward"


def test_the_gradient_of_a_penalty_over_parts():
    torch.manual_seed(0)
    mixer = TransformerVQ(8, block=4, n_codes=5).double().train()
    x = torch.randn(4, 6, 8, dtype=F64)
    mixer(x)
    other = copy.deepcopy(mixer)
    mixer(x)
    with _relayed.relayed():
        for part in PARTS:
            other(x[part])
    assert mixer.penalty is not None
    assert other.penalty is not None
    want, got = (torch.autograd.grad(m.penalty, m.in_proj.weight)[0] for m in (mixer, other))
    assert_close(other.penalty, mixer.penalty, "float64", "penalty")
    assert want.abs().max() > 0
    assert_close(got, want, "float64", "gradient")


def test_nothing_is_left_behind_an_error():
    ran = []

    def lose():
        with _relayed.relayed():
            _relayed.later(ran.append, torch.zeros(1))
            raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        lose()
    assert not ran
    assert not _relayed.relaying()
    _relayed.later(ran.append, torch.zeros(1))
    assert len(ran) == 1, "a layer that is not relayed learns at once"
