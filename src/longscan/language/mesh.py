"""Training on a mesh of processes: strategies for Lightning's Trainer, and their options."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from longscan.language.task import LanguageTask
from longscan.models.stack import Stack
from longscan.parallel import SequenceParallel
from longscan.parallel.mesh import (
    MeshSizes,
    build_mesh,
    read_shards,
    save_shards,
    sequence_group,
    shard_parameters,
)
from longscan.parallel.scan import METHODS


def trainer_settings(options: dict[str, Any], seed: int) -> dict[str, Any]:
    """Arguments of Lightning's Trainer for the options of ours: mesh, sp_method and fsdp2 become
    a strategy and a number of devices.

    Raises: ValueError if they do not fit each other, or the processes that have been started.
    """
    settings = dict(options)
    text, method = settings.pop("mesh"), settings.pop("sp_method")
    if method not in (*METHODS, "auto"):
        known = ", ".join(METHODS)
        raise ValueError(f"unknown sp_method {method!r}; choose from {known}, auto")
    sharded = settings["strategy"] == "fsdp2"
    if sharded and settings["precision"] not in (None, "32", "32-true", "bf16-mixed"):
        raise ValueError(
            f"fsdp2 trains in 32-true or bf16-mixed, not {settings['precision']}; use one of "
            "these, or --trainer.strategy ddp"
        )
    if text is None and not sharded:
        return settings
    sizes = None if text is None else MeshSizes.parse(text)
    if sizes is not None:
        _place(sizes, settings)
    kind = ShardedStrategy if sharded else MeshStrategy
    settings["strategy"] = kind(sizes, method=method, seed=seed)
    return settings


def _place(sizes: MeshSizes, settings: dict[str, Any]) -> None:
    """Set devices (and under torchrun num_nodes) to those of a mesh, where they are not given."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        started, here = (int(os.environ[k]) for k in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        if sizes.processes != started:
            raise ValueError(
                f"--trainer.mesh {sizes} is of {sizes.processes} processes, but torchrun started "
                f"{started}; change --nproc-per-node, --nnodes or the mesh"
            )
        settings.update(devices=here, num_nodes=started // here)
        return
    devices, nodes = settings["devices"], settings["num_nodes"]
    if devices in ("auto", -1, "-1"):
        if sizes.processes % nodes:
            raise ValueError(
                f"--trainer.mesh {sizes} is of {sizes.processes} processes, which cannot be spread "
                f"evenly over {nodes} nodes"
            )
        settings["devices"] = sizes.processes // nodes
        return
    if isinstance(devices, str):
        several, parts = "," in devices, [d for d in devices.split(",") if d.strip()]
        if not all(d.strip().isdigit() for d in parts):
            raise ValueError(f"--trainer.devices must be numbers with a mesh, not {devices!r}")
        devices = [int(d) for d in parts] if several else int(devices)
    count = nodes * (devices if isinstance(devices, int) else len(devices))
    if count != sizes.processes:
        raise ValueError(
            f"--trainer.mesh {sizes} is of {sizes.processes} processes, but --trainer.devices "
            f"{settings['devices']} on {nodes} node(s) makes {count}; leave out devices, or "
            "change the mesh"
        )


class MeshStrategy(DDPStrategy):
    """A copy of the model on each of dp x sp processes, which average their gradients.

    Ranks sp * i to sp * i + sp - 1 get the same batches, and each works on its part of them. As
    their gradients are parts of a sum, the task multiplies its loss by sp before the average.

    sizes: of the mesh; None: all processes have data of their own.
    method: how states cross, as in `SequenceParallel`. seed: of what mixers and dropout draw.
    """

    def __init__(self, sizes: MeshSizes | None, *, method: str = "auto", seed: int = 0) -> None:
        super().__init__()
        self.sizes, self.method, self.seed = sizes, method, seed
        self.mesh: DeviceMesh | None = None

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        assert self.sizes is not None
        return {"num_replicas": self.sizes.dp, "rank": self.global_rank // self.sizes.sp}

    def setup_environment(self) -> None:
        super().setup_environment()
        if self.sizes is None:
            self.sizes = MeshSizes(dp=self.world_size)
        self.mesh = build_mesh(self.sizes, self.root_device.type)

    def setup(self, trainer: Any) -> None:
        task = self.lightning_module
        assert isinstance(task, LanguageTask)
        assert self.sizes is not None
        assert self.mesh is not None
        task.draws = (self.seed, self.global_rank)
        if self.sizes.sp > 1:
            task.sequence = SequenceParallel(
                sequence_group(self.mesh),
                method=self.method,
                per_host=min(self.sizes.sp, self.num_processes),
            )
        super().setup(trainer)


class ShardedStrategy(MeshStrategy):
    """`MeshStrategy` with parameters, gradients and optimiser sharded over all processes (FSDP2).

    A checkpoint is the usual file, but for its tensors. These lie in a folder beside it, to which
    the file points; it is replaced when the folder is whole, so one of two is always complete.
    """

    def model_to_device(self) -> None:
        pass  # sharding moves a block at a time: a whole model need not fit on a device

    def configure_ddp(self) -> None:
        task = self.lightning_module
        assert isinstance(task, LanguageTask)
        assert isinstance(task.model, Stack)
        mixed = self.precision_plugin.precision == "bf16-mixed"
        products = torch.bfloat16 if mixed else None
        shard_parameters(task.model, self.root_device.type, products=products)

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        return False  # `load_checkpoint` does

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}  # `save_checkpoint` writes the tensors

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return {"state": {}, "param_groups": optimizer.state_dict()["param_groups"]}

    def _names(self) -> list[str]:
        """Names of the optimiser's parameters, in its order."""
        assert self.lightning_module is not None
        names = {p: name for name, p in self.lightning_module.named_parameters()}
        return [names[p] for group in self.optimizers[0].param_groups for p in group["params"]]

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        path = Path(filepath)
        folder = path.with_name(f"{path.name}.shards-{checkpoint['global_step']}")
        assert self.lightning_module is not None
        model, optimizer = get_state_dict(self.lightning_module, self.optimizers)
        save_shards({"model": model, "optimizer": optimizer["state"]}, folder)
        checkpoint["shards"] = {"folder": folder.name, "parameters": self._names()}
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        path = Path(checkpoint_path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        shards, [saved] = checkpoint.get("shards"), checkpoint["optimizer_states"]
        task, names = self.lightning_module, self._names()
        assert task is not None
        if shards:
            model, optimizer = get_state_dict(task, self.optimizers)
            read = {"model": model, "optimizer": optimizer["state"]}
            read_shards(path.parent / shards["folder"], read)
        else:
            state = {names[i]: s for i, s in saved["state"].items()}
            read = {"model": checkpoint["state_dict"], "optimizer": state}
        groups = [{**g, "params": [names[i] for i in g["params"]]} for g in saved["param_groups"]]
        set_state_dict(
            task,
            self.optimizers,
            model_state_dict=read["model"],
            optim_state_dict={"state": read["optimizer"], "param_groups": groups},
            options=StateDictOptions(full_state_dict=not shards),
        )
        return checkpoint

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        pass  # `load_checkpoint` did

    def teardown(self) -> None:
        """As the base class, but leaves the shards where they are."""
        assert self.cluster_environment is not None
        assert self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()


def with_tensors(checkpoint: dict[str, Any], path: Path) -> dict[str, Any]:
    """A checkpoint of `ShardedStrategy` as one process has it: its tensors read and put in."""
    shards = checkpoint.pop("shards")
    state: dict[int, dict[str, Any]] = {}
    number = {name: i for i, name in enumerate(shards["parameters"])}
    for name, x in read_shards(path.parent / shards["folder"]).items():
        part, _, name = name.partition(".")
        if part == "model":
            checkpoint["state_dict"][name] = x
        else:
            name, _, what = name.rpartition(".")
            state.setdefault(number[name], {})[what] = x
    checkpoint["optimizer_states"][0]["state"] = state
    return checkpoint


__all__ = ["MeshStrategy", "ShardedStrategy", "trainer_settings", "with_tensors"]
