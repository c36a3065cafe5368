"""longscan docs: a page for every mixer, from its registry entry, its docstring and measurements.

Nothing on a page is written by hand: sizes come from building the mixer, speeds from the rows of
bench/history.csv, claims from those of bench/claims.csv. So a page changes when the code does, and
--check tells when it has not.
"""

from __future__ import annotations

import argparse
import csv
import functools
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from longscan import registry
from longscan.bench.measure import digits
from longscan.claims.report import RECORDS, Recorded, read_records
from longscan.io import save_text
from longscan.markdown import ARXIV, prose, table
from longscan.mixers.base import Mixer

MARK = "<!-- Written by `longscan docs`; edit the docstring or the registry instead. -->"
D_MODEL = 512  # the width that sizes are measured at
LENGTHS = (1, 64, 128, 1024, 1088)  # tokens after which a state is measured

# What the names mean that several mixers share; a docstring's own words go first.
SHARED = {
    "d_model": "width of the input and the output",
    "n_heads": "query heads",
    "n_kv_heads": "key and value heads; None: as many as query heads",
    "n_value_heads": "value heads, a multiple of n_heads; None: n_heads",
    "d_head": "channels of a head; None: derived from d_model",
    "d_key": "channels of a query or key head; None: derived from d_model, see Shapes",
    "d_value": "channels of a value head; None: derived from d_model, see Shapes",
    "d_state": "numbers of state per channel",
    "d_conv": "taps of the short causal convolution",
    "expand": "inner width as a multiple of d_model",
    "bias": "whether the projections have biases",
    "conv_bias": "whether the convolution has a bias",
    "rope_theta": "base of the rotary frequencies",
    "dt_range": "range of the step sizes at initialisation",
    "dt_floor": "smallest step size at initialisation",
    "dt_init_floor": "smallest step size at initialisation",
    "skip_per_channel": "whether the skip D has a number per channel, not per head",
    "norm_before_gate": "whether the norm comes before the gate, not behind it",
    "forget_gate": "whether the state decays by a learned gate",
    "output_gate": "whether a gate of the input multiplies the output",
    "negative_eigenvalues": "double the write strength, to [0, 2]",
    "norm_eps": "added to the mean square in the norm",
}

_LABEL = re.compile(r"^([A-Z][A-Za-z_ ,]*):\s+", re.MULTILINE)


@dataclass(frozen=True)
class Docstring:
    """A mixer's docstring in parts.

    body: paragraphs between the first sentence and the sections, True for a formula.
    sections: Shapes, Precision, Source, ... in the order written. settings: name -> meaning.
    """

    summary: str
    body: list[tuple[str, bool]] = field(default_factory=list)
    sections: dict[str, str] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def parse_docstring(text: str, settings: list[str]) -> Docstring:
    """Split a docstring; `settings` are the constructor's parameters.

    A section starts with its name and a colon at the start of a line; a setting with its name and
    a colon at the start of a line or a sentence. A paragraph before them with a "=" is a formula.
    """
    first, *rest = re.split(r"\n\s*\n", inspect.cleandoc(text))
    out = Docstring(_one_line(first))
    names = "|".join(map(re.escape, settings))
    label = re.compile(rf"(?:^|(?<=[.;]\s))({names}):\s+", re.MULTILINE) if names else _LABEL
    for paragraph in rest:
        found = [*label.finditer(paragraph), *_LABEL.finditer(paragraph)]
        found = sorted({m.start(): m for m in found}.values(), key=lambda m: m.start())
        before = paragraph[: found[0].start()] if found else paragraph
        if before.strip():
            out.body.append((inspect.cleandoc(before), "=" in before))
        ends = [m.start() for m in found][1:] + [len(paragraph)] * bool(found)
        for m, end in zip(found, ends, strict=True):
            into = out.settings if m[1] in settings else out.sections
            into[m[1]] = _one_line(paragraph[m.end() : end])
    return out


def initialisation(cls: type) -> str:
    """What reset_parameters says it does, with "As Parent; ..." spelled out."""
    text = _one_line(inspect.getdoc(cls.__dict__.get("reset_parameters")) or "")
    parents = cls.__mro__[1:]
    if not text:
        return initialisation(parents[0]) if parents and issubclass(parents[0], Mixer) else ""
    m = re.match(r"As (\w+)(?=[;.])", text)
    parent = next((c for c in parents if m and c.__name__ == m[1]), None)
    return text if m is None or parent is None else initialisation(parent)[:-1] + text[m.end() :]


