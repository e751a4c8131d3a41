"""What SANE in lightly and SANE in solo-learn share: schedules that end with the run, also with a resumed one."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from slr_plugin import CosineConfidence, MomentumMixup, SLRLoss
from slr_plugin.adapters._random import mixing_generator

_Hooks: Any = object  # those of a LightningModule, of pytorch_lightning for lightly, of lightning for solo-learn
_RUN = "slr_plugin_run"  # in a checkpoint


class SelfLabelingModule(_Hooks):  # type: ignore[misc]
    """Hooks for a LightningModule, its first base, that has one or more :class:`slr_plugin.SLRLoss`.

    Attributes:
        confidence: a number, ``(m1, m2)`` for a growth from m1 to m2 over the run, or a callable ``step -> mu``.
        mixup: the :class:`slr_plugin.MomentumMixup`, or None.
    """

    confidence: float | tuple[float, float] | Callable[[int], float]
    mixup: MomentumMixup | None
    queue_setting = "queue_size"  # how the user knows it

    def _follow(self, *losses: SLRLoss) -> None:
        """Let the losses follow the run; to be called at the end of ``__init__``."""
        self._steps = RunSteps()
        self._losses = losses  # in a tuple, so that torch does not register them once more
        self._confidences = [loss.confidence for loss in losses]  # that this module has set: another is the user's

    def on_fit_start(self) -> None:
        """Remember where this run begins."""
        super().on_fit_start()
        self._steps.begin(self.trainer)
        for callback in self.trainer.callbacks:
            if getattr(callback, "_use_buffers", False):  # Lightning's WeightAveraging and EMAWeightAveraging
                warnings.warn(
                    f"{type(callback).__name__} averages the queue and the step of the loss, which no average of them "
                    "can replace: pass use_buffers=False to it",
                    stacklevel=2,
                )

    def on_train_start(self) -> None:
        """Seed the mixing, let a resumed run go on, and lay the schedules over the run."""
        super().on_train_start()
        self._steps.resume(self.trainer)
        if self.mixup is not None:
            self.mixup.generator = mixing_generator(self.trainer.global_step)
        for number, loss in enumerate(self._losses):
            if isinstance(self.confidence, tuple | list) and loss.confidence is self._confidences[number]:
                loss.confidence = schedule(self.confidence, self._steps.total(self.trainer))
                self._confidences[number] = loss.confidence
        self._warn_of_long_queue(len(self._losses[0].memory_bank))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Place the schedules at the optimizer's step, to which several batches may belong."""
        for loss in self._losses:
            loss.set_step(self.trainer.global_step - self._steps.first)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add where the run began, and a callable confidence in words."""
        words = repr(self.confidence) if callable(self.confidence) else ""
        checkpoint[_RUN] = self._steps.state_dict(self.trainer) | {"confidence": words}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Read where the run began; warn if its confidence was a callable and is none now."""
        run = checkpoint.get(_RUN, {})  # none in earlier versions
        self._steps.load_state_dict(run)
        if run.get("confidence") and not callable(self.confidence):
            warnings.warn(
                f"the checkpoint was trained with confidence={run['confidence']}, a callable, which it does not hold; "
                f"this module has {self.confidence}: pass confidence= again",
                stacklevel=2,
            )

    def _warn_of_long_queue(self, queue_size: int) -> None:
        try:
            images = len(self.trainer.train_dataloader.dataset)
        except (AttributeError, TypeError):  # several loaders, or data without a length
            return
        if queue_size > images:
            warnings.warn(
                f"the queue of {queue_size:,} keys is longer than the training set of {images:,} images: it holds "
                f"earlier keys of the batch's own images, as negatives; set {self.queue_setting} well below that, "
                f"{max(1, images // 3)} say",
                stacklevel=2,
            )


def schedule(confidence: Any, total_steps: int) -> Any:
    """The confidence for SLRLoss: of ``(m1, m2)`` the growth over a run, anything else as it is."""
    if not isinstance(confidence, tuple | list):
        return confidence
    if len(confidence) != 2:
        raise ValueError(f"confidence must be a number, (m1, m2) or a callable, got {confidence}")
    return CosineConfidence(confidence[0], confidence[1], total_steps)


class RunSteps:
    """Counts the optimizer steps of a run from its beginning, also where it goes on from a checkpoint.

    A second fit of the same trainer counts ``global_step`` on but is a run of its own. A run that goes on with another
    number of steps per epoch (other processes, batches or accumulation) stands at the same share of its epochs.

    Attributes:
        first: the ``global_step`` from which the steps of this run count.
    """

    first: int
    _earlier: int  # steps of earlier fits, which the trainer's estimate of all steps includes
    _per_epoch: float | None  # steps per epoch of the checkpoint's run, in whose steps both are; None: in today's

    def __init__(self) -> None:
        self._stored: Mapping[str, Any] = {}  # in the checkpoint that was loaded last
        self._take({})

    def begin(self, trainer: Any) -> None:
        """To be called in ``on_fit_start``, before a checkpoint restores ``global_step``."""
        now = int(trainer.global_step)
        self._take(self._stored if trainer.ckpt_path else {"first": now, "earlier": now})

    def resume(self, trainer: Any) -> None:
        """To be called in ``on_train_start``, after a checkpoint restored ``global_step``; changes the total."""
        if trainer.ckpt_path:  # once more: FSDP and others load it after the fit began
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
        """Read what the checkpoint of a run kept; it counts if the next fit goes on from it."""
        self._stored = dict(state)

    def _take(self, state: Mapping[str, Any]) -> None:
        self.first, self._earlier = state.get("first", 0), state.get("earlier", 0)
        self._per_epoch = state.get("per_epoch")

    def _share(self, trainer: Any) -> float:
        """Today's steps per epoch over the checkpoint's; 1 where steps and not epochs end the run."""
        if not self._per_epoch or trainer.max_epochs <= 0:
            return 1.0
        share = epoch_steps(trainer, 1) / self._per_epoch
        ends_by_epochs = epoch_steps(trainer, trainer.max_epochs) <= trainer.estimated_stepping_batches
        return share if ends_by_epochs and math.isfinite(share) else 1.0


def epoch_steps(trainer: Any, epochs: int) -> float:
    """The optimizer steps of the first epochs. The trainer's estimate leaves out an accumulation that changes."""
    batches, accumulated = trainer.num_training_batches, [trainer.accumulate_grad_batches] * epochs
    for callback in trainer.callbacks:
        if hasattr(callback, "get_accumulate_grad_batches"):  # the GradientAccumulationScheduler of either Lightning
            accumulated = [callback.get_accumulate_grad_batches(epoch) for epoch in range(epochs)]
    return math.inf if math.isinf(batches) and epochs else sum(math.ceil(batches / count) for count in accumulated)
