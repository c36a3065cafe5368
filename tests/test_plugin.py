"""docs/adding-a-mixer.md, done to the letter: its files written, its commands run, in its order.

Only `pip install -e .` is stood in for: by the metadata that it would leave beside the module.
"""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "adding-a-mixer.md"
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
PROGRAMS = {
    "python": [],
    "pytest": ["-m", "pytest", "-W", "error", "-p", "no:cacheprovider"],
    "longscan": ["-m", "longscan"],
}


def install(folder: Path) -> None:
    """What an editable installation of the project in `folder` amounts to."""
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


def run(words: list[str], folder: Path, cwd: Path | None = None) -> str:
    """The output of a command in the plugin's environment; fails if the command does."""
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT / "src")]),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "100",
    }
    done = subprocess.run(
        [sys.executable, *PROGRAMS[words[0]], *words[1:]],
        cwd=cwd or folder, env=env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def guide(tmp_path_factory):
    """The folder in which the guide has been followed, and what each command printed."""
    folder = tmp_path_factory.mktemp("plugin")
    printed: dict[str, str] = {}
    for language, title, body in BLOCK.findall(GUIDE.read_text(encoding="utf-8")):
        if title:
            (folder / title).write_text(body, encoding="utf-8")
            continue
        assert language == "sh", f"a block of {language} without a title is never run"
        for line in body.replace("\\\n", " ").splitlines():
            if line == "pip install -e .":
                install(folder)
            else:
                printed[line] = run(shlex.split(line), folder)
    return folder, printed


def output(printed: dict[str, str], start: str) -> str:
    """What the one command that starts so printed."""
    (line,) = [line for line in printed if line.startswith(start)]
    return printed[line]


def test_the_name_is_known(guide):
    names = output(guide[1], "python -c").split()
    assert names[-1] == "my_hgrn2"
    assert "gated_deltanet" in names
    assert len(set(names)) == len(names)


def test_the_guides_own_tests_pass(guide):
    folder, printed = guide
    written = (folder / "test_my_mixers.py").read_text().count("\ndef test_")
    assert written >= 4
    assert f"{written} passed" in output(printed, "pytest")


def test_it_trains_and_writes(guide):
    text = output(guide[1], "python train_my_mixers.py")
    losses = [float(x) for x in re.findall(r"^step \d+: loss ([\d.]+)$", text, re.MULTILINE)]
    assert len(losses) >= 3
    assert losses[0] > 5, "untrained: about log 256"
    assert losses[-1] < 0.6 * losses[0]
    assert re.search(r"^class .", text, re.MULTILINE | re.DOTALL)
    # Two layers of two heads of 32 x 32 float32 numbers.
    assert f"state: {2 * 2 * 32 * 32 * 4:,} bytes" in text


def test_the_command_line_takes_it(guide):
    folder, printed = guide
    assert "my_hgrn2" in output(printed, "longscan train language")
    for name in ("config.json", "model.safetensors", "loss.png", "metrics.csv"):
        assert (folder / "my-run" / name).stat().st_size > 0, name
    written = output(printed, "longscan generate")
    assert written.startswith("class ")
    assert len(written) > len("class \n")


def test_it_has_a_page(guide, monkeypatch):
    folder, _ = guide
    assert [p.name for p in (folder / "docs" / "mixers").iterdir()] == ["my_hgrn2.md"]
    page = (folder / "docs" / "mixers" / "my_hgrn2.md").read_text(encoding="utf-8")
    assert "https://arxiv.org/abs/2404.07904" in page
    assert "S_t = diag(a_t) S_{t-1}" in page
    assert "| `n_heads` | `4` | heads of q, f and v alike; it must divide d_model |" in page
    # in_proj, out_proj, the norm; four heads of 128 x 128 float32 numbers.
    assert f"{4 * 512 * 512 + 128:,}" in page
    assert f"{4 * 128 * 128 * 4:,} bytes" in page
    snippet = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert snippet is not None
    monkeypatch.syspath_prepend(str(folder))
    try:
        exec(snippet[1], {})
    finally:
        del sys.modules["my_mixers"]


def test_it_inherits_the_tests_of_every_mixer(guide):
    folder, _ = guide
    some = ("paths_agree", "split_equals", "packed_equals", "low_precision", "bad_input")
    words = ["pytest", "-q", str(ROOT / "tests" / "test_family.py")]
    out = run([*words, "-rA", "-k", f"my_hgrn2 and ({' or '.join(some)})"], folder, ROOT)
    for name in some:
        assert re.search(rf"^PASSED .*{name}.*my_hgrn2", out, re.MULTILINE), name