def state_size(mixer: Mixer) -> str:
    """How large the state of one sequence is, measured along a sequence.

    Returns: "N bytes", "N bytes per token" or, where growth ends, "N bytes per token, at most M".
    """
    sizes, state, done = [], None, 0
    with torch.no_grad():
        for length in LENGTHS:
            _, state = mixer(torch.zeros(1, length - done, mixer.d_model), state)
            sizes.append(state.nbytes)
            done = length
    if len(set(sizes)) == 1:
        return f"{sizes[0]:,} bytes"
    rate = (sizes[2] - sizes[1]) / (LENGTHS[2] - LENGTHS[1])
    if sizes[-2] == sizes[-1]:
        return f"{rate:,.0f} bytes per token, at most {sizes[-1]:,} bytes"
    return f"{rate:,.0f} bytes per token"


@dataclass(frozen=True)
class Sizes:
    """What building a mixer with its defaults at D_MODEL shows."""

    parameters: int
    state: str


@functools.cache
def measure(name: str) -> Sizes:
    """Build a mixer and take its measures; the caller's random numbers stay as they are."""
    with torch.random.fork_rng(devices=[]):
        mixer = registry.mixer_class(name)(D_MODEL)
    return Sizes(sum(p.numel() for p in mixer.parameters()), state_size(mixer))


# --- Markdown -----------------------------------------------------------------------------------


def _paper(entry: registry.Entry) -> str:
    if ARXIV.fullmatch(entry.arxiv):
        return f"[{prose(entry.title)}](https://arxiv.org/abs/{entry.arxiv})"
    return prose(entry.title)


def settings_of(cls: type) -> dict[str, inspect.Parameter]:
    """The constructor's parameters without self."""
    return dict(inspect.signature(cls).parameters)


def meaning(cls: type, setting: str) -> str:
    """What a setting is for: in the class's docstring, its parents', or as in all mixers.

    "see above" if the class speaks of it elsewhere, "" if nowhere.
    """
    names = list(settings_of(cls))
    for c in cls.__mro__:
        if issubclass(c, Mixer) and c is not Mixer and c.__doc__:
            said = parse_docstring(c.__doc__, names).settings
            if setting in said:
                return said[setting].rstrip(".")
    if setting in SHARED:
        return SHARED[setting]
    said = f"{cls.__doc__} {initialisation(cls)}"
    return "see above" if re.search(rf"\b{setting}\b", said) else ""


def _settings_table(cls: type) -> str:
    rows = []
    for name, p in settings_of(cls).items():
        default = "" if p.default is p.empty else f"`{p.default!r}`"
        rows.append([f"`{name}`", default, prose(meaning(cls, name))])
    return table(["Setting", "Default", "Meaning"], rows)


def _use(name: str, cls: type) -> str:
    return f"""\
```python
import torch
from {cls.__module__} import {cls.__name__}

mixer = {cls.__name__}(d_model=64)
y, state = mixer(torch.randn(1, 100, 64))  # 100 tokens at once
y, state = mixer(torch.randn(1, 1, 64), state)  # the next token, from the state
```

As the layers of a language model:

```sh
longscan train language --model.pattern {name} --max-minutes 3
```"""


def page(
    name: str, sizes: Sizes, speed: list[dict[str, str]], records: list[Recorded] | None = None
) -> str:
    """The page of a mixer."""
    entry, cls = registry.entry(name), registry.mixer_class(name)
    doc = parse_docstring(cls.__doc__ or "", list(settings_of(cls)))
    parts = [MARK, f"# {name}", prose(doc.summary)]
    parts.append(f"{_paper(entry)}, {entry.year}. Family: {prose(entry.taxonomy)}.")
    for text, formula in doc.body:
        parts.append(f"```text\n{text}\n```" if formula else prose(_one_line(text)))
    parts += [f"**{label}.** {_upper(prose(text))}" for label, text in doc.sections.items()]
    start = initialisation(cls)
    if start:
        parts.append(f"**Initialisation.** {prose(start)}")
    parts += ["## Use", _use(name, cls), "## Settings", _settings_table(cls), "## Size and cost"]
    affine = "yes" if entry.affine else "no"
    across = "at once" if cls.shardable else "one device after another"
    rows = [
        [f"Parameters at d_model = {D_MODEL}", f"{sizes.parameters:,}"],
        [f"State of one sequence at d_model = {D_MODEL}, float32", sizes.state],
        ["Cost of a sequence of T tokens", prose(entry.train)],
        ["Cost of one token behind T others", prose(entry.decode)],
        ["A stretch of tokens is an affine map on the state", affine],
        ["One sequence on several devices", across],
        ["A block has an MLP behind the mixer", "yes" if entry.mlp else "no"],
    ]
    parts.append(table(["Property", "Value"], rows))
    shown = [r for r in records or [] if name in r.claim.mixers]
    if shown:
        parts += ["## Measured claims", *(_claim(r) for r in shown)]
    if speed:
        parts += ["## Measured speed", _speed(speed)]
    module = cls.__module__
    if module.startswith("longscan."):
        file = f"src/{module.replace('.', '/')}.py"
        parts.append(f"Source: [`{file}`](../../{file}). All mixers: [README](README.md).")
    else:
        parts.append(f"Source: module `{module}`.")
    return "\n\n".join(parts) + "\n"


