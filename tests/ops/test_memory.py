"""The test-time memory op: golden vectors, identities with other ops, gradients, extremes."""

import math
from itertools import pairwise

import pytest
import torch
from helpers import TOLERANCE, assert_close, error, golden, unit
from torch import Tensor

from longscan.ops._biases import BIASES, WITH_THRESHOLD
from longscan.ops._retentions import RETENTIONS
from longscan.ops.decay import decay
from longscan.ops.delta import delta as delta_rule
from longscan.ops.memory import Rule, memory, memory_read, memory_reference
from longscan.state import State

F64 = torch.float64
BACKENDS = ("reference", "torch")
MODELS = {
    "moneta_paper": {"bias": "lp", "retention": "lq_paper"},
    "moneta_mirror": {"bias": "lp", "retention": "lq_mirror"},
    "memora": {"retention": "kl"},
    "titans": {"bias": "squared", "algorithm": "momentum"},
    "yaad_coord": {"bias": "huber_coord"},
    "yaad_norm": {"bias": "huber_norm"},
    "yaad_mix": {"bias": "huber_mix"},
}


def file_of(gates, model):
    if gates == "channel":
        return golden("miras/miras_channel_gates")
    file = golden("miras/miras_scalar_gates")
    return file | golden("miras/miras_scalar_gates_yaad") if "yaad" in model else file


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("form", ["mlp", "linear"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("gates", ["scalar", "channel"])
def test_golden(gates, model, form, chunk, backend):
    file = file_of(gates, model)
    rule = Rule(**MODELS[model], chunk=chunk)
    x = {k[3:]: t.requires_grad_() for k, t in file.items() if k.startswith("in.")}

    def tokens(name):  # [B, H, T, ...] -> [B, T, H, ...]
        return x[name].transpose(1, 2)

    letters = "L" if model == "memora" else "W"
    order = ["2", "1"] if form == "mlp" else [""]  # W2 is applied first
    first = {f"W{i}": x[f"{letters}{i}_0"] for i in order}
    titans, huber = model == "titans", "yaad" in model
    state = None
    if titans and gates == "channel":  # one sequence: starting weights and momentum are its own
        a = {f"a{i}": w for i, w in enumerate(first.values())}
        state = State({**a, **{f"m{i}": x[f"S0_{k}"] for i, k in enumerate(first)}})
    y, end = memory(
        tokens("q"), tokens("k"), tokens("v"), tokens("eta"), tokens("alpha").log(),
        tokens("delta") if huber else None, tokens("momentum").log() if titans else None,
        weights=[w.squeeze(0) for w in first.values()],
        norm=(x["ln_gamma"].squeeze(0), x["ln_beta"].squeeze(0)) if form == "mlp" else None,
        rule=rule, state=state, backend=backend,
    )  # fmt: skip
    case = f"{model}.{form}.chunk{chunk}."
    assert_close(y.transpose(1, 2), file[case + "y"], "golden64", "y")
    for i, name in enumerate(first):
        assert_close(end.tensor(f"a{i}"), file[case + f"final_{name}"], "golden64", name)
        if titans:
            assert_close(end.tensor(f"m{i}"), file[case + f"final_S_{name}"], "golden64", name)
    names = [k.removeprefix(case + "d_") for k in file if k.startswith(case + "d_")]
    grads = torch.autograd.grad((y.transpose(1, 2) * x["dy"]).sum(), [x[n] for n in names])
    assert len(names) >= 6
    for name, grad in zip(names, grads, strict=True):
        assert_close(grad, file[case + f"d_{name}"], "golden64", f"d{name}")


# --- random inputs --------------------------------------------------------------------------


def draw(rule, seed=0, *, rows=2, length=7, heads=2, d=4, hidden=(6,), norm=True, channels=False):
    """Keyword arguments of `memory` for a memory with these hidden widths; none: linear."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=F64, generator=g)

    def gate(low, high):
        shape = (rows, length, heads, d) if channels else (rows, length, heads)
        return low + (high - low) * torch.rand(shape, dtype=F64, generator=g)

    widths = [d, *hidden, d]
    x = {
        "q": normal(rows, length, heads, d),
        "k": unit(normal(rows, length, heads, d)),
        "v": normal(rows, length, heads, d),
        "eta": gate(0.05, 0.3),
        "weights": [normal(heads, b, a) * a**-0.5 for a, b in pairwise(widths)],
    }
    if norm:
        x["norm"] = (1 + 0.1 * normal(heads, d), 0.1 * normal(heads, d))
    if rule.retention != "none":
        x["log_a"] = gate(0.7, 1.0).log()
    if rule.bias in WITH_THRESHOLD:
        x["delta"] = 0.5 + torch.rand(rows, length, heads, dtype=F64, generator=g)
    if rule.algorithm == "momentum":
        x["log_mu"] = gate(0.3, 0.9).log()
    return x


def apart(x):
    """The tensors of `draw`, flat, and how to put them together again."""
    flat = {k: t for k, t in x.items() if isinstance(t, Tensor)}
    flat |= {f"{k}.{i}": t for k in ("weights", "norm") for i, t in enumerate(x.get(k, ()))}

    def join(values):
        out = {k: t for k, t in values.items() if "." not in k}
        for k in ("weights", "norm"):
            if k in x:
                out[k] = [values[f"{k}.{i}"] for i in range(len(x[k]))]
        return out

    return flat, join


def part(x, a, b):
    """Tokens a to b."""
    return {k: t[:, a:b] if isinstance(t, Tensor) else t for k, t in x.items()}


def rowwise(x, i):
    return {k: t[i : i + 1] if isinstance(t, Tensor) else t for k, t in x.items()}


def same_state(a, b):
    assert list(a) == list(b)
    for k in a:
        if k == "at":
            assert torch.equal(a[k], b[k])
        else:
            assert_close(a[k], b[k], "float64", k)


# --- identities: the framework's table ------------------------------------------------------


def linear(seed=0, length=9, d_key=3, d_value=5, gate="head"):
    """Inputs of linear attention and of the delta rule, and their state as a memory's."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(2, length, 2, d, dtype=F64, generator=g) for d in (d_key, d_key, d_value)
    )
    eta = torch.rand(2, length, 2, dtype=F64, generator=g)
    shape = (2, length, 2, d_key) if gate == "key" else (2, length, 2)
    log_a = -torch.rand(shape, dtype=F64, generator=g)
    s = torch.randn(2, 2, d_key, d_value, dtype=F64, generator=g)
    weights = [torch.zeros(2, d_value, d_key, dtype=F64)]
    return q, unit(k), v, eta, log_a, s, weights


def same_linear(got, want):
    assert_close(got[0], want[0], "float64", "y")
    assert_close(got[1].tensor("a0").mT, want[1], "float64", "state")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("gate", ["none", "head", "key"])
def test_dot_product_is_linear_attention(gate, chunk, backend):
    """Linear attention; RetNet, Mamba-2; GLA. Its gradient does not depend on the weights."""
    q, k, v, eta, log_a, s, weights = linear(gate=gate)
    rule = Rule(
        bias="dot", chunk=chunk, channels="key", retention="none" if gate == "none" else "l2"
    )
    log_a = None if gate == "none" else log_a
    got = memory(
        q, k, v, eta, log_a, weights=weights, rule=rule, state=State(a0=s.mT), backend=backend
    )
    same_linear(got, decay(q, k, v * eta.unsqueeze(-1), log_a, state=s))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gate", ["none", "head", "key"])
def test_l2_is_the_delta_rule(gate, backend):
    """DeltaNet; Gated DeltaNet; KDA: the gradient at the decayed weights, without chunks."""
    q, k, v, eta, log_a, s, weights = linear(gate=gate)
    log_a = None if gate == "none" else log_a
    rule = Rule(
        retention="none" if gate == "none" else "l2", decay_first=True, chunk=1, channels="key"
    )
    got = memory(
        q, k, v, eta, log_a, weights=weights, rule=rule, state=State(a0=s.mT), backend=backend
    )
    same_linear(got, delta_rule(q, k, v, eta, log_a, state=s))


@pytest.mark.parametrize("backend", BACKENDS)
def test_longhorn_is_the_delta_rule_with_its_own_step(backend):
    q, k, v, eta, _, s, weights = linear()
    k, eta = 2 * k, 5 * eta
    rule = Rule(retention="none", algorithm="implicit", chunk=1)
    got = memory(q, k, v, eta, weights=weights, rule=rule, state=State(a0=s.mT), backend=backend)
    beta = eta / (1 + eta * k.square().sum(-1))
    same_linear(got, delta_rule(q, k, v, beta, state=s))


def test_implicit_step_solves_its_equation():
    """A' = A - eta (A' k - v) k^T: the gradient is that at the new weights."""
    q, k, v, eta, _, s, weights = linear(length=1)
    rule = Rule(retention="none", algorithm="implicit", chunk=1)
    _, end = memory(q, k, v, eta, weights=weights, rule=rule, state=State(a0=s.mT))
    a, k, v = end.tensor("a0"), k[:, 0].unsqueeze(-1), v[:, 0].unsqueeze(-1)
    assert_close(a, s.mT - eta[:, 0, :, None, None] * (a @ k - v) @ k.mT, "float64")


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_steps_per_token_are_deltaproduct(backend):
    q, k, v, eta, _, s, weights = linear(length=12)
    rule = Rule(retention="none", chunk=1)
    y, end = memory(q, k, v, eta, weights=weights, rule=rule, state=State(a0=s.mT), backend=backend)
    k, v, eta = (x.unflatten(1, (-1, 3)) for x in (k, v, eta))
    same_linear((y[:, 2::3], end), delta_rule(q[:, 2::3], k, v, eta, state=s))


def test_gated_deltanet_is_not_yaad():
    """The order matters: at the weights before their decay the result is another."""
    q, k, v, eta, log_a, s, weights = linear()
    more = {"weights": weights, "state": State(a0=s.mT)}
    y, _ = memory(q, k, v, eta, log_a, rule=Rule(chunk=1), **more)
    z, _ = memory(q, k, v, eta, log_a, rule=Rule(chunk=1, decay_first=True), **more)
    assert error(y, z) > 0.01


def literal(x, rule, update):
    """y of a linear memory whose weights themselves follow W' = update(W, G, alpha, eta)."""
    w = RETENTIONS[rule.retention].weights([x["weights"][0].unsqueeze(0)], rule)[0]
    out = []
    for t in range(x["q"].shape[1]):
        q, k, v = (x[n][:, t].unsqueeze(-1) for n in "qkv")
        alpha, eta = (g[:, t, :, None, None] for g in (x["log_a"].exp(), x["eta"]))
        w = update(w, (w @ k - v) @ k.mT, alpha, eta)
        out.append((w @ q).squeeze(-1))
    return torch.stack(out, 1)


LITERAL = {
    # Memora's equation as printed.
    "kl": lambda rule: lambda w, g, a, eta: torch.softmax(a * w.log() - eta * g, -1),
    # f' = logit keeps weights in (0, 1).
    "bregman": lambda rule: lambda w, g, a, eta: torch.sigmoid(a * w.logit() - eta * g),
    "elastic_net_proximal": lambda rule: (
        lambda w, g, a, eta: _soft(a * w - eta * g, rule.threshold * eta)
    ),
}


def _soft(z, bound):
    return torch.where(z > bound, z - bound, torch.where(z < -bound, z + bound, 0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LITERAL)
def test_recurrences_of_the_weights_themselves(name, backend):
    """Accumulators behind a map are the printed recurrence of the weights."""
    rule = Rule(retention=name, chunk=1, threshold=0.5)
    x = draw(rule, hidden=(), norm=False)
    y, _ = memory(**x, rule=rule, backend=backend)
    assert_close(y, literal(x, rule, LITERAL[name](rule)), "float64")


def test_kl_step_is_the_step_of_its_divergence():
    """W * exp(-zeta - eta G), zeta such that rows sum to 1, with nothing forgotten."""
    rule = Rule(retention="kl", chunk=1)
    x = draw(rule, hidden=(), norm=False)
    x["log_a"] = torch.zeros_like(x["log_a"])

    def update(w, g, alpha, eta):
        u = w * (-eta * g).exp()
        return u / u.sum(-1, True)

    assert_close(memory(**x, rule=rule)[0], literal(x, rule, update), "float64")


SLOPES = {  # f' of each divergence
    "kl": lambda u: u.log() + 1,
    "f_chi2": lambda u: u - 1,
    "f_reverse_kl": lambda u: -1 / u,
    "f_hellinger": lambda u: 1 - u.rsqrt(),
}


@pytest.mark.parametrize("total", [1.0, 3.0])
@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 30.0])
@pytest.mark.parametrize("name", SLOPES)
def test_divergences_are_minimised(name, scale, total):
    """max <A, W> - D_f(W) with rows that sum to total: f'(u) - A is one number where u > 0."""
    g = torch.Generator().manual_seed(1)
    a = scale * torch.randn(4, 9, dtype=F64, generator=g)
    rule = Rule(retention=name, total=total)
    (w,) = rule.map.weights([a], rule)
    assert_close(w.sum(-1), torch.full((4,), total, dtype=F64), "float64")
    assert w.min() >= 0
    u = w * 9 / total
    gap = SLOPES[name](u) - a
    inside = u > 0
    assert inside.all() or name == "f_chi2"
    level = gap.where(inside, -math.inf).amax(-1, True)
    assert (gap - level).where(inside, 0).abs().max() <= TOLERANCE["float64"] * gap[
        inside
    ].abs().max()
    assert (gap >= level - 1e-12).all(), "nothing outside wants in"


