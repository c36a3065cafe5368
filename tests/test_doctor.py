"""longscan doctor: what it says is so."""

from __future__ import annotations

from importlib import metadata

import torch

from longscan import doctor
from longscan.ops.dispatch import OPS, backend_of


def test_report_names_versions_devices_and_the_backend_of_every_op(capsys):
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out
    for name in ("triton", "cpu:", "bfloat16"):
        assert name in out
    for op in OPS:
        backend = backend_of(op, torch.zeros(1))
        line = next(x for x in out.splitlines() if x.split()[:1] == [op])
        assert line.split()[1] == backend.name
        assert backend.reason in line
    assert ("no accelerator found" in out) == (len(doctor.devices()) == 1)


def test_forced_backend_is_reported(monkeypatch, capsys):
    monkeypatch.setenv("LONGSCAN_BACKEND", "reference")
    doctor.main([])
    lines = [x for x in capsys.readouterr().out.splitlines() if x.split()[:1] == ["delta"]]
    assert lines
    assert all("reference" in x and "LONGSCAN_BACKEND" in x for x in lines)


def test_extras_tell_installed_from_missing(monkeypatch, capsys):
    found = doctor.extras()
    assert found["train"]["lightning"] == metadata.version("lightning")
    real = metadata.version

    def without_lightning(name):
        if name == "lightning":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", without_lightning)
    assert doctor.extras()["train"]["lightning"] is None
    doctor.main([])
    assert "missing lightning -> pip install 'longscan[train]'" in capsys.readouterr().out


def test_runs_without_an_installation(monkeypatch, capsys):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)
    assert doctor.main([]) == 0
    assert "not installed as a package" in capsys.readouterr().out


def test_advice_on_precision_follows_the_measurement(monkeypatch):
    cpu = torch.device("cpu")
    assert doctor.matmul_seconds(cpu, torch.float32, 64) > 0

    def timed(single, half):
        times = {torch.float32: single, torch.bfloat16: half}
        monkeypatch.setattr(doctor, "matmul_seconds", lambda device, dtype, n: times[dtype])
        return doctor.dtype_advice(cpu)

    assert "train in 32-true" in timed(1.0, 300.0)
    assert "300.0x slower" in timed(1.0, 300.0)
    assert "bf16-mixed may be faster" in timed(1.0, 0.25)
    assert "4.0x faster" in timed(1.0, 0.25)
