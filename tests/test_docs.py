"""The documentation says what the code does: pages are current, code in them runs, links lead."""

import re
import runpy
import shlex
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch

from longscan import cli, docs, markdown, registry
from longscan.bench.measure import Timing
from longscan.bench.report import Result, append_history, history_rows

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
GUIDE = ROOT / "docs" / "adding-a-mixer.md"  # its blocks are run by test_plugin.py
every_page = pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def blocks(path: Path, language: str) -> list[str]:
    text = path.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}[^\n]*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


# --- what is written ------------------------------------------------------------------------


@every_page
def test_python_runs(path, tmp_path, monkeypatch):
    """The blocks of a page run in order, as one program."""
    if path == GUIDE:
        pytest.skip("run by test_plugin.py")
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "__main__"}
    for i, code in enumerate(blocks(path, "python")):
        exec(compile(code, f"{path.name}, block {i}", "exec"), names)


def test_every_mixers_page_has_code():
    for name in docs.own_names():
        assert len(blocks(ROOT / "docs" / "mixers" / f"{name}.md", "python")) == 1


@every_page
def test_commands_exist(path):
    """Every longscan command on a page is one, and the options of training are understood."""
    for block in blocks(path, "(?:sh|bash|console)"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words[:1] != ["longscan"] or len(words) == 1 or words[1].startswith("-"):
                continue
            command, rest = cli._resolve(words[1:])
            if command == "train language" and path != GUIDE:
                from longscan.language.train import parse

                parse(rest)


@every_page
def test_links_lead_somewhere(path):
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if not re.match(r"https?://", target):
            assert (path.parent / target.partition("#")[0]).exists(), target


def test_files_named_in_the_tour_exist():
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    files = [p for part in ("src", "tests", "docs") for p in (ROOT / part).rglob("*.py")]
    for name in set(re.findall(r"[\w/]*\w\.py\b", text)):
        if "NAME" not in name:
            assert any(f"/{p.relative_to(ROOT)}".endswith(f"/{name}") for p in files), name


def test_no_page_is_lost():
    """From the map every page can be reached."""
    seen, todo = set(), [ROOT / "docs" / "index.md"]
    while todo:
        page = todo.pop().resolve()
        if page not in seen and page.suffix == ".md" and page.exists():
            seen.add(page)
            links = re.findall(r"\]\(([^):#]+)\)", page.read_text(encoding="utf-8"))
            todo += [page.parent / link for link in links]
    assert set(PAGES) <= seen


def test_the_picture_is_current():
    path = ROOT / "docs" / "one-scan.svg"
    text = path.read_text(encoding="utf-8")
    assert text == runpy.run_path(str(ROOT / "docs" / "picture.py"))["picture"]()
    ET.fromstring(text)


# --- the generator --------------------------------------------------------------------------


def test_pages_are_current(capsys):
    """The committed pages are what the code gives; if not: longscan docs."""
    status = docs.main(["--check", "--out", str(ROOT / "docs")])
    assert status == 0, capsys.readouterr().out


def test_check_tells_what_is_wrong(tmp_path, capsys):
    folder = tmp_path / "docs" / "mixers"
    run = ["--out", str(tmp_path / "docs")]
    assert docs.main(["--check", *run]) == 1, "nothing is there yet"
    assert docs.main(run) == 0
    assert docs.main(["--check", *run]) == 0
    assert {p.stem for p in folder.iterdir()} == {"README", *docs.own_names()}

    gla = (folder / "gla.md").read_text(encoding="utf-8")
    (folder / "gla.md").write_text(gla + "by hand\n", encoding="utf-8")
    (folder / "kda.md").unlink()
    (folder / "gone.md").write_text(docs.MARK + "\n\n# gone\n", encoding="utf-8")
    (folder / "mine.md").write_text("# notes\n", encoding="utf-8")
    capsys.readouterr()
    assert docs.main(["--check", *run]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"{folder / 'gla.md'} is out of date",
        f"{folder / 'kda.md'} is missing",
        f"{folder / 'gone.md'} is of no mixer",
        "run: longscan docs",
    ]
    assert docs.main(run) == 0
    assert (folder / "gla.md").read_text(encoding="utf-8") == gla
    assert (folder / "kda.md").is_file()
    assert not (folder / "gone.md").exists()
    assert (folder / "mine.md").read_text(encoding="utf-8") == "# notes\n", "not ours to touch"


def test_pages_by_name(tmp_path):
    assert docs.main(["gla", "--out", str(tmp_path)]) == 0
    assert [p.name for p in (tmp_path / "mixers").iterdir()] == ["gla.md"]
    with pytest.raises(ValueError, match="did you mean gla"):
        docs.main(["glaa", "--out", str(tmp_path)])


def test_measuring_leaves_random_numbers_alone():
    torch.manual_seed(0)
    want = torch.rand(3)
    torch.manual_seed(0)
    docs.measure("linear_attention")
    assert torch.equal(torch.rand(3), want)


@pytest.mark.parametrize(
    ("name", "parameters", "state"),
    [
        # q, k, v, out; four heads of 128 x (128 + 1)
        ("linear_attention", 4 * 512 * 512, f"{4 * 128 * 129 * 4:,} bytes"),
        # key and value of a token
        ("attention", 4 * 512 * 512, f"{2 * 512 * 4:,} bytes per token"),
        # 511 of them, and the number of tokens seen as a 64-bit integer
        (
            "sliding_attention",
            4 * 512 * 512,
            f"{2 * 512 * 4:,} bytes per token, at most {511 * 2 * 512 * 4 + 8:,} bytes",
        ),
        # window of 3 inputs, 1024 x 16 numbers
        ("mamba", None, f"{(3 * 1024 + 1024 * 16) * 4:,} bytes"),
    ],
)
def test_sizes(name, parameters, state):
    sizes = docs.measure(name)
    assert sizes.state == state
    assert parameters in (None, sizes.parameters)


def test_docstrings_are_taken_apart():
    doc = docs.parse_docstring(
        """One sentence
        over two lines.

        S = A S + U
        o = S q

        Some prose.

        Shapes: x [B, T],
        state [B]. width: of the state.
        depth: of it; see `Other`. Not a setting: this.
        Source: arXiv 2312.06635, eq. 3.
        """,
        ["d_model", "width", "depth"],
    )
    assert doc.summary == "One sentence over two lines."
    assert doc.body == [("S = A S + U\no = S q", True), ("Some prose.", False)]
    assert doc.sections == {"Shapes": "x [B, T], state [B].", "Source": "arXiv 2312.06635, eq. 3."}
    assert doc.settings == {
        "width": "of the state.",
        "depth": "of it; see `Other`. Not a setting: this.",
    }


def test_prose_is_safe_markdown():
    assert markdown.prose("a*b*c < d | e") == r"a\*b\*c \< d \| e"
    assert markdown.prose("`a*b` and `Mamba`") == "`a*b` and [`Mamba`](mamba.md)"
    assert markdown.prose("arXiv 2312.06635, eq. 3") == (
        "[arXiv 2312.06635](https://arxiv.org/abs/2312.06635), eq. 3"
    )


@pytest.mark.parametrize("name", docs.own_names())
def test_every_mixer_is_documented(name):
    """The docstring has what its page needs."""
    cls = registry.mixer_class(name)
    doc = docs.parse_docstring(cls.__doc__ or "", list(docs.settings_of(cls)))
    assert doc.summary.endswith(".")
    assert doc.body, "a recurrence, or how it differs from another mixer"
    assert any(label.startswith("Shapes") for label in doc.sections)
    assert registry.entry(name).arxiv in doc.sections["Source"]
    assert any("precision" in label.lower() for label in doc.sections)
    assert doc.sections["Differs"]
    assert re.search(r"\b(MIT|Apache-2\.0|BSD)\b", doc.sections["Reference"]), "and its licence"
    unexplained = [s for s in docs.settings_of(cls) if not docs.meaning(cls, s)]
    assert not unexplained
    assert docs.initialisation(cls)


def test_speeds_come_from_the_history(tmp_path):
    def result(row, layer, mode, ours, peer):
        package = row.rpartition("-")[2]
        times = (Timing((ours,)), Timing((peer,)) if peer else None)
        why = "" if peer else "left out: too slow"
        return Result(row, layer, package, mode, 2, 512, 256, *times, 10.0, 20.0, 1e-6, why)

    def about(date):
        keys = {"cpu": "a processor", "threads": "2", "torch": "2.13", "transformers": "5.1"}
        return {"date": f"{date}T00:00:00Z", "device": "cpu", "commit": "abc1234", **keys}

    history = tmp_path / "bench" / "history.csv"
    row = "mamba-transformers"
    old = [result(row, "Mamba", "train", 50.0, 15500.0), result(row, "Mamba", "decode", 7.0, 9.0)]
    new = [
        result(row, "Mamba", "train", 40.0, 15500.0),
        result("mamba-mambapy", "Mamba", "train", 41.0, None),
        result("delta-op-transformers", "delta", "train", 1.0, 2.0),
    ]
    append_history(history, history_rows(old, about("2025-01-01")))
    append_history(history, history_rows(new, about("2025-02-01")))
    pages = docs.pages(["mamba", "gla"], history, with_index=False)
    lines = pages["mamba.md"].splitlines()
    shape = "B=2 T=512 d_model=256"
    assert f"| transformers | train | {shape} | 40.0 | 15500 | 388 | 10.0 | 20.0 |" in lines
    assert f"| transformers | decode | {shape} | 7.00 | 9.00 | 1.29 | 10.0 | 20.0 |" in lines
    assert f"| mambapy | train | {shape} | 41.0 | left out: too slow |  | 10.0 | 20.0 |" in lines
    assert "50.0" not in pages["mamba.md"], "the older run of the same call"
    captions = [line for line in lines if "a processor, 2 threads" in line]
    assert captions == [
        "2025-02-01, a processor, 2 threads, torch 2.13, transformers 5.1, commit abc1234:",
        "2025-01-01, a processor, 2 threads, torch 2.13, transformers 5.1, commit abc1234:",
        "2025-02-01, a processor, 2 threads, torch 2.13, commit abc1234:",
    ]
    assert "Measured speed" not in pages["gla.md"]


def test_claims_come_from_their_records(tmp_path):
    def line(claim, device, case, mean, seeds="3", date="2025-01-01"):
        return {
            "claim": claim, "case": case, "mixer": "", "metric": "test error", "mean": mean,
            "min": mean, "max": "0.5", "seeds": seeds, "published": "", "holds": "yes",
            "minutes": "0.5", "device": device, "date": f"{date}T00:00:00Z",
        }  # fmt: skip

    def run(device, sharp, date):
        got = {(b, s): "0.05" for b in ("legs", "legt", "fout") for s in (0.5, 1, 1.9, 2.2, 4)}
        got |= dict.fromkeys([("legt", 1.9), ("fout", 1.9)], sharp)
        got |= dict.fromkeys([("legt", 2.2), ("fout", 2.2)], "0.2")
        return [
            line("timescale", device, f"{b}, dt lag = {s}", mean, date=date)
            for (b, s), mean in got.items()
        ]

    bench = tmp_path / "bench"
    records = [*run("cpu A", "0.04", "2025-01-01"), *run("cpu A", "0.001", "2025-02-01")]
    append_history(bench / "claims.csv", [*records, *run("gpu B", "0.04", "2025-03-01")])
    pages = docs.pages(["s4", "gla"], bench / "history.csv", with_index=False)
    text = pages["s4.md"]
    assert text.count("**A HiPPO basis") == 2, "the latest of each device"
    assert "Holds in our hands. At dt lag = 1.9 the error is 1.0e-03 for legt" in text
    assert "Does not hold in our hands. At dt lag = 1.9 the error is 4.0e-02 for legt" in text
    assert "| legt, dt lag = 1.9 | test error | 0.00100 (0.00100 to 0.500, 3 seeds) |  |" in text
    assert "cpu A, 2025-02-01, 7.5 minutes; `longscan claims timescale` runs it again." in text
    assert "2025-01-01" not in text
    assert "Measured claims" not in pages["gla.md"]