@pytest.mark.parametrize("name", ["lq_mirror", "lq_paper", "l2"])
def test_lq_maps(name):
    """The mirror map inverts the gradient of |W|_p^2 / 2; the printed map shrinks what is large."""
    g = torch.Generator().manual_seed(1)
    a = torch.randn(2, 3, 4, dtype=F64, generator=g)
    rule = Rule(retention=name, q=4.0)
    (w,) = rule.map.weights([a], rule)
    if name == "lq_mirror":
        w = w.detach().requires_grad_()
        half = w.abs().pow(4 / 3).sum((1, 2)).pow(3 / 4).square() / 2
        assert_close(torch.autograd.grad(half.sum(), w)[0], a, "float64")
    power = {"lq_mirror": 1, "lq_paper": -1, "l2": 1}[name]
    assert_close(rule.map.weights([10 * a], rule)[0], 10.0**power * w.detach(), "float64")
    (plain,) = rule.map.weights([a], Rule(retention=name, q=2.0))
    assert_close(plain, a, "float64", "q = 2 is the identity")


def test_soft_thresholds():
    a = torch.tensor([[-3.0, -0.5, 0.0, 0.2, 2.0]], dtype=F64)
    rule = Rule(retention="elastic_net", threshold=0.5)
    want = torch.tensor([[-2.5, 0.0, 0.0, 0.0, 1.5]], dtype=F64)
    assert_close(rule.map.weights([a], rule)[0], want, "float64")
    smooth = Rule(retention="elastic_net_smooth", threshold=1e-12)
    assert_close(smooth.map.weights([a], smooth)[0], a, "float64")
    smooth = Rule(retention="elastic_net_smooth", threshold=0.5)
    (w,) = smooth.map.weights([a], smooth)
    assert (w.abs() <= a.abs()).all()
    assert torch.equal(w.sign(), a.sign())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize(
    ("one", "other", "change"),
    [
        ({"bias": "huber_coord"}, {}, ("delta", 1e6)),
        ({"bias": "huber_norm"}, {}, ("delta", 1e6)),
        ({"bias": "huber_mix"}, {}, ("delta", 1e6)),
        ({"bias": "value_shift"}, {}, ("delta", 0.0)),
        ({"algorithm": "momentum"}, {}, ("log_mu", -math.inf)),
        ({"retention": "lq_paper", "q": 2.0}, {}, None),
        ({"retention": "lq_mirror", "q": 2.0}, {}, None),
        ({"bias": "lp", "p": 1.0}, {"bias": "l1"}, None),
        ({"bias": "lp", "p": 2.0, "sharpness": 1e9, "eps": 1e-30}, {"bias": "squared"}, None),
        ({"read": "frozen"}, {}, None),
    ],
    ids=lambda x: " ".join(map(str, x.values())) if isinstance(x, dict) else None,
)
def test_rules_that_are_special_cases(one, other, change, chunk, backend):
    rule = Rule(**one, chunk=chunk)
    x = draw(rule)
    if change:
        x[change[0]] = torch.full_like(x[change[0]], change[1])
    y, end = memory(**x, rule=rule, backend=backend)
    x = {k: t for k, t in x.items() if k not in ("delta", "log_mu")}
    want, final = memory(**x, rule=Rule(**other, chunk=chunk), backend=backend)
    assert_close(y, want, "float64")
    same_state(State({k: t for k, t in end.items() if k[0] != "m"}), final)


