"""What torch keeps private and the loss has to know; where a torch does not tell, the answer is the usual case."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import Tensor


def current_backward() -> int:
    """The number of the backward that this thread is in, -1 outside of any."""
    number = getattr(torch._C, "_current_graph_task_id", None)
    return -1 if number is None else number()


def is_in_reentrant_checkpoint() -> bool:
    """Whether the backward under way is that of reentrant activation checkpointing, which computes a call again."""
    node = getattr(torch._C, "_current_autograd_node", None)
    return node is not None and "CheckpointFunction" in type(node()).__name__


def saves_tensors_by_hooks() -> bool:
    """Whether hooks take what the backward needs, as in other checkpointing. Torch 2.4 does not tell: it may be so."""
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return hooks is None or hooks(False) is not None


def is_transformed(value: Tensor) -> bool:
    """Whether a tensor is inside a torch.func transform."""
    functorch = getattr(torch._C, "_functorch", None)
    return functorch is not None and functorch.is_functorch_wrapped_tensor(value)


def without_modes() -> AbstractContextManager[object]:
    """Compute unseen by torch's dispatch modes, such as that of selective checkpointing."""
    try:
        from torch.utils._python_dispatch import _disable_current_modes
    except ImportError:
        return contextlib.nullcontext()
    return _disable_current_modes()
