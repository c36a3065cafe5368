"""longscan.nn.Recurrent stands where torch.nn.LSTM stood, whatever the mixer."""

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import longscan
from longscan import registry
from longscan.nn import Recurrent
from longscan.state import State
from longscan.verify import perturbed

F64 = torch.float64
LENGTHS = [4, 9, 1, 9]


def make(*sizes, **settings):
    torch.manual_seed(0)
    settings.setdefault("mixer", "gated_deltanet")
    return perturbed(Recurrent(*(sizes or (5, 16, 2)), **settings).double())


def features(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def same(a, b, tol=1e-10):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


@pytest.mark.parametrize("name", registry.names())
def test_every_mixer_in_chunks_with_gradients(name):
    rnn = make(5, 16, 2, mixer=name)
    x = features(21, 2, 5).requires_grad_()
    whole, last = rnn(x)
    assert whole.shape == (21, 2, 16)
    a, state = rnn(x[:8])
    assert state.batch_size == 2
    b, state = rnn(x[8:9], state)
    c, state = rnn(x[9:], state)
    parts = torch.cat([a, b, c])
    same(parts, whole)
    same(state.flatten(), last.flatten())
    leaves = [x, *rnn.parameters()]
    project = features(21, 2, 16, seed=1)
    want = torch.autograd.grad((whole * project).sum(), leaves, allow_unused=True)
    got = torch.autograd.grad((parts * project).sum(), leaves, allow_unused=True)
    same(got, want, 1e-8)
    assert want[0].ne(0).any(-1).all()


@pytest.mark.parametrize("settings", [{}, {"bidirectional": True}, {"batch_first": True}], ids=str)
@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_it_is_called_as_an_lstm_is(settings, enforce_sorted):
    """The same inputs give outputs of the same form; packed rows are as if alone."""
    lstm = torch.nn.LSTM(5, 16, 2, **settings).double()
    rnn = make(5, 16, 2, **settings)
    lengths = sorted(LENGTHS, reverse=True) if enforce_sorted else LENGTHS
    x = features(4, 9, 5)
    batch_first = settings.get("batch_first", False)
    given = x if batch_first else x.transpose(0, 1)
    for sample in (given, x[0]):
        assert rnn(sample)[0].shape == lstm(sample)[0].shape
    packed = pack_padded_sequence(given, torch.tensor(lengths), batch_first, enforce_sorted)
    got, state = rnn(packed)
    want = lstm(packed)[0]
    assert isinstance(got, PackedSequence)
    assert got.data.shape == want.data.shape
    assert torch.equal(got.batch_sizes, want.batch_sizes)
    rows, sizes = pad_packed_sequence(got, batch_first=True)
    assert sizes.tolist() == lengths
    for i, n in enumerate(lengths):
        y, s = rnn(x[i, :n])
        same(rows[i, :n], y)
        assert rows[i, n:].eq(0).all()
        same(state.select(i).flatten(), s.flatten())
    if not settings.get("bidirectional"):
        again, _ = rnn(packed, state)
        rows, _ = pad_packed_sequence(again, batch_first=True)
        for i, n in enumerate(lengths):
            same(rows[i, :n], rnn(x[i, :n], state.select(i))[0])


def test_batch_first_is_a_transposition():
    a, b = make(batch_first=True), make()
    x = features(3, 7, 5)
    y, s = a(x)
    z, t = b(x.transpose(0, 1))
    same(y, z.transpose(0, 1))
    same(s.flatten(), t.flatten())
    assert s.batch_size == 3


@pytest.mark.parametrize("name", ["gated_deltanet", "mamba"])
def test_two_directions(name):
    """The halves of the output: what an LSTM's are, and each knows one side of time only."""
    rnn = make(5, 16, 2, mixer=name, bidirectional=True, batch_first=True)
    x = features(2, 9, 5).requires_grad_()
    y, state = rnn(x)
    assert y.shape == (2, 9, 32)
    assert len(state) == 0
    assert len(rnn.init_state(2)) == 0

    def one_way(stack, u):
        return stack(stack.in_proj(u))[0]

    same(y, torch.cat([one_way(rnn.ahead, x), one_way(rnn.back, x.flip(1)).flip(1)], -1))
    (g,) = torch.autograd.grad(y[:, 4, :16].sum(), x, retain_graph=True)
    assert g[:, :5].ne(0).any(-1).all()
    assert g[:, 5:].eq(0).all()
    (g,) = torch.autograd.grad(y[:, 4, 16:].sum(), x)
    assert g[:, 4:].ne(0).any(-1).all()
    assert g[:, :4].eq(0).all()


def test_sizes_and_settings():
    rnn = Recurrent(16, 16, 3, mixer="gla", n_heads=2, stack={"mlp": "none", "norm": "layer"})
    config = rnn.ahead.config
    assert (config.d_model, config.layers) == (16, ("gla",) * 3)
    assert config.mixers == {"gla": {"n_heads": 2}}
    assert not any("in_proj" in n and "mixer" not in n for n, _ in rnn.named_parameters())
    assert rnn.ahead.norm.bias is not None
    assert "16, 16, num_layers=3" in repr(rnn)
    assert longscan.nn.Recurrent is Recurrent
    groups = rnn.parameter_groups(weight_decay=0.1, lr=1e-3)
    assert {g["name"] for g in groups} == {"decay", "no_decay"}
    state = rnn.init_state(2)
    x = torch.randn(4, 2, 16)
    same(rnn(x, state)[0], rnn(x)[0])


def test_dropout_and_reset():
    rnn = make(5, 16, 2, dropout=0.5, bidirectional=True)
    x = features(6, 2, 5)
    rnn.train()
    assert not torch.equal(rnn(x)[0], rnn(x)[0])
    rnn.eval()
    assert torch.equal(rnn(x)[0], rnn(x)[0])
    other = perturbed(rnn)
    for r in (rnn, other):
        torch.manual_seed(3)
        r.reset_parameters()
    for (name, p), q in zip(rnn.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_it_learns_to_remember():
    """The first number of a sequence, asked for at its end."""
    torch.manual_seed(0)
    rnn, head = Recurrent(1, 32, batch_first=True), torch.nn.Linear(32, 1)
    parameters = [*rnn.parameters(), *head.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    for _ in range(60):
        x = torch.rand(64, 10, 1)
        y, _ = rnn(x)
        loss = (head(y[:, -1]) - x[:, 0]).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.02, "the variance is 0.083"


def test_inference_mode():
    rnn = make()
    packed = pack_padded_sequence(features(9, 4, 5), LENGTHS, enforce_sorted=False)
    want, _ = rnn(packed)
    with torch.inference_mode():
        same(rnn(packed)[0].data, want.data.detach())


def test_bad_use():
    rnn, both, x = make(), make(bidirectional=True), features(7, 2, 5)
    packed = pack_padded_sequence(x, [7, 3])
    _, state = rnn(x)
    wide = pack_padded_sequence(features(7, 2, 6), [7, 3])
    for call, error, words in (
        (lambda: rnn(x[..., 1:]), ValueError, r"\[time, batch, 5\]"),
        (lambda: make(batch_first=True)(x[..., 1:]), ValueError, r"\[batch, time, 5\]"),
        (lambda: rnn(x[0, 0]), ValueError, r"\[time, 5\]"),
        (lambda: rnn(wide), ValueError, "5 features, not 6"),
        (lambda: rnn(x, (x, x)), TypeError, "longscan.State, not tuple"),
        (lambda: rnn(x, State()), ValueError, "2 blocks"),
        (lambda: both(x, both.init_state(2)), ValueError, "both ends"),
        (lambda: both(packed, state), ValueError, "both ends"),
        (lambda: Recurrent(5, 16, mixer="lstm"), ValueError, "unknown mixer"),
        (lambda: Recurrent(5, 16, mixer="gla*2"), ValueError, "unknown mixer"),
        (lambda: Recurrent(5, 16, n_head=2), ValueError, "did you mean n_heads"),
        (lambda: Recurrent(5, 16, stack={"norms": "rms"}), ValueError, "did you mean norm"),
        (lambda: Recurrent(5, 16, stack={"n_layers": 2}), ValueError, "arguments of their own"),
        (lambda: Recurrent(5, 16, 0), ValueError, "n_layers must be"),
    ):
        with pytest.raises(error, match=words):
            call()