def test_squared_error_has_twice_the_step():
    x = draw(Rule())
    y, _ = memory(**x, rule=Rule(bias="squared"))
    want, _ = memory(**{**x, "eta": 2 * x["eta"]}, rule=Rule())
    assert_close(y, want, "float64")


@pytest.mark.parametrize("bias", BIASES)
def test_biases_are_slopes_of_their_losses(bias):
    g = torch.Generator().manual_seed(0)
    e = torch.randn(40, 5, dtype=F64, generator=g).requires_grad_()
    v = torch.randn(40, 5, dtype=F64, generator=g)
    t = 0.5 + torch.rand(40, 1, dtype=F64, generator=g)
    norm = e.norm(dim=-1, keepdim=True)

    def huber(x):
        return torch.where(x <= t, x.square() / 2, t * (x - t / 2))

    loss = {
        "dot": -(e + v) * v,
        "l1": e.abs(),
        "l2": e.square() / 2,
        "squared": e.square(),
        "lp": e.abs() ** 3,
        "huber_coord": huber(e.abs()),
        "huber_norm": huber(norm),
        "huber_mix": torch.where(norm <= t, e.square() / 2, t * e.abs()),
        "value_shift": norm.square() / 2 + t * norm,
    }[bias]
    (want,) = torch.autograd.grad(loss.sum(), e)
    rule = Rule(bias=bias, sharpness=1e12, eps=1e-30)
    assert_close(BIASES[bias](e.detach(), v, t, rule), want, "float64")


