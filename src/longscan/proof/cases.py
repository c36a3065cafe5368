"""What the kernels are proved on.

Cases sit where kernels break: lengths around the borders of chunks, packed sequences whose borders
lie off that grid, gates at and near 0 and 1, sizes that are no powers of two, shared heads, long
sequences, tensors of more than 2^31 numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import chain

from longscan.proof.case import Case
from longscan.proof.channels import (
    conv_cases,
    gates_cases,
    loss_cases,
    mamba_cases,
    norm_cases,
    parts_cases,
    projection_cases,
    selective_cases,
)  # fmt: skip
from longscan.proof.elementwise import add_norm_cases, glu_cases, rotary_cases
from longscan.proof.heads import (
    KEY_GATES,
    SCALAR_GATES,
    decay_arguments,
    decay_cases,
    delta_arguments,
    delta_cases,
    head_cases,
    mlstm_cases,
    wide_delta_cases,
)  # fmt: skip
from longscan.proof.recurrent import slstm_cases

CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "decay": decay_cases,
    "decay_keys": lambda: head_cases(partial(decay_arguments, per_key=True), KEY_GATES),
    "delta": lambda: chain(delta_cases(delta_arguments, SCALAR_GATES), wide_delta_cases()),
    "delta_keys": lambda: delta_cases(partial(delta_arguments, per_key=True), KEY_GATES),
    "selective": selective_cases,
    "selective_mamba": mamba_cases,
    "mlstm": mlstm_cases,
    "slstm": slstm_cases,
    "conv": conv_cases,
    "conv_silu": conv_cases,
    "conv_parts": parts_cases,
    "projection": projection_cases,
    "gates": gates_cases,
    "norm": norm_cases,
    "add_norm": add_norm_cases,
    "glu": glu_cases,
    "rotary": rotary_cases,
    "loss": loss_cases,
}
"""The kernels, by name, and what each is proved on."""


@cache
def cases(kernel: str) -> tuple[Case, ...]:
    """The cases of a kernel.

    Raises: ValueError for one that is not known.
    """
    if kernel not in CASES:
        raise ValueError(f"no proof of a kernel {kernel!r}; there is one of {', '.join(CASES)}")
    found = tuple(CASES[kernel]())
    assert len({c.name for c in found}) == len(found)
    return found
