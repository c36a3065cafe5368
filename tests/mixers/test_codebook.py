"""The codebook: where it starts, how it follows the keys, and that all ranks have the same."""

import copy

import pytest
import torch
from helpers import assert_close, error
from torch import distributed, multiprocessing

from longscan.mixers._codebook import Codebook

F64 = torch.float64
H, S, K = 2, 6, 3


def keys(batch, n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, n, H, K, dtype=F64, generator=g).requires_grad_()


def codebook(seed=0, **more):
    torch.manual_seed(seed)
    return Codebook(H, S, K, **more).double()


def test_the_first_training_forward_starts_with_its_keys():
    c, k = codebook(), keys(3, 8)
    random = c.book().clone()
    c.eval()(k)
    assert torch.equal(c.book(), random)
    out = c.train()(k)
    spread = k.detach().flatten(0, 1)[[i * 24 // S for i in range(S)]]
    assert torch.equal(out.book, spread.transpose(0, 1))
    c(keys(3, 8, seed=1))
    assert error(c.book(), out.book) < 0.5, "and is not started again"


def test_a_loaded_codebook_is_not_started_again():
    c = codebook()
    c.train()(keys(2, 9))
    other = codebook(seed=1).train()
    other.load_state_dict(c.state_dict())
    out = other(keys(2, 9, seed=3))
    assert torch.equal(out.book, c(keys(2, 9, seed=3)).book)


def test_moving_averages():
    """One forward notes, the next folds in: gamma of the old, 1 - gamma of the keys by code."""
    c, k = codebook(decay=0.9), keys(2, 11)
    first = c.train()(k)
    c_sum, c_count = c.c_sum.clone(), c.c_count.clone()
    assert torch.equal(c_sum, first.book)
    for h in range(H):
        for s in range(S):
            mine = k.detach()[:, :, h][first.codes[:, :, h] == s]
            c_sum[h, s] = 0.9 * c_sum[h, s] + 0.1 * mine.sum(0)
            c_count[h, s] = 0.9 * c_count[h, s] + 0.1 * len(mine)
    second = c(keys(2, 11, seed=1))
    assert_close(c.c_sum, c_sum, "float64", "c_sum")
    assert_close(c.c_count, c_count, "float64", "c_count")
    assert_close(second.book, c_sum / c_count.clamp(min=0.01)[..., None], "float64", "book")


def test_commitment_is_the_distance_to_the_codewords():
    c, k = codebook(), keys(2, 11)
    assert c.eval()(k).commit is None
    out = c.train()(k)
    far = (k.unsqueeze(3) - out.book).square().sum(-1).amin(-1)
    assert_close(out.commit, far.sum(-1).mean(), "float64", "value")
    (gradient,) = torch.autograd.grad(out.commit, k)
    assert_close(gradient, 2 * (k - out.k_hat).detach() / 22, "float64", "codewords are constants")
    assert not out.book.requires_grad


def test_nothing_is_noted_without_gradients_or_in_evaluation():
    c, k = codebook(), keys(2, 11)
    c.train()(k)
    kept = {n: t.clone() for n, t in c.named_buffers()}
    with torch.no_grad():
        c(keys(2, 11, seed=1))
    c.eval()(keys(2, 11, seed=2))
    for n, t in c.named_buffers():
        assert torch.equal(t, kept[n]), n


def test_dead_codewords_come_back_as_keys():
    c = codebook(decay=0.5, patience=5).train()
    c(keys(2, 20))
    c.c_sum[0, 2] = 1e9  # so far off that no key comes to it
    for step in range(40):
        k = keys(2, 20, seed=step)
        out = c(k)
        if out.book[0, 2].abs().max() < 100:
            break
    assert 5 <= step < 20
    last = keys(2, 20, seed=step - 1).detach().flatten(0, 1)[2 * 40 // S]
    assert torch.equal(out.book[0, 2], last[0]), "one of the keys noted before"
    assert (out.book[0].abs() < 100).all()
    used = c(keys(2, 20, seed=99)).codes[:, :, 0] == 2
    assert used.any()


def test_usage_stays_broad():
    """Clustered keys: the codebook learns the clusters, and most codewords are used."""
    torch.manual_seed(0)
    c, centres = Codebook(1, 16, 4).train(), 3 * torch.randn(12, 4)
    for _ in range(60):
        k = centres[torch.randint(12, (4, 32))] + 0.05 * torch.randn(4, 32, 4)
        out = c(k.unsqueeze(2).requires_grad_())
    assert out.commit < 0.5 * 4
    p = torch.bincount(out.codes.flatten(), minlength=16) / 128
    assert torch.special.entr(p).sum().exp() > 16 / 4


def test_narrow_modules_keep_the_codebook_wide():
    c = codebook().float()
    kept = c.c_sum.clone()
    c.half().to(torch.bfloat16)
    assert torch.equal(c.c_sum, kept)
    out = c.train()(keys(2, 5).bfloat16())
    assert out.book.dtype == out.k_hat.dtype == out.commit.dtype == torch.float32
    assert copy.deepcopy(c).double().pending.dtype == F64


def batches(rank, step):
    """Ranks have batches of different sizes."""
    return keys(2 + rank, 7, seed=10 * step + rank)


def train(step_keys):
    c, books = codebook().train(), []
    for k in step_keys:
        books.append(c(k).book.clone())
    return [*books, *c.state_dict().values()]


def rank_main(rank, meeting, out):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    out.put((rank, [t.tolist() for t in train([batches(rank, i) for i in range(4)])]))
    distributed.barrier()
    distributed.destroy_process_group()


def test_two_ranks_equal_one_process(tmp_path):
    meeting = f"file://{tmp_path / 'meeting'}"
    context = multiprocessing.get_context("spawn")
    out = context.SimpleQueue()
    ranks = [context.Process(target=rank_main, args=(r, meeting, out)) for r in range(2)]
    for p in ranks:
        p.start()
    for p in ranks:
        p.join(60)
        assert p.exitcode == 0
    got = dict(out.get() for _ in ranks)
    assert got[0] == got[1], "bitwise the same codebook"
    want = train([torch.cat([batches(r, i) for r in range(2)]) for i in range(4)])
    for a, b in zip(got[0], want, strict=True):
        assert_close(torch.tensor(a, dtype=F64), b.double(), "float64", "codebook")


@pytest.mark.parametrize(
    ("settings", "says"), [({"n_codes": 0}, "n_codes"), ({"decay": 1.5}, "decay")]
)
def test_bad_settings_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        Codebook(**{"n_heads": 1, "n_codes": 4, "d_key": 2, **settings})