# --- gradients ------------------------------------------------------------------------------


def check_gradients(rule, **shape):
    x = draw(rule, rows=1, heads=1, d=2, hidden=shape.pop("hidden", (3,)), length=3, **shape)
    flat, join = apart(x)

    def f(*values):
        y, end = memory_reference(**join(dict(zip(flat, values, strict=True))), rule=rule)
        return [y, *(t for k, t in end.items() if k != "at")]

    leaves = [t.clone().requires_grad_() for t in flat.values()]
    assert torch.autograd.gradcheck(f, leaves, fast_mode=True)


@pytest.mark.parametrize("bias", BIASES)
def test_gradcheck_of_biases(bias):
    check_gradients(Rule(bias=bias, chunk=2))


@pytest.mark.parametrize("retention", RETENTIONS)
def test_gradcheck_of_retentions(retention):
    check_gradients(Rule(retention=retention, chunk=2))
    check_gradients(Rule(retention=retention, chunk=2, read="frozen"), hidden=(), norm=False)


@pytest.mark.parametrize("more", [{"algorithm": "momentum"}, {"decay_first": True}], ids=str)
def test_gradcheck_of_algorithms(more):
    check_gradients(Rule(chunk=1, **more), channels=True)
    check_gradients(Rule(chunk=2, **more), hidden=(3, 2))


