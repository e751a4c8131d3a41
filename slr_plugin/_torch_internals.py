"""What torch keeps private and the loss has to know; where a torch does not tell, the answer is the usual case.

Activation checkpointing computes a call again in the backward. The reentrant kind records a gradient only then, so the
second run is the one that counts; in every other kind the first run has advanced the queue and the schedule already.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_repeated() -> bool:
    """Whether the current call is made in a backward and records a gradient, as checkpointing does."""
    return torch.is_grad_enabled() and _in_backward()


def is_recomputed() -> bool:
    """Whether checkpointing computes the current operator again; operators can ask inside compiled code too."""
    return _in_backward() and (is_in_reentrant_checkpoint() or _saves_tensors_by_hooks())


def refuse_repetition() -> NoReturn:
    """Raise the error of a call that is computed again after what it reads has changed."""
    raise RuntimeError(
        "activation checkpointing computes SLRLoss again after its queue or schedule moved on, so its gradient would "
        "be wrong: checkpoint the encoder without the loss, which needs O(s d) memory anyway"
    )


def is_in_reentrant_checkpoint() -> bool:
    """Whether the backward under way is that of reentrant activation checkpointing."""
    node = getattr(torch._C, "_current_autograd_node", None)
    return node is not None and "CheckpointFunction" in type(node()).__name__


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Compute in the dtypes of the tensors, on devices with autocast and without."""
    if torch.compiler.is_compiling() or torch.amp.is_autocast_available(device.type):  # which torch 2.4 cannot trace
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def check_plain(name: str, value: Tensor) -> None:
    """Raise for tensors that the operators of the loss cannot see through: sharded, or of another derivative."""
    if torch.compiler.is_compiling():
        return
    if hasattr(value, "device_mesh"):
        raise TypeError(
            f"{name} is a DTensor: pass {name}.to_local() for features, with gather_distributed=True to see all keys, "
            "and keep a temperature out of fully_shard"
        )
    functorch = getattr(torch._C, "_functorch", None)
    if functorch is not None and functorch.is_functorch_wrapped_tensor(value):
        raise RuntimeError(
            f"{name} is inside a torch.func transform, which SLRLoss does not support: use loss.backward() or "
            "torch.autograd.grad"
        )
    if forward_ad.unpack_dual(value).tangent is not None:  # type: ignore[no-untyped-call]
        raise RuntimeError("SLRLoss has no forward-mode derivative; use backward() or torch.autograd.grad")


def _in_backward() -> bool:
    number = getattr(torch._C, "_current_graph_task_id", None)
    return number is not None and number() != -1


def _saves_tensors_by_hooks() -> bool:
    # As checkpointing does to keep what the backward needs. Torch 2.4 does not tell: it may be so.
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return hooks is None or hooks(False) is not None
