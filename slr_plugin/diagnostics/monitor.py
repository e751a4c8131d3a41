"""Follows a loss and its queue, and measures the labels of its calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from slr_plugin.checks import check_index_tensor
from slr_plugin.diagnostics.quality import LabelQuality, label_quality
from slr_plugin.diagnostics.report import summary
from slr_plugin.distributed import gather
from slr_plugin.key_sets import KeySet
from slr_plugin.loss import SLRLoss
from slr_plugin.queue import Enqueued


class Observer(Protocol):
    """Follows every call of a loss; :class:`LabelMonitor` is one."""

    def begin(self) -> None:
        """A call begins, which may still raise."""

    def compare(self, key_set: KeySet, labels: Callable[[], Tensor]) -> None:
        """The loss is computed, the queue not advanced yet; ``labels()`` gives the dense labels over the key set."""

    def enqueue(self, enqueued: Enqueued) -> None:
        """The batch's keys entered the queue."""


class LabelMonitor:
    """Watches a criterion's labels during training; knows the classes of the keys in its queue.

    Announce the classes of every batch; a batch that was not announced enters the queue with unknown ones. Labels are
    measured on the calls announced with ``measure``, before the loss of the same call, and cost one dense (s, K)
    matrix; the other calls cost next to nothing. Classes become unknown when a checkpoint or a reset replaces the
    queue. Where the criterion gathers over processes, build a monitor in all of them, since it gathers the classes at
    every call; on one process alone it would wait for the others.

    Args:
        criterion: a :class:`slr_plugin.SLRLoss`.

    Raises:
        TypeError: ``criterion`` is no SLRLoss.

    >>> from slr_plugin import SLRLoss
    >>> criterion = SLRLoss(0.2, memory_bank_size=(16, 8))
    >>> monitor = LabelMonitor(criterion)
    >>> for step in range(4):
    ...     queries, keys, classes = torch.randn(8, 8), torch.randn(8, 8), torch.randint(2, (8,))
    ...     monitor.announce(classes, measure=step % 2 == 1)
    ...     loss = criterion(queries.requires_grad_(), keys)
    >>> len(monitor.measured), bool(0 <= monitor.mean().same <= 1)
    (2, True)
    """

    def __init__(self, criterion: SLRLoss) -> None:
        if not hasattr(criterion, "observers"):
            raise TypeError(f"criterion must be a slr_plugin.SLRLoss, got {type(criterion).__name__}")
        self.criterion = criterion
        self.measured: list[LabelQuality] = []
        self._averaged: list[LabelQuality] = []  # by the last call of mean()
        self._announced: Tensor | None = None  # of the next call
        self._classes: Tensor | None = None  # of the call under way
        self._measures = False
        self._queue_classes, self._generation = self._unknown()
        criterion.observers.append(self)

    @property
    def queue_classes(self) -> Tensor:
        """The classes (n,) of the keys in the queue, -1 where unknown."""
        return self._table().clone()

    def announce(self, classes: Tensor, measure: bool = True) -> None:
        """Tell the classes (s,) of the criterion's next call, -1 where unknown; whether to measure its labels.

        Raises:
            TypeError: ``classes`` is no integer tensor.
        """
        check_index_tensor("classes", classes)
        self._announced, self._measures = classes, measure

    def mean(self) -> LabelQuality:
        """The mean of what was measured since the last call of this method; not a number if nothing was."""
        self._averaged, self.measured = self.measured, []
        return LabelQuality.average(self._averaged)

    def summary(self) -> str:
        """Say in words how good the labels are, and what to change: those measured since the last :meth:`mean`.

        If there are none, those of that mean.
        """
        return summary(LabelQuality.average(self.measured or self._averaged), self.criterion)

    def remove(self) -> None:
        """Let go of the criterion; a second time does nothing."""
        if self in self.criterion.observers:
            self.criterion.observers.remove(self)

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint needs beside the criterion's."""
        return {"queue_classes": self.queue_classes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, after the criterion did.

        Raises:
            ValueError: it comes from a queue of another length.
        """
        stored = state["queue_classes"]
        if stored.shape != self.queue_classes.shape:
            raise ValueError(
                f"the checkpoint's queue_classes has {len(stored)} entries, the queue {len(self.queue_classes)} keys; "
                "build the loss with the memory_bank_size of the checkpoint's run, or start a new monitor"
            )
        self._table().copy_(stored)

    # ---------------------------------------------------------- what the criterion calls, see Observer

    def begin(self) -> None:
        """Take the announcement, which belongs to this call even if it raises."""
        self._classes, self._announced = self._announced, None

    @torch.no_grad()
    def compare(self, key_set: KeySet, labels: Callable[[], Tensor]) -> None:
        """Measure the labels, if announced, while the queue still holds the keys that they spread over."""
        size = len(key_set.positives)
        device = key_set.positives.device
        if self._classes is None:  # nobody told
            self._classes, self._measures = torch.full((size,), -1, device=device), False
        if self._classes.shape != (size,):
            raise ValueError(
                f"the classes announced have shape {tuple(self._classes.shape)}, the criterion's batch {size} "
                "rows; announce one class per query, -1 where it is unknown"
            )
        local = self._classes.to(device, torch.int64)
        self._classes = gather(local) if self.criterion.gather_distributed else local
        if self._measures:
            rows, columns = key_set.column_classes(local, self._classes, self._table().to(device))
            self.measured.append(label_quality(labels(), rows, columns, key_set.own_columns()))

    def enqueue(self, enqueued: Enqueued) -> None:
        """Record the classes of the keys that were just enqueued."""
        places, accepted = enqueued
        classes = self._table()
        if self._classes is None:  # this monitor did not see the call begin
            newest = torch.full_like(places, -1)
        else:
            newest = self._classes[-len(places) :].to(classes.device)
        # Without reading back whether the keys were finite; in place, as a CUDA graph repeats it.
        classes.index_copy_(0, places, torch.where(accepted, newest, classes[places]))

    def _table(self) -> Tensor:
        """The classes that later calls write to, on the queue's device; unknown ones after its keys were replaced."""
        with torch.inference_mode(False):  # else no training could write to them
            if self._generation != self.criterion.memory_bank.generation:
                self._queue_classes, self._generation = self._unknown()
            self._queue_classes = self._queue_classes.to(self.criterion.memory_bank.bank.device)
        return self._queue_classes

    def _unknown(self) -> tuple[Tensor, int]:
        bank = self.criterion.memory_bank
        with torch.inference_mode(False):
            return torch.full((len(bank),), -1, device=bank.bank.device), bank.generation
