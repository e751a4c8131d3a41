"""The prior confidence mu over training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from slr_plugin.checks import check_confidence, check_integer, check_number


@dataclass(frozen=True)
class CosineConfidence:
    r"""Moves the prior confidence from ``start`` to ``end`` along half a cosine, then holds it.

    ::

        μ(t) = end - (end - start) · (cos(π t / total_steps) + 1) / 2     until total_steps, then end

    Args:
        start: m1 in [0, 1e38], the confidence at step 0. The paper takes 0 on CIFAR-10 and 0.5 on ImageNet.
        end: m2 in [0, 1e38], the confidence from step ``total_steps`` on; may be below ``start``. The paper takes 1
            and 10.
        total_steps: T >= 1, usually the number of optimiser steps of the run.

    Raises:
        ValueError: an argument is out of its range, or the step is a negative number (in a tensor it counts as 0).
        TypeError: an argument is not a number.

    >>> confidence = CosineConfidence(start=0.0, end=1.0, total_steps=100)
    >>> [round(confidence(step), 3) for step in (0, 25, 50, 100, 1000)]
    [0.0, 0.146, 0.5, 1.0, 1.0]
    """

    start: float
    end: float
    total_steps: int

    def __post_init__(self) -> None:
        check_confidence("start", self.start)
        check_confidence("end", self.end)
        check_integer("total_steps", self.total_steps, low=1)
        # Plain numbers: numpy's scalars would keep their own precision.
        plain = {"start": float(self.start), "end": float(self.end), "total_steps": int(self.total_steps)}
        self.__dict__.update(plain)  # the dataclass is frozen

    @overload
    def __call__(self, step: float) -> float: ...
    @overload
    def __call__(self, step: Tensor) -> Tensor: ...
    def __call__(self, step: float | Tensor) -> float | Tensor:
        """Return the confidence at ``step``.

        Returns:
            A float for a number. For a tensor of steps a tensor, computed on its device without synchronisation, in
            float64 from float64, else in float32 (Apple's GPUs have no float64), within 5e-7 of the larger of
            ``start`` and ``end`` at every step.
        """
        if isinstance(step, Tensor):
            clamped = step.to(torch.promote_types(step.dtype, torch.float32)).clamp(0, self.total_steps)
            rest = torch.cos(clamped * (math.pi / self.total_steps)) + 1  # from 2 to exactly 0
            return self.end - rest * ((self.end - self.start) / 2)
        check_number("step", step, low=0.0)
        return self.end - (self.end - self.start) * (math.cos(math.pi * min(step / self.total_steps, 1.0)) + 1) / 2
