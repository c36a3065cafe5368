"""The models that `longscan bench parallel` spreads over ranks."""

from __future__ import annotations

from dataclasses import dataclass

from longscan.bench.gpu_models import SIZES, SOFT
from longscan.bench.gpu_models import config as sized
from longscan.models import LanguageModelConfig

LINEAR = ("gla", "gated_deltanet", "mamba2")
CASES = ("gla", "gated_deltanet", "mamba2", "mamba", "mlstm", "gated_deltanet*3,attention")


def config(size: str, mixer: str, **changes: object) -> LanguageModelConfig:
    """The model of `bench gpu --models`, and of equal widths and blocks one with GLA."""
    if mixer != "gla":
        return sized(size, mixer).replace(**changes)
    d, head = SIZES[size]["d_model"], SIZES[size]["head"]
    # Keys d / 2 and values d wide, as the layer has them by default.
    heads = {"n_heads": d // (2 * head), "d_key": head, "d_value": 2 * head}
    return sized(size, SOFT).replace(pattern="gla", mixers={"gla": heads}, **changes)


def small(pattern: str, tiny: bool) -> LanguageModelConfig:
    """Of a case: heads that our kernels take, gates that remember what lies shards back."""
    d, head = (32, 8) if tiny else (256, 64)
    settings = {
        "gla": {"n_heads": 2, "d_key": head, "d_value": 2 * head, "gate_temperature": 256.0},
        "gated_deltanet": {"n_heads": 2, "d_key": head, "d_value": 2 * head},
        "mamba2": {"d_state": head, "d_head": head},
        "mamba": {},
        "mlstm": {"n_heads": 2 * d // (2 * head)},
        SOFT: {"n_heads": d // head},
    }
    names = {part.partition("*")[0] for part in pattern.split(",")}
    return LanguageModelConfig(
        97 if tiny else 512,
        d_model=d,
        n_layers=4 if "," in pattern else 2,
        pattern=pattern,
        mixers={n: settings[n] for n in names},
    )


@dataclass(frozen=True)
class Shape:
    """What a layer of a model hands from rank to rank, float32; transition: numbers of A a head."""

    heads: int
    d_key: int
    d_value: int
    transition: int

    @property
    def state(self) -> int:
        return 4 * self.heads * self.d_key * self.d_value

    @property
    def kind(self) -> str:
        return "matrix" if self.transition == self.d_key**2 else "diagonal"


def shape(size: str, mixer: str) -> Shape:
    """Of a linear layer in the model of a size."""
    settings = config(size, mixer).mixers[mixer]
    if mixer == "mamba2":
        heads = 2 * SIZES[size]["d_model"] // settings["d_head"]
        return Shape(heads, settings["d_state"], settings["d_head"], 1)
    k, v = settings["d_key"], settings["d_value"]
    return Shape(settings["n_heads"], k, v, k if mixer == "gla" else k * k)
