"""What a caller gave, checked before anything changes, and the unit features made of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from slr_plugin.checks import check_float_tensor
from slr_plugin.mixup import Mix, check_mix


def unit_features(out0: Tensor, out1: Tensor, crops: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor]:
    """Unit rows of one dtype: float64 if ``out0`` or ``out1``, both (s, d), is, else float32.

    Returns:
        The trained rows, queries and then crop after crop, ((1 + c) s, d), and the positives, (s, d).
    """
    dtype = torch.promote_types(torch.promote_types(out0.dtype, out1.dtype), torch.float32)
    trained = torch.cat([rows.to(dtype) for rows in (out0, *crops)]) if crops else out0.to(dtype)
    return F.normalize(trained, dim=1), F.normalize(out1.to(dtype), dim=1)


def check_views(out0: Tensor, out1: Tensor) -> None:
    """Raise ValueError or TypeError unless both are (batch, dimension), of one shape and device."""
    _check_features("out0", out0)
    _check_features("out1", out1)
    if out0.shape != out1.shape:
        raise ValueError(f"out0 and out1 must have one shape, got {tuple(out0.shape)} and {tuple(out1.shape)}")
    if out0.device != out1.device:
        raise ValueError(f"out0 is on {out0.device} and out1 on {out1.device}; move them to one device")


def checked_crops(
    out0: Tensor, mixed: Tensor | Sequence[Tensor] | None, mix: Mix | Sequence[Mix] | None
) -> tuple[list[Tensor], list[Mix]]:
    """The mixed views, and how each was mixed, one to one; one tensor and one mix count as one crop."""
    if mixed is None and mix is None:
        return [], []
    if mixed is None or mix is None:
        given, absent = ("mixed", "mix") if mix is None else ("mix", "mixed")
        raise ValueError(f"{given} came without {absent}: pass both, criterion(out0, out1, mixed, mix)")
    if isinstance(mixed, Tensor) and _is_mix(mix):
        return [mixed], [_checked_mix("", out0, mixed, mix)]
    if not isinstance(mixed, Tensor | list | tuple):
        raise TypeError(f"mixed must be a tensor or a list of tensors, one per crop, got {type(mixed).__name__}")
    if not isinstance(mix, list | tuple):
        raise TypeError(
            "mix must be the (theta, partner) that MomentumMixup returned or a list of them, one per crop, got "
            f"{type(mix).__name__}"
        )
    if isinstance(mixed, Tensor) or _is_mix(mix) or len(mixed) != len(mix) or not mixed:
        raise ValueError(f"mixed and mix must match one to one, got mixed={_count(mixed)} and mix={_count(mix)}")
    pairs = enumerate(zip(mixed, mix, strict=True))
    return list(mixed), [_checked_mix(f"[{i}]", out0, *pair) for i, pair in pairs]


def _checked_mix(where: str, out0: Tensor, features: Any, mix: Any) -> Mix:
    _check_features(f"mixed{where}", features)
    if not _is_mix(mix):
        raise TypeError(
            f"mix{where} must be the (theta, partner) that MomentumMixup returned, got {type(mix).__name__}"
        )
    if features.shape != out0.shape:
        raise ValueError(f"mixed{where} must have the shape of out0, {tuple(out0.shape)}, got {tuple(features.shape)}")
    if features.device != out0.device:
        raise ValueError(f"mixed{where} is on {features.device} and out0 on {out0.device}; move it there")
    check_mix(Mix(*mix), len(out0), name=f"mix{where}.")
    theta, partner = mix
    return Mix(theta.to(out0.device), partner.to(out0.device, torch.long))


def _is_mix(value: Any) -> TypeGuard[Mix]:
    """A Mix, or a plain (theta, partner)."""
    return isinstance(value, Mix) or (isinstance(value, tuple) and len(value) == 2 and not any(map(_is_mix, value)))


def _count(value: Any) -> str:
    return "one" if isinstance(value, Tensor) or _is_mix(value) else f"a list of {len(value)}"


def _check_features(name: str, value: Any) -> None:
    check_float_tensor(name, value)
    if value.ndim != 2 or 0 in value.shape:
        raise ValueError(f"{name} must have shape (batch, dimension), both >= 1, got {tuple(value.shape)}")
