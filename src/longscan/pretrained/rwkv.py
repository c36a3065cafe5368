"""RWKV-4, 5 and 7 language models, from one file of the authors' names.

Two layouts are told apart by the tensors' shapes: that of the authors' .pth files, and that of
rwkv.cpp (MIT), which stores decays already exponentiated and small matrices transposed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from longscan.models.checkpoint import CheckpointError
from longscan.models.config import LanguageModelConfig
from longscan.pretrained._convert import Table, convert

_ATT = {
    "r_proj.weight": "receptance.weight",
    "k_proj.weight": "key.weight",
    "v_proj.weight": "value.weight",
    "out_proj.weight": "output.weight",
}
_NORM = {"norm.weight": "ln_x.weight", "norm.bias": "ln_x.bias"}
_MIX = "time_mix_r time_mix_k time_mix_v"
_FIRST = {"time_decay": "time_decay", "u": "time_first|time_faaaa"}
_SMALL = {name: name for name in ("w0", "a0", "k_k", "k_a", "r_k")}
_LORA = {f"{p}_{n}.weight": f"{p}{i}" for p in "wag" for i, n in ((1, "down"), (2, "up"))}
_VALUE = {"v0": "v0", "v_down.weight": "v1", "v_up.weight": "v2"}

ATT: dict[int, Table] = {
    4: {**_ATT, **_FIRST, "mu": _MIX},
    5: {**_ATT, **_FIRST, **_NORM, "mu": _MIX + " time_mix_g?", "g_proj.weight": "gate.weight?"},
    7: {**_ATT, **_LORA, **_NORM, **_SMALL, "mu": "x_rwkvag"},
}
"""Our parameters of a time mix -> the authors', for each version."""

FFN: dict[bool, Table] = {
    True: {
        "k_proj.weight": "key.weight",
        "r_proj.weight": "receptance.weight",
        "out_proj.weight": "value.weight",
        "mu": "time_mix_k time_mix_r",
    },
    False: {"k_proj.weight": "key.weight", "out_proj.weight": "value.weight", "mu": "x_k"},
}
"""Our parameters of a channel mix -> the authors'; gated or not."""


