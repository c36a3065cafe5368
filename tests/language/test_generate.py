"""Generation: one function of (model, prompt, seed), however it is fed and cut."""

import itertools

import ema  # noqa: F401  (registers the mixer)
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longscan.language.generate import decoded, generate, generate_ids, prefill, until_stop
from longscan.language.sampling import Sampling
from longscan.language.tokenizer import ByteTokenizer
from longscan.models import LanguageModel, LanguageModelConfig

PATTERNS = ["ema", "gated_deltanet,mamba2", "ema,attention"]
BYTES = ByteTokenizer()


def make(pattern="gated_deltanet", dtype=torch.float64, vocab_size=257, **settings):
    torch.manual_seed(0)
    settings = {"d_model": 16, "n_layers": 2, **settings}
    if "mamba2" in pattern:
        settings["mixers"] = {"mamba2": {"d_state": 8, "d_head": 8}}
    model = LanguageModel(LanguageModelConfig(vocab_size, pattern=pattern, **settings))
    with torch.no_grad():
        model.embedding.weight.mul_(30)  # sharp logits, so that tokens depend on what was read
    return model.to(dtype)


def text(model, prompt="ab", **options):
    options = {"max_new_tokens": 20, "seed": 3, **options}
    return "".join(generate(model, BYTES, prompt, **options))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_prefill_in_segments_of_prompts_of_any_length(pattern):
    model = make(pattern)
    rows = [[5], list(range(50)), [7, 8, 9], list(range(100, 131))]
    whole = [model(torch.tensor([r])) for r in rows]
    for segment in (1, 7, 40, 4096):
        logits, state = prefill(model, rows, segment=segment)
        assert state.batch_size == 4
        for i, (want, s) in enumerate(whole):
            torch.testing.assert_close(logits[i], want[0, -1])
            nxt = torch.tensor([[3]])
            torch.testing.assert_close(model(nxt, state.select(i).clone())[0], model(nxt, s)[0])
    _, state = prefill(model, [r[:1] for r in rows])
    more = [r[1:] or [1] for r in rows]
    again, _ = prefill(model, more, state, segment=8)
    torch.testing.assert_close(again[1], whole[1][0][0, -1])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_greedy_is_the_argmax_of_the_whole_text_each_time(pattern):
    model = make(pattern)
    got = [t for (t,) in generate_ids(model, [[1, 2]], max_new_tokens=12, sampling=Sampling(0))]
    assert len(got) == 12
    ids = [1, 2]
    for token in got:
        assert token == model(torch.tensor([ids]))[0][0, -1].argmax().item()
        ids.append(token)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_prompt_gives_the_same_beside_others(pattern):
    model = make(pattern)
    prompts = [[1, 2, 3], [4] * 30, [5, 6]]
    options = {"max_new_tokens": 15, "seed": 7, "eod": None}
    together = list(generate_ids(model, prompts, **options))
    padded = list(generate_ids(model, [[9, 9], prompts[1], [8] * 70], segment=5, **options))
    assert [step[1] for step in together] == [step[1] for step in padded]
    assert [step[0] for step in together] == [
        t for (t,) in generate_ids(model, prompts[:1], **options)
    ]


def test_a_finished_prompt_gives_none_and_the_others_go_on():
    model = make()
    options = {"max_new_tokens": 40, "seed": 1}
    prompts = [[1], [2, 3], [4]]
    free = list(generate_ids(model, prompts, **options))
    eod = free[6][1]  # whatever prompt 1 says in step 6 shall end it
    columns = list(zip(*free, strict=True))
    stream = generate_ids(model, prompts, eod=eod, **options)
    steps = list(stream)
    for got, want in zip(zip(*steps, strict=True), columns, strict=True):
        end = want.index(eod) if eod in want else len(want)
        assert list(got[: end + 1]) == list(want[: end + 1])
        assert set(got[end + 1 :]) <= {None}
    assert columns[1].index(eod) <= 6
    assert len(stream.rows) == sum(eod not in c for c in columns)


def test_state_takes_constant_memory_with_linear_mixers():
    model = make("gated_deltanet,mamba2")
    stream = generate_ids(model, [[1, 2, 3]], max_new_tokens=60)
    sizes = []
    for _ in stream:
        sizes.append(stream.state.nbytes)
    assert len(sizes) == 60
    assert len(set(sizes)) == 1
    growing = generate_ids(make("attention"), [[1, 2, 3]], max_new_tokens=9)
    assert len({growing.state.nbytes for _ in growing}) == 9


def test_a_long_prompt_needs_no_more_memory_than_a_segment():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.numel = max(self.numel, out.numel())
            return out

    model = make(dtype=torch.float32)

    def largest(n, **options):
        with Largest() as seen:
            prefill(model, [[65] * n], **options)
        return seen.numel

    assert largest(600, segment=64) == largest(64)
    assert largest(600) > 4 * largest(64)


