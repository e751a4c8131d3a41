"""Settings of whole trainings, once for everybody: the paper's two, and ours for labels from known features."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from slr_plugin.checks import check_integer
from slr_plugin.loss import SLRLoss
from slr_plugin.mixup import MomentumMixup
from slr_plugin.schedules import CosineConfidence


@dataclass(frozen=True)
class Preset:
    """Holds the settings of a training; ``dataclasses.replace`` makes another.

    Attributes:
        temperature: of :class:`slr_plugin.SLRLoss`, as are ``sharpening`` and ``refined_weight``.
        sharpening: below 1 the refined labels favour the most similar keys more.
        confidence: its start and its end over the run, of :class:`slr_plugin.CosineConfidence`.
        refined_weight: the share of the refined term.
        kappa: of :class:`slr_plugin.MomentumMixup`.
        queue_size: keys in the queue, 0 for none.
        batch_size: what ``learning_rate`` is for.
        learning_rate: of SGD, which decays along a cosine to 0.
        momentum: of SGD.
        weight_decay: of SGD.
        epochs: the length of the training.

    Raises:
        ValueError: a setting is out of its range. SLRLoss and MomentumMixup check theirs when they are built.
        TypeError: a setting is of the wrong type.

    >>> from slr_plugin import presets
    >>> criterion = presets.CIFAR10.loss(dim=128, total_steps=2000 * 195)
    >>> criterion.memory_bank.bank.shape
    torch.Size([4096, 128])
    >>> presets.CIFAR10.mixup()
    MomentumMixup(kappa=2.0, mode='elem')
    """

    temperature: float
    sharpening: float
    confidence: tuple[float, float]
    refined_weight: float
    kappa: float
    queue_size: int
    batch_size: int
    learning_rate: float
    momentum: float
    weight_decay: float
    epochs: int

    def __post_init__(self) -> None:
        for name, low in (("queue_size", 0), ("batch_size", 1), ("epochs", 1)):
            check_integer(name, getattr(self, name), low=low)
        if not isinstance(self.confidence, tuple | list) or len(self.confidence) != 2:
            raise ValueError(f"confidence must be (m1, m2), its start and its end, got {self.confidence!r}")

    def loss(self, dim: int | None = None, total_steps: int | None = None, **overrides: Any) -> SLRLoss:
        """The :class:`slr_plugin.SLRLoss` with these settings, or with ``overrides`` of them.

        Args:
            dim: of the features, needed if there is a queue.
            total_steps: of the run, needed if the confidence changes.
            overrides: other arguments of SLRLoss.
        """
        settings: dict[str, Any] = {
            "temperature": self.temperature,
            "sharpening": self.sharpening,
            "refined_weight": self.refined_weight,
        }
        start, end = self.confidence
        if self.queue_size and "memory_bank_size" not in overrides:
            settings["memory_bank_size"] = (self.queue_size, _needed("dim", dim, "these settings have a queue"))
        if "confidence" not in overrides and start == end:
            settings["confidence"] = start
        elif "confidence" not in overrides:
            steps = _needed("total_steps", total_steps, "the confidence changes over the run")
            settings["confidence"] = CosineConfidence(start, end, steps)
        return SLRLoss(**(settings | overrides))

    def mixup(self, generator: torch.Generator | None = None) -> MomentumMixup:
        """The :class:`slr_plugin.MomentumMixup` with this kappa."""
        return MomentumMixup(kappa=self.kappa, generator=generator)


def _needed(name: str, value: int | None, why: str) -> int:
    if value is None:
        raise ValueError(f"{name} must be passed: {why}")
    return value


#: The paper's settings for CIFAR-10.
CIFAR10 = Preset(
    temperature=0.2,
    sharpening=0.8,
    confidence=(0.0, 1.0),
    refined_weight=0.5,
    kappa=2.0,
    queue_size=4096,
    batch_size=256,
    learning_rate=0.03,
    momentum=0.9,
    weight_decay=1e-4,
    epochs=2000,
)

#: The paper's settings for ImageNet; it also reports 800 epochs. As it does not state lambda, that of CIFAR-10 stands
#: here.
IMAGENET = replace(CIFAR10, sharpening=1.0, confidence=(0.5, 10.0), kappa=0.1, queue_size=65536, epochs=200)

#: Ours, for two trained views and ``estimator`` in every call, since without it the positives make the whole label. The
#: label is what the estimator says, but for a thousandth. A queue wants temperature 0.2 and ``estimator_dim``.
FROM_FEATURES = replace(
    CIFAR10,
    temperature=0.1,
    sharpening=0.25,
    confidence=(1000.0, 1000.0),
    refined_weight=1.0,
    queue_size=0,
    batch_size=128,
    learning_rate=0.02,
    epochs=20,
)
