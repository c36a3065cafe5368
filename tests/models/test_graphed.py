"""Steps by CUDA graphs are the steps of the model; what needs no GPU is tested without one."""

from contextlib import contextmanager, nullcontext

import pytest
import torch

from longscan.language import generate as language
from longscan.language.generate import generate_ids
from longscan.language.sampling import Sampling
from longscan.models import LanguageModel, LanguageModelConfig
from longscan.models import graphed as graphs
from longscan.models.graphed import GraphedStep, graphed, same_form
from longscan.registry import names
from longscan.state import State

GRAPHED = (
    "gated_deltanet", "deltanet", "kda", "gla", "linear_attention", "retention", "mamba", "mamba2",
    "mlstm", "mlstm_large",
)  # fmt: skip


def make(pattern, d=32, layers=2, dtype=torch.float64, device="cpu"):
    torch.manual_seed(0)
    config = LanguageModelConfig(97, d_model=d, n_layers=layers, pattern=pattern)
    model = LanguageModel(config).eval()
    with torch.no_grad():
        model.embedding.weight.mul_(30)  # sharp logits, so that tokens depend on what was read
    return model.to(device, dtype)


class Emulated:
    """GraphedStep without graphs."""

    made = 0

    def __init__(self, model, state):
        self.model, self.state, self.rows = model, state.clone(), state.batch_size
        Emulated.made += 1

    def __call__(self, ids):
        assert ids.shape == (self.rows, 1)
        logits, self.state = self.model(ids, self.state)
        return logits


@pytest.fixture
def emulated(monkeypatch):
    Emulated.made = 0
    monkeypatch.setattr(language, "graphed", Emulated)
    monkeypatch.setattr(language, "GRAPH_FROM", 3)


def run(model, prompts=5, tokens=30, **options):
    prompts = [[i + 1, i + 2] for i in range(prompts)]
    options = {"seed": 3, "sampling": Sampling(0.8), **options}
    stream = generate_ids(model, prompts, max_new_tokens=tokens, **options)
    return list(stream), stream


def test_a_stream_by_graphs_says_what_one_without_says(emulated, monkeypatch):
    model = make("gated_deltanet,mamba2")
    with monkeypatch.context() as plain:
        plain.setattr(language, "graphed", lambda *_: None)
        want, _ = run(model)
        eod = want[9][2]
        ending, end = run(model, eod=eod)
    assert run(model)[0] == want
    assert Emulated.made == 1
    got, stream = run(model, eod=eod, sampling=Sampling(0.8, repetition_penalty=1.0))
    assert got == ending
    assert stream.rows == end.rows
    for name, t in stream.state.flatten().items():
        torch.testing.assert_close(t, end.state.flatten()[name])


def test_rows_leave_at_half(emulated):
    model = make("gla")
    free, _ = run(model, sampling=Sampling(0))
    steps, stream = run(model, sampling=Sampling(0), eod=free[4][0])
    left = sum(token is not None for token in steps[-1])
    assert len(stream.rows) <= left
    assert stream.state.batch_size == len(stream.rows) or not stream.rows
    stream = generate_ids(model, [[i] for i in range(6)], max_new_tokens=30, seed=0)
    next(stream), next(stream)
    assert stream._graph.rows == 6
    for keep, rows in (([0, 2, 3, 4, 5], 6), ([0, 1, 3, 4], 6), ([1, 2, 3], None)):
        before = stream.state
        stream._drop(keep)
        assert (stream._graph and stream._graph.rows) == rows
        for name, t in before.select(keep).flatten().items():
            torch.testing.assert_close(stream.state.flatten()[name], t)
        next(stream)
    assert stream._graph.rows == 3


def test_a_short_stream_needs_no_graph(emulated):
    run(make("gla"), tokens=3)
    assert Emulated.made == 0


def test_nothing_changes_on_a_cpu():
    model = make("gla")
    assert graphed(model, model.init_state(2)) is None
    assert graphed(model, State()) is None