def _upper(text: str) -> str:
    """A capital for a word at the start; symbols such as x or in_proj stay as they are."""
    return text[:1].upper() + text[1:] if re.match(r"[a-z]{2,}[ ,;]", text) else text


def index(sizes: dict[str, Sizes]) -> str:
    """The table of all mixers."""
    rows = []
    for name, s in sizes.items():
        e = registry.entry(name)
        about = (f"{_paper(e)}, {e.year}", prose(e.taxonomy), "yes" if e.affine else "no")
        cost = (prose(e.train), prose(e.decode))
        rows.append([f"[{name}]({name}.md)", *about, *cost, f"{s.parameters:,}", s.state])
    head = ["Mixer", "Paper", "Family", "Affine", "Sequence", "Token", "Parameters", "State"]
    text = f"""\
Sequence and Token are the costs of a sequence of T tokens and of one token behind T others.
Parameters and State are measured with default settings at d_model = {D_MODEL}, the state of one
sequence in float32. Affine: a stretch of tokens is an affine map on the state, so that stretches
can be composed ([the one idea](../design.md))."""
    return "\n\n".join([MARK, "# The mixers", text, table(head, rows)]) + "\n"


def read_history(path: Path) -> dict[str, list[dict[str, str]]]:
    """Mixer -> its rows of bench/history.csv, the latest of each peer, call and shape."""
    latest: dict[tuple[str, ...], dict[str, str]] = {}
    if path.is_file():
        with open(path, newline="", encoding="utf-8") as f:
            for row in csv.DictReader(f):
                latest[row["device"], row["row"], row["mode"], row["shape"]] = row
    out: dict[str, list[dict[str, str]]] = {}
    for row in latest.values():
        out.setdefault(row["row"].rpartition("-")[0], []).append(row)
    return out


def _speed(rows: list[dict[str, str]]) -> str:
    """Rows of the bench as tables, one for each machine and time they were taken at."""
    layers = [r for r in rows if r["device"] == "cpu"]
    ops = [r for r in rows if r["device"] != "cpu"]
    return "\n\n".join([_layers(layers)] * bool(layers) + [_ops(ops)] * bool(ops))


def _ops(rows: list[dict[str, str]]) -> str:
    """Rows of `bench gpu`: the recurrence alone, in bfloat16."""
    head = ["Peer", "Shape", "Forward, ms", "Peer's", "Times faster", "With backward, ms", "Peer's",
            "Times faster", "MiB", "Peer's MiB"]  # fmt: skip
    numbers = ("ours_forward_ms", "peer_forward_ms", "forward_ratio", "ours_ms", "peer_ms",
               "ratio", "ours_mib", "peer_mib")  # fmt: skip
    runs: dict[str, list[list[str]]] = {}
    for r in rows:
        about = f"{r['date'][:10]}, {r['device']}, torch {r['torch']}, triton {r['triton']}"
        cells = [digits(float(r[n])) if r.get(n) else "" for n in numbers]
        peer = f"{r['row'].rpartition('-')[2]} {r.get('peer_version', '')}".strip()
        runs.setdefault(about, []).append([peer, r["shape"], *cells])
    parts = ["Medians of `longscan bench gpu`: the op alone, called from Python in bfloat16, side "
             "by side with the peer's; MiB the peak beyond the inputs."]  # fmt: skip
    for about, cells in runs.items():
        parts += [f"{about}:", table(head, cells)]
    return "\n\n".join(parts)


def _layers(rows: list[dict[str, str]]) -> str:
    """Rows of `bench cpu`: whole layers."""
    head = ["Peer", "Call", "Shape", "ms", "Peer's ms", "Times faster", "MiB", "Peer's MiB"]
    numbers = ("ours_ms", "peer_ms", "ratio", "ours_mib", "peer_mib")
    runs: dict[str, list[list[str]]] = {}
    for r in rows:
        peer = r["row"].rpartition("-")[2]
        versions = ", ".join(f"{p} {r[p]}" for p in ("torch", peer) if r.get(p))
        about = f"{r['date'][:10]}, {r['cpu']}, {r['threads']} threads, {versions}"
        if r.get("commit"):
            about += f", commit {r['commit']}"
        cells = [digits(float(r[n])) if r[n] else "" for n in numbers]
        if not r["peer_ms"]:
            cells[1] = prose(r["note"])
        runs.setdefault(about, []).append([peer, r["mode"], r["shape"], *cells])
    beside = "another of ours, for the cost alone"
    if not {r["row"].rpartition("-")[2] for r in rows} <= set(registry.names()):
        beside = "the peer's layer of equal weights"
    parts = [f"Medians of `longscan bench`, side by side with {beside}, in float32; decode is one "
             "token, MiB the rise of memory at its peak."]  # fmt: skip
    for about, cells in runs.items():
        parts += [f"{about}:", table(head, cells)]
    return "\n\n".join(parts)


