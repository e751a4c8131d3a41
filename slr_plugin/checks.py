"""Checks of arguments, shared with the adapters: errors name the argument, what came, and what would do."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor


def check_number(name: str, value: Any, *, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite real number in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:  # a whole number above 1.8e308
        number = math.inf
    if not (math.isfinite(number) and low <= number <= high):
        raise ValueError(f"{name} must be {_interval(low, high)}, got {value}")
    return number


def check_confidence(name: str, value: Any) -> float:
    """A prior confidence mu in [0, 1e38], so that 1 + 2 mu, the largest z of equation (5), is finite in float32."""
    return check_number(name, value, low=0.0, high=1e38)


def check_integer(name: str, value: Any, *, low: int) -> int:
    """An integer >= low that int64 holds."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}")
    number = int(value)
    if not low <= number < 2**63:
        raise ValueError(f"{name} must be {f'>= {low}' if number < low else 'below 2**63'}, got {value}")
    return number


def check_flag(name: str, value: Any) -> bool:
    """A bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r} of type {type(value).__name__}")
    return value


def check_float_tensor(name: str, value: Any, hint: str = "") -> None:
    """A real floating point tensor; ``hint`` says what to do about another dtype."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if not value.dtype.is_floating_point:
        found = f"{value.dtype} of shape {tuple(value.shape)}"
        raise TypeError(f"{name} must have a floating point dtype, got {found}{'; ' * bool(hint)}{hint}")


def check_index_tensor(name: str, value: Any) -> None:
    """An integer tensor that can index."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must have dtype torch.int64, got {value.dtype}")


def check_values(name: str, value: Tensor, low: float, high: float) -> None:
    """Every value in [low, high].

    Values on an accelerator are not read back, which would stall it, and neither are values under ``torch.compile``.
    """
    if torch.compiler.is_compiling() or value.device.type != "cpu":
        return
    smallest, largest = (extreme.item() for extreme in value.aminmax())
    if not low <= smallest <= largest <= high:
        raise ValueError(f"{name} must be {_interval(low, high)}, got {smallest} to {largest}")


def _interval(low: float, high: float) -> str:
    if math.isinf(low) and math.isinf(high):
        return "finite"
    return f">= {low}" if math.isinf(high) else f"between {low} and {high}"
