"""What SANE in lightly and SANE in solo-learn share: seeds, schedules over the run, and what is known of the images."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from slr_plugin import CosineConfidence, MomentumMixup, SLRLoss
from slr_plugin.adapters.knowledge import Knowledge
from slr_plugin.distributed import rank

_Hooks: Any = object  # those of a LightningModule, of pytorch_lightning for lightly, of lightning for solo-learn


class SelfLabelingModule(_Hooks):  # type: ignore[misc]
    """Hooks for a LightningModule, its first base, that has one or more :class:`slr_plugin.SLRLoss`."""

    confidence: float | tuple[float, float] | Callable[[int], float]  # of (m1, m2) it grows from m1 to m2 over the run
    mixup: MomentumMixup | None
    knowledge: Knowledge
    queue_setting = "queue_size"  # how the user knows it
    place_of_images = 2  # in a batch: numbers or names of its images
    first_step = 0  # the trainer's step at which this run began

    def _follow(self, *losses: SLRLoss) -> None:
        """Let the losses follow the run; to be called at the end of ``__init__``."""
        self._losses = losses  # in a tuple, so that torch does not register them once more
        self._schedule = losses[0].confidence  # that this module has set: another is the user's

    def total_steps(self) -> int:
        """The optimizer steps of this run; ValueError if it has no known end."""
        steps = self.trainer.estimated_stepping_batches - self.first_step
        if not 0 < steps < math.inf:
            raise ValueError(
                "the schedules reach their ends with the run, which has no known end: set max_epochs or max_steps of "
                "the Trainer (max_steps where the data have no length)"
            )
        return int(steps)

    def setup(self, stage: str) -> None:
        """Remember where this run begins: a second fit of a trainer goes on counting steps."""
        super().setup(stage)
        self.first_step = self.trainer.global_step

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on in the run of a checkpoint."""
        super().on_load_checkpoint(checkpoint)
        self.first_step = 0

    def on_train_start(self) -> None:
        """Seed the mixing, lay the schedules over the run, and see that what is known is of these images."""
        super().on_train_start()
        images: Any = getattr(self.trainer.train_dataloader, "dataset", None)
        if self.knowledge.tables:
            self.knowledge.attach(images)
        if self.mixup is not None:
            self.mixup.generator = mixing_generator(self.trainer.global_step)
        follow = [loss for loss in self._losses if loss.confidence is self._schedule]
        if isinstance(self.confidence, tuple | list) and follow:
            self._schedule = schedule(self.confidence, self.total_steps())
            for loss in follow:
                loss.confidence = self._schedule
        queue_size = len(self._losses[0].memory_bank)
        if hasattr(images, "__len__") and queue_size > len(images):
            warnings.warn(
                f"the queue of {queue_size:,} keys is longer than the training set of {len(images):,} images: it holds "
                f"earlier keys of the batch's own images, as negatives; set {self.queue_setting} well below that",
                stacklevel=2,
            )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Place the schedules at the optimizer's step, to which several batches may belong."""
        for loss in self._losses:
            loss.set_step(self.trainer.global_step - self.first_step)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Put what is known of the images in the place of their numbers, while these are on the CPU."""
        batch = super().on_before_batch_transfer(batch, dataloader_idx)
        if not (self.knowledge.tables and self.trainer.training):
            return batch
        if len(batch) <= self.place_of_images:
            raise ValueError(
                f"with {' and '.join(self.knowledge.tables)} a batch must say which images it has: take lightly's "
                "LightlyDataset, or wrap a data set in slr_plugin.adapters.lightly.Indexed"
            )
        batch = list(batch)
        batch[self.place_of_images] = self.knowledge.of(batch[self.place_of_images])
        return batch


def schedule(confidence: Any, total_steps: int) -> Any:
    """The confidence for SLRLoss: of ``(m1, m2)`` the growth over a run, anything else as it is."""
    if not isinstance(confidence, tuple | list):
        return confidence
    if len(confidence) != 2:
        raise ValueError(f"confidence must be a number, (m1, m2) or a callable, got {confidence}")
    return CosineConfidence(confidence[0], confidence[1], total_steps)


def mixing_generator(step: int) -> torch.Generator:
    """A generator with a seed of the global seed, the process, and the step at which a run begins or goes on.

    Lightning seeds all processes alike: they would all mix alike. It is made where the training begins, since none can
    be sent to the processes that a strategy spawns.
    """
    seed = np.random.SeedSequence([torch.initial_seed(), rank(), step]).generate_state(1)
    return torch.Generator().manual_seed(int(seed[0]))