def is_rwkv(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are the parameters of an RWKV language model."""
    return "blocks.0.att.receptance.weight" in tensors


def _version(tensors: Mapping[str, Tensor]) -> int:
    def has(name: str) -> bool:
        return f"blocks.0.att.{name}" in tensors

    if has("r_k"):
        return 7
    if not has("time_mix_k"):
        raise CheckpointError("this is an RWKV of a version that is not supported; 4, 5 and 7 are")
    return 5 if has("ln_x.weight") else 4


def _layers(tensors: Mapping[str, Tensor]) -> int:
    found = (re.match(r"blocks\.(\d+)\.", name) for name in tensors)
    return 1 + max(int(m[1]) for m in found if m)


def rwkv_config(tensors: Mapping[str, Tensor]) -> LanguageModelConfig:
    """Version and sizes of an RWKV model, from its tensors.

    Raises: CheckpointError for a version that is not supported.
    """
    version, layers = _version(tensors), _layers(tensors)

    def shape(name: str) -> torch.Size:
        if name not in tensors:
            raise CheckpointError(f"there is no tensor {name}")
        return tensors[name].shape

    def att(name: str) -> torch.Size:
        return shape(f"blocks.0.att.{name}")

    vocab, d_model = shape("emb.weight")
    own: dict[str, object] = {}
    if version == 5:
        decay = att("time_decay")
        own = {
            "d_head": d_model // decay[0],
            "decay_per_channel": decay[1:].numel() > 1,
            "output_gate": "blocks.0.att.gate.weight" in tensors,
        }
        if len(decay) == 3:  # rwkv.cpp does not scale what the norm reads
            own["norm_eps"] = 1e-5
    elif version == 7:
        # The bottlenecks' matrices are stored either way around.
        names = {"decay_rank": "w1", "a_rank": "a1", "gate_rank": "g1"}
        own = {key: min(att(name)) for key, name in names.items()}
        own["d_head"] = att("r_k")[1]
        if layers > 1:
            own |= {"value_residual": True, "value_rank": min(shape("blocks.1.att.v1"))}
    mix = {"d_ff": shape("blocks.0.ffn.key.weight")[0], "gated": version < 7}
    return LanguageModelConfig(
        vocab_size=vocab,
        d_model=d_model,
        n_layers=2 * layers,
        pattern=f"rwkv{version},rwkv_channel_mix",
        mixers={f"rwkv{version}": own, "rwkv_channel_mix": mix},
        norm="layer",
        embedding_norm=True,
        tie_embeddings=False,
        pad_vocab_multiple=1,
    )


def rwkv_state_dict(
    tensors: Mapping[str, Tensor], config: LanguageModelConfig
) -> dict[str, Tensor]:
    """Our state dict of a whole model.

    Raises: CheckpointError for missing or left-over tensors.
    """
    version, layers = _version(tensors), config.n_layers // 2
    table: dict[str, str] = {"embedding.weight": "emb.weight", "head.weight": "head.weight"}
    norms = {"embedding_norm": "blocks.0.ln0", "norm": "ln_out"}
    for i in range(layers):
        att = {**ATT[version], **(_VALUE if version == 7 and i > 0 else {})}
        for block, part, names in ((2 * i, "att", att), (2 * i + 1, "ffn", FFN[version < 7])):
            norms[f"blocks.{block}.norm"] = f"blocks.{i}.ln{1 + block % 2}"
            prefix = f"blocks.{i}.{part}."
            for ours, theirs in names.items():
                theirs = re.sub(r"[^ |]+", lambda m: prefix + m[0], theirs)  # noqa: B023
                table[f"blocks.{block}.mixer.{ours}"] = theirs
    for ours, theirs in norms.items():
        table |= {f"{ours}.{kind}": f"{theirs}.{kind}" for kind in ("weight", "bias")}
    return convert(_plain(tensors, version), table)


def _plain(tensors: Mapping[str, Tensor], version: int) -> dict[str, Tensor]:
    """The tensors as this library keeps them, still under the authors' names."""
    authors = _is_authors(tensors, version)
    change = _seven(authors) if version == 7 else _four_and_five(version, authors)
    out: dict[str, Tensor] = {}
    for name, t in tensors.items():
        leaf = name.rpartition(".")[2]
        # The first layer has no other's values to take, though some files have tensors for it.
        if re.fullmatch(r"__.*__|blocks\.0\.att\.v[012]", name):
            continue
        out[name] = change(leaf, t.double()).float() if t.is_floating_point() else t
    if version == 7 and authors:
        for i in range(_layers(tensors)):
            rows = [out.pop(f"blocks.{i}.att.x_{c}", None) for c in "rwkvag"]
            out[f"blocks.{i}.att.x_rwkvag"] = torch.cat([r for r in rows if r is not None])
    return out


def _is_authors(tensors: Mapping[str, Tensor], version: int) -> bool:
    """Whether the layout is that of the authors' files, not of rwkv.cpp."""
    if version == 7:
        return "blocks.0.att.x_rwkvag" not in tensors
    return tensors["blocks.0.att.time_mix_k"].ndim == 3


def _seven(authors: bool) -> Callable[[str, Tensor], Tensor]:
    def change(leaf: str, t: Tensor) -> Tensor:
        if leaf.startswith("x_"):
            return t.reshape(-1, t.shape[-1])
        if leaf in ("w0", "a0", "v0", "k_k", "k_a"):
            return t.flatten()
        return t.mT if authors and re.fullmatch("[wavg][12]", leaf) else t

    return change


def _four_and_five(version: int, authors: bool) -> Callable[[str, Tensor], Tensor]:
    def change(leaf: str, t: Tensor) -> Tensor:
        if leaf.startswith("time_mix_"):
            return 1 - t.reshape(1, -1)
        if leaf == "time_first" and version == 5 and authors:
            raise CheckpointError("RWKV-5.1 in the authors' layout is not supported; 5.2 is")
        if leaf == "time_decay" and not authors:
            # Stored as -exp(w) in RWKV-4, as exp(-exp(w)) in RWKV-5.
            t = torch.log(-t if version == 4 else -torch.log(t))
        return t.squeeze(-1).squeeze(-1) if leaf.startswith("time_") and version == 5 else t

    return change


__all__ = ["ATT", "FFN", "is_rwkv", "rwkv_config", "rwkv_state_dict"]