@pytest.mark.parametrize("name", ["f_chi2", "f_reverse_kl", "f_hellinger"])
def test_second_derivatives_of_roots(name):
    rule = Rule(retention=name)
    a = torch.randn(2, 4, dtype=F64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda a: rule.map.weights([a], rule)[0], [a])


# --- paths ----------------------------------------------------------------------------------

RULES = {
    "momentum": Rule(bias="squared", algorithm="momentum", chunk=3),
    "huber": Rule(bias="huber_norm", chunk=3),
    "moneta": Rule(bias="lp", retention="lq_paper", chunk=3),
    "moneta frozen": Rule(bias="lp", retention="lq_paper", chunk=3, read="frozen"),
    "memora": Rule(retention="kl", chunk=3),
    "memora frozen": Rule(retention="kl", chunk=3, read="frozen"),
    "momentum frozen": Rule(algorithm="momentum", retention="lq_mirror", chunk=3, read="frozen"),
    "proximal": Rule(retention="elastic_net_proximal", chunk=3),
    "proximal frozen": Rule(retention="elastic_net_proximal", chunk=3, read="frozen"),
    "decay first": Rule(decay_first=True, chunk=3),
    "decay first frozen": Rule(decay_first=True, chunk=3, retention="kl", read="frozen"),
    "exact": Rule(retention="kl", chunk=1),
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


@every_rule
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels", [False, True])
def test_steps_equal_the_definition(rule, backend, channels):
    """Token by token, and in two parts, is as the whole; so is every gradient."""
    x = draw(rule, channels=channels)
    flat, join = apart(x)
    results = []
    for cuts in ([0, 7], range(8), [0, 2, 7]):
        leaves = {k: t.clone().requires_grad_() for k, t in flat.items()}
        now, state, out = join(leaves), None, []
        how = "reference" if len(cuts) == 2 else backend
        for a, b in pairwise(cuts):
            y, state = memory(**part(now, a, b), rule=rule, state=state, backend=how)
            out.append(y)
        g = torch.Generator().manual_seed(3)
        y = torch.cat(out, 1)
        ends = [t for t in state.values() if t.is_floating_point()]
        loss = sum((t * torch.randn(t.shape, dtype=F64, generator=g)).sum() for t in (y, *ends))
        grads = torch.autograd.grad(loss, list(leaves.values()))
        results.append((y, state, grads))
    for y, state, grads in results[1:]:
        assert_close(y, results[0][0], "float64", "y")
        same_state(state, results[0][1])
        for name, a, b in zip(flat, grads, results[0][2], strict=True):
            assert_close(a, b, "float64", f"d{name}")


@every_rule
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_at_different_positions(rule, backend):
    """Rows whose chunks began at different times go on together as they would alone."""
    x = draw(rule, rows=3)
    ages = [1, 2, 5]
    alone = [memory(**part(rowwise(x, i), 0, n), rule=rule)[1] for i, n in enumerate(ages)]
    joined = State.cat(alone)
    y, end = memory(**part(x, 1, 7), rule=rule, state=joined, backend=backend)
    z, middle = memory(**part(x, 1, 2), rule=rule, state=joined, backend=backend)
    for i in range(3):
        row = rowwise(x, i)
        want, final = memory(**part(row, 1, 7), rule=rule, state=alone[i], backend="reference")
        assert_close(y[i : i + 1], want, "float64", "y")
        same_state(end.select(i), final)
        assert_close(z[i : i + 1], want[:, :1], "float64", "one token")
        _, final = memory(**part(row, 1, 2), rule=rule, state=alone[i], backend="reference")
        same_state(middle.select(i), final)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_equals_separate(backend):
    rule = Rule(bias="squared", algorithm="momentum", retention="kl", chunk=3)
    x = draw(rule, rows=1, length=11)
    cu = [0, 4, 5, 11]
    before = [memory(**part(x, 0, n), rule=rule)[1] for n in (1, 2, 3)]
    y, end = memory(
        **x, rule=rule, state=State.cat(before), cu_seqlens=torch.tensor(cu), backend=backend
    )
    for i, s in enumerate(before):
        want, final = memory(**part(x, *cu[i : i + 2]), rule=rule, state=s, backend="reference")
        assert_close(y[:, cu[i] : cu[i + 1]], want, "float64")
        same_state(end.select(i), final)


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_reading(backend):
    """Inside a chunk: with the factor of its start, or with weights linear in the gradients."""
    for retention in ("lq_paper", "kl"):
        rule = Rule(retention=retention, chunk=4, read="frozen")
        x = draw(rule, hidden=(), norm=False, length=4)
        exact, end = memory(**x, rule=Rule(retention=retention, chunk=4), backend=backend)
        y, state = memory(**x, rule=rule, backend=backend)
        assert_close(state["a0"], end["a0"], "float64", "learning is the same")
        w0 = x["weights"][0].unsqueeze(0)
        (start,) = rule.map.weights([w0], rule)
        a, w, out = w0, start, []
        for t in range(4):
            q, k, v = (x[n][:, t].unsqueeze(-1) for n in "qkv")
            alpha, eta = (g[:, t, :, None, None] for g in (x["log_a"].exp(), x["eta"]))
            update = eta * (start @ k - v) @ k.mT
            a, w = alpha * a - update, alpha * w - update
            out.append(
                ((a * (start / w0)[..., :1, :1] if retention == "lq_paper" else w) @ q)[..., 0]
            )
        assert_close(y, torch.stack(out, 1), "float64")
        assert error(y, exact) > 1e-3
        one = [
            memory(**x, rule=Rule(retention=retention, chunk=1, read=r))
            for r in ("exact", "frozen")
        ]
        assert torch.equal(one[0][0], one[1][0]), "with chunks of one token nothing is frozen"


@pytest.mark.parametrize("backend", BACKENDS)
def test_states_go_from_one_chunk_size_to_another(backend):
    fine, coarse = Rule(chunk=1), Rule(chunk=3)
    x = draw(fine)
    _, state = memory(**part(x, 0, 2), rule=fine)
    y, end = memory(**part(x, 2, 7), rule=coarse, state=state, backend=backend)
    new_chunk = State(state, g0=state["a0"], g1=state["a1"], at=torch.zeros(2, dtype=torch.long))
    want, _ = memory(**part(x, 2, 7), rule=coarse, state=new_chunk, backend="reference")
    assert_close(y, want, "float64")
    y, _ = memory(**part(x, 0, 2), rule=fine, state=end, backend=backend)
    plain = State({k: end[k] for k in ("a0", "a1")})
    want, _ = memory(**part(x, 0, 2), rule=fine, state=plain, backend="reference")
    assert_close(y, want, "float64")


@every_rule
def test_reading_without_learning(rule):
    """memory_read is the answer of a token that teaches nothing."""
    x = draw(rule)
    _, state = memory(**x, rule=rule)
    q = draw(rule, 1)["q"]
    exact = {"rule": rule, "norm": x["norm"]}
    y = memory_read(q, state=state, **exact)
    idle = {**x, "q": q, "eta": torch.zeros_like(x["eta"])}
    for k in ("log_a", "log_mu"):
        if k in idle:
            idle[k] = torch.zeros_like(idle[k])
    idle_state = State({k: torch.zeros_like(t) if k[0] == "m" else t for k, t in state.items()})
    if not rule.frozen:
        assert_close(y, memory(**idle, rule=rule, state=idle_state)[0], "float64")
    first = memory_read(q, weights=x["weights"], **exact)
    same = State({f"a{i}": w.expand(2, -1, -1, -1) for i, w in enumerate(x["weights"])})
    assert_close(first, memory_read(q, state=same, **exact), "float64")


def test_weights_get_zero_gradients_beside_a_state():
    """Not none, at which data-parallel training that carries states would stop."""
    rule = Rule()
    x = draw(rule)
    _, state = memory(**x, rule=rule)
    weights = [w.requires_grad_() for w in x["weights"]]
    for t in (1, 7):
        y, _ = memory(**{**part(x, 0, t), "weights": weights}, rule=rule, state=state)
        for g in torch.autograd.grad(y.sum(), weights):
            assert g.abs().max() == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [1, 2])
