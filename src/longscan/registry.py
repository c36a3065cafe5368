"""Every mixer by name: the one table a new mixer adds a line to."""

from __future__ import annotations

import difflib
import importlib
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from longscan.mixers.base import Mixer


@dataclass(frozen=True)
class Entry:
    """What is known of a mixer.

    target: the class, or "module:Class", imported on first use.
    taxonomy: its place among the families (Mamba-360, arXiv 2404.16112, extended).
    affine: whether a stretch of tokens is an affine map on its state (see `longscan.algebra`).
    train, decode: cost of a whole sequence of length T, and of one token at position T.
    mlp: True if the paper's block adds an MLP after the mixer, False if the mixer is the block.
    """

    name: str
    target: type[Mixer] | str
    title: str
    arxiv: str
    year: int
    taxonomy: str
    affine: bool = True
    train: str = "O(T)"
    decode: str = "O(1)"
    mlp: bool = True


_entries: dict[str, Entry] = {}
_plugins_loaded = False


def register(entry: Entry) -> None:
    """Add a mixer. Packages may also announce entries under the group "longscan.mixers".

    Raises: ValueError if the name is taken by another mixer.
    """
    known = _entries.get(entry.name)
    if known is not None and known.target != entry.target:
        raise ValueError(f"the mixer name {entry.name!r} is taken by {known.target}")
    _entries[entry.name] = entry


def _load_plugins() -> None:
    global _plugins_loaded
    if not _plugins_loaded:
        _plugins_loaded = True
        for point in metadata.entry_points(group="longscan.mixers"):
            register(point.load())


def names() -> list[str]:
    """All mixer names, in the order they were registered."""
    _load_plugins()
    return list(_entries)


def entry(name: str) -> Entry:
    """The entry called `name`.

    Raises: ValueError naming the nearest known mixers.
    """
    _load_plugins()
    if name not in _entries:
        near = difflib.get_close_matches(name, _entries, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(_entries)}"
        raise ValueError(f"unknown mixer {name!r}; {hint}")
    return _entries[name]


def mixer_class(name: str) -> type[Mixer]:
    """The class of the mixer called `name`."""
    target = entry(name).target
    if isinstance(target, str):
        module, _, attribute = target.partition(":")
        target = getattr(importlib.import_module(module), attribute)
    return target