def test_same_seed_same_text_and_the_global_generator_is_left_alone():
    model = make()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b, c = text(model), text(model), text(model, seed=4)
    assert a == b != c
    assert torch.equal(torch.get_rng_state(), before)
    assert len({text(model, seed=None) for _ in range(4)}) > 1
    assert text(model, temperature=0, seed=1) == text(model, temperature=0, seed=2)


def test_repetition_penalty_counts_prompt_and_output():
    model = make()
    ids = [
        t
        for (t,) in generate_ids(
            model,
            [[1, 2, 3]],
            max_new_tokens=30,
            sampling=Sampling(temperature=0, repetition_penalty=1e9),
        )
    ]
    assert len(set(ids) | {1, 2, 3}) == 33  # never twice, nor anything of the prompt
    plain = [
        t for (t,) in generate_ids(model, [[1, 2, 3]], max_new_tokens=30, sampling=Sampling(0))
    ]
    assert len(set(plain)) < 30


def test_options_reach_the_sampler():
    model = make()
    greedy = text(model, temperature=0)
    assert text(model, top_k=1) == text(model, top_p=1e-9) == text(model, min_p=1.0) == greedy
    assert text(model, temperature=50.0) != greedy
    assert text(model, top_k=0, top_p=1.0, min_p=0.0) == text(model)


def test_text_ends_at_the_end_of_the_document_and_at_the_limit():
    model = make()
    assert list(generate(model, BYTES, "x", max_new_tokens=0)) == []
    with torch.no_grad():
        model.embedding.weight.zero_()
        model.embedding.weight[256] = 1.0  # the head now sees one direction
        model.embedding.weight[97] = -1.0
    logits, _ = prefill(model, [[256]])
    sign = torch.sign(logits[0, 256])
    with torch.no_grad():
        model.norm.weight.mul_(sign)
    assert text(model, temperature=0, prompt="") == ""
    with torch.no_grad():
        model.norm.weight.mul_(-1)
    assert text(model, temperature=0, prompt="", max_new_tokens=1) == "a"


def test_training_mode_is_put_back():
    model = make().train()
    modes = set()
    model.blocks[0].register_forward_hook(lambda m, *_: modes.add(m.training))
    text(model)
    assert modes == {False}
    assert model.training
    assert model.blocks[0].training


def test_training_works_after_generation():
    model = make("gated_deltanet,mamba2")
    text(model)
    ids = torch.arange(12)[None]
    loss, _ = model.loss(ids, ids, cu_seqlens=torch.tensor([0, 5, 12]))
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


# --- text -----------------------------------------------------------------------------------


@given(st.text(max_size=20))
def test_characters_come_whole_and_unchanged(s):
    pieces = list(decoded(s.encode("utf-8", "replace"), BYTES))
    assert "".join(pieces).encode("utf-8", "replace") == s.encode("utf-8", "replace")
    assert all(pieces)


def test_a_character_comes_with_its_last_byte():
    assert list(decoded("aé🙂".encode(), BYTES)) == ["a", "é", "🙂"]
    assert "".join(decoded(b"a\xffb\xf0\x9f", BYTES)) == "a\ufffdb\ufffd"


@given(
    st.text("ab", max_size=30),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.data(),
)
def test_stop_texts_end_the_text_and_are_never_begun(s, stops, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(s)), max_size=8)))
    read = 0

    def pieces():
        nonlocal read
        for a, b in itertools.pairwise([0, *cuts, len(s)]):
            read = b
            yield s[a:b]

    ends = [e for e in range(len(s) + 1) for stop in stops if s[:e].endswith(stop)]
    want = s
    if ends:
        longest = max(len(stop) for stop in stops if s[: ends[0]].endswith(stop))
        want = s[: ends[0] - longest]
    shown = ""
    for piece in until_stop(pieces(), stops):
        shown += piece
        begun = [n for stop in stops for n in range(len(stop)) if s[:read].endswith(stop[:n])]
        over = read == len(s) or any(stop in s[:read] for stop in stops)
        assert over or len(shown) <= read - max(begun, default=0)
    assert shown == want


def test_stop_in_generation():
    model = make()
    whole = text(model, max_new_tokens=30)
    stop = whole[10:13]
    cut = text(model, max_new_tokens=30, stop=stop)
    assert cut == whole[: whole.find(stop)]
    assert text(model, max_new_tokens=30, stop=["no such text", stop]) == cut


def test_pieces_are_not_held_back_without_need():
    it = until_stop(iter(["abc", "de", "x"]), ["ey"])
    assert next(it) == "abc"
    assert next(it) == "d"
    assert next(it) == "ex"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -1}, "temperature"),
        ({"stop": ["a", ""]}, "stop"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"segment": 0}, "segment"),
    ],
)
def test_bad_options_at_once(options, words):
    with pytest.raises(ValueError, match=words):
        generate(make(), BYTES, "x", **{"max_new_tokens": 3, **options})


def test_bad_prompts():
    for prompts in ([], [[1], []]):
        with pytest.raises(ValueError, match="at least one token"):
            generate_ids(make(), prompts, max_new_tokens=3)
    with pytest.raises(ValueError, match="vocab_size"):
        generate_ids(make(vocab_size=20), [[30]], max_new_tokens=3)
