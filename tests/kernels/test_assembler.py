"""Which ptxas assembles the kernels: one that does not break them."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
SHOW = "import longscan.kernels; from triton import knobs; print(knobs.nvidia.ptxas.version)"


def run(code, **env):
    kept = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    return subprocess.run(
        [sys.executable, "-c", code], env={**kept, **env}, capture_output=True, text=True
    )


def test_it_is_new_enough():
    major, minor = map(int, run(SHOW).stdout.split("."))
    assert (major, minor) >= (12, 9)


def test_an_old_one_is_refused(tmp_path):
    old = tmp_path / "ptxas"
    old.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.8, V12.8.93'\n")
    old.chmod(0o755)
    done = run(SHOW, TRITON_PTXAS_PATH=str(old))
    assert done.returncode != 0
    assert "unset TRITON_PTXAS_PATH" in done.stderr
    assert "LONGSCAN_BACKEND=torch" in done.stderr
