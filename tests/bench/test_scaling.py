"""The simulation: against the closed formulas, against sums by hand, and against another one.

`Engine` runs the same exchanges as programs of ranks on an event queue, and shares no code with
`longscan.bench.scaling_exchange`, which computes times of whole rounds.
"""

import heapq
import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from longscan.bench import scaling, scaling_cases, scaling_gloo, scaling_published, scaling_report
from longscan.bench import scaling_exchange as sim
from longscan.bench.scaling_cases import A100, GLA, H100, alone, flat
from longscan.bench.scaling_exchange import Calibration, Compute, exchange, wires
from longscan.bench.scaling_step import Model, _ring_attention, step
from longscan.parallel.cost import Element, Link, Tokens, blocks, seconds

ROOT = Path(__file__).parents[2]
SMALL = Model("small", 8e6, 4, 64, 2, 16, 32, "key", "")
LINKS = Calibration("links", "made up", Link(2e-6, 50e9), Link(9e-6, 8e9), per_host=4)


# --- against the closed formulas ----------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 3, 8, 13, 64, 100])
@pytest.mark.parametrize("method", ["allgather", "ring", "direct", "allscan", "doubling", "relay"])
def test_one_kind_of_link_gives_the_formula(method, ranks):
    formula = {"relay": "lasp", "direct": "allgather"}.get(method, method)
    told = seconds(formula, ranks, GLA.element, H100.outer)
    assert alone(method, GLA, flat(H100), ranks) == pytest.approx(told, rel=1e-9)


@pytest.mark.parametrize("ranks", [4, 8, 16, 64, 256])
def test_hosts_give_the_formula_of_hosts(ranks):
    told = seconds("hierarchical", ranks, GLA.element, H100.inner, per_host=8, outer=H100.outer)
    assert alone("hierarchical", GLA, H100, ranks) == pytest.approx(told, rel=1e-9)


@pytest.mark.parametrize(("ranks", "n"), [(2, 1), (4, 3), (5, 1), (8, 16), (64, 7)])
def test_a_chain_takes_p_plus_n_minus_1_ticks(ranks, n):
    """One tick folds a block, messages are free: all is done after P + n - 1 of them."""
    free = Link(1e-12, 1e30)
    on = wires(Calibration("", "", free, free), ranks)
    done, end = sim.chain(np.zeros(ranks), float(n), on, n, combine=1.0)
    assert end == pytest.approx(ranks + n - 1)
    assert done == pytest.approx([0, *(r + n - 1 for r in range(1, ranks))])


