"""The prior confidence mu over training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from slr_plugin.checks import check_integer, check_number


@dataclass(frozen=True)
class CosineConfidence:
    r"""Prior confidence that moves from ``start`` to ``end`` along half a cosine, then stays.

    .. math:: \mu_t = m_2 - (m_2 - m_1) (\cos(\pi t / T) + 1) / 2, \qquad \mu_t = m_2 \text{ for } t \ge T

    Args:
        start: m1 >= 0, the confidence at step 0. The paper takes 0 on CIFAR-10 and 0.5 on ImageNet.
        end: m2 >= 0, the confidence from step ``total_steps`` on. The paper takes 1 and 10.
        total_steps: T >= 1, usually the number of optimiser steps of the run.

    Raises:
        ValueError: an argument is out of its range, or the step is a negative int (a negative tensor counts as 0).
        TypeError: an argument is not a number.

    >>> confidence = CosineConfidence(start=0.0, end=1.0, total_steps=100)
    >>> [round(confidence(step), 3) for step in (0, 25, 50, 100, 1000)]
    [0.0, 0.146, 0.5, 1.0, 1.0]
    """

    start: float
    end: float
    total_steps: int

    def __post_init__(self) -> None:
        check_number("start", self.start, low=0.0)
        check_number("end", self.end, low=0.0)
        check_integer("total_steps", self.total_steps, low=1)

    @overload
    def __call__(self, step: int) -> float: ...
    @overload
    def __call__(self, step: Tensor) -> Tensor: ...
    def __call__(self, step: int | Tensor) -> float | Tensor:
        """The confidence at ``step``: a float for an int, a float64 tensor (no device synchronisation) for a tensor."""
        if isinstance(step, Tensor):
            progress = (step.double() / self.total_steps).clamp(0.0, 1.0)
            return self.end - (self.end - self.start) * (torch.cos(math.pi * progress) + 1) / 2
        if step < 0:
            raise ValueError(f"step must be >= 0, got {step}")
        progress_ = min(step / self.total_steps, 1.0)
        return self.end - (self.end - self.start) * (math.cos(math.pi * progress_) + 1) / 2