def test_states_share_nothing_with_weights(backend, length):
    """An optimiser's step leaves carried states as they are."""
    rule = Rule(retention="kl", chunk=3, read="frozen")
    x = draw(rule, length=length)
    _, state = memory(**x, rule=rule, backend=backend)
    before = state.clone()
    for w in x["weights"]:
        w.zero_()
    same_state(state, before)


# --- precision ------------------------------------------------------------------------------


def test_types():
    rule = Rule(retention="kl", chunk=3)
    flat, join = apart(draw(rule))
    x = join({k: t.to(torch.bfloat16) for k, t in flat.items()})
    for length in (1, 7):
        y, state = memory(**part(x, 0, length), rule=rule)
        assert y.dtype == torch.bfloat16
        assert state.tensor("a0").dtype == state.tensor("g0").dtype == torch.float32
        assert state.tensor("at").dtype == torch.int64
    assert memory_read(x["q"], state=state, rule=rule, norm=x["norm"]).dtype == torch.bfloat16


@pytest.mark.parametrize("retention", RETENTIONS)
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-4, 1e4, 1e30])
def test_maps_stay_finite(retention, scale):
    """float32 accumulators of nothing, ties, and sizes whose powers are not numbers any more."""
    rule = Rule(retention=retention)
    g = torch.Generator().manual_seed(0)
    a = torch.randn(2, 4, 6, generator=g) * scale
    a[0, :, 3] = a[0, :, 2]
    a.requires_grad_()
    (w,) = rule.map.weights([a], rule)
    (slope,) = torch.autograd.grad(w.sum() + w[..., 0].sum(), a)
    assert torch.isfinite(w).all()
    if scale != 1e-30 or not retention.startswith("lq_paper"):  # of degree -1: steep at 0
        assert torch.isfinite(slope).all()


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e4, 1e15])
def test_biases_stay_finite(bias, scale):
    g = torch.Generator().manual_seed(0)
    e = (torch.randn(5, 4, generator=g) * scale).requires_grad_()
    t = torch.tensor([[0.0], [1e-6], [1.0], [1e3], [1e6]], requires_grad=True)
    out = BIASES[bias](e, e, t, Rule(bias=bias))
    assert torch.isfinite(out).all()
    for slope in torch.autograd.grad(out.sum() + 0 * (e.sum() + t.sum()), [e, t]):
        assert torch.isfinite(slope).all()