for _entry in (
    Entry("linear_attention", "longscan.mixers.linear_attention:LinearAttention",
          "Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention",
          "2006.16236", 2020, "linear attention, no gate"),
    Entry("retention", "longscan.mixers.retention:Retention",
          "Retentive Network: A Successor to Transformer for Large Language Models",
          "2307.08621", 2023, "linear attention, fixed scalar decay"),
    Entry("gla", "longscan.mixers.gla:GatedLinearAttention",
          "Gated Linear Attention Transformers with Hardware-Efficient Training",
          "2312.06635", 2023, "linear attention, gate per key channel"),
    Entry("lssl", "longscan.mixers.lssl:LSSL",
          "Combining Recurrent, Convolutional, and Continuous-time Models with Linear State-Space "
          "Layers",
          "2110.13985", 2021, "state space, time-invariant, dense", mlp=False),
    Entry("s4", "longscan.mixers.s4:S4",
          "Efficiently Modeling Long Sequences with Structured State Spaces",
          "2111.00396", 2021, "state space, time-invariant, diagonal plus low rank", mlp=False),
    Entry("s4d", "longscan.mixers.s4d:S4D",
          "On the Parameterization and Initialization of Diagonal State Space Models",
          "2206.11893", 2022, "state space, time-invariant, diagonal", mlp=False),
    Entry("mamba", "longscan.mixers.mamba:Mamba",
          "Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
          "2312.00752", 2023, "selective state space, diagonal", mlp=False),
    Entry("mamba2", "longscan.mixers.mamba2:Mamba2",
          "Transformers are SSMs: Generalized Models and Efficient Algorithms Through "
          "Structured State Space Duality",
          "2405.21060", 2024, "selective state space, scalar per head", mlp=False),
    Entry("deltanet", "longscan.mixers.deltanet:DeltaNet",
          "Parallelizing Linear Transformers with the Delta Rule over Sequence Length",
          "2406.06484", 2024, "delta rule, no gate"),
    Entry("gated_deltanet", "longscan.mixers.gated_deltanet:GatedDeltaNet",
          "Gated Delta Networks: Improving Mamba2 with Delta Rule",
          "2412.06464", 2024, "delta rule, scalar gate"),
    Entry("kda", "longscan.mixers.kda:KimiDeltaAttention",
          "Kimi Linear: An Expressive, Efficient Attention Architecture",
          "2510.26692", 2025, "delta rule, gate per key channel"),
    Entry("deltaproduct", "longscan.mixers.deltaproduct:DeltaProduct",
          "DeltaProduct: Improving State-Tracking in Linear RNNs via Householder Products",
          "2502.10297", 2025, "delta rule, several steps per token"),
    Entry("mamba3", "longscan.mixers.mamba3:Mamba3",
          "Mamba-3: Improved Sequence Modeling using State Space Principles",
          "2603.15569", 2026, "selective state space, scalar and rotation per head"),
    Entry("mlstm", "longscan.mixers.mlstm:MLSTM",
          "xLSTM: Extended Long Short-Term Memory",
          "2405.04517", 2024, "exponential gates, matrix memory", mlp=False),
    Entry("mlstm_large", "longscan.mixers.mlstm_large:MLSTMLarge",
          "xLSTM 7B: A Recurrent LLM for Fast and Efficient Inference",
          "2503.13427", 2025, "exponential gates, matrix memory"),
    Entry("slstm", "longscan.mixers.slstm:SLSTM",
          "xLSTM: Extended Long Short-Term Memory",
          "2405.04517", 2024, "exponential gates, memory mixing", affine=False),
    Entry("rwkv4", "longscan.mixers.rwkv4:RWKV4",
          "RWKV: Reinventing RNNs for the Transformer Era",
          "2305.13048", 2023, "linear attention, fixed decay per channel", mlp=False),
    Entry("rwkv5", "longscan.mixers.rwkv5:RWKV5",
          "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence",
          "2404.05892", 2024, "linear attention, fixed decay per key channel", mlp=False),
    Entry("rwkv7", "longscan.mixers.rwkv7:RWKV7",
          "RWKV-7 \"Goose\" with Expressive Dynamic State Evolution",
          "2503.14456", 2025, "delta rule, gate and erase strength per key channel", mlp=False),
    Entry("rwkv_channel_mix", "longscan.mixers.rwkv_channel_mix:RWKVChannelMix",
          "RWKV: Reinventing RNNs for the Transformer Era",
          "2305.13048", 2023, "token shift and MLP", mlp=False),
    Entry("titans", "longscan.mixers.memories:Titans",
          "Titans: Learning to Memorize at Test Time",
          "2501.00663", 2024, "test-time memory, MLP, momentum", affine=False),
    Entry("moneta", "longscan.mixers.memories:Moneta",
          "It's All Connected: A Journey Through Test-Time Memorization, Attentional Bias, "
          "Retention, and Online Optimization",
          "2504.13173", 2025, "test-time memory, MLP, l_p loss, l_q retention", affine=False),
    Entry("yaad", "longscan.mixers.memories:Yaad",
          "It's All Connected: A Journey Through Test-Time Memorization, Attentional Bias, "
          "Retention, and Online Optimization",
          "2504.13173", 2025, "test-time memory, MLP, Huber loss", affine=False),
    Entry("memora", "longscan.mixers.memories:Memora",
          "It's All Connected: A Journey Through Test-Time Memorization, Attentional Bias, "
          "Retention, and Online Optimization",
          "2504.13173", 2025, "test-time memory, MLP, KL retention", affine=False),
    Entry("ttt", "longscan.mixers.memories:TTT",
          "Learning to (Learn at Test Time): RNNs with Expressive Hidden States",
          "2407.04620", 2024, "test-time memory, linear or MLP", affine=False),
    Entry("titans_mac", "longscan.mixers.titans_mac:TitansMAC",
          "Titans: Learning to Memorize at Test Time",
          "2501.00663", 2024, "test-time memory as context of attention in segments",
          affine=False, train="O(T segment)", decode="O(segment)"),
    Entry("titans_mag", "longscan.mixers.titans_mag:TitansMAG",
          "Titans: Learning to Memorize at Test Time",
          "2501.00663", 2024, "test-time memory gating attention in a window",
          affine=False, train="O(T window)", decode="O(window)"),
    Entry("titans_mal", "longscan.mixers.titans_mag:TitansMAL",
          "Titans: Learning to Memorize at Test Time",
          "2501.00663", 2024, "test-time memory, then attention in a window",
          affine=False, train="O(T window)", decode="O(window)"),
    Entry("gam", "longscan.mixers.gam:GAM",
          "Gated Associative Memory: A Parallel O(N) Architecture for Efficient Sequence Modeling",
          "2509.00605", 2025, "convolution and a learned bank of slots"),
    Entry("gam_written", "longscan.mixers.gam:WrittenGAM",
          "Gated Slot Attention for Efficient Linear-Time Sequence Modeling",
          "2409.07146", 2024, "convolution and a bank of slots written by the sequence"),
    Entry("wersa", "longscan.mixers.wersa:WERSA",
          "Scaling Attention to Very Long Sequences in Linear Time with Wavelet-Enhanced Random "
          "Spectral Attention",
          "2507.08637", 2025, "linear attention behind a wavelet filter bank"),
    Entry("mega", "longscan.mixers.mega:Mega",
          "Mega: Moving Average Equipped Gated Attention",
          "2209.10655", 2022, "moving average and softmax attention", affine=False,
          train="O(T^2)", decode="O(T)"),
    Entry("transformer_vq", "longscan.mixers.transformer_vq:TransformerVQ",
          "Transformer-VQ: Linear-Time Transformers via Vector Quantization",
          "2309.16354", 2023, "softmax attention, quantised keys", affine=False, mlp=False,
          decode="O(window + codes)"),
    Entry("longvq", "longscan.mixers.longvq:LongVQ",
          "LongVQ: Long Sequence Modeling with Vector Quantization on Structured Memory",
          "2404.11163", 2024, "moving average and softmax attention, quantised keys",
          affine=False, decode="O(window + codes)"),
    Entry("attention", "longscan.mixers.attention:Attention",
          "Attention Is All You Need",
          "1706.03762", 2017, "softmax attention", affine=False, train="O(T^2)", decode="O(T)"),
    Entry("sliding_attention", "longscan.mixers.attention:SlidingAttention",
          "Longformer: The Long-Document Transformer",
          "2004.05150", 2020, "softmax attention, window", affine=False, train="O(T window)",
          decode="O(window)"),
    Entry("gated_attention", "longscan.mixers.gated_attention:GatedAttention",
          "Gated Attention for Large Language Models: Non-linearity, Sparsity, and "
          "Attention-Sink-Free",
          "2505.06708", 2025, "softmax attention, gated output", affine=False, train="O(T^2)",
          decode="O(T)"),
):  # fmt: skip
    register(_entry)
