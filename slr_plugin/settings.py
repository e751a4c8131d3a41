"""Hyperparameters of SLRLoss and their validation, wherever one is given or assigned."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from slr_plugin.checks import check_confidence, check_flag, check_integer, check_number
from slr_plugin.schedules import CosineConfidence

Confidence = float | Callable[[int], float]


class Settings(NamedTuple):
    """What one call needs besides features."""

    temperature: float | Tensor  # a tensor may be trained
    sharpening: float
    refined_weight: float
    confidence: float | Tensor
    refines: bool  # False only where the confidence is known to be 0: the labels need no pass then
    chunk_size: int | None = None


def check_setting(name: str, value: Any) -> Any:
    """Return the value as the loss keeps it, or raise ValueError or TypeError that names the setting."""
    return SETTINGS[name](name, value)


class HasSettings(nn.Module):
    """A module whose settings are checked whenever they are assigned."""

    temperature: float | Tensor
    sharpening: float
    confidence: Confidence
    refined_weight: float
    in_batch_keys: bool
    gather_distributed: bool
    symmetric: bool
    same_group: str
    chunk_size: int | None

    def __setattr__(self, name: str, value: Any) -> None:
        """Check a setting, here and wherever it is assigned later."""
        if name in SETTINGS:
            value = check_setting(name, value)
            if name == "symmetric" and value and len(self.memory_bank):  # type: ignore[arg-type]
                raise ValueError(
                    "symmetric=True needs memory_bank_size=0: with a queue only out0 is compared with keys; for both "
                    "directions call one loss per direction"
                )
            # A parameter or module that had this name; torch takes no number in its place.
            self._parameters.pop(name, None)
            self._modules.pop(name, None)
        super().__setattr__(name, value)

    def settings_at(self, step: Tensor, dtype: torch.dtype) -> Settings:
        """Return the settings of a call at a step () of the schedule, for features of a dtype."""
        mu: float | Tensor
        if isinstance(self.confidence, CosineConfidence):
            mu = self.confidence(step.to(dtype))
        elif callable(self.confidence):
            mu = check_confidence(f"confidence({int(step)})", self.confidence(int(step)))
            mu = torch.tensor(mu, dtype=torch.float64, device="cpu")
        else:
            mu = self.confidence
        refines = callable(self.confidence) or self.confidence > 0
        temperature = as_scalar(self.temperature, dtype)
        return Settings(temperature, self.sharpening, self.refined_weight, mu, refines, self.chunk_size)


def as_scalar(temperature: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """A temperature as the objective takes it: a tensor () of the features' dtype, or a number."""
    return temperature.reshape(()).to(dtype) if isinstance(temperature, Tensor) else temperature


def _checked_temperature(name: str, value: Any) -> float | Tensor:
    if isinstance(value, Tensor):
        if value.numel() != 1 or not value.dtype.is_floating_point:
            raise ValueError(
                f"{name} must be a number or a floating point tensor with one value, got {value.dtype} of shape "
                f"{tuple(value.shape)}"
            )
        # Read on the CPU only: elsewhere it would wait for the device whenever it is assigned.
        if value.device.type == "cpu" and not torch.compiler.is_compiling():
            _checked_temperature(name, value.item())
        return value
    number = check_number(name, value)
    if abs(number) < 1e-8:
        raise ValueError(f"{name} must be at least 1e-8 in magnitude, got {value}")
    return number


def _checked_confidence(name: str, value: Any) -> Confidence:
    return value if callable(value) else check_confidence(name, value)


def _checked_size(name: str, value: Any) -> int | None:
    return None if value is None else check_integer(name, value, low=1)


def _checked_same_group(name: str, value: Any) -> str:
    if value not in ("positive", "ignored"):
        raise ValueError(f'{name} must be "positive" or "ignored", got {value!r}')
    return str(value)


SETTINGS: dict[str, Callable[[str, Any], Any]] = {
    "temperature": _checked_temperature,
    "sharpening": functools.partial(check_number, low=1e-8, high=1.0),
    "confidence": _checked_confidence,
    "refined_weight": functools.partial(check_number, low=0.0, high=1.0),
    "in_batch_keys": check_flag,
    "gather_distributed": check_flag,
    "symmetric": check_flag,
    "same_group": _checked_same_group,
    "chunk_size": _checked_size,
}
