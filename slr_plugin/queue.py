"""The dictionary B: past keys, first in first out."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slr_plugin.checks import check_integer


class KeyQueue(nn.Module):
    """A ring of the newest ``n`` keys, for any batch size.

    ``bank`` (n, d) float32 holds unit rows, random ones at first; ``bank_ptr`` (1,) int64 is the row written next. Both
    are in the state dict. Loading is tolerant where nothing of value can be lost: a checkpoint without a queue keeps
    the one in place and warns; a module without a queue drops the checkpoint's and warns. Another *size* is an error.

    Args:
        size: ``(n, d)``; 0 or ``(0, d)`` for no queue. A bare positive int n takes d from the first batch.

    Raises:
        ValueError: a negative entry, a missing dimension, or d = 0.
        TypeError: an entry is not an integer.
    """

    bank: Tensor
    bank_ptr: Tensor

    def __init__(self, size: int | Sequence[int] = 0) -> None:
        super().__init__()
        self.size, dim = _parse_size(size)
        # Without a queue the buffers are empty and not saved, as in NTXentLoss(memory_bank_size=0).
        persistent = self.size > 0
        self.register_buffer("bank", _random_keys(self.size, dim), persistent=persistent)
        self.register_buffer("bank_ptr", torch.zeros(1, dtype=torch.long), persistent=persistent)

    def __len__(self) -> int:
        return self.size

    @property
    def dim(self) -> int:
        """The dimension d of the keys; 0 while it is not known."""
        return self.bank.shape[1]

    def set_dim(self, dim: int) -> None:
        """Fill a queue whose dimension was left open with random keys of dimension ``dim``."""
        with torch.inference_mode(False):  # else no later training could write to it
            self.bank = _random_keys(self.size, dim).to(self.bank)

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> Tensor:
        """Write (s, d) unit keys over the oldest ones; of more than n keys the newest n stay.

        A batch with a non-finite key leaves the queue as it is (without reading the values back to the host).

        Returns:
            Whether the batch was written, as a bool tensor of shape ().
        """
        finite = are_finite(keys)
        newest = keys[-self.size :]
        start = self.bank_ptr + (len(keys) - len(newest))
        places = (start + torch.arange(len(newest), device=self.bank.device)) % self.size
        accepted = finite.to(self.bank.device)
        self.bank.index_copy_(0, places, torch.where(accepted, newest.to(self.bank), self.bank[places]))
        self.bank_ptr.add_(len(keys) * accepted).remainder_(self.size)
        return finite

    def extra_repr(self) -> str:
        """The size, for print(module)."""
        return f"size={self.size}, dim={self.dim or 'from the first batch'}" if self.size else "no queue"

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        names = [prefix + "bank", prefix + "bank_ptr"]
        found = [name for name in names if name in state_dict]
        stored = state_dict.get(names[0])
        if not self.size:
            if found:
                warnings.warn(
                    f"the checkpoint holds a queue of shape {tuple(stored.shape) if stored is not None else '?'}, this "
                    "loss has none: the checkpoint's queue is dropped; set memory_bank_size to keep it",
                    stacklevel=2,
                )
            local = {name: value for name, value in state_dict.items() if name not in names}
        elif stored is None or stored.numel() == 0:
            warnings.warn(
                f"the checkpoint holds no queue ({names[0]!r}): the queue in place is kept, its first "
                f"{self.size} keys are not those of the checkpoint's run",
                stacklevel=2,
            )
            local = dict(state_dict)
            local.update({names[0]: self.bank, names[1]: self.bank_ptr})
        else:
            if len(found) < len(names):
                missing_keys.append(names[1])
            dim = self.dim or stored.shape[-1]
            if stored.shape != (self.size, dim):
                error_msgs.append(
                    f"{names[0]}: the checkpoint's queue has shape {tuple(stored.shape)}, this loss's "
                    f"({self.size}, {self.dim or 'any'}); build the loss with "
                    f"memory_bank_size={tuple(stored.shape)}, or delete {names[0]!r} from the checkpoint to start a "
                    "fresh queue"
                )
                return
            if not self.dim:
                self.set_dim(dim)
            local = state_dict
        super()._load_from_state_dict(local, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)


def are_finite(keys: Tensor) -> Tensor:
    """Whether all of (s, d) unit keys are finite, which is when their sum is; a bool tensor of shape ()."""
    return keys.sum().abs() < torch.inf


def _random_keys(size: int, dim: int) -> Tensor:
    return F.normalize(torch.randn(size, dim, dtype=torch.float32), dim=-1)


def _parse_size(size: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(size, str | bytes) or not isinstance(size, Integral | Sequence):
        raise TypeError(f"memory_bank_size must be an int or (n, d), got {size!r} of type {type(size).__name__}")
    given = [size] if isinstance(size, Integral) else list(size)
    for number in given:
        check_integer("memory_bank_size", number, low=0)
    numbers = [int(number) for number in given]
    if numbers == [0]:
        return 0, 0
    if len(numbers) == 1 and isinstance(size, Integral):
        warnings.warn(
            f"memory_bank_size={size} leaves the dimension to the first batch; write memory_bank_size=({size}, d)",
            stacklevel=4,
        )
        return numbers[0], 0
    if len(numbers) != 2 or (numbers[0] > 0 and numbers[1] == 0):
        raise ValueError(f"memory_bank_size must be 0, or (n, d) with d >= 1, got {size!r}")
    return numbers[0], numbers[1] if numbers[0] else 0