def _claim(run: Recorded) -> str:
    """One claim of a paper beside what was measured."""
    holds, sentence = run.verdict()
    rows = []
    for x in run.lines:
        low, mean, high = (digits(float(x[n])) for n in ("min", "mean", "max"))
        spread = f"{mean} ({low} to {high}, {x['seeds']} seeds)" if x["seeds"] != "1" else mean
        rows.append([prose(x["case"]), prose(x["metric"]), spread, prose(x["published"])])
    minutes = dict.fromkeys((x["case"], x["minutes"]) for x in run.lines)  # a set has no order
    about = (
        f"{run.device}, {run.lines[-1]['date'][:10]}, {sum(float(m) for _, m in minutes):.1f} "
        f"minutes; `longscan claims {run.claim.name}` runs it again."
    )
    verdict = "Holds in our hands." if holds else "Does not hold in our hands."
    head = ["Case", "Metric", "Measured", "Published"]
    return "\n\n".join(
        [
            f"**{prose(run.claim.title)}** {prose(run.claim.source)}.",
            f"{verdict} {prose(sentence)}",
            table(head, rows),
            about,
        ]
    )


# --- Files --------------------------------------------------------------------------------------


def own_names() -> list[str]:
    """The mixers that come with longscan, without those of plugins."""
    return [n for n in registry.names() if _module(n).startswith("longscan.")]


def _module(name: str) -> str:
    return registry.mixer_class(name).__module__


def pages(names: list[str], history: Path, *, with_index: bool) -> dict[str, str]:
    """File name -> text of the pages of some mixers."""
    sizes = {name: measure(name) for name in names}
    speed, records = read_history(history), read_records(history.with_name(RECORDS))
    out = {f"{n}.md": page(n, s, speed.get(n, []), records) for n, s in sizes.items()}
    if with_index:
        out["README.md"] = index(sizes)
    return out


def differences(wanted: dict[str, str], folder: Path) -> list[str]:
    """What is wrong with the files of a folder, a line each."""
    wrong = []
    for name, text in wanted.items():
        path = folder / name
        if not path.is_file():
            wrong.append(f"{path} is missing")
        elif path.read_text(encoding="utf-8") != text:
            wrong.append(f"{path} is out of date")
    return wrong


def leftovers(folder: Path) -> Iterator[Path]:
    """Generated pages of mixers that are no more."""
    for path in sorted(folder.glob("*.md")):
        known = path.stem in registry.names() or path.name == "README.md"
        if not known and path.read_text(encoding="utf-8").startswith(MARK):
            yield path


def main(argv: list[str]) -> int:
    """longscan docs"""
    parser = argparse.ArgumentParser(
        prog="longscan docs",
        description="Write a page for each mixer, and an index, to OUT/mixers. Speeds come from "
        "bench/history.csv beside OUT, claims from bench/claims.csv, if they are there.",
    )
    add = parser.add_argument
    add("mixers", nargs="*", help="only the pages of these (default: all of longscan's own)")
    add("--out", default="docs", help="the folder of the documentation")
    add("--check", action="store_true", help="write nothing; fail if a page would change")
    args = parser.parse_args(argv)
    out = Path(args.out)
    folder, history = out / "mixers", out.absolute().parent / "bench" / "history.csv"
    wanted = pages(args.mixers or own_names(), history, with_index=not args.mixers)
    wrong = differences(wanted, folder)
    old = [] if args.mixers else list(leftovers(folder))
    if args.check:
        for line in [*wrong, *(f"{path} is of no mixer" for path in old)]:
            print(line)
        print("run: longscan docs" if wrong or old else f"{len(wanted)} pages are up to date")
        return 1 if wrong or old else 0
    for name, text in wanted.items():
        save_text(text, folder / name)
    for path in old:
        path.unlink()
        print(f"removed {path}, the page of a mixer that is no more")
    print(f"{len(wanted)} pages in {folder}, {len(wrong)} of them changed")
    return 0
