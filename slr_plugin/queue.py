"""The dictionary B: past keys, first in first out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slr_plugin.checks import check_integer


class KeyQueue(nn.Module):
    """A ring of the newest ``n`` keys, for any batch size.

    ``bank`` (n, d) float32 holds unit rows, random ones at first; ``bank_ptr`` (1,) int64 is the row written next;
    ``groups`` (n,) int64 are the ids of the keys' groups, -1 where unknown. All are in the state dict. In loading,
    what a checkpoint lacks stays as it is, what this queue lacks is dropped, and both warn. Another *size* is an error.

    Args:
        size: ``(n, d)``; 0 or ``(0, d)`` for no queue. A bare positive int n takes d from the first batch.
        estimator_dim: e, for a second ring ``estimator_bank`` (n, e) beside the first, which holds other features of
            the same keys; None for none.

    Attributes:
        generation: how often all keys were replaced at once, by a checkpoint or a reset.

    Raises:
        ValueError: a negative entry, a missing dimension, or d = 0.
        TypeError: an entry is not an integer.
    """

    bank: Tensor
    bank_ptr: Tensor
    groups: Tensor
    estimator_bank: Tensor | None

    def __init__(self, size: int | Sequence[int] = 0, estimator_dim: int | None = None) -> None:
        super().__init__()
        self.size, dim = _parse_size(size)
        if estimator_dim is not None:
            check_integer("estimator_dim", estimator_dim, low=1)
            if not self.size:
                raise ValueError("estimator_dim is the width of a second queue: set memory_bank_size, or leave it out")
        self.generation = 0
        self._is_shared = False
        # Without a queue the buffers are empty and not saved, as in NTXentLoss(memory_bank_size=0).
        persistent = self.size > 0
        self.register_buffer("bank", _random_keys(self.size, dim), persistent=persistent)
        self.register_buffer("bank_ptr", torch.zeros(1, dtype=torch.long), persistent=persistent)
        self.register_buffer("groups", torch.full((self.size,), -1), persistent=persistent)
        ring = None if estimator_dim is None else _random_keys(self.size, estimator_dim)
        self.register_buffer("estimator_bank", ring)

    def __len__(self) -> int:
        return self.size

    @property
    def dim(self) -> int:
        """The dimension d of the keys; 0 while it is not known."""
        return self.bank.shape[1]

    def check(self, features: Tensor, estimators: Tensor | None = None) -> None:
        """Raise unless features (s, d), and (s, e), could enter the queue, or there is none."""
        if not self.size:
            return
        if self.dim not in (0, features.shape[1]):
            raise ValueError(
                f"out0 and out1 have shape {tuple(features.shape)} but the queue has shape {tuple(self.bank.shape)}; "
                f"set memory_bank_size=({self.size}, {features.shape[1]})"
            )
        width = None if self.estimator_bank is None else self.estimator_bank.shape[1]
        if width is None and estimators is not None:
            raise ValueError(f"estimator needs a queue of such features too: set estimator_dim={estimators.shape[1]}")
        if width is not None and (estimators is None or estimators.shape[1] != width):
            raise ValueError(
                f"estimator must have shape (s, {width}), as estimator_dim says, got "
                f"{None if estimators is None else tuple(estimators.shape)}"
            )

    def set_dim(self, dim: int) -> None:
        """Fill a queue whose dimension was left open with random keys of dimension ``dim``."""
        if not self.dim:
            with torch.inference_mode(False):  # else no later training could write to it
                self.bank = _random_keys(self.size, dim).to(self.bank)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start again: fresh random unit rows, pointer 0. ``to_empty`` and FSDP call this after a meta device."""
        for ring in (self.bank, self.estimator_bank):
            if ring is not None:
                size, dim = ring.shape
                ring.copy_(_random_keys(size, dim, device="cpu"))  # the default device may hold no values
        self.bank_ptr.zero_()
        self.groups.fill_(-1)
        self.generation += 1
        self._is_shared = False

    @torch.no_grad()
    def share(self, broadcast: Callable[[Tensor], None]) -> bool:
        """Give all processes the first queue of process 0, once; theirs differ where their seeds do.

        Returns:
            Whether that was now.
        """
        if self._is_shared:
            return False
        for ring in self.buffers():
            broadcast(ring)
        self._is_shared = True
        return True

    @torch.no_grad()
    def enqueue(self, keys: Tensor, estimators: Tensor | None = None, groups: Tensor | None = None) -> Tensor:
        """Write (s, d) unit keys over the oldest ones, with (s, e) other features and (s,) ids of groups.

        The newest n stay. A batch with a feature that is not finite leaves the queue as it is, without reading values
        back to the host.

        Returns:
            Whether the batch was accepted; or would be, by a queue of size 0. A bool tensor ().
        """
        total = keys.sum() if estimators is None else keys.sum() + estimators.sum()
        difference = total - total
        accepted = difference == difference  # is 0 where all are finite, and not a number elsewhere
        if not self.size:
            return accepted
        accepted = accepted.to(self.bank.device)
        newest = min(len(keys), self.size)
        start = self.bank_ptr + (len(keys) - newest) if newest < len(keys) else self.bank_ptr
        places = (start + torch.arange(newest, device=self.bank.device)) % self.size
        if groups is None:
            groups = self.groups.new_full((len(keys),), -1)
        for ring, rows in ((self.bank, keys), (self.estimator_bank, estimators), (self.groups, groups)):
            if ring is not None and rows is not None:
                ring.index_copy_(
                    0, places, torch.where(accepted, rows[-newest:].to(ring), ring.index_select(0, places))
                )
        self.bank_ptr.add_(accepted, alpha=len(keys)).remainder_(self.size)
        return accepted

    def extra_repr(self) -> str:
        """The size, for print(module)."""
        return f"size={self.size}, dim={self.dim or 'from the first batch'}" if self.size else "no queue"

    def refusal(self, state_dict: Mapping[str, Any], prefix: str) -> str:
        """Say why a checkpoint's queue cannot be loaded; "" if it can."""
        bank = state_dict.get(f"{prefix}bank")
        if not self.size or bank is None or bank.numel() == 0:
            return ""
        for name, own in self._buffers.items():
            stored = state_dict.get(prefix + name)
            open_dim = name == "bank" and not self.dim and len(bank) == self.size
            if own is None or stored is None or stored.shape == own.shape or open_dim:
                continue
            setting = f"memory_bank_size={tuple(bank.shape)}"
            if name == "estimator_bank":
                setting = f"estimator_dim={stored.shape[-1]}"
            return (
                f"{prefix}{name} must have shape {tuple(own.shape)}, the checkpoint's has {tuple(stored.shape)}; build "
                f"the loss with {setting}, or delete {prefix + name!r} from the checkpoint"
            )
        return ""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        *_, errors = args
        if refusal := self.refusal(state_dict, prefix):
            errors.append(refusal)
            return
        stored = {name for name in self._buffers if state_dict.get(prefix + name, self.bank_ptr[:0]).numel()}
        if "bank" not in stored:
            stored = set()
        elif self.size:
            self.set_dim(state_dict[f"{prefix}bank"].shape[-1])
            self.generation += 1
        own = {name: value for name, value in self._buffers.items() if self.size and value is not None}
        for name in ("bank", "estimator_bank"):
            if name in own and name not in stored:
                _warn(f"the checkpoint holds no {prefix + name!r}: the rows in place stay, not those of its run")
            elif name in stored and name not in own:
                shape = tuple(state_dict[prefix + name].shape)
                _warn(f"{prefix + name!r} of the checkpoint, of shape {shape}, is dropped: this loss has none")
        if stored and "groups" in own:
            own["groups"] = torch.full_like(self.groups, -1)  # unknown where not stored
        local = {key: value for key, value in state_dict.items() if key.removeprefix(prefix) not in self._buffers}
        local |= {prefix + name: state_dict[prefix + name] if name in stored else own[name] for name in own}
        super()._load_from_state_dict(local, prefix, *args)


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def _random_keys(size: int, dim: int, device: str | None = None) -> Tensor:
    return F.normalize(torch.randn(size, dim, dtype=torch.float32, device=device), dim=-1)


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
            f"memory_bank_size={size} leaves the dimension to the first batch, so a copy made before it (for weight "
            f"averaging, or an exponential moving average) cannot follow; write memory_bank_size=({size}, d)",
            stacklevel=4,
        )
        return numbers[0], 0
    if len(numbers) != 2 or (numbers[0] > 0 and numbers[1] == 0):
        raise ValueError(f"memory_bank_size must be 0, or (n, d) with d >= 1, got {size!r}")
    return numbers[0], numbers[1] if numbers[0] else 0
