"""The numbers of the loss, and what each of them may be: checked wherever one is given or assigned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slr_plugin.checks import check_flag, check_integer, check_number

Confidence = float | Callable[[int], float]

# Beyond these, logits or weights overflow float32.
SMALLEST_TEMPERATURE = SMALLEST_SHARPENING = 1e-8
LARGEST_CONFIDENCE = 1e30


class Settings(NamedTuple):
    """The numbers of equation (9) in one call."""

    temperature: float | Tensor  # a tensor may be trained
    sharpening: float
    refined_weight: float
    confidence: float | Tensor
    refines: bool  # False only where the confidence is known to be 0: the labels need no pass then
    chunk_size: int | None = None
    stale: bool = False  # see softmax_stats


def check_setting(name: str, value: Any) -> Any:
    """Return the value as the loss keeps it, or raise ValueError or TypeError that names the setting."""
    return _CHECKS[name](value)


def is_setting(name: str) -> bool:
    """Whether a setting has this name."""
    return name in _CHECKS


def check_confidence(name: str, value: Any) -> float:
    """Return a confidence mu that a number or a schedule gave, under the name it is to have in an error."""
    check_number(name, value, low=0.0, high=LARGEST_CONFIDENCE)
    return float(value)


def _temperature(value: Any) -> float | Tensor:
    if isinstance(value, Tensor):
        if value.numel() != 1 or not value.dtype.is_floating_point:
            raise ValueError(
                f"temperature must be a number or a floating point tensor with one value, got {value.dtype} of shape "
                f"{tuple(value.shape)}"
            )
        # Read on the CPU only: elsewhere it would wait for the device whenever it is assigned.
        if value.device.type == "cpu" and not torch.compiler.is_compiling():
            _temperature(value.item())
        return value
    check_number("temperature", value)
    if abs(value) < SMALLEST_TEMPERATURE:
        raise ValueError(f"temperature must be at least {SMALLEST_TEMPERATURE} in magnitude, got {value}")
    return float(value)


def _sharpening(value: Any) -> float:
    check_number("sharpening", value)
    if not SMALLEST_SHARPENING <= value <= 1:
        raise ValueError(f"sharpening must be in (0, 1], and at least {SMALLEST_SHARPENING}, got {value}")
    return float(value)


def _confidence(value: Any) -> Confidence:
    return value if callable(value) else check_confidence("confidence", value)


def _refined_weight(value: Any) -> float:
    check_number("refined_weight", value, low=0.0, high=1.0)
    return float(value)


def _chunk_size(value: Any) -> int | None:
    if value is not None:
        check_integer("chunk_size", value, low=1)
    return value if value is None else int(value)


def _flag(name: str) -> Callable[[Any], bool]:
    def check(value: Any) -> bool:
        check_flag(name, value)
        return bool(value)

    return check


_CHECKS: dict[str, Callable[[Any], Any]] = {
    "temperature": _temperature,
    "sharpening": _sharpening,
    "confidence": _confidence,
    "refined_weight": _refined_weight,
    "chunk_size": _chunk_size,
    "in_batch_keys": _flag("in_batch_keys"),
    "gather_distributed": _flag("gather_distributed"),
}