def test_the_formulas_blocks_are_best_for_one_exchange():
    n = blocks(64, GLA.element.state, H100.outer)
    at = lambda k: exchange("allscan", np.zeros(64), GLA.element, wires(flat(H100), 64), n=k).max()  # noqa: E731
    assert at(n) < min(at(n // 2), at(2 * n), at(1))


def test_faster_links_inside_hosts_help():
    for m in ("allscan", "doubling", "hierarchical", "relay"):
        assert alone(m, GLA, H100, 64) <= alone(m, GLA, flat(H100), 64)
    assert alone("allgather, all cards", GLA, H100, 64) < 0.2 * alone("allgather", GLA, H100, 64)
    assert alone("allgather", GLA, H100, 8) < 0.2 * alone("allgather", GLA, flat(H100), 8)


# --- against an event queue ---------------------------------------------------------------------


class Engine:
    """Programs (generators) that wait: a number of seconds, or a Flag."""

    def __init__(self):
        self.now, self.queue, self.order = 0.0, [], itertools.count()

    def at(self, time, call):
        heapq.heappush(self.queue, (time, next(self.order), call))

    def start(self, program):
        done = Flag(self)

        def resume():
            wait = next(program, None)
            if wait is None:
                done.set()
            elif isinstance(wait, Flag):
                wait.then(resume)
            else:
                self.at(self.now + wait, resume)

        self.at(self.now, resume)
        return done

    def run(self):
        while self.queue:
            self.now, _, call = heapq.heappop(self.queue)
            call()


class Flag:
    """Something that happens once."""

    def __init__(self, engine):
        self.engine, self.time, self.waiting = engine, None, []

    def then(self, call):
        if self.time is None:
            self.waiting.append(call)
        else:
            self.engine.at(self.engine.now, call)

    def set(self):
        self.time = self.engine.now
        for call in self.waiting:
            self.engine.at(self.time, call)


class Network:
    """Links between ranks, each of which carries one message after the other."""

    def __init__(self, c, ready):
        self.c, self.ready, self.size = c, ready, len(ready)
        self.engine, self.last, self.flags = Engine(), {}, {}
        self.done = [0.0] * self.size

    def seconds(self, source, to, nbytes):
        link = self.c.inner if source // self.c.per_host == to // self.c.per_host else self.c.outer
        return link.latency + nbytes / link.bandwidth

    def flag(self, *name):
        return self.flags.setdefault(name, Flag(self.engine))

    def send(self, source, to, nbytes, tag):
        """Returns what happens when the message has arrived."""
        before, arrived = self.last.get((source, to)), self.flag(to, tag)

        def carry():
            if before is not None:
                yield before
            yield self.seconds(source, to, nbytes)
            arrived.set()

        self.last[source, to] = self.engine.start(carry())
        return arrived

    def run(self, program):
        for r in range(self.size):
            self.engine.start(program(self, r))
        self.engine.run()
        return np.array(self.done)


def chain_program(nbytes, n, combine):
    def program(net, r):
        yield net.ready[r]
        for i in range(n):
            if r:
                yield net.flag(r, i)
                net.done[r] = net.flag(r, i).time
            yield combine * nbytes / n
            if r + 1 < net.size:
                net.send(r, r + 1, nbytes / n, i)
        net.done[r] = max(net.done[r], net.ready[r])

    return program


def ring_program(nbytes):
    def program(net, r):
        yield net.ready[r]
        for k in range(net.size - 1):
            out = net.send(r, (r + 1) % net.size, nbytes, k)
            yield net.flag(r, k)
            yield out
        net.done[r] = net.engine.now

    return program


def doubling_program(nbytes, combine):
    def program(net, r):
        yield net.ready[r]
        net.done[r], far = net.engine.now, 1
        while far < net.size:
            out = net.send(r, r + far, nbytes, far) if r + far < net.size else None
            if r >= far:
                yield net.flag(r, far)
                yield combine * nbytes
                net.done[r] = net.engine.now
            if out is not None:
                yield out
            far *= 2

    return program


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ranks", [2, 5, 8, 11])
def test_an_event_queue_gives_the_same_times(ranks, seed):
    """Ranks that start at different times, on links of two kinds."""
    ready = np.random.default_rng(seed).uniform(0, 5e-4, ranks)
    size, combine = 1e6, 3e-11
    for n in (1, 3, 8):
        got = exchange("allscan", ready, Element(size), wires(LINKS, ranks), n=n, combine=combine)
        assert got == pytest.approx(Network(LINKS, ready).run(chain_program(size, n, combine)))
    got = exchange("ring", ready, Element(size), wires(LINKS, ranks))
    assert got == pytest.approx(Network(LINKS, ready).run(ring_program(size)))
    got = exchange("doubling", ready, Element(size), wires(LINKS, ranks), combine=combine)
    assert got == pytest.approx(Network(LINKS, ready).run(doubling_program(size, combine)))


def test_the_backward_starts_at_the_last_rank():
    """Hosts of 4, 4 and 2 ranks; from the right, the small one comes first."""
    assert wires(LINKS, 10).host.tolist() == [0] * 4 + [1] * 4 + [2] * 2
    assert wires(LINKS, 10, backward=True).host.tolist() == [2] * 2 + [1] * 4 + [0] * 4


# --- a step -------------------------------------------------------------------------------------

COMPUTE = Compute(flops=1e14, scores=1e14, parts=(0.1, 0.2, 0.1))
SLOW = Calibration("slow", "made up", Link(1e-4, 1e9), Link(1e-4, 1e9), compute=COMPUTE)


def parts(model, tokens, ranks):
    """Seconds of a layer's forward, and in the backward."""
    layer = 6 * model.weights / model.layers * tokens / ranks / 1e14
    return layer / 3, layer * 2 / 3


def test_work_alone():
    s = step(SMALL, SLOW, "data", 4, 2**16)
    assert s.seconds == pytest.approx(6 * SMALL.weights * 2**14 / 1e14) == pytest.approx(s.alone)
    assert s.relative == pytest.approx(1)
    assert step(SMALL, SLOW, "allscan", 1, 2**16).relative == pytest.approx(1)


@pytest.mark.parametrize("method", ["allgather", "ring", "doubling"])
def test_what_is_not_hidden_is_added(method):
    """Where all ranks wait at each layer, each exchange costs what its overlap leaves."""
    t = seconds(method, 8, SMALL.element, SLOW.outer)
    between = 0.7 * t / (0.2 * parts(SMALL, 1, 8)[0])  # hidden in the backward alone
    for tokens in (2**14, between, 10 * between):
        times = parts(SMALL, tokens, 8)
        left = sum(SMALL.layers * (0.3 * w + max(0, t - 0.2 * w) - 0.3 * w) for w in times)
        s = step(SMALL, SLOW, method, 8, tokens, together=True)
        assert s.seconds - s.alone == pytest.approx(left, abs=1e-12)
    assert left == 0, "so many tokens hide it"


def test_lasp_in_series():
    """The mixing of P ranks and P - 1 messages, once a direction for free ranks, else once a
    layer."""
    ranks, tokens = 8, 2**16
    message = SLOW.outer.seconds(SMALL.element.state)
    wave = sum((ranks - 1) * (0.4 * w + message) for w in parts(SMALL, tokens, ranks))
    free, bound = (step(SMALL, SLOW, "lasp", ranks, tokens, together=t) for t in (False, True))
    assert free.seconds - free.alone == pytest.approx(wave)
    assert bound.seconds - bound.alone == pytest.approx(SMALL.layers * wave)
    early = step(SMALL, SLOW, "lasp_early", ranks, tokens)
    assert early.seconds - early.alone == pytest.approx(
        sum((ranks - 1) * (0.2 * w + message) for w in parts(SMALL, tokens, ranks))
    )


def test_a_chain_of_free_ranks_pays_its_latency_once_a_direction():
    ranks, tokens = 16, 2**18
    one, many = (replace(SMALL, layers=n, weights=2e6 * n) for n in (1, 40))
    lost = [s.seconds - s.alone for s in
            (step(m, SLOW, "relay", ranks, tokens) for m in (one, many))]  # fmt: skip
    assert lost[1] == pytest.approx(lost[0])
    bound = step(many, SLOW, "relay", ranks, tokens, together=True)
    assert bound.seconds - bound.alone == pytest.approx(40 * lost[0])
    gathers = [step(many, SLOW, "allgather", ranks, tokens, together=t) for t in (False, True)]
    assert gathers[0].seconds == pytest.approx(gathers[1].seconds)


@pytest.mark.parametrize("method", ["ring_attention", "ulysses", "lasp2h"])
def test_softmax_exchanges_give_the_formula(method):
    c = replace(SLOW, compute=replace(COMPUTE, scores=float("inf")))
    s = step(SMALL, c, method, 8, 2**12)
    payload = Tokens(2**12, SMALL.d_model)
    told = sum(seconds(method, 8, payload, SLOW.outer, backward=b) for b in (False, True))
    rest = sum(0.6 * w for w in parts(SMALL, 2**12, 8))
    assert s.seconds == pytest.approx(SMALL.layers * (told + rest))


def test_ring_attention_hides_messages_behind_scores():
    fast = replace(SLOW, inner=Link(1e-9, 1e15), outer=Link(1e-9, 1e15))
    assert step(SMALL, fast, "ring_attention", 8, 2**16).relative == pytest.approx(1, abs=1e-4)
    quarter = [step(SMALL, fast, "softmax_data", 1, t).seconds for t in (2**20, 2**22)]
    assert quarter[1] / quarter[0] == pytest.approx(16, rel=0.05), "scores are of pairs"


@pytest.mark.parametrize(("core", "message"), [(3.0, 1.0), (1.0, 3.0)])
def test_rounds_of_ring_attention(core, message):
    """Messages travel behind scores in the forward; in the backward they carry what these made."""
    link = Link(message / 2, 2 / message)  # one byte takes `message` seconds
    on = lambda: wires(Calibration("", "", link, link), 5)  # noqa: E731
    forward, backward = (_ring_attention(np.zeros(5), core, 1.0, on(), b) for b in (False, True))
    assert forward == pytest.approx([max(5 * core, 4 * message + core)] * 5)
    assert backward == pytest.approx([5 * core + 4 * message] * 5)


def test_more_ranks_never_help_and_waiting_never_helps():
    for m in ("allgather", "allscan", "doubling", "lasp"):
        kept = [step(GLA, H100, m, p, 16384 * p).relative for p in (2, 8, 32, 128)]
        assert kept == sorted(kept, reverse=True)
        bound = step(GLA, H100, m, 128, 16384 * 128, together=True).relative
        assert bound <= kept[-1] + 1e-9
    longer = [step(GLA, H100, "allgather", 64, t).relative for t in (2**18, 2**20, 2**22)]
    assert longer == sorted(longer)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: step(SMALL, SLOW, "lasp3", 2, 8), "unknown method 'lasp3'"),
        (lambda: step(SMALL, SLOW, "data", 0, 8), "needs ranks and tokens"),
        (lambda: step(SMALL, LINKS, "data", 2, 8), "knows links only"),
        (lambda: replace(SMALL, transition="row").element, "transition is one of"),
        (lambda: exchange("data", np.zeros(2), Element(1), wires(LINKS, 2)), "unknown method"),
        (lambda: scaling_gloo.calibrate(1), "at least 2 ranks"),
    ],
)
def test_what_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_states_of_models():
    assert GLA.element == Element(2 * 2**20, 4096)
    assert scaling_cases.GDN.element == Element(3 * 2**20, 1.5 * 2**20)
    assert scaling_published.LLAMA.element == Element(2**20, 0)
    assert replace(SMALL, transition="head").element.transition == 8


