"""Validates and L2-normalises the tensors of a call."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slr_plugin.checks import check_float_tensor
from slr_plugin.mixup import Mix, check_mix

VIEWS = ("out0", "out1")  # what SLRLoss calls queries and positives


class UnitRows(torch.autograd.Function):
    r"""Divides each row by its length; :math:`\partial L / \partial x = (\dot u - u \langle u, \dot u \rangle) / |x|`.

    As ``F.normalize``, whose gradient takes autograd three times as many operations.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        """(r, d) rows, of which one of length 0 stays 0."""
        unit, length = _divided(rows)
        ctx.save_for_backward(unit, length)
        return unit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """The part of the gradient that is orthogonal to the row."""
        unit, length = ctx.saved_tensors
        along = (unit * grad).sum(1, keepdim=True)
        gradient: Tensor = grad.addcmul(unit, along, value=-1).div_(length)
        return gradient


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Compute in the dtypes of the tensors, on devices with autocast and without."""
    if torch.compiler.is_compiling() or torch.amp.is_autocast_available(device.type):  # which torch 2.4 cannot trace
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def unit_rows(rows: Tensor) -> Tensor:
    """Rows (r, d) divided by their lengths."""
    unit: Tensor = UnitRows.apply(rows) if rows.requires_grad else _divided(rows)[0]
    return unit


def _divided(rows: Tensor) -> tuple[Tensor, Tensor]:
    length = torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min_(1e-12)
    return rows / length, length


class Features(NamedTuple):
    """Features of a call, of any length and one dtype: float64 if queries or positives have it, else float32."""

    queries: Tensor  # (s, d)
    positives: Tensor  # (s, d)
    crops: Sequence[Tensor] = ()  # (s, d) each, mixed queries
    mixes: Sequence[Mix] = ()  # of every crop
    negatives: Tensor | None = None  # (m, d)
    estimator: Tensor | None = None  # (s, e), without gradient
    groups: Tensor | None = None  # (s,) int64 ids, negative for none


def checked_features(
    queries: Any,
    positives: Any,
    mixed: Any = None,
    mix: Any = None,
    negatives: Any = None,
    estimator: Any = None,
    groups: Any = None,
    names: Sequence[str] = VIEWS,
) -> Features:
    """Return the features of a call, or raise ValueError or TypeError that names the argument which does not fit."""
    for name, value in zip(names, (queries, positives), strict=True):
        _check_features(name, value)
    first, second = names
    if queries.shape != positives.shape:
        shapes = f"{tuple(queries.shape)} and {tuple(positives.shape)}"
        raise ValueError(f"{first} and {second} must have one shape, got {shapes}")
    if queries.device != positives.device:
        raise ValueError(f"{first} is on {queries.device} and {second} on {positives.device}; move them to one device")
    crops, mixes = _checked_crops(queries, mixed, mix, first)
    size, dim = queries.shape
    if negatives is not None:
        _check_features("negatives", negatives, queries, first)
        if negatives.shape[1] != dim:
            raise ValueError(f"negatives must have shape (m, {dim}), as wide as {first}, got {tuple(negatives.shape)}")
    if estimator is not None:
        _check_features("estimator", estimator, queries, first)
        if len(estimator) != size:
            raise ValueError(f"estimator must have one row per row of {first}, {size}, got {tuple(estimator.shape)}")
        if negatives is not None:
            raise ValueError("negatives have no features to be estimated by: pass either estimator or negatives")
    if groups is not None:
        groups = checked_groups("groups", groups, size, queries.device)
    dtype = torch.promote_types(torch.promote_types(queries.dtype, positives.dtype), torch.float32)

    def converted(x: Tensor) -> Tensor:
        return x if x.dtype == dtype else x.to(dtype)

    return Features(
        converted(queries),
        converted(positives),
        [converted(crop) for crop in crops],
        mixes,
        None if negatives is None else converted(negatives),
        None if estimator is None else converted(estimator.detach()),
        groups,
    )


def checked_groups(name: str, groups: Any, size: int, device: torch.device) -> Tensor:
    """The ids (size,) of groups on a device, or TypeError or ValueError that says what to pass."""
    if not isinstance(groups, Tensor) or groups.dtype not in (torch.int32, torch.int64):
        found = groups.dtype if isinstance(groups, Tensor) else type(groups).__name__
        raise TypeError(
            f"{name} must be whole numbers, a tensor ({size},) of torch.int64, negative for none, got {found}"
        )
    if groups.shape != (size,):
        raise ValueError(f"{name} must have shape ({size},), an id for each sample, got {tuple(groups.shape)}")
    return groups.to(device, torch.int64).contiguous()  # a column of a table is not


def _checked_crops(queries: Tensor, mixed: Any, mix: Any, first: str) -> tuple[list[Tensor], list[Mix]]:
    """The mixed views, and how each was mixed, one to one; one tensor and one mix count as one crop."""
    if mixed is None and mix is None:
        return [], []
    if isinstance(mixed, Tensor):
        _check_features("mixed", mixed)  # class labels, perhaps, which come without mix
        if isinstance(mix, tuple) and len(mix) == 2:
            return [mixed], [_checked_mix("", queries, mixed, mix, first)]
    are_lists = isinstance(mixed, list | tuple) and isinstance(mix, list | tuple) and not isinstance(mix, Mix)
    if not are_lists or len(mixed) != len(mix) or not mixed:
        is_known = isinstance(mixed, Tensor | list | tuple | None) and isinstance(mix, list | tuple | None)
        raise (ValueError if is_known else TypeError)(
            "mixed and mix must match one to one: features of mixed queries with the (theta, partner) that "
            f"MomentumMixup returned, or lists of both, got mixed={_found(mixed)} and mix={_found(mix)}"
        )
    pairs = enumerate(zip(mixed, mix, strict=True))
    return list(mixed), [_checked_mix(f"[{i}]", queries, *pair, first) for i, pair in pairs]


def _found(value: Any) -> str:
    return f"{len(value)} of them" if isinstance(value, list) else type(value).__name__


def _checked_mix(where: str, queries: Tensor, features: Any, mix: Any, first: str) -> Mix:
    _check_features(f"mixed{where}", features, queries, first)
    if not isinstance(mix, tuple) or len(mix) != 2:
        raise TypeError(f"mix{where} must be the (theta, partner) of MomentumMixup, got {type(mix).__name__}")
    if features.shape != queries.shape:
        shape = tuple(queries.shape)
        raise ValueError(f"mixed{where} must have the shape of {first}, {shape}, got {tuple(features.shape)}")
    theta, partner = mix
    check_mix(Mix(theta, partner), len(queries), name=f"mix{where}.")
    return Mix(theta.to(queries.device), partner.to(queries.device, torch.long))


def _check_features(name: str, value: Any, queries: Tensor | None = None, first: str = "") -> None:
    """Raise unless ``value`` is a table of features, on the device of the queries."""
    if isinstance(value, Tensor) and not value.dtype.is_floating_point:
        raise TypeError(
            f"{name} must be features (batch, dimension) with a floating point dtype, got {value.dtype} of shape "
            f"{tuple(value.shape)}; the loss takes no class labels there: pass ids of known groups as groups="
        )
    check_float_tensor(name, value)
    if value.ndim != 2 or 0 in value.shape:
        raise ValueError(f"{name} must have shape (batch, dimension), both >= 1, got {tuple(value.shape)}")
    if queries is not None and value.device != queries.device:
        raise ValueError(f"{name} is on {value.device} and {first} on {queries.device}; move it there")
