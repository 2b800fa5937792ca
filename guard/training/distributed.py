"""Several processes, started by `torchrun`, that train one network, each on its share of every batch.

In a single process every function here does nothing, or what it would do among one. Tensors may lie on the
CPU or on the process's GPU. Nothing wraps the network: after its backward passes a step calls `average` once
(docs/decisions/0056).
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from guard.errors import GuardError, TrainingError, UsageError
from guard.progress import silenced

T = TypeVar("T")


def world_size() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if _joined() else 1


def rank() -> int:
    """The number of this process, from 0; process 0 writes files and talks."""
    return distributed.get_rank() if _joined() else 0


def max_over_processes(values: Tensor) -> Tensor:
    """The largest of every entry over all processes: any shape -> the same, detached. Not for NaN."""
    return _reduced(values, distributed.ReduceOp.MAX)


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum of every entry over all processes: any shape -> the same, detached."""
    return _reduced(values, distributed.ReduceOp.SUM)


def share_of_maximum(value: Tensor) -> Tensor:
    """The factor that makes a scalar of every process their maximum, once gradients are averaged.

    It is `world_size()` on the process with the largest value (the first of several) and 0 on the others; 1
    in a single process. A scalar like `value`, detached. NaN counts as largest.
    """
    values = torch.zeros(world_size(), dtype=value.dtype, device=value.device)
    values[rank()] = value.detach()
    return (sum_over_processes(values).argmax() == rank()).to(value.dtype) * world_size()


def average(model: nn.Module, terms: Mapping[str, Tensor]) -> dict[str, float]:
    """Averages gradients and BatchNorm's running statistics over the processes, and returns `terms` averaged.

    `terms` are scalars, of the same names on every process. A weight without a gradient counts as one of 0.
    Where one process has a term that is not finite, all get it. One message to each process carries it all.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    scalars = torch.stack([value.detach() for value in terms.values()])
    if world_size() > 1:
        tensors = [
            *(torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights),
            *_statistics_of(model),
            scalars,
        ]
        flat = sum_over_processes(torch.cat([tensor.detach().reshape(-1) for tensor in tensors]))
        parts = torch.split(flat / world_size(), [tensor.numel() for tensor in tensors])
        with torch.no_grad():
            for tensor, part in zip(tensors, parts, strict=True):
                tensor.copy_(part.view_as(tensor))
    return dict(zip(terms, scalars.tolist(), strict=True))


def gather(value: T) -> list[T]:
    """Every process's value, in the order of their numbers, on all of them; tensors should be on the CPU."""
    if world_size() == 1:
        return [value]
    values: list[T] = [value] * world_size()
    distributed.all_gather_object(values, value)
    return values


def check_identical(model: nn.Module) -> None:
    """Raises `TrainingError` on all processes where their weights are not the same, bit by bit."""
    if world_size() == 1:
        return
    bits = [value.detach().float().reshape(-1).view(torch.int32) for value in model.state_dict().values()]
    total = torch.cat(bits).sum(dtype=torch.int64)
    if max_over_processes(total) != -max_over_processes(-total):
        raise alike(
            TrainingError("the processes' weights differ; they must run on the same kind of machine.")
        )


@contextmanager
def together() -> Iterator[None]:
    """What one process cannot do, none does: an error inside, on any process, ends the block on all.

    Process 0 raises it, the others leave quietly (`SystemExit`). Only `GuardError` and `OSError` count as
    errors to share; after any other, torchrun ends the rest.
    """
    found: GuardError | OSError | None = None
    try:
        yield
    except (GuardError, OSError) as error:
        found = error
    if world_size() == 1:
        if found is not None:
            raise found
        return
    if not max_over_processes(torch.tensor(float(found is not None))):
        return
    reports = gather((type(found), str(found)) if found is not None else None)
    kind, message = next(report for report in reports if report is not None)
    raise alike(kind(message) if found is None else found)


def alike(error: BaseException) -> BaseException:
    """What to raise for an error that all processes found: itself on process 0, a quiet end elsewhere."""
    if rank() == 0:
        return error
    return SystemExit(130 if isinstance(error, KeyboardInterrupt) else 1)


@contextmanager
def first() -> Iterator[None]:
    """Process 0 runs the block before the others do: it fetches what they then find."""
    here = torch.zeros(1)
    if rank() > 0:
        sum_over_processes(here)
    try:
        yield
    finally:
        if rank() == 0:
            sum_over_processes(here)


@contextmanager
def processes(device: str) -> Iterator[str]:
    """Inside, the processes that torchrun started are one group; yields the device of this one.

    Without torchrun that is `device`. Progress is shown by process 0 alone. Raises `UsageError` where there
    are fewer GPUs than processes, or where `device` names one GPU for all.
    """
    count, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    if count == 1:
        yield device
        return
    backend = "gloo"
    if device.startswith("cuda"):
        if device != "cuda":
            raise UsageError(f"--device {device}: names one GPU for {count} processes. Give cuda.")
        if local >= torch.cuda.device_count():
            raise UsageError(
                f"torchrun started {local + 1} or more processes for {torch.cuda.device_count()} GPUs. Lower "
                "--nproc_per_node, or give --device cpu."
            )
        device, backend = f"cuda:{local}", "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(local)
    distributed.init_process_group(backend)
    try:
        with silenced() if rank() > 0 else nullcontext():
            yield device
    finally:
        distributed.destroy_process_group()


def _joined() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _reduced(values: Tensor, operation: "distributed.ReduceOp.RedOpType") -> Tensor:
    if world_size() == 1:
        return values.detach()
    result = values.detach().clone()
    distributed.all_reduce(result, operation)
    return result


def _statistics_of(model: nn.Module) -> list[Tensor]:
    return [
        statistic
        for layer in model.modules()
        if isinstance(layer, _BatchNorm)
        for statistic in (layer.running_mean, layer.running_var)
        if statistic is not None
    ]
