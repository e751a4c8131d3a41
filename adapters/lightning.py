"""A Lightning callback that logs how good refined labels are, for lightly's trainers and for solo-learn's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from slr_plugin import SLRLoss
from slr_plugin.adapters._require import require
from slr_plugin.checks import check_integer
from slr_plugin.diagnostics import LabelMonitor, LabelQuality

# lightly trains with pytorch_lightning, solo-learn with lightning; their trainers call the hooks of either's callbacks.
if find_spec("pytorch_lightning") is not None:
    from pytorch_lightning import Callback
else:
    require("lightly", "lightning")
    from lightning.pytorch import Callback  # type: ignore[assignment]


def targets(batch: Any) -> Tensor:
    """The classes of a batch: lightly's are ``(views, targets, ...)``, solo-learn's ``(indices, views, targets)``."""
    classes: Tensor = batch[1] if isinstance(batch[1], Tensor) else batch[-1]
    return classes


class LabelQualityCallback(Callback):
    """Logs ``labels/<field>`` of :class:`slr_plugin.diagnostics.LabelQuality` once per epoch.

    It is the mean over every :class:`slr_plugin.SLRLoss` in the module. A measurement builds one dense (s, K) matrix of
    labels. With several processes, those of process 0 are logged. Classes are -1 where unknown; training never sees
    them. Checkpoints keep the classes of the keys in the queue.

    Args:
        every_n_steps: measure in every n-th step, >= 1, and in the first of an epoch.
        classes: the classes (s,) of a batch as the trainer gives it.

    Attributes:
        quality: what was logged last, a :class:`slr_plugin.diagnostics.LabelQuality`, or None.

    Raises:
        ValueError: ``every_n_steps`` is below 1, or at the start of training there is no SLRLoss in the module.
    """

    def __init__(self, every_n_steps: int = 50, classes: Callable[[Any], Tensor] = targets) -> None:
        check_integer("every_n_steps", every_n_steps, low=1)
        self.every_n_steps = every_n_steps
        self.classes = classes
        self.quality: LabelQuality | None = None
        self._monitors: list[LabelMonitor] = []

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Watch the losses of the module."""
        if stage != "fit":
            return
        self.teardown(trainer, pl_module, stage)
        self._monitors = [LabelMonitor(module) for module in pl_module.modules() if isinstance(module, SLRLoss)]
        if not self._monitors:
            raise ValueError(f"{type(pl_module).__name__} has no slr_plugin.SLRLoss whose labels could be measured")

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Tell the classes, which the loss is not given."""
        for monitor in self._monitors:
            monitor.announce(self.classes(batch), not monitor.measured or batch_idx % self.every_n_steps == 0)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the means."""
        self.quality = LabelQuality.average([monitor.mean() for monitor in self._monitors])
        logs = {f"labels/{name}": value for name, value in self.quality._asdict().items()}
        pl_module.log_dict(logs, rank_zero_only=True)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Let go of the losses."""
        for monitor in self._monitors:
            monitor.remove()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"monitors": [monitor.state_dict() for monitor in self._monitors]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; where it has no state, the classes of keys in the queue are unknown at first."""
        for monitor, state in zip(self._monitors, state_dict["monitors"], strict=False):
            monitor.load_state_dict(state)
