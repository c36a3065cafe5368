"""Decoding by CUDA graphs: one token of a model without the host launching its kernels."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from longscan.ops.step import twins
from longscan.state import State

Step = Callable[[Tensor, State], tuple[Tensor, State]]


class GraphedStep:
    """Tokens one after the other: `logits = step(ids)` for `logits, state = model(ids, state)`.

    Two graphs take turns: the first leaves in buffers B the state after that in A, the second one
    goes back. Kernels that know of it (`ops.step`) write where the state shall be; what other code
    makes is copied there. The numbers are those of the model called by itself.

    Made for the rows of one state, by `graphed`. Shapes: ids [rows, 1]; what the model returns.
    """

    def __init__(self, model: Step, state: State) -> None:
        first, second = (
            state.map(lambda t: torch.empty_like(t, memory_format=torch.contiguous_format))
            for _ in range(2)
        )
        _fill(first.flatten(), state.flatten())
        self._states = first, second
        device = next(iter(first.flatten().values())).device
        self.rows = state.batch_size
        self._ids = torch.zeros(self.rows, 1, dtype=torch.long, device=device)
        self._turn = 0
        self._graphs: list[tuple[torch.cuda.CUDAGraph, Tensor]] = []
        for before, after in (self._states, self._states[::-1]):
            self._graphs.append(self._capture(model, before, after))

    def _capture(
        self, model: Step, before: State, after: State
    ) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """A graph from one buffer to the other, and where it leaves the logits."""
        graph, old, new = torch.cuda.CUDAGraph(), before.flatten(), after.flatten()
        pool = self._graphs[0][0].pool() if self._graphs else None
        side = torch.cuda.Stream(self._ids.device)
        with (
            torch.cuda.stream(side),  # is left even where the capture fails
            twins([(t, new[name]) for name, t in old.items()]),
            torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"),
            _no_waiting(),
        ):
            logits, made = model(self._ids, before)
            made = made.flatten()
            _fill(new, {n: t for n, t in made.items() if t.data_ptr() != new[n].data_ptr()})
        return graph, logits

    @torch.inference_mode()
    def __call__(self, ids: Tensor) -> Tensor:
        """Logits after one more token of each row, valid until the next call but one."""
        self._ids.copy_(ids)
        graph, logits = self._graphs[self._turn]
        graph.replay()
        self._turn ^= 1
        return logits

    @property
    def state(self) -> State:
        """The state after the last token, as a value of its own."""
        with torch.inference_mode():
            return self._states[self._turn].clone()


@torch.inference_mode()
def graphed(model: Step, state: State) -> GraphedStep | None:
    """`GraphedStep` where it can be: on CUDA, for states whose sizes no longer change, and models
    whose host need not look at numbers on the device. Else None: call the model itself.

    A growing cache of attention stays without graphs, also within a window, for its length is
    read on the host. Takes the time of a few tokens, and memory for a second state. Weights are
    read where they lie: the model must stay on its device, out of autocast. Warns where a capture
    fails for another reason than the host's waiting.
    """
    tensors = state.flatten().values()
    if not tensors or not all(t.is_cuda for t in tensors) or torch.is_autocast_enabled("cuda"):
        return None
    # Warms up, on tensors of its own: what the host notes with a tensor must not reach a graph.
    ids = torch.zeros(state.batch_size, 1, dtype=torch.long, device=next(iter(tensors)).device)
    _, after = model(ids, state.clone())
    if not same_form(state, after):
        return None
    try:
        return GraphedStep(model, state)
    except RuntimeError as problem:
        if "synchroniz" not in str(problem):  # else as said above, and as it should be
            why = str(problem).splitlines()[0]
            warnings.warn(f"decoding goes on without CUDA graphs: {why}", stacklevel=2)
        return None


def same_form(a: State, b: State) -> bool:
    """Whether two states agree in names, shapes and dtypes."""
    return [(n, t.shape, t.dtype) for n, t in a.flatten().items()] == [
        (n, t.shape, t.dtype) for n, t in b.flatten().items()
    ]


def _fill(to: dict[str, Tensor], made: dict[str, Tensor]) -> None:
    """Copy what was made to the places of its names."""
    copy = torch._foreach_copy_  # type: ignore[attr-defined]
    for dtype in dict.fromkeys(t.dtype for t in made.values()):
        names = [n for n, t in made.items() if t.dtype is dtype]
        copy([to[n] for n in names], [made[n] for n in names])


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Raise a RuntimeError where the host would wait for the device, before it breaks a capture."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():  # the mode tells once that it does not see everything
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


__all__ = ["GraphedStep", "graphed", "same_form"]
