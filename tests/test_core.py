"""States, files, layouts, registry and backends."""

import errno
from types import SimpleNamespace

import pytest
import torch

import longscan
from longscan import registry
from longscan.io import SaveError, save_text, write_atomically
from longscan.ops import dispatch
from longscan.ops._layout import layout
from longscan.ops.dispatch import OPS, backend_of, by_kernel, choose
from longscan.state import State


def _state():
    return State({"0": State(s=torch.randn(3, 2), n=torch.arange(3)), "1": State()})


def test_state_tree():
    s = _state()
    assert s.batch_size == 3
    assert list(s.flatten()) == ["0.s", "0.n"]
    assert State.unflatten(s.flatten())["0"]["s"] is s["0"]["s"]
    assert s.to(dtype=torch.float64).child("0").tensor("s").dtype == torch.float64
    assert s.to(dtype=torch.float64).child("0").tensor("n").dtype == torch.long
    assert s.select([2, 0])["0"]["n"].tolist() == [2, 0]
    assert s.select(slice(1, None)).batch_size == 2
    assert not s.map(lambda t: t.clone()).child("0").tensor("s").requires_grad
    leaves = torch.utils._pytree.tree_leaves(s)
    assert len(leaves) == 2
    with pytest.raises(TypeError, match="nested state"):
        s.tensor("0")
    with pytest.raises(TypeError, match="is a tensor"):
        s.child("0").child("s")
    with pytest.raises(ValueError, match="cannot join"):
        State.cat([s, State(other=torch.zeros(1))])
    with pytest.raises(ValueError, match="at least one"):
        State.cat([])


def test_failed_write_keeps_the_earlier_file(tmp_path):
    path = tmp_path / "a.txt"
    save_text("first", path)

    def full(temporary):
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(SaveError, match="disk is full"):
        write_atomically(path, full)
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path], "no debris"
    with pytest.raises(ZeroDivisionError):
        write_atomically(path, lambda p: 1 // 0)
    assert path.read_text() == "first"


@pytest.mark.parametrize("lengths", [[5], [1, 9, 4], [8, 8], [3, 17, 1, 2]])
def test_layout_of_packed_rows(lengths):
    cu = torch.tensor([0, *lengths]).cumsum(0)
    total = sum(lengths)
    plan = layout(1, total, 4, cu)
    x = torch.arange(1, total + 1).view(1, total, 1)
    chunks = plan.split(x)
    assert chunks.shape[0] == sum(plan.counts) == sum(-(-n // 4) for n in lengths)
    assert torch.equal(plan.join(chunks), x)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    for chunk in chunks.squeeze(-1):
        inside = document[chunk[chunk > 0] - 1]
        assert (inside == inside[0]).all(), "a chunk never holds two sequences"
    rows = torch.arange(len(lengths))
    assert torch.equal(plan.rows_out(plan.rows_in(rows)), rows)
    assert plan.counts == sorted(plan.counts, reverse=True)


def test_layout_notices_a_changed_tensor():
    cu = torch.tensor([0, 3, 8])
    assert layout(1, 8, 4, cu).counts == [2, 1]
    assert layout(1, 8, 4, cu) is layout(1, 8, 4, cu)
    cu[1] = 4
    assert layout(1, 8, 4, cu).counts == [2]


@pytest.mark.parametrize(
    ("cu", "message"),
    [
        ([1, 8], "start at 0"),
        ([0, 4, 4, 8], "rise strictly"),
        ([0, 9, 8], "rise strictly"),
        ([0, 7], "ends at 7"),
        ([0], "shape"),
    ],
)
def test_bad_cu_seqlens(cu, message):
    with pytest.raises(ValueError, match=message):
        layout(1, 8, 4, torch.tensor(cu))


def test_registry_suggests():
    assert "gla" in registry.names()
    with pytest.raises(ValueError, match="did you mean gated_deltanet"):
        registry.entry("gated_deltane")
    with pytest.raises(ValueError, match="known:"):
        registry.entry("zzzzzz")
    with pytest.raises(ValueError, match="is taken"):
        registry.register(registry.Entry("gla", "x:Y", "", "", 2026, ""))


def test_backend_of(monkeypatch):
    x = torch.zeros(1)
    for op in OPS:
        chosen = longscan.backend_of(op, x)
        assert chosen.name == "torch"
        assert chosen.reason
    monkeypatch.setenv("LONGSCAN_BACKEND", "reference")
    assert backend_of("decay", x).name == "reference"
    assert backend_of("decay", x, "torch").name == "torch"
    monkeypatch.setenv("LONGSCAN_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="unknown backend"):
        backend_of("decay", x)
    with pytest.raises(ValueError, match="unknown op"):
        backend_of("softmax", x)


def test_a_triton_form_that_cannot_run_is_refused(monkeypatch):
    x = torch.zeros(1)
    assert backend_of("memory", x).name == "torch"
    with pytest.raises(ValueError, match="CUDA device"):
        backend_of("memory", x, "triton")
    with pytest.raises(ValueError, match="no Triton form"):
        backend_of("vq", x, "triton")
    monkeypatch.setenv("LONGSCAN_BACKEND", "triton")
    chosen = backend_of("vq", x)
    assert chosen.name == "torch"
    assert "no Triton form" in chosen.reason


def test_a_kernel_runs_where_it_fits(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # a CPU may run kernels then
    x, forms = torch.zeros(1), {"torch": "torch", "triton": "kernel"}

    def chosen(op="decay", backend=None, fits=True):
        return choose(op, x, backend, forms, lambda: fits)

    room = SimpleNamespace(shared_memory_per_block_optin=232448)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: room)
    dispatch._room.cache_clear()
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert chosen() == "kernel"
    # A compiler asks once and does not look inside.
    asked = torch.compile(lambda x: x + dispatch._has_room(0), fullgraph=True, backend="eager")
    assert asked(x) == 1
    assert chosen(fits=False) == "torch"
    with pytest.raises(ValueError, match="does not compute"):
        chosen(fits=False, backend="triton")
    assert by_kernel("norm", x, lambda: True)
    assert not by_kernel("norm", x, lambda: False)
    room.shared_memory_per_block_optin = 101376  # a GPU for desktops
    dispatch._room.cache_clear()
    assert chosen() == "torch"
    assert chosen(backend="triton") == "kernel"
    assert not by_kernel("norm", x, lambda: True)
    room.shared_memory_per_block_optin = 232448
    dispatch._room.cache_clear()
    monkeypatch.setenv("LONGSCAN_BACKEND", "torch")
    assert chosen() == "torch"
    assert not by_kernel("norm", x, lambda: True)
