"""The streaming pass as the objective calls it: the statistics of rows, and the gradients of their keys.

Nothing here records a gradient. Under ``torch.compile`` each function is a ``torch.library`` operator, without a graph
break.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slr_plugin._torch_internals import is_recomputed, refuse_repetition
from slr_plugin.streaming import tiled
from slr_plugin.streaming.stats import Pass, SoftmaxStats

_PASS = (
    "Tensor rows, Tensor keys, Tensor? queue, Tensor? values, Tensor? queue_values, Tensor? hidden, "
    "Tensor? row_groups, Tensor? key_groups, float scale, float bound, bool symmetric, bool cross, SymInt chunk"
)


def softmax_stats(given: Pass, repeatable: bool = True) -> SoftmaxStats:
    """Compute the softmax statistics of every row over its keys (equations in ``stats.py``).

    Args:
        given: the rows and the keys.
        repeatable: False where a compiled call reads a queue or a schedule that have moved on when activation
            checkpointing computes the pass again; that then raises RuntimeError.
    """
    if torch.compiler.is_compiling():
        return SoftmaxStats(*_softmax_stats(*given, repeatable))
    return tiled.forward(given)


def keys_gradient(given: Pass, stats: SoftmaxStats, row_values: Tensor) -> Tensor:
    r"""Compute :math:`\sum_i s_{ik} u_i` (b, v) of every key k, for row values u (r, v), from the pass's statistics.

    The weights are computed anew. They are constants where the values are not the keys; else the caller adds up in u
    what reaches the keys as such, :math:`c \dot\ell_i r_i`, and as values, :math:`\dot a_i`.
    """
    if torch.compiler.is_compiling():
        return _keys_gradient(*given, stats.reference, stats.offset, row_values)  # type: ignore[no-any-return]
    return tiled.keys_gradient(given, stats.reference, stats.offset, row_values)


def symmetric_gradient(given: Pass, stats: SoftmaxStats, weights: Tensor) -> Tensor:
    r"""Compute :math:`\sum_k (w_i s_{ik} + w_k s_{ki}) b_k` (r, d) of a symmetric pass, for weights w (r,) of the rows.

    It is what rows that are the keys get as both from :math:`\sum_i w_i \ell_i / c`. The forward pass can then do
    without means: give it ``values`` (b, 0).
    """
    if torch.compiler.is_compiling():
        return _symmetric_gradient(*given, stats.reference, stats.offset, weights)  # type: ignore[no-any-return]
    return tiled.symmetric_gradient(given, stats.reference, stats.offset, weights)


@torch.library.custom_op(
    "slr_plugin::softmax_stats",
    mutates_args=(),
    schema=f"({_PASS}, bool repeatable) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _softmax_stats(*args: Any) -> tuple[Tensor, ...]:
    *given, repeatable = args
    if not repeatable and is_recomputed():
        refuse_repetition()
    return tuple(tiled.forward(Pass(*given)))


@torch.library.custom_op(
    "slr_plugin::keys_gradient",
    mutates_args=(),
    schema=f"({_PASS}, Tensor reference, Tensor offset, Tensor row_values) -> Tensor",
)
def _keys_gradient(*args: Any) -> Tensor:
    return tiled.keys_gradient(Pass(*args[:-3]), *args[-3:])


@torch.library.custom_op(
    "slr_plugin::symmetric_gradient",
    mutates_args=(),
    schema=f"({_PASS}, Tensor reference, Tensor offset, Tensor weights) -> Tensor",
)
def _symmetric_gradient(*args: Any) -> Tensor:
    return tiled.symmetric_gradient(Pass(*args[:-3]), *args[-3:])


@_softmax_stats.register_fake
def _(*args: Any) -> Any:
    given = Pass(*args[:-1])
    count, width = len(given.rows), (given.keys if given.values is None else given.values).shape[1]
    return *(given.rows.new_empty(count) for _ in range(3)), given.rows.new_empty(count, width)


@_keys_gradient.register_fake
def _(*args: Any) -> Tensor:
    keys, row_values = args[1], args[-1]
    gradient: Tensor = row_values.new_empty(keys.shape[0], row_values.shape[1])
    return gradient


@_symmetric_gradient.register_fake
def _(*args: Any) -> Tensor:
    return torch.empty_like(args[0])