# --- calibrations, the page ---------------------------------------------------------------------


@pytest.mark.parametrize("c", [H100, A100, LINKS, replace(LINKS, gather=Link(1e-6, 1e9))])
def test_calibrations_survive_a_file(c, tmp_path):
    (tmp_path / "c.json").write_text(sim.save(c), encoding="utf-8")
    assert sim.load(tmp_path / "c.json") == c


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda raw: raw.pop("inner"), "inner"),
        (lambda raw: raw.update(speed=1), "speed"),
        (lambda raw: raw["outer"].update(bandwidth=0), "above 0"),
        (lambda raw: raw["compute"].update(parts=[0.5, 0.5]), "three shares"),
        (lambda raw: raw["compute"].update(parts=[0.5, 0.5, 0.5]), "three shares"),
        (lambda raw: raw["compute"].update(flops=0), "above 0"),
        (lambda raw: raw.update(per_host=0), "at least one rank"),
        (lambda raw: raw.update(combine=-1), "no less than 0 seconds"),
    ],
)
def test_calibrations_that_are_none(change, words, tmp_path):
    raw = json.loads(sim.save(H100))
    change(raw)
    path = tmp_path / "c.json"
    path.write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(ValueError, match=words):
        sim.load(path)


def test_not_json(tmp_path):
    (tmp_path / "c.json").write_text("latency: 3", encoding="utf-8")
    with pytest.raises(ValueError, match="is not a calibration"):
        sim.load(tmp_path / "c.json")