@pytest.mark.parametrize("pattern", ["gla", "gated_deltanet,mamba", "attention", "gla,attention"])
def test_only_states_of_constant_size(pattern):
    model = make(pattern)
    _, a = model(torch.ones(2, 3, dtype=torch.long))
    _, b = model(torch.ones(2, 1, dtype=torch.long), a)
    assert same_form(a, b) == ("attention" not in pattern)


@pytest.mark.parametrize("pattern", ["gated_deltanet,mamba2", "retention"])
def test_a_capture_leaves_the_next_state_in_the_other_buffer(pattern, monkeypatch):
    """With the recording of a graph left out: its steps run while they are captured."""

    class Graph:
        def pool(self):
            return None

    @contextmanager
    def graph(*_, **__):
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda *_: nullcontext())
    monkeypatch.setattr(graphs, "_no_waiting", nullcontext)
    model = make(pattern)
    with torch.inference_mode():
        _, state = model(torch.ones(2, 3, dtype=torch.long))
        step = GraphedStep(model, state)
        zero = torch.zeros(2, 1, dtype=torch.long)
        _, once = model(zero, state)
        logits, twice = model(zero, once)
    torch.testing.assert_close(step._graphs[1][1], logits)
    for buffer, want in zip(step._states, (twice, once), strict=True):
        for name, t in want.flatten().items():
            torch.testing.assert_close(buffer.flatten()[name], t)
            assert not hasattr(buffer.flatten()[name], "_longscan_twin")
            assert buffer.flatten()[name].data_ptr() != state.flatten()[name].data_ptr()


gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", names())
@torch.inference_mode()
def test_graphs_give_the_numbers_of_the_model(name, dtype):
    model = make(name, 64, dtype=dtype, device="cuda")
    ids = torch.randint(0, 97, (3, 12), device="cuda")
    _, state = model(ids[:, :4])
    step = graphed(model, state)
    if step is None:
        assert name not in GRAPHED
        pytest.skip("no graphs for this mixer")
    for t in range(4, 12):
        want, state = model(ids[:, t : t + 1], state)
        got = step(ids[:, t : t + 1])
        assert torch.equal(got, want), f"token {t}: {(got - want).abs().max():.1e}"
        kept = step.state.flatten()
        assert all(torch.equal(kept[n], s) for n, s in state.flatten().items())


@gpu
@needs_cuda
@pytest.mark.parametrize("pattern", ["gated_deltanet,mamba2", "gla,attention", "retention"])
def test_a_stream_says_the_same(pattern, monkeypatch):
    model = make(pattern, dtype=torch.float32, device="cuda")
    got, stream = run(model, tokens=40)
    assert (stream._graph is None) == ("attention" in pattern)
    with monkeypatch.context() as plain:
        plain.setattr(language, "graphed", lambda *_: None)
        assert run(model, tokens=40)[0] == got
        free = got[9][2]
        want, end = run(model, tokens=40, eod=free)
    steps, stream = run(model, tokens=40, eod=free)
    assert steps == want
    assert stream.rows == end.rows


@gpu
@needs_cuda
def test_memory_does_not_grow():
    model = make("gated_deltanet,mamba2", dtype=torch.bfloat16, device="cuda")
    stream = generate_ids(model, [[1, 2], [3]], max_new_tokens=200, seed=0)
    used = []
    for i, _ in enumerate(stream):
        if i in (20, 100, 199):
            torch.cuda.synchronize()
            used.append(torch.cuda.memory_allocated())
    assert used[0] == used[1] == used[2]
    del stream
    for _ in range(3):  # nor with streams that are over
        list(generate_ids(model, [[1, 2], [3]], max_new_tokens=40, seed=0))
        torch.cuda.synchronize()
        used.append(torch.cuda.memory_allocated())
    assert used[-1] == used[-2]
    assert used[-1] < used[0]


def test_the_names_above_are_those_of_mixers():
    assert set(GRAPHED) <= set(names())
