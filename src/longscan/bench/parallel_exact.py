"""Sharded models against whole ones: losses and all gradients, and what no exchange would cost."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from longscan.bench.parallel_group import Here
from longscan.bench.parallel_models import small
from longscan.models import LanguageModel
from longscan.parallel import SequenceParallel
from longscan.parallel.scan import METHODS

LIMITS = {"float32": 1e-4, "bfloat16": 2e-2}
"""Of a difference, relative to the largest entry of the gradient of a parameter (of the loss)."""
FLOOR = 1e-3
"""Gradients whose largest entry is below this part of the model's largest are compared with that
part: what should be zero is noise on both sides."""


def correctness(here: Here, pattern: str) -> None:
    """Rows of a model: dtypes x batch or packed x methods. Shards are unequal."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    tiny = here.size == "tiny"
    length = 64 * here.ranks if tiny else 512 * here.ranks
    lengths = unequal(length, here.ranks)
    torch.manual_seed(0)
    with here.device:
        model = LanguageModel(small(pattern, tiny))
    exact: dict[str, Mapping[str, Tensor]] = {}
    for dtype in LIMITS if here.gpu else ("float32",):
        for mode in ("batch", "packed"):
            names = {m: f"correctness/{pattern}/{dtype}/{mode}/{m}" for m in METHODS}
            if here.agreed(all(n in here.done for n in names.values())):
                continue
            torch.manual_seed(1)
            batch = 2 if mode == "batch" else 1
            ids, targets = torch.randint(
                model.config.vocab_size, (2, batch, length), device=here.device
            )
            cu = None
            if mode == "packed":  # sequences that end in shards, at an edge, and cross several
                at = [0, 5, lengths[0] // 2, sum(lengths[:3]) if here.ranks > 3 else 5]
                cu = torch.tensor(sorted({*at, length - 7, length}), device=here.device)
            want = whole(model, ids, targets, cu, dtype)
            exact.setdefault(mode, want if dtype == "float32" else {})
            own = difference(want, exact[mode])[0] if exact[mode] and want is not exact[mode] else 0
            control = 0.0
            if cu is None:
                control = here.worst(apart(here, model, ids, targets, lengths, want, dtype))[0]
            for method, name in names.items():
                if not here.todo(name):
                    continue
                # Two "hosts", so that both levels of the hierarchy are at work.
                sequence = SequenceParallel(
                    here.group, method=method, per_host=max(1, here.ranks // 2)
                )
                shards = sequence.shards(length, cu_seqlens=cu, lengths=lengths, final_states=False)
                model.zero_grad()
                with _autocast(here, dtype):
                    loss, _ = model.loss(shards.shard(ids), shards.shard(targets), shards=shards)
                loss.backward()
                sequence.finish()
                far, worst = difference(summed(_gradients(model, loss)), want)
                error, off = here.worst(far, (loss.detach() - want["loss"]).abs().item())
                off /= want["loss"].abs().item()
                here.write(
                    "correctness", case=pattern, dtype=dtype, mode=mode, method=method,
                    lengths=lengths, loss=off, error=error, worst=worst, limit=LIMITS[dtype],
                    own=own, control=control,
                    met=max(error, off) <= LIMITS[dtype] and (cu is not None or control > far),
                )  # fmt: skip


def unequal(length: int, ranks: int) -> list[int]:
    """Shards of multiples of 16 tokens, of which every other is short enough to look through."""
    if ranks < 3:
        first = length * 7 // 16 // 16 * 16
        return [first, length - first][:ranks] if ranks == 2 else [length]
    short = [r % 2 == 1 for r in range(ranks)]
    left = length - 16 * sum(short)
    long = left // (ranks - sum(short)) // 16 * 16
    out = [16 if s else long for s in short]
    out[0] += length - sum(out)
    return out


def whole(
    model: LanguageModel, ids: Tensor, targets: Tensor, cu: Tensor | None, dtype: str
) -> dict[str, Tensor]:
    """Loss and gradients of the whole sequences on this rank."""
    model.zero_grad()
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        loss, _ = model.loss(ids, targets, cu_seqlens=cu)
    loss.backward()
    return _gradients(model, loss)


def apart(
    here: Here,
    model: LanguageModel,
    ids: Tensor,
    targets: Tensor,
    lengths: list[int],
    want: Mapping[str, Tensor],
    dtype: str,
) -> float:
    """The error if nothing crossed the edges of shards: what the limit must be far below."""
    totals = {name: torch.zeros_like(g) for name, g in want.items()}
    for x, y in zip(ids.split(lengths, 1), targets.split(lengths, 1), strict=True):
        for name, g in whole(model, x, y, None, dtype).items():
            totals[name] += g * (x.shape[1] / ids.shape[1])
    return difference(totals, want)[0]


def _autocast(here: Here, dtype: str) -> torch.autocast:
    return torch.autocast(here.device.type, torch.bfloat16, enabled=dtype == "bfloat16")


def _gradients(model: LanguageModel, loss: Tensor) -> dict[str, Tensor]:
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


def summed(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Over ranks, in one message; the loss, which is that of all ranks, as it is."""
    names = [name for name in gradients if name != "loss"]
    flat = torch.cat([gradients[n].flatten() for n in names])
    dist.all_reduce(flat)
    parts = flat.split([gradients[n].numel() for n in names])
    return {"loss": gradients["loss"]} | {
        n: x.view_as(gradients[n]) for n, x in zip(names, parts, strict=True)
    }


def difference(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest relative one of gradients, and where; infinite if one of them is missing."""
    if got.keys() != want.keys():
        return float("inf"), ", ".join(sorted(got.keys() ^ want.keys()))
    grads = [name for name in want if name != "loss"]
    top = max(want[n].abs().max().item() for n in grads)
    return max(
        ((got[n] - want[n]).abs().max().item() / max(want[n].abs().max().item(), FLOOR * top), n)
        for n in grads
    )