# --- errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bias": "huber"}, "unknown bias 'huber'; choose from dot, l1"),
        ({"retention": "l3"}, "unknown retention"),
        ({"algorithm": "adam"}, "unknown algorithm"),
        ({"read": "lazy"}, "unknown read"),
        ({"channels": "rows"}, "unknown channels"),
        ({"chunk": 0}, "chunk must be an integer >= 1"),
        ({"chunk": 2.0}, "chunk must be an integer >= 1"),
        ({"p": 0.5}, "p must be at least 1"),
        ({"q": 1.5}, "q must be at least 2"),
        ({"eps": 0.0}, "eps must be positive"),
        ({"total": math.inf}, "total must be positive"),
        ({"sharpness": -1.0}, "sharpness must be positive"),
        ({"threshold": math.nan}, "threshold must be positive"),
        ({"algorithm": "implicit", "bias": "l1"}, "'implicit' is known in closed form"),
        ({"algorithm": "implicit", "retention": "kl"}, "'implicit' is known in closed form"),
    ],
)
def test_rules_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        Rule(**settings)


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        ({}, {"k": lambda x: x["k"][..., :3]}, "k must have shape"),
        ({}, {"eta": lambda x: x["eta"][:, :3]}, "eta must have shape"),
        ({}, {"eta": lambda x: x["eta"].unsqueeze(-1)}, "eta must have shape"),
        ({}, {"log_a": lambda x: x["log_a"].exp()}, "log_a must be log decays <= 0"),
        ({"retention": "none"}, {"log_a": lambda x: -x["eta"]}, "'none' keeps all"),
        ({"algorithm": "momentum"}, {"log_mu": lambda x: None}, "needs log_mu"),
        ({"algorithm": "momentum"}, {"log_mu": lambda x: x["eta"]}, "log_mu must be log decays"),
        ({}, {"log_mu": lambda x: x["log_a"]}, "takes no log_mu"),
        ({"bias": "huber_norm"}, {"delta": lambda x: None}, "needs a threshold delta"),
        ({}, {"delta": lambda x: x["eta"]}, "takes no delta"),
        (
            {"bias": "huber_norm"},
            {"delta": lambda x: x["delta"].unsqueeze(-1).expand(-1, -1, -1, 4)},
            "delta must have shape",
        ),
        ({}, {"weights": lambda x: []}, "at least one matrix"),
        ({}, {"weights": lambda x: x["weights"][:1]}, r"weights\[0\] must have shape"),
        ({}, {"weights": lambda x: x["weights"][::-1]}, r"weights\[0\] must have shape"),
        ({}, {"norm": lambda x: (x["norm"][0], x["norm"][1][:1])}, "beta must have shape"),
        ({"channels": "key"}, {}, "for a linear memory"),
        ({"algorithm": "implicit"}, {}, "needs a linear memory"),
        ({}, {"state": lambda x: State(a0=x["weights"][0])}, "the state has no a1"),
        (
            {},
            {"state": lambda x: State(a0=x["weights"][0], a1=x["weights"][1])},
            "state a0 must have shape",
        ),
        ({}, {"cu_seqlens": lambda x: torch.tensor([0, 7])}, "the batch must be 1"),
    ],
)
def test_inputs_that_do_not_fit(settings, change, message):
    rule = Rule(**settings)
    x = draw(rule)
    with pytest.raises(ValueError, match=message):
        memory(**{**x, **{k: f(x) for k, f in change.items()}}, rule=rule)


def test_deep_memories_have_no_channels():
    x = draw(Rule(), hidden=(5, 6), channels=True)
    with pytest.raises(ValueError, match="channel-wise eta needs a memory of one matrix"):
        memory(**x)
    x = draw(Rule(), hidden=(5, 6))
    y, _ = memory(**x)
    assert_close(y, memory(**x, backend="reference")[0], "float64")
    with pytest.raises(ValueError, match="needs a state, or the weights"):
        memory_read(x["q"])
    with pytest.raises(TypeError, match="v must be floating point"):
        memory(**{**x, "v": x["v"].long()})
