"""The numbers of the loss, and what each of them may be: checked wherever one is given or assigned."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from slr_plugin.checks import check_confidence, check_flag, check_integer, check_no_tangent, check_number
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
    has_changed: bool = False  # this and the next: see softmax_stats
    may_change: bool = False

    def one_hot(self) -> Settings:
        """The same without refinement."""
        # Not _replace, which torch.compile cannot trace in torch 2.4.
        return Settings(
            self.temperature,
            self.sharpening,
            self.refined_weight,
            self.confidence,
            refines=False,
            chunk_size=self.chunk_size,
            has_changed=self.has_changed,
            may_change=self.may_change,
        )


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
    chunk_size: int | None
    _mu: Tensor | None = None  # a confidence that is a number: torch.compile compiles anew for new Python numbers
    _refines = True
    _was_compiled = False
    _first_temperature: Tensor | None = None  # what a parameter was when it was assigned; None without a value

    def __setattr__(self, name: str, value: Any) -> None:
        """Check a setting, here and wherever it is assigned later."""
        if name in SETTINGS:
            value = check_setting(name, value)
            if name == "symmetric" and value and len(self.memory_bank):  # type: ignore[arg-type]
                raise ValueError(
                    "symmetric=True needs memory_bank_size=0: with a queue only out0 is compared with keys; for both "
                    "directions call one loss per direction"
                )
            if name == "temperature" and self._was_compiled and isinstance(value, float):
                warnings.warn(
                    "torch.compile compiles the loss anew for every new temperature that is a Python number: "
                    "assign a tensor, criterion.temperature = torch.tensor(...)",
                    stacklevel=2,
                )
            # A parameter or module that had this name; torch takes no number in its place.
            self._parameters.pop(name, None)
            self._modules.pop(name, None)
            if name == "confidence":
                with torch.inference_mode(False):
                    self._mu = None if callable(value) else torch.tensor(value, dtype=torch.float64, device="cpu")
                self._refines = callable(value) or value > 0
            if name == "temperature":
                has_value = isinstance(value, nn.Parameter) and not value.is_meta
                self._first_temperature = value.detach().clone() if has_value else None
        super().__setattr__(name, value)

    def settings_at(
        self, step: Tensor, dtype: torch.dtype, has_changed: bool = False, may_change: bool = False
    ) -> Settings:
        """Return the settings of a call at a step () of the schedule, for features of a dtype."""
        if torch.compiler.is_compiling():
            self._was_compiled = True
        mu: float | Tensor
        if isinstance(self.confidence, CosineConfidence):
            mu = self.confidence(step.to(dtype))
        elif self._mu is None:
            mu = self._called_schedule(step)
        else:
            mu = self._mu if torch.compiler.is_compiling() else self.confidence  # type: ignore[assignment]
        temperature = as_scalar(self.temperature, dtype)
        if isinstance(temperature, Tensor) and temperature.is_meta and not step.is_meta:
            raise RuntimeError(
                "temperature is on the meta device, which holds no value: assign criterion.temperature a number or a "
                "tensor that has one"
            )
        return Settings(
            temperature,
            self.sharpening,
            self.refined_weight,
            mu,
            self._refines,
            self.chunk_size,
            has_changed,
            may_change,
        )

    def _reset_temperature(self) -> None:
        """Give a parameter the value that it had when it was assigned, or not a number where it had none."""
        if isinstance(self.temperature, nn.Parameter) and not self.temperature.is_meta:
            first = self._first_temperature
            self.temperature.fill_(math.nan if first is None else first.reshape(()))

    def _called_schedule(self, step: Tensor) -> Tensor:
        assert callable(self.confidence)
        if torch.compiler.is_compiling():
            warnings.warn(
                "torch.compile compiles the loss anew at every step of a schedule that is a Python function: use "
                "CosineConfidence",
                stacklevel=2,
            )
        mu = self.confidence(int(step))
        check_confidence(f"confidence({int(step)})", mu)
        return torch.tensor(mu, dtype=torch.float64, device="cpu")


def as_scalar(temperature: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """A temperature as the objective takes it: a tensor () of the features' dtype, or a number."""
    if not isinstance(temperature, Tensor):
        return temperature
    check_no_tangent(temperature)
    return temperature.reshape(()).to(dtype)


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
    check_number(name, value)
    if abs(value) < 1e-8:
        raise ValueError(f"{name} must be at least 1e-8 in magnitude, got {value}")
    return float(value)


def _checked_sharpening(name: str, value: Any) -> float:
    check_number(name, value)
    if not 1e-8 <= value <= 1:
        raise ValueError(f"{name} must be in {'(0, 1]' if value <= 0 or value > 1 else '[1e-8, 1]'}, got {value}")
    return float(value)


def _checked_confidence(name: str, value: Any) -> Confidence:
    if callable(value):
        return value  # type: ignore[no-any-return]
    check_confidence(name, value)
    return float(value)


def _checked_weight(name: str, value: Any) -> float:
    check_number(name, value, low=0.0, high=1.0)
    return float(value)


def _checked_size(name: str, value: Any) -> int | None:
    if value is not None:
        check_integer(name, value, low=1)
    return value and int(value)


def _checked_flag(name: str, value: Any) -> bool:
    check_flag(name, value)
    return bool(value)


SETTINGS: dict[str, Callable[[str, Any], Any]] = {
    "temperature": _checked_temperature,
    "sharpening": _checked_sharpening,
    "confidence": _checked_confidence,
    "refined_weight": _checked_weight,
    "in_batch_keys": _checked_flag,
    "gather_distributed": _checked_flag,
    "symmetric": _checked_flag,
    "chunk_size": _checked_size,
}