def test_a_section_is_replaced_and_nothing_else():
    page = scaling.PAGE.replace(
        "<!-- gloo -->", "<!-- nccl -->\nmeasured\n<!-- /nccl -->\n<!-- gloo -->"
    )
    once = scaling.with_section(page, "simulation", "one")
    twice = scaling.with_section(once, "simulation", r"two \1")
    assert "one" not in twice.replace(scaling.PAGE[:100], "")
    assert r"two \1" in twice
    assert scaling.with_section(twice, "simulation", "one") == once
    assert "measured" in twice
    for broken in ("", page + "<!-- gloo -->", page.replace("<!-- /gloo -->", "")):
        with pytest.raises(ValueError, match="needs one <!-- gloo -->"):
            scaling.with_section(broken, "gloo", "x")


def test_the_command(tmp_path, monkeypatch, capsys):
    """With a model of one layer, and without the published ratios: the pictures and the page."""
    monkeypatch.setattr(scaling, "GLA", replace(GLA, layers=1, weights=GLA.weights / 24))
    monkeypatch.setattr(scaling_published, "section", lambda: "published")
    (tmp_path / "scaling.md").write_text(
        scaling.PAGE.replace("<!-- gloo -->\n", "<!-- gloo -->\nkept\n"), encoding="utf-8"
    )
    kept = tmp_path / "c.json"
    args = ["--write", "--out", str(tmp_path), "--save", str(kept)]
    assert scaling.main(args) == 0
    text = (tmp_path / "scaling.md").read_text(encoding="utf-8")
    assert "kept" in text
    assert "published" in text
    for name in ("bytes", "exchange", "ranks", "tokens"):
        assert f"scaling_{name}.png" in text
        assert (tmp_path / f"scaling_{name}.png").read_bytes().startswith(b"\x89PNG")
    assert sim.load(kept) == H100
    assert "wrote" in capsys.readouterr().out
    (tmp_path / "scaling.md").write_text("no markers", encoding="utf-8")
    with pytest.raises(ValueError, match="needs one <!-- simulation -->"):
        scaling.main(args)


