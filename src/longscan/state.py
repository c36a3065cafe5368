"""State: what a layer or model carries from one stretch of a sequence to the next, as a value."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias, Union

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Leaf: TypeAlias = Union[Tensor, "State"]


class State(Mapping[str, Leaf]):
    """An immutable tree of named tensors whose first axis is the batch (or the packed sequence).

    Nothing in the library writes into a state: every call returns a new one, so keeping an old
    state is how to roll back, and sharing one is how to branch.

    Shapes: every tensor is [B, ...]; nested states share B.
    Precision: recurrent states are float32 (float64 when the inputs are), whatever the model's.
    """

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[str, Leaf] | None = None, **more: Leaf) -> None:
        self._items: dict[str, Leaf] = {**(items or {}), **more}

    def __getitem__(self, key: str) -> Leaf:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __repr__(self) -> str:
        parts = (
            f"{k}={v!r}" if isinstance(v, State) else f"{k}={tuple(v.shape)}"
            for k, v in self._items.items()
        )
        return f"State({', '.join(parts)})"

    def tensor(self, key: str) -> Tensor:
        """The tensor called `key`; TypeError if it is a nested state."""
        value = self._items[key]
        if not isinstance(value, Tensor):
            raise TypeError(f"state entry {key!r} is a nested state, not a tensor")
        return value

    def child(self, key: str) -> State:
        """The nested state called `key`; TypeError if it is a tensor."""
        value = self._items[key]
        if not isinstance(value, State):
            raise TypeError(f"state entry {key!r} is a tensor, not a nested state")
        return value

    def map(self, fn: Callable[[Tensor], Tensor]) -> State:
        """A state of the same form with `fn` applied to every tensor."""
        return State(
            {k: v.map(fn) if isinstance(v, State) else fn(v) for k, v in self._items.items()}
        )

    def clone(self) -> State:
        """A copy that shares no memory."""
        return self.map(lambda t: t.clone())

    def detach(self) -> State:
        """The same values, cut from the autograd graph (truncated backpropagation)."""
        return self.map(lambda t: t.detach())

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """Move to a device; `dtype` changes floating tensors only."""
        return self.map(
            lambda t: t.to(device=device, dtype=dtype if t.is_floating_point() else None)
        )

    def select(self, index: int | slice | Sequence[int] | Tensor) -> State:
        """The rows of the batch named by `index`; an int keeps a batch axis of one."""
        if isinstance(index, int):
            index = [index]
        if not isinstance(index, slice | Tensor):
            index = torch.as_tensor(index, dtype=torch.long)
        return self.map(lambda t: t[index.to(t.device) if isinstance(index, Tensor) else index])

    @staticmethod
    def cat(states: Iterable[State]) -> State:
        """Join states of equal form along the batch axis.

        Tensors whose second axes differ, caches of attention at different ages, are right-aligned:
        the shorter get zeros on the left.
        """
        states = list(states)
        if not states:
            raise ValueError("State.cat needs at least one state")
        keys = list(states[0])
        for s in states[1:]:
            if list(s) != keys:
                raise ValueError(f"cannot join states with entries {keys} and {list(s)}")
        out: dict[str, Leaf] = {}
        for k in keys:
            values = [s[k] for s in states]
            if isinstance(values[0], State):
                out[k] = State.cat(s.child(k) for s in states)
            else:
                out[k] = torch.cat(_aligned([s.tensor(k) for s in states]))
        return State(out)

    def flatten(self, prefix: str = "") -> dict[str, Tensor]:
        """Every tensor under its dotted name."""
        out: dict[str, Tensor] = {}
        for k, v in self._items.items():
            if isinstance(v, State):
                out.update(v.flatten(f"{prefix}{k}."))
            else:
                out[prefix + k] = v
        return out

    @staticmethod
    def unflatten(flat: Mapping[str, Tensor]) -> State:
        """The inverse of `flatten`."""
        tree: dict = {}
        for name, value in flat.items():
            *parents, leaf = name.split(".")
            node = tree
            for p in parents:
                node = node.setdefault(p, {})
            node[leaf] = value

        def build(node: dict) -> State:
            return State({k: build(v) if isinstance(v, dict) else v for k, v in node.items()})

        return build(tree)

    @property
    def batch_size(self) -> int:
        """Rows in the batch; 0 for a state without tensors (a mixer that carries nothing)."""
        return next((t.shape[0] for t in self.flatten().values()), 0)

    @property
    def nbytes(self) -> int:
        """Bytes held by all tensors."""
        return sum(t.numel() * t.element_size() for t in self.flatten().values())

    def save(self, path: str | Path) -> None:
        """Write to one safetensors file."""
        from longscan.io import save_tensors

        save_tensors({k: v.contiguous() for k, v in self.flatten().items()}, path)

    @staticmethod
    def load(path: str | Path, device: str = "cpu") -> State:
        """Read what `save` wrote."""
        from safetensors.torch import load_file

        return State.unflatten(load_file(str(path), device=device))


def _aligned(tensors: list[Tensor]) -> list[Tensor]:
    """Tensors of equal second axes, by zeros on the left of the shorter."""
    if tensors[0].ndim < 2 or len({t.shape[1] for t in tensors}) == 1:
        return tensors
    longest = max(t.shape[1] for t in tensors)
    return [
        torch.nn.functional.pad(t, (0, 0) * (t.ndim - 2) + (longest - t.shape[1], 0))
        for t in tensors
    ]


pytree.register_pytree_node(
    State,
    lambda s: (list(s._items.values()), list(s._items)),
    lambda values, keys: State(dict(zip(keys, values, strict=True))),
    serialized_type_name="longscan.State",
)
