"""The streaming pass as the objective calls it: the statistics of rows, and the gradients of their keys.

Nothing here records a gradient. Under ``torch.compile`` each function is a ``torch.library`` operator, without a graph
break.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from slr_plugin.streaming import tiled
from slr_plugin.streaming.stats import Pass, SoftmaxStats

_PASS = (
    "Tensor rows, Tensor keys, Tensor? queue, Tensor? values, Tensor? queue_values, Tensor? hidden, "
    "Tensor? row_groups, Tensor? key_groups, float scale, float bound, bool symmetric, bool cross, SymInt chunk"
)


def softmax_stats(given: Pass) -> SoftmaxStats:
    """Compute the softmax statistics of every row over its keys (equations in ``stats.py``)."""
    if torch.compiler.is_compiling():
        return SoftmaxStats(*_softmax_stats(*given))
    return tiled.softmax_stats(given)


def keys_gradient(given: Pass, stats: SoftmaxStats, row_values: Tensor) -> Tensor:
    r"""Compute :math:`\sum_i s_{ik} u_i` (b, v) of every key k, for row values u (r, v), from the pass's statistics."""
    if torch.compiler.is_compiling():
        return _keys_gradient(*given, stats.reference_bits, stats.offset, row_values)  # type: ignore[no-any-return]
    return tiled.keys_gradient(given, stats.reference_bits, stats.offset, row_values)


def symmetric_gradient(given: Pass, stats: SoftmaxStats, weights: Tensor) -> Tensor:
    r"""Compute :math:`\sum_k (w_i s_{ik} + w_k s_{ki}) b_k` (r, d) of a symmetric pass, for weights w (r,) of the rows.

    It is what rows that are the keys get as both from :math:`\sum_i w_i \ell_i / c`. The forward pass can then do
    without means: give it ``values`` (b, 0).
    """
    if torch.compiler.is_compiling():
        return _symmetric_gradient(*given, stats.reference_bits, stats.offset, weights)  # type: ignore[no-any-return]
    return tiled.symmetric_gradient(given, stats.reference_bits, stats.offset, weights)


def _operator(name: str, compute: Callable[..., Any], arguments: str, fake: Callable[..., Any]) -> Any:
    """An operator of a function of a pass; ``arguments`` end the schema, ``fake`` gives the shapes of its results."""

    def flat(*args: Any) -> Any:
        found = compute(Pass(*args[: len(Pass._fields)]), *args[len(Pass._fields) :])
        return tuple(x.clone() for x in found) if isinstance(found, tuple) else found  # which must share no memory

    operator = torch.library.custom_op(f"slr_plugin::{name}", flat, mutates_args=(), schema=f"({_PASS}{arguments}")
    operator.register_fake(fake)
    return operator


def _like_stats(rows: Tensor, keys: Tensor, queue: Tensor | None, values: Tensor | None, *_: Any) -> tuple[Tensor, ...]:
    width = (keys if values is None else values).shape[1]
    return *(rows.new_empty(len(rows)) for _ in range(3)), rows.new_empty(len(rows), width)


def _like_keys(rows: Tensor, keys: Tensor, *args: Any) -> Tensor:
    return keys.new_empty(len(keys), args[-1].shape[1])


def _like_rows(rows: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(rows)


_softmax_stats = _operator("softmax_stats", tiled.softmax_stats, ") -> (Tensor, Tensor, Tensor, Tensor)", _like_stats)
_keys_gradient = _operator(
    "keys_gradient", tiled.keys_gradient, ", Tensor reference, Tensor offset, Tensor row_values) -> Tensor", _like_keys
)
_symmetric_gradient = _operator(
    "symmetric_gradient",
    tiled.symmetric_gradient,
    ", Tensor reference, Tensor offset, Tensor weights) -> Tensor",
    _like_rows,
)
