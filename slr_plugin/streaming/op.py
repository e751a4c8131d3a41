"""The streaming pass, and which backend computes it: forward, and the gradients of the keys.

Neither records a gradient. Under ``torch.compile`` each is a ``torch.library`` operator, without a graph break.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from slr_plugin._torch_internals import is_recomputed, refuse_repetition
from slr_plugin.streaming import tiled
from slr_plugin.streaming.stats import Pass, SoftmaxStats

BACKENDS = ("tiled", "triton")  # modules beside this one, with ``forward`` and ``keys_backward``
DEFAULT_BACKEND = "tiled"  # may be set to "triton", which gives way to "tiled" where its kernels cannot do
WIDEST_TRITON = 256  # dimensions that the registers of a GPU hold

_PASS = (
    "Tensor rows, Tensor keys, Tensor? queue, Tensor? values, Tensor? queue_values, Tensor? hidden, "
    "Tensor? row_groups, Tensor? key_groups, float scale, float bound, bool symmetric, bool cross, SymInt chunk"
)


def softmax_stats(given: Pass, backend: str | None = None, repeatable: bool = True) -> SoftmaxStats:
    """Compute the softmax statistics of every row over its keys (equations in ``stats.py``).

    Args:
        given: the rows and the keys.
        backend: ``"tiled"`` or ``"triton"``; None takes ``DEFAULT_BACKEND`` as far as it can compute the pass.
        repeatable: False where a compiled call reads a queue or a schedule that have moved on when activation
            checkpointing computes the pass again; that then raises.

    Raises:
        RuntimeError: a pass that is not repeatable is computed again.
        ValueError: an unknown ``backend``.
    """
    name = resolve(backend, given)
    if torch.compiler.is_compiling():
        return SoftmaxStats(*_softmax_stats(*given, name, repeatable))
    return _backend(name).forward(given)  # type: ignore[no-any-return]


def keys_gradient(given: Pass, stats: SoftmaxStats, row_values: Tensor, backend: str | None = None) -> Tensor:
    r"""Compute :math:`\sum_i s_{ik} u_i` (b, v) of every key k, for row values u (r, v), from the pass's statistics.

    The weights are computed anew. They are constants where the values are not the keys; else the caller adds up in u
    what reaches the keys as such, :math:`c \dot\ell_i r_i`, and as values, :math:`\dot a_i`.
    """
    finite = stats.offset.clamp(min=-64.0)  # of a row that sees no key; others have at least -2 * 32 ln 2
    name = resolve(backend, given)
    if torch.compiler.is_compiling():
        return _keys_gradient(*given, stats.reference, finite, row_values, name)  # type: ignore[no-any-return]
    return _backend(name).keys_backward(given, stats.reference, finite, row_values)  # type: ignore[no-any-return]


def symmetric_gradient(given: Pass, stats: SoftmaxStats, weights: Tensor) -> Tensor:
    r"""Compute :math:`\sum_k (w_i s_{ik} + w_k s_{ki}) b_k` (r, d) of a symmetric pass, for weights w (r,) of the rows.

    It is what rows that are the keys get as both from :math:`\sum_i w_i \ell_i / c`. The forward pass can then do
    without means: give it ``values`` (b, 0).
    """
    finite = stats.offset.clamp(min=-64.0)
    if torch.compiler.is_compiling():
        return _symmetric_gradient(*given, stats.reference, finite, weights)  # type: ignore[no-any-return]
    return tiled.symmetric_gradient(given, stats.reference, finite, weights)


def resolve(backend: str | None, given: Pass) -> str:
    """Choose the backend that computes a pass."""
    if backend not in (None, *BACKENDS):
        raise ValueError(f'backend must be "tiled", "triton" or None, got {backend!r}')
    rows, values = given.rows, given.keys if given.values is None else given.values
    dim = max(rows.shape[1], values.shape[1])
    if backend == "triton" and dim > WIDEST_TRITON:
        raise ValueError(f'backend="triton" takes at most {WIDEST_TRITON} dimensions, got {dim}; pass backend="tiled"')
    if backend is not None or DEFAULT_BACKEND == "tiled":
        return backend or "tiled"
    float32_on_gpu = rows.device.type == "cuda" and rows.dtype == torch.float32
    may_round = torch.get_float32_matmul_precision() != "highest"  # as the kernels do
    special = given.row_groups is not None or given.cross or not values.shape[1]  # which the kernels do not know
    fits = dim <= WIDEST_TRITON and not given.chunk and not special
    return "triton" if float32_on_gpu and may_round and fits else "tiled"


@torch.library.custom_op(
    "slr_plugin::softmax_stats",
    mutates_args=(),
    schema=f"({_PASS}, str backend, bool repeatable) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _softmax_stats(*args: Any) -> tuple[Tensor, ...]:
    *given, name, repeatable = args
    if not repeatable and is_recomputed():
        refuse_repetition()
    return tuple(_backend(name).forward(Pass(*given)))


@torch.library.custom_op(
    "slr_plugin::keys_gradient",
    mutates_args=(),
    schema=f"({_PASS}, Tensor reference, Tensor offset, Tensor row_values, str backend) -> Tensor",
)
def _keys_gradient(*args: Any) -> Tensor:
    *given, reference, offset, row_values, name = args
    gradient: Tensor = _backend(name).keys_backward(Pass(*given), reference, offset, row_values)
    return gradient


@torch.library.custom_op(
    "slr_plugin::symmetric_gradient",
    mutates_args=(),
    schema=f"({_PASS}, Tensor reference, Tensor offset, Tensor weights) -> Tensor",
)
def _symmetric_gradient(*args: Any) -> Tensor:
    *given, reference, offset, weights = args
    return tiled.symmetric_gradient(Pass(*given), reference, offset, weights)


@_softmax_stats.register_fake
def _(*args: Any) -> Any:
    given = Pass(*args[:-2])
    count, width = len(given.rows), (given.keys if given.values is None else given.values).shape[1]
    return *(given.rows.new_empty(count) for _ in range(3)), given.rows.new_empty(count, width)


@_keys_gradient.register_fake
def _(*args: Any) -> Tensor:
    keys, row_values = args[1], args[-2]
    gradient: Tensor = row_values.new_empty(keys.shape[0], row_values.shape[1])
    return gradient


@_symmetric_gradient.register_fake
def _(*args: Any) -> Tensor:
    return torch.empty_like(args[0])


def _backend(name: str) -> ModuleType:
    # Imported when it is used: torch brings Triton along on Linux, elsewhere there may be none.
    return importlib.import_module(f"slr_plugin.streaming.{name}")
