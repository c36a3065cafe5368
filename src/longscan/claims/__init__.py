"""Claims of papers, each with a small experiment that anyone can run: `longscan claims NAME`.

A claim is a line of CLAIMS and two functions:

    def experiment(job: Job) -> Iterator[Row]     # job.measure(...) for every case and seed
    def holds(rows: list[Row]) -> tuple[bool, str]

`longscan.claims.training` has Job, `longscan.claims.results` has Row.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass


@dataclass(frozen=True)
class Claim:
    """A published claim and where its experiment is.

    target: "module:function", the experiment. check: "module:function", whether its rows agree.
    title: the claim in one sentence. source: paper, arXiv id, table or figure.
    mixers: whose pages show it. minutes: about how long it takes on 2 CPU cores with `seeds` seeds.
    data: what --data must hold, "" if nothing is needed. gpu: what --device cuda does instead.
    """

    name: str
    target: str
    check: str
    title: str
    source: str
    mixers: tuple[str, ...]
    minutes: float
    data: str = ""
    seeds: int = 3
    gpu: str = ""


_all = (
    Claim(
        "mqar",
        "longscan.claims.recall:mqar",
        "longscan.claims.recall:mqar_holds",
        "With more key-value pairs than key channels, the delta rule recalls where additive "
        "linear attention does not.",
        "Parallelizing Linear Transformers with the Delta Rule, arXiv 2406.06484, figure 2",
        ("deltanet", "linear_attention", "gla"),
        minutes=5,
        seeds=1,
        gpu="64 pairs in 256 tokens",
    ),
    Claim(
        "induction",
        "longscan.claims.recall:induction",
        "longscan.claims.recall:induction_holds",
        "Mamba learns induction heads and goes on solving them beyond the trained length (here: "
        "to 4 times), where attention and time-invariant state spaces fail.",
        "Mamba, arXiv 2312.00752, table 2 and table 11",
        ("mamba", "attention", "s4d"),
        minutes=3,
        seeds=2,
        gpu="trained at 256 tokens",
    ),
    Claim(
        "selective_copying",
        "longscan.claims.copying:selective_copying",
        "longscan.claims.copying:selective_copying_holds",
        "Selecting what to keep by content solves selective copying, where time-invariant models "
        "of the same budget fail.",
        "Mamba, arXiv 2312.00752, table 1",
        ("mamba", "s4d", "retention"),
        minutes=1.6,
        seeds=1,
        gpu="8 tokens among 128",
    ),
    Claim(
        "parity",
        "longscan.claims.tracking:parity",
        "longscan.claims.tracking:parity_holds",
        "With eigenvalues in [-1, 1] one layer of the delta rule learns parity and extrapolates; "
        "with eigenvalues in [0, 1] it cannot.",
        "Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues, arXiv 2411.12537, "
        "table 1",
        ("deltanet", "gated_deltanet"),
        minutes=2.6,
        seeds=2,
        gpu="64 tokens, wider",
    ),
    Claim(
        "parity_rotations",
        "longscan.claims.tracking:parity_rotations",
        "longscan.claims.tracking:parity_holds",
        "Mamba-3, whose state turns, learns parity and extrapolates; Mamba-2 cannot.",
        "Mamba-3, arXiv 2603.15569, state tracking table",
        ("mamba3", "mamba2"),
        minutes=2.3,
        seeds=3,
        gpu="64 tokens, wider",
    ),
    Claim(
        "parity_memory",
        "longscan.claims.tracking:parity_memory",
        "longscan.claims.tracking:parity_holds",
        "sLSTM, whose heads mix their memories, learns parity and extrapolates; mLSTM cannot.",
        "xLSTM: Extended Long Short-Term Memory, arXiv 2405.04517, figure 4",
        ("slstm", "mlstm"),
        minutes=1.7,
        seeds=3,
        gpu="64 tokens, wider",
    ),
    Claim(
        "s3",
        "longscan.claims.tracking:s3",
        "longscan.claims.tracking:solved",
        "Two Householder steps a token with eigenvalues in [-1, 1] track the permutations of "
        "three things in one layer; one step, or eigenvalues in [0, 1], do not.",
        "DeltaProduct, arXiv 2502.10297, figure 4",
        ("deltaproduct",),
        minutes=2.5,
        seeds=2,
        gpu="128 tokens",
    ),
    Claim(
        "s5",
        "longscan.claims.tracking:s5",
        "longscan.claims.tracking:solved",
        "In one layer n Householder steps a token track permutations of five things that move at "
        "most n + 1 of them (two steps for three, four for all); fewer steps do not.",
        "DeltaProduct, arXiv 2502.10297, figure 4",
        ("deltaproduct",),
        minutes=2.4,
        seeds=2,
        gpu="all 120 permutations, four steps against two",
    ),
    Claim(
        "attention_sink",
        "longscan.claims.sinks:attention_sink",
        "longscan.claims.sinks:attention_sink_holds",
        "A sigmoid gate on the output of attention keeps the first token from becoming a sink, "
        "and does not cost any loss.",
        "Gated Attention for Large Language Models, arXiv 2505.06708, table 4",
        ("attention", "gated_attention"),
        minutes=1,
        seeds=1,
        gpu="6 layers of 384, 512 tokens",
    ),
    Claim(
        "memories",
        "longscan.claims.memory:memories",
        "longscan.claims.memory:memories_hold",
        "A matrix memory of any kind recalls key-value pairs as attention does; a vector, a window "
        "or a token shift does not.",
        "Zoology, arXiv 2312.04927, figure 2; Kimi Linear, arXiv 2510.26692; RWKV-7, arXiv "
        "2503.14456",
        ("attention", "kda", "rwkv7", "rwkv5", "mlstm_large", "rwkv4", "sliding_attention",
         "rwkv_channel_mix"),
        minutes=1.8,
        seeds=1,
    ),
    Claim(
        "timescale",
        "longscan.claims.signals:timescale",
        "longscan.claims.signals:timescale_holds",
        "A HiPPO basis with a window (LegT, FouT) remembers the last 2 / dt tokens sharply and "
        "nothing before them; LegS fades smoothly over about 1 / dt.",
        "How to Train Your HiPPO, arXiv 2206.12037, sections 3 and 4",
        ("s4",),
        minutes=0.2,
    ),
    Claim(
        "delay",
        "longscan.claims.signals:delay",
        "longscan.claims.signals:delay_holds",
        "S4 with a windowed basis learns to delay its input by almost the window; with LegS it "
        "stays blurred.",
        "How to Train Your HiPPO, arXiv 2206.12037, section 5",
        ("s4",),
        minutes=2,
        seeds=2,
    ),
    Claim(
        "resampling",
        "longscan.claims.signals:resampling",
        "longscan.claims.signals:resampling_holds",
        "A time-invariant state space trained at one sampling rate works at half of it when dt is "
        "doubled, and not otherwise.",
        "LSSL, arXiv 2110.13985, Speech Commands; How to Train Your HiPPO, arXiv 2206.12037; both "
        "on speech",
        ("lssl", "s4", "s4d"),
        minutes=2.7,
    ),
    Claim(
        "smnist",
        "longscan.claims.images:smnist",
        "longscan.claims.images:smnist_holds",
        "State spaces read digits pixel by pixel better than softmax attention trained alike.",
        "LSSL, arXiv 2110.13985, sequential MNIST",
        ("s4d", "lssl", "mlstm", "attention"),
        minutes=2.6,
        data="mnist",
        seeds=1,
        gpu="all 784 pixels, 4 layers of 128",
    ),
    Claim(
        "spoken_digits",
        "longscan.claims.images:spoken_digits",
        "longscan.claims.images:spoken_digits_holds",
        "S4 recognises words from raw audio samples, and at half the sampling rate of training "
        "without any further training.",
        "How to Train Your HiPPO, arXiv 2206.12037, Speech Commands; S4D, arXiv 2206.11893",
        ("s4", "s4d"),
        minutes=3,
        data="spoken_digits",
        seeds=1,
        gpu="8 kHz, 4 layers of 128",
    ),
    Claim(
        "outliers",
        "longscan.claims.outliers:outliers",
        "longscan.claims.outliers:outliers_hold",
        "A memory that minimises the Huber loss of Yaad keeps recalling when a tenth of the values "
        "are outliers; with the l2 loss it learns nothing.",
        "Miras, arXiv 2504.13173, section 5.2",
        ("ttt", "yaad", "moneta"),
        minutes=0.2,
    ),
    Claim(
        "test_time_recall",
        "longscan.claims.needles:test_time_recall",
        "longscan.claims.needles:test_time_recall_holds",
        "Memories that learn at test time solve multi-query associative recall at the parameters "
        "of Gated DeltaNet.",
        "Miras, arXiv 2504.13173, section 6 (needle tasks); Titans, arXiv 2501.00663",
        ("gated_deltanet", "titans", "moneta", "yaad", "memora"),
        minutes=8,
        seeds=1,
        gpu="32 pairs in 256 tokens, vocabulary 8192",
    ),
    Claim(
        "needles",
        "longscan.claims.needles:needles",
        "longscan.claims.needles:needles_hold",
        "Beyond the trained length Titans, Moneta, Yaad and Memora find needles in noise better "
        "than Gated DeltaNet.",
        "Miras, arXiv 2504.13173, table of S-NIAH (93.5, 92.9, 92.1 against 75.8)",
        ("gated_deltanet", "titans", "moneta", "yaad", "memora"),
        minutes=8,
        seeds=1,
        gpu="256 tokens, tested to 4096",
    ),
    Claim(
        "staleness",
        "longscan.claims.language:staleness",
        "longscan.claims.language:staleness_holds",
        "A memory trained with gradients that are up to 16 tokens old can be read out exactly, "
        "token by token.",
        "Learning to (Learn at Test Time), arXiv 2407.04620, section 2.4; Miras, arXiv 2504.13173, "
        "section 5.4",
        ("titans", "moneta", "yaad", "memora", "ttt"),
        minutes=5,
        seeds=1,
        gpu="width 128",
    ),
    Claim(
        "language",
        "longscan.claims.language:language",
        "longscan.claims.language:language_holds",
        "At equal parameters Titans, Moneta, Yaad and Memora model text better than Gated DeltaNet "
        "and GLA; the other architectures stand beside them.",
        "Miras, arXiv 2504.13173, table 2; Titans, arXiv 2501.00663, table 1",
        ("gated_deltanet", "gla", "titans", "moneta", "yaad", "memora", "ttt", "titans_mac",
         "titans_mag", "titans_mal", "gam", "gam_written", "wersa", "mega", "transformer_vq",
         "longvq"),
        minutes=20,
        gpu="width 128",
    ),
    Claim(
        "gam_reach",
        "longscan.claims.slots:gam_reach",
        "longscan.claims.slots:gam_reach_holds",
        "A bank that is read token by token carries nothing from one token to another: GAM sees "
        "1 + L (k - 1) tokens; a bank that the sequence writes keeps one from any distance.",
        "ours, of GAM, arXiv 2509.00605, which speaks of global context",
        ("gam", "gam_written", "gla"),
        minutes=2,
        seeds=1,
    ),
    Claim(
        "wersa_kernel",
        "longscan.claims.spectral:wersa_kernel",
        "longscan.claims.spectral:wersa_kernel_holds",
        "The random features of WERSA, with a matrix for queries and one for keys, approximate a "
        "kernel of the angle between them.",
        "WERSA, arXiv 2507.08637, section 3",
        ("wersa",),
        minutes=0.1,
    ),
    Claim(
        "reviews",
        "longscan.claims.spectral:reviews",
        "longscan.claims.spectral:reviews_hold",
        "WERSA classifies long documents as well as softmax attention, at a cost that grows "
        "linearly with their length.",
        "WERSA, arXiv 2507.08637, ArXiv classification",
        ("wersa", "attention"),
        minutes=4,
        data="movie_reviews",
        seeds=1,
        gpu="4096 bytes, width 128, costs to 32768",
    ),
    Claim(
        "longvq_cost",
        "longscan.claims.quantised:longvq_cost",
        "longscan.claims.quantised:longvq_cost_holds",
        "Softmax attention over quantised keys is computed exactly in linear time.",
        "LongVQ, arXiv 2404.11163; Transformer-VQ, arXiv 2309.16354, section 3",
        ("longvq", "attention"),
        minutes=1,
        seeds=1,
        gpu="width 256, to 65536 tokens",
    ),
)  # fmt: skip

CLAIMS: dict[str, Claim] = {claim.name: claim for claim in _all}


def claim(name: str) -> Claim:
    """The claim called `name`.

    Raises: ValueError naming the nearest.
    """
    if name not in CLAIMS:
        near = difflib.get_close_matches(name, CLAIMS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else f"claims: {', '.join(CLAIMS)}"
        raise ValueError(f"unknown claim {name!r}; {hint}")
    return CLAIMS[name]