def test_measured_beside_simulated():
    link = Link(1e-3, 1e9)
    c = Calibration("gloo", "measured: somewhere", link, link, per_host=4, combine=1e-9)
    t = scaling_gloo.Timed("ring", 4, 10**6, 1, 0.012, 0.015, 0.02)
    text = scaling_report.gloo([(c, [t, replace(t, method="relay", ranks=2)])])
    line = next(x for x in text.splitlines() if x.startswith("| ring"))
    cells = [x.strip() for x in line.strip("| ").split("|")]
    assert cells == ["ring", "4", "977 KiB", "1", "6.00", "12.0", "15.0", "20.0", "2.00"]
    assert "| relay    | 2   | 977 KiB | 1      | 3.00" in text, "a fold, then a message of 2 ms"


# --- published numbers --------------------------------------------------------------------------


def test_solve():
    assert scaling_published.solve(lambda x: x * x, 49, 1, 100) == pytest.approx(7, rel=0.01)
    assert scaling_published.solve(lambda x: 1 / x, 0.1, 1, 100) == pytest.approx(10, rel=0.01)
    assert scaling_published.solve(lambda x: x, 500, 1, 100) is None


@pytest.mark.parametrize(
    ("simulated", "verdict"),
    [([10.5], "yes"), ([5, 12], "in between"), ([5, 8], "no"), ([20, 40], "no"), ([3, 9.2], "yes")],
)
def test_verdicts(simulated, verdict):
    values = dict(zip("abc", simulated, strict=False))
    assert scaling_published.Row("", "", 10, values, "").verdict == verdict


def test_what_gives_a_published_number_gives_it():
    """The latency that is solved for, put back into the simulation."""
    row = scaling_published.collectives()
    microseconds = float(row.needed.rpartition(": ")[2].split()[0])
    c = scaling_published._latency(H100, 1e-6 * microseconds)
    ratio = max(alone("allgather", GLA, c, p) / alone("allscan", GLA, c, p) for p in (64, 128, 256))
    assert ratio == pytest.approx(row.published, rel=0.02)


@pytest.mark.slow
def test_the_page_is_current(tmp_path):
    """If not: longscan bench scaling --write."""
    (tmp_path / "scaling.md").write_text(scaling.PAGE, encoding="utf-8")
    assert scaling.main(["--write", "--out", str(tmp_path)]) == 0
    fresh, page = (
        (folder / "scaling.md").read_text(encoding="utf-8").partition("<!-- simulation -->")[2]
        for folder in (tmp_path, ROOT / "docs")
    )
    last = "<!-- /simulation -->"
    assert fresh.partition(last)[0] == page.partition(last)[0]


@pytest.mark.slow
def test_gloo_is_measured():
    c, rows = scaling_gloo.calibrate(2, repetitions=5)
    assert c.gather is not None
    assert 0 < c.inner.latency < 0.1
    assert c.inner.bandwidth > 1e6
    assert {t.method for t in rows} == {"ring", "relay", "doubling"}
    assert all(0 < t.least <= t.median <= t.most for t in rows)
