"""The kernels in Triton's interpreter on a CPU: the small cases, and that no launch is unproved."""

import json
import os
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from longscan.proof import CASES, cases

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
SMALL = [(k, c.name) for k in CASES for c in cases(k) if c.quick]


@cache
def outcomes(*words):
    """What interpreter.py prints of a kernel, or of a mixer that is compiled."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(__file__).parent / "interpreter.py"), *words],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(("kernel", "name"), SMALL)
def test_small(kernel, name):
    found = [line for line in outcomes(kernel) if line.get("case") == name]
    assert found
    if all(line["status"] == "skip" for line in found):
        pytest.skip(found[0]["what"])
    for line in found:
        assert line["status"] == "ok", f"{line['dtype']}, {line['what']}: {line['error']:.1e}"


@pytest.mark.parametrize("kernel", CASES)
def test_no_launch_is_left_out(kernel):
    """Every entry of a launch table is chosen by a case; the kernels are not run for this."""
    assert outcomes(kernel)[-1] == {"unused": {}}


@pytest.mark.parametrize("mixer", ["gla", "mamba", "mamba2", "gated_deltanet", "mlstm"])
def test_compiled_mixers_equal_eager_ones(mixer):
    """torch.compile finds one graph with the kernels in it, for any length."""
    lines = outcomes("compiled", mixer)
    assert len(lines) == 2
    assert all(line["error"] < 1e-5 for line in lines), lines


def test_selective_in_pieces():
    assert len(outcomes("pieces")) == 2
    for line in outcomes("pieces"):
        assert "selective.combine" in line["ran"], line
        assert line["error"] <= 1e-2, line
