"""Gathering over processes, with gradient; the identity on one process."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


def world_size() -> int:
    """The number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather(local: Tensor, name: str | None = None) -> Tensor:
    """Concatenate (s, d) of every process to (world_size * s, d), in the order of ranks.

    The gradient of a row is the sum of the gradients that all processes have for it, so that DDP's mean over processes
    gives the gradient of the mean loss.

    All processes bring equally many rows. What is gathered before the loss compares its arguments comes with a name,
    and is compared here, on the CPU alone, since an accelerator would wait: see :func:`check_alike`.
    """
    if world_size() == 1:
        return local
    if name is not None and local.device.type == "cpu":
        check_alike(local.device, **{name: local})
    gathered: Tensor = _Gather.apply(local)
    return gathered


def broadcast(values: Tensor, device: torch.device) -> None:
    """Overwrite ``values`` with those of process 0, exchanged on a device whose processes can talk to each other."""
    if world_size() > 1:
        sent = values.to(device)
        dist.broadcast(sent, 0)
        values.copy_(sent)


def check_alike(device: torch.device, **arguments: Tensor | None) -> None:
    """Raise in all processes, before they would wait for each other, unless they bring equally many rows of all.

    Raises:
        ValueError: the numbers differ.
    """
    own = torch.tensor([0 if value is None else len(value) for value in arguments.values()], device=device)
    parts = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(parts, own)
    for name, counts in zip(arguments, torch.stack(parts).T.tolist(), strict=True):
        if len(set(counts)) > 1:
            raise ValueError(
                f"gather_distributed=True needs equally many rows in every process, got {counts} rows of {name}; set "
                "drop_last=True in the DataLoader, and bring each argument in all processes or in none"
            )


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        local = local.contiguous()
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, local)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]
