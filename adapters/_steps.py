"""Where a run of a Lightning trainer begins and how long it is, and whether its queue is in good hands."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

NEW_RUN: dict[str, Any] = {"first": 0, "earlier": 0, "per_epoch": None}


class RunSteps:
    """The optimizer steps of a run, counted from where it begins, also where it goes on from a checkpoint.

    A second fit of the same trainer counts ``global_step`` on but is a run of its own. A run that goes on with another
    number of steps per epoch (other processes, batches or accumulation) stands at the same share of its epochs.

    Attributes:
        first: the ``global_step`` from which the steps of this run count.
    """

    def __init__(self) -> None:
        self.first = 0
        self._earlier = 0  # the steps of earlier fits, which the trainer's estimate of all steps includes
        self._per_epoch: float | None = None  # of the run that goes on, as long as both numbers above are in its steps
        self._stored: Mapping[str, Any] = NEW_RUN  # in the checkpoint that was loaded last
        self._taken: Mapping[str, Any] = NEW_RUN  # of this fit

    def begin(self, trainer: Any) -> None:
        """To be called in ``on_fit_start``, before a checkpoint restores ``global_step``."""
        now = int(trainer.global_step)
        self._take(self._stored if trainer.ckpt_path else NEW_RUN | {"first": now, "earlier": now})

    def go_on(self, trainer: Any) -> None:
        """To be called in ``on_train_start``, after a checkpoint restored ``global_step``; changes the total."""
        if trainer.ckpt_path and self._taken is not self._stored:  # FSDP and others load it after the fit began
            self._take(self._stored)
        share = self._share(trainer)
        if share != 1:
            warnings.warn(
                f"this run takes {epoch_steps(trainer, 1)} optimizer steps in an epoch where its checkpoint's took "
                f"{self._per_epoch}: the schedules go on at the same share of the epochs",
                stacklevel=2,
            )
            self.first = trainer.global_step - round((trainer.global_step - self.first) * share)
            self._earlier = round(self._earlier * share)
        self._per_epoch = None

    def total(self, trainer: Any) -> int:
        """The steps of this run; ask before its first one.

        Raises:
            ValueError: the run has no end.
        """
        steps = trainer.estimated_stepping_batches
        if trainer.max_epochs > 0:  # -1 without a limit
            steps = min(steps, epoch_steps(trainer, trainer.max_epochs))
        steps -= round(self._earlier * self._share(trainer))
        if not 0 < steps < math.inf:
            raise ValueError(
                f"the schedules reach their ends with the run, which has {'no known' if steps < 0 else steps} steps: "
                "set max_epochs or max_steps of the Trainer (max_steps where the data have no length)"
            )
        return int(steps)

    def state_dict(self, trainer: Any) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"first": self.first, "earlier": self._earlier, "per_epoch": epoch_steps(trainer, 1)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what the checkpoint of a run kept, if the next fit goes on from it."""
        self._stored = dict(state)

    def _take(self, numbers: Mapping[str, Any]) -> None:
        self._taken = numbers
        self.first, self._earlier, self._per_epoch = (numbers[name] for name in NEW_RUN)

    def _share(self, trainer: Any) -> float:
        """Today's steps per epoch over the checkpoint's; 1 where steps and not epochs end the run."""
        if not self._per_epoch or trainer.max_epochs <= 0:
            return 1.0
        steps, whole, today = (
            trainer.estimated_stepping_batches,
            *(epoch_steps(trainer, n) for n in (trainer.max_epochs, 1)),
        )
        return today / self._per_epoch if whole <= steps and math.isfinite(today / self._per_epoch) else 1.0


def epoch_steps(trainer: Any, epochs: int) -> float:
    """The optimizer steps of the first epochs. The trainer's estimate leaves out an accumulation that changes."""
    batches, accumulated = trainer.num_training_batches, [trainer.accumulate_grad_batches] * epochs
    for callback in trainer.callbacks:
        if hasattr(callback, "get_accumulate_grad_batches"):  # the GradientAccumulationScheduler of either Lightning
            accumulated = [callback.get_accumulate_grad_batches(epoch) for epoch in range(epochs)]
    return math.inf if math.isinf(batches) and epochs else sum(math.ceil(batches / count) for count in accumulated)


def warn_of_averaged_queue(trainer: Any) -> None:
    """Warn if a callback averages buffers; ask where the fit begins."""
    for callback in trainer.callbacks:
        if getattr(callback, "_use_buffers", False):  # Lightning's WeightAveraging and EMAWeightAveraging
            warnings.warn(
                f"{type(callback).__name__} averages the queue and the step of the loss, which no average of them can "
                "replace: pass use_buffers=False to it",
                stacklevel=2,
            )


def warn_of_long_queue(trainer: Any, queue_size: int, setting: str) -> None:
    """Warn if the queue holds more keys than there are training images; ask when the training begins."""
    try:
        images = len(trainer.train_dataloader.dataset)
    except (AttributeError, TypeError):  # several loaders, or data without a length
        return
    if queue_size > images:
        warnings.warn(
            f"the queue of {queue_size:,} keys is longer than the training set of {images:,} images: it holds earlier "
            f"keys of the batch's own images, as negatives; set {setting} well below that, {max(1, images // 3)} say",
            stacklevel=2,
        )
