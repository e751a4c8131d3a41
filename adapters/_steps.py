"""Where a run of a Lightning trainer begins and how long it is, and whether its queue suits its data."""

from __future__ import annotations

import math
import warnings
from typing import Any


def first_step(trainer: Any) -> int:
    """The trainer's ``global_step`` where this run begins; ask in ``on_fit_start``, before a checkpoint restores it.

    A second fit of the same trainer counts on but is a run of its own, unless it goes on from ``ckpt_path``.
    """
    return 0 if trainer.ckpt_path else int(trainer.global_step)


def run_steps(trainer: Any) -> int:
    """The optimizer steps of this run; ask before its first step.

    Raises:
        ValueError: the run has no end.
    """
    steps = trainer.estimated_stepping_batches
    if trainer.max_epochs > 0:  # -1 without a limit
        steps = min(steps, epoch_steps(trainer, trainer.max_epochs))
    steps -= first_step(trainer)
    if not 0 < steps < math.inf:
        raise ValueError(
            f"the schedules reach their ends with the run, which has {steps} steps: set max_epochs or max_steps of the "
            "Trainer (max_steps where the data have no length)"
        )
    return int(steps)


def epoch_steps(trainer: Any, epochs: int) -> float:
    """The optimizer steps of the first epochs. The trainer's estimate leaves out an accumulation that changes."""
    batches, accumulated = trainer.num_training_batches, [trainer.accumulate_grad_batches] * epochs
    for callback in trainer.callbacks:
        if hasattr(callback, "get_accumulate_grad_batches"):  # the GradientAccumulationScheduler of either Lightning
            accumulated = [callback.get_accumulate_grad_batches(epoch) for epoch in range(epochs)]
    return math.inf if math.isinf(batches) and epochs else sum(math.ceil(batches / count) for count in accumulated)


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
