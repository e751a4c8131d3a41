"""What a caller gave, checked before anything changes: unit features in one dtype, mixed views with their mixing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from slr_plugin._checks import check_float_tensor
from slr_plugin.mixup import Mix, check_mix


class Crop(NamedTuple):
    """One mixed view: its unit features (s, d) and how it was mixed."""

    features: Tensor
    mix: Mix


def unit_features(out0: Tensor, out1: Tensor) -> tuple[Tensor, Tensor]:
    """Both outputs checked, normalised, in one dtype: float64 if either is, else float32."""
    _check_features("out0", out0)
    _check_features("out1", out1)
    if out0.shape != out1.shape:
        raise ValueError(f"out0 and out1 must have one shape, got {tuple(out0.shape)} and {tuple(out1.shape)}")
    if out0.device != out1.device:
        raise ValueError(f"out0 is on {out0.device} and out1 on {out1.device}; move them to one device")
    dtype = torch.promote_types(torch.promote_types(out0.dtype, out1.dtype), torch.float32)
    return F.normalize(out0.to(dtype), dim=1), F.normalize(out1.to(dtype), dim=1)


def mixed_crops(
    queries: Tensor, mixed: Tensor | Sequence[Tensor] | None, mix: Mix | Sequence[Mix] | None
) -> list[Crop]:
    """The mixed views beside ``queries``, checked and normalised; one tensor and one mix count as one crop."""
    if mixed is None and mix is None:
        return []
    if mixed is None or mix is None:
        given, absent = ("mixed", "mix") if mix is None else ("mix", "mixed")
        raise ValueError(f"{given} came without {absent}: pass both, criterion(out0, out1, mixed, mix)")
    if isinstance(mixed, Tensor) and _is_mix(mix):
        return [_crop("", queries, mixed, mix)]
    if not isinstance(mixed, Tensor | list | tuple):
        raise TypeError(f"mixed must be a tensor or a list of tensors, one per crop, got {type(mixed).__name__}")
    if not isinstance(mix, list | tuple):
        raise TypeError(
            "mix must be the (theta, partner) that MomentumMixup returned or a list of them, one per crop, got "
            f"{type(mix).__name__}"
        )
    if isinstance(mixed, Tensor) or _is_mix(mix) or len(mixed) != len(mix) or not mixed:
        raise ValueError(f"mixed and mix must match one to one, got mixed={_count(mixed)} and mix={_count(mix)}")
    return [_crop(f"[{i}]", queries, *pair) for i, pair in enumerate(zip(mixed, mix, strict=True))]


def _crop(where: str, queries: Tensor, features: Any, mix: Any) -> Crop:
    _check_features(f"mixed{where}", features)
    if not _is_mix(mix):
        raise TypeError(
            f"mix{where} must be the (theta, partner) that MomentumMixup returned, got {type(mix).__name__}"
        )
    if features.shape != queries.shape:
        raise ValueError(
            f"mixed{where} must have the shape of out0, {tuple(queries.shape)}, got {tuple(features.shape)}"
        )
    if features.device != queries.device:
        raise ValueError(f"mixed{where} is on {features.device} and out0 on {queries.device}; move it there")
    check_mix(Mix(*mix), len(queries), name=f"mix{where}.")
    theta, partner = mix
    return Crop(
        features=F.normalize(features.to(queries.dtype), dim=1),
        mix=Mix(theta.to(queries), partner.to(queries.device, torch.long)),
    )


def _is_mix(value: Any) -> TypeGuard[Mix]:
    """A Mix, or a plain (theta, partner)."""
    return isinstance(value, Mix) or (isinstance(value, tuple) and len(value) == 2 and not any(map(_is_mix, value)))


def _count(value: Any) -> str:
    return "one" if isinstance(value, Tensor) or _is_mix(value) else f"a list of {len(value)}"


def _check_features(name: str, value: Any) -> None:
    check_float_tensor(name, value)
    if value.ndim != 2 or 0 in value.shape:
        raise ValueError(f"{name} must have shape (batch, dimension), both >= 1, got {tuple(value.shape)}")
