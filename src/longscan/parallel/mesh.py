"""Processes as a mesh of dp x sp: data-parallel groups of ranks that share sequences.

Parameters are copied to every rank, or sharded over all of them (FSDP2, `shard_parameters`); then
checkpoints are folders that every rank writes its part of and any other mesh can read.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import filesystem, state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from longscan.io import SaveError
from longscan.models.checkpoint import save_checkpoint
from longscan.models.stack import Stack


@dataclass(frozen=True)
class MeshSizes:
    """dp: groups that get different batches; sp: ranks of a group, which share its sequences."""

    dp: int = 1
    sp: int = 1

    @property
    def processes(self) -> int:
        return self.dp * self.sp

    def __str__(self) -> str:
        return f"dp={self.dp},sp={self.sp}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Sizes from "dp=2,sp=4"; an axis left out is 1.

        Raises: ValueError for anything else.
        """
        sizes: dict[str, int] = {}
        for part in text.replace(" ", "").split(","):
            found = re.fullmatch(r"(dp|sp)=([1-9]\d*)", part)
            if not found or found[1] in sizes:
                raise ValueError(
                    f"cannot read the mesh {text!r}; write dp=2,sp=4 for 2 groups, each with other "
                    "data, of 4 processes that share sequences (or dp=2, or sp=4, alone)"
                )
            sizes[found[1]] = int(found[2])
        return cls(**sizes)


def build_mesh(sizes: MeshSizes, device: str = "cpu") -> DeviceMesh:
    """The DeviceMesh with axes dp and sp of all processes; neighbours share sequences, so that
    they are on one host where they can be.

    Raises: RuntimeError without a process group; ValueError if the sizes are not its size.
    """
    if not dist.is_initialized():
        raise RuntimeError(
            "no process group: call torch.distributed.init_process_group first, or start the "
            "program with torchrun"
        )
    world = dist.get_world_size()
    if sizes.processes != world:
        raise ValueError(
            f"the mesh {sizes} is of {sizes.processes} processes, but {world} are running"
        )
    return init_device_mesh(device, (sizes.dp, sizes.sp), mesh_dim_names=("dp", "sp"))


def sequence_group(mesh: DeviceMesh) -> dist.ProcessGroup:
    """A group of the ranks that share this rank's sequences, which nothing else sends through."""
    if mesh["sp"].size() < dist.get_world_size():
        return mesh["sp"].get_group()
    made: Any = dist.new_group()  # here the mesh would hand out the default group
    return made


def shard_parameters(
    model: Stack, device: str = "cpu", *, products: torch.dtype | None = None
) -> None:
    """Shard parameters, gradients and so the optimiser over all ranks, in place (FSDP2).

    Each block is a unit, gathered when it runs; the rest of the model is another. `model(...)` and
    `model.loss(...)` then work as before, on any device the model was built on.
    Gradients are averaged over all ranks, so that under sequence parallelism the loss must be
    multiplied by the number of ranks that share a sequence.
    products: what autocast makes products in, None without it.
    Precision: weights are kept, and gradients reduced, in float32. An MLP, which is products alone,
    is gathered in `products`, as autocast would round it; the rest, with gates, decays and other
    parameters that must not be rounded, in float32. Numbers are those of the model not sharded.
    Source: torch.distributed.fsdp.fully_shard.
    """
    everyone = init_device_mesh(device, (dist.get_world_size(),), mesh_dim_names=("all",))
    narrow = MixedPrecisionPolicy(param_dtype=products, reduce_dtype=torch.float32)
    for block in model.blocks:
        if products is not None and isinstance(block.mlp, nn.Module):
            fully_shard(block.mlp, mesh=everyone, mp_policy=narrow)
        fully_shard(block, mesh=everyone)
    whole: Any = fully_shard(model, mesh=everyone)
    # A parameter may go without a gradient on some ranks only (a start of sequences, say); torch
    # before 2.13 cannot be told.
    if hasattr(whole, "set_reduce_scatter_unused_params"):
        whole.set_reduce_scatter_unused_params(True)
    register_fsdp_forward_method(model, "loss")


class _Gathered(nn.Module):
    """Tensors by name in the place of a module that has them."""

    def __init__(self, tensors: dict[str, Any]) -> None:
        super().__init__()
        self.tensors = tensors

    def state_dict(self, *args, **more) -> dict[str, Any]:
        return self.tensors


def save_gathered(model: Stack, folder: str | Path) -> None:
    """`model.save(folder)` of a sharded model: all ranks call it, rank 0 writes."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    tensors = get_model_state_dict(model, options=options)
    if dist.get_rank() == 0:
        save_checkpoint(folder, model.architecture, model.config.to_dict(), _Gathered(tensors))


def save_shards(tensors: Mapping[str, Any], folder: Path) -> None:
    """Write sharded tensors into a new folder: all ranks call it, each writes its own part.

    Raises: SaveError, on all ranks, if one could not write.
    """
    if dist.get_rank() == 0:  # left by a run that was killed while it wrote
        shutil.rmtree(folder, ignore_errors=True)
    dist.barrier()
    try:
        state_dict_saver.save(dict(tensors), checkpoint_id=folder)
    except CheckpointException as error:
        told = "; ".join(sorted({f"{e[0]}" for e in error.failures.values()}))
        raise SaveError(
            f"could not write {folder}: {told}. Any earlier checkpoint is intact."
        ) from error


def read_shards(folder: Path, into: dict[str, Any] | None = None) -> dict[str, Any]:
    """Read what `save_shards` wrote, into sharded tensors of any mesh (all ranks call it); or, by
    default, as whole tensors in this process alone.

    Returns: nested like `into`, or flat: names joined by dots.
    Raises: ValueError if the folder does not hold them.
    """
    if not (folder / ".metadata").exists():
        raise ValueError(
            f"{folder} is missing or not complete: it holds the tensors of the checkpoint beside "
            "it; move both together"
        )
    if into is not None:
        state_dict_loader.load(into, checkpoint_id=folder)
        return into
    reader = filesystem.FileSystemReader(folder)
    tensors: dict[str, Tensor] = {
        name: torch.empty(stored.size, dtype=stored.properties.dtype)  # pyright: ignore
        for name, stored in reader.read_metadata().state_dict_metadata.items()
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # as meant
        state_dict_loader.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


__all__ = [
    "MeshSizes",
    "build_mesh",
    "read_shards",
    "save_gathered",
    "save_shards",
    "sequence_group",
    "shard_parameters",
]
