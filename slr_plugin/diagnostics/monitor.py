"""Follows a loss and its queue, and measures the labels of its calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from slr_plugin.checks import check_index_tensor
from slr_plugin.diagnostics.quality import LabelQuality, label_quality
from slr_plugin.distributed import gather
from slr_plugin.loss import SLRLoss


class LabelMonitor:
    """Watches a criterion's labels during training; knows the classes of the keys in its queue.

    Announce the classes of every batch; a batch that was not announced enters the queue with unknown ones. Labels are
    measured on the calls announced with ``measure``, before the loss of the same call, and cost one dense (s, K)
    matrix; the other calls cost next to nothing. Classes become unknown when a checkpoint or a reset replaces the
    queue. Where the criterion gathers over processes, build a monitor in all of them, since it gathers the classes at
    every call; on one process alone it would wait for the others. Calls are followed by the module's forward hooks,
    which ``criterion.forward(...)`` called by name does not run.

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
        if not hasattr(criterion, "labelled_keys"):
            raise TypeError(f"criterion must be a slr_plugin.SLRLoss, got {type(criterion).__name__}")
        self.criterion = criterion
        self.measured: list[LabelQuality] = []
        self._announced: Tensor | None = None  # of the next call
        self._measures = False
        self._queue_classes, self._generation = torch.empty(0, dtype=torch.long), -1  # of no queue so far
        self._hooks = (
            criterion.register_forward_pre_hook(self._before, with_kwargs=True),
            criterion.register_forward_hook(self._after),
        )

    @property
    def queue_classes(self) -> Tensor:
        """The classes (n,) of the keys in the queue, -1 where unknown."""
        return self._table().clone()

    def announce(self, classes: Tensor, measure: bool = True) -> None:
        """Tell the classes (s,) of the criterion's next call, -1 where unknown; whether to measure its labels.

        Where the criterion gathers over processes, all of them measure the same calls.

        Raises:
            TypeError: ``classes`` is no integer tensor.
        """
        check_index_tensor("classes", classes)
        self._announced, self._measures = classes, measure

    def mean(self) -> LabelQuality:
        """The mean of what was measured since the last call of this method; not a number if nothing was."""
        measured, self.measured = self.measured, []
        return LabelQuality.average(measured)

    def remove(self) -> None:
        """Let go of the criterion; a second time does nothing."""
        for hook in self._hooks:
            hook.remove()

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

    @torch.no_grad()
    def _before(self, criterion: SLRLoss, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take the announcement, which belongs to this call even if it raises; measure the labels if it says so.

        A call that activation checkpointing makes again comes without one, and its keys have unknown classes.
        """
        out0 = args[0] if args else kwargs["out0"]
        announced, self._announced = self._announced, None
        measures = self._measures and announced is not None
        unknown = torch.full((len(out0),), -1, device=out0.device)
        local = unknown if announced is None else announced.to(out0.device, torch.int64)
        if local.shape != unknown.shape:
            raise ValueError(
                f"the classes announced have shape {tuple(local.shape)}, the criterion's batch {len(out0)} rows; "
                "announce one class per query, -1 where it is unknown"
            )
        self._classes = gather(local, "out0") if criterion.gather_distributed else local
        self._step, self._pointer = criterion.step.clone(), criterion.memory_bank.bank_ptr.clone()
        if measures:
            key_set, labels = criterion.labelled_keys(*args, **kwargs)
            rows, columns = key_set.column_classes(local, self._classes, self._table().to(out0.device))
            self.measured.append(label_quality(labels, rows, columns, key_set.positive_columns()))

    @torch.no_grad()
    def _after(self, criterion: SLRLoss, args: tuple[Any, ...], loss: Tensor) -> None:
        """Record the classes of the keys that entered the queue, if they did, without reading values back."""
        classes = self._table()
        if not len(classes):
            return
        newest = self._classes[-len(classes) :].to(classes.device)
        start = self._pointer + (len(self._classes) - len(newest))
        places = (start + torch.arange(len(newest), device=classes.device)) % len(classes)
        entered = (criterion.step != self._step).to(classes.device)
        # In place, as a CUDA graph repeats it.
        classes.index_copy_(0, places, torch.where(entered, newest, classes[places]))

    def _table(self) -> Tensor:
        """The classes that later calls write to, on the queue's device; unknown ones after its keys were replaced."""
        bank = self.criterion.memory_bank
        with torch.inference_mode(False):  # else no training could write to them
            if self._generation != bank.generation:
                self._queue_classes, self._generation = torch.full((len(bank),), -1), bank.generation
            self._queue_classes = self._queue_classes.to(bank.bank.device)
        return self._queue_classes
