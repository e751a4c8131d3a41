"""The streaming pass as a ``torch.library`` operator: its arguments, its gradient, and which backend computes it.

As an operator the pass is one node for ``torch.compile``, without a graph break.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from slr_plugin._torch_internals import is_recomputed, refuse_repetition
from slr_plugin.streaming.stats import Plan, SoftmaxStats, Source

BACKENDS = ("tiled", "triton")  # modules beside this one, with ``forward`` and ``keys_backward``
DEFAULT_BACKEND = "tiled"  # may be set to "triton", which gives way to "tiled" where its kernels cannot do
WIDEST_TRITON = 256  # dimensions that the registers of a GPU hold

_PLAN = (
    "Tensor? hidden, Tensor? row_groups, Tensor? key_groups, float scale, float bound, bool symmetric, SymInt chunk, "
    "str backend"
)


def softmax_stats(
    rows: Tensor,
    keys: Tensor,
    queue: Tensor | None = None,
    *,
    values: Tensor | None = None,
    queue_values: Tensor | None = None,
    hidden: Tensor | None = None,
    row_groups: Tensor | None = None,
    key_groups: Tensor | None = None,
    scale: float = 1.0,
    bound: float = math.inf,
    symmetric: bool = False,
    chunk_size: int | None = None,
    backend: str | None = None,
    repeatable: bool = True,
) -> SoftmaxStats:
    """Compute the softmax statistics of every row over its keys in one pass (equations in ``stats.py``).

    Args:
        rows: (r, d) float32 or float64.
        keys: (b, d) of the same dtype and device; b may be 0.
        queue: (n, d) further keys, numbered after ``keys``, without gradient. They are a source of their own, so that
            they are neither copied nor converted as a whole: any float dtype, any device.
        values: (b, v), what is averaged, where that is not the keys. The weights then count as constants: only
            ``values`` gets a gradient.
        queue_values: (n, v), likewise for ``queue``.
        hidden: (r, h) int64, the numbers of the ``keys`` that each row does not see; -1 for none.
        row_groups: (r,) int64, ids of groups: a row does not see the keys with its own one, unless that is negative.
        key_groups: (b + n,) int64, of the keys and then the queue.
        scale: the factor c on the similarities.
        bound: no logit is larger in magnitude. A small bound saves the running maximum.
        symmetric: ``keys`` is ``rows`` and the hidden pairs are symmetric: half of the logits are then enough.
        chunk_size: keys per tile; None chooses by device.
        backend: ``"tiled"`` or ``"triton"``; None takes ``DEFAULT_BACKEND`` as far as it can compute the pass.
        repeatable: False where a compiled call reads a queue or a schedule that have moved on when activation
            checkpointing computes the pass again; that then raises.

    Returns:
        The :class:`SoftmaxStats`. Where the values are the keys, ``offset`` has gradients for rows and keys, and
        ``mean`` has one for the keys alone: its weights count as constants, because they serve as labels.

    Raises:
        RuntimeError: a second derivative is asked for, or a pass that is not repeatable is computed again.
        ValueError: an unknown ``backend``.
    """
    if values is not None:
        rows, keys = rows.detach(), keys.detach()
    averaged = keys if values is None else values
    name = resolve(backend, rows, max(rows.shape[1], averaged.shape[1]), chunk_size)
    if row_groups is not None and name == "triton":
        name = "tiled"  # its kernels do not compare groups
    plan = hidden, row_groups, key_groups, scale, bound, symmetric, chunk_size or 0, name
    reference, offset, max_weight, mean = _forward(rows, keys, queue, values, queue_values, repeatable, *plan)
    # Autograd follows all outputs of an operator; cut off here, the others cost nothing in the backward.
    return SoftmaxStats(
        reference.detach(),
        offset if values is None else offset.detach(),
        max_weight.detach(),
        mean if averaged.requires_grad else mean.detach(),
    )


def resolve(backend: str | None, rows: Tensor, dim: int, chunk_size: int | None) -> str:
    """Choose the backend that computes a pass over at most ``dim`` dimensions."""
    if backend not in (None, *BACKENDS):
        raise ValueError(f'backend must be "tiled", "triton" or None, got {backend!r}')
    if backend == "triton" and dim > WIDEST_TRITON:
        raise ValueError(f'backend="triton" takes at most {WIDEST_TRITON} dimensions, got {dim}; pass backend="tiled"')
    if backend is not None or DEFAULT_BACKEND == "tiled":
        return backend or "tiled"
    float32_on_gpu = rows.device.type == "cuda" and rows.dtype == torch.float32
    may_round = torch.get_float32_matmul_precision() != "highest"  # as the kernels do
    return "triton" if float32_on_gpu and may_round and not chunk_size and dim <= WIDEST_TRITON else "tiled"


@torch.library.custom_op(
    "slr_plugin::softmax_stats",
    mutates_args=(),
    schema="(Tensor rows, Tensor keys, Tensor? queue, Tensor? values, Tensor? queue_values, bool repeatable, "
    f"{_PLAN}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _forward(
    rows: Tensor,
    keys: Tensor,
    queue: Tensor | None,
    values: Tensor | None,
    queue_values: Tensor | None,
    repeatable: bool,
    *plan: Any,
) -> tuple[Tensor, ...]:
    if not repeatable and is_recomputed():
        refuse_repetition()
    sources = [Source(keys, keys if values is None else values)]
    if queue is not None:
        sources.append(Source(queue, queue if queue_values is None else queue_values))
    return tuple(_backend(plan).forward(rows, sources, Plan(*plan[:-1])))


@torch.library.custom_op(
    "slr_plugin::softmax_stats_keys_backward",
    mutates_args=(),
    schema=f"(Tensor rows, Tensor keys, Tensor reference, Tensor offset, Tensor row_values, {_PLAN}) -> Tensor",
)
def _keys_backward(
    rows: Tensor, keys: Tensor, reference: Tensor, offset: Tensor, row_values: Tensor, *plan: Any
) -> Tensor:
    r""":math:`\sum_i s_{ik} u_i` of every key k, for row values u (r, v), with the weights s computed anew."""
    finite = offset.masked_fill(offset == -torch.inf, 0.0)  # of a row that sees no key
    gradient: Tensor = _backend(plan).keys_backward(rows, keys, reference, finite, row_values, Plan(*plan[:-1]))
    return gradient


@_forward.register_fake
def _(rows: Tensor, keys: Tensor, queue: Any, values: Tensor | None, *args: Any) -> Any:
    count, width = rows.shape[0], (keys if values is None else values).shape[1]
    return *(rows.new_empty(count) for _ in range(3)), rows.new_empty(count, width)


@_keys_backward.register_fake
def _(rows: Tensor, keys: Tensor, reference: Tensor, offset: Tensor, row_values: Tensor, *args: Any) -> Tensor:
    return row_values.new_empty(keys.shape[0], row_values.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    rows, keys, _, _, _, _, *masks = inputs[:9]
    ctx.plan = inputs[9:]
    reference, offset, _, mean = output
    ctx.save_for_backward(rows, keys, reference, offset, mean, *masks)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
    r"""Rows get :math:`c \dot\ell_i a_i`, keys get :math:`\sum_i s_{ik} (c \dot\ell_i r_i + \dot a_i)`.

    Values that are not the keys get the second part of the latter.
    """
    if torch.is_grad_enabled():  # under create_graph=True only
        raise RuntimeError("SLRLoss has no second derivative: its gradient is in closed form; drop create_graph=True")
    _, grad_offset, _, grad_mean = grad_outputs
    rows, keys, reference, offset, mean, *masks = ctx.saved_tensors
    grad_rows = grad_keys = grad_values = None
    if ctx.needs_input_grad[3]:  # values that are not the keys: the weights are constants
        if grad_mean is not None:
            grad_values = _keys_backward(rows, keys, reference, offset, grad_mean, *masks, *ctx.plan)
    else:
        row_values = grad_mean
        if grad_offset is not None:
            scale = ctx.plan[0]
            factor = scale * grad_offset[:, None]
            grad_rows = factor * mean if ctx.needs_input_grad[0] else None
            if ctx.needs_input_grad[1]:
                row_values = factor * rows if grad_mean is None else grad_mean.addcmul(factor, rows)
        if ctx.needs_input_grad[1] and row_values is not None:
            grad_keys = _keys_backward(rows, keys, reference, offset, row_values, *masks, *ctx.plan)
    return grad_rows, grad_keys, None, grad_values, *[None] * 10  # queue_values, repeatable and the plan


_forward.register_autograd(_backward, setup_context=_save)


def _backend(plan: Sequence[Any]) -> ModuleType:
    # Imported when it is used: torch brings Triton along on Linux, elsewhere there may be none.
    return importlib.import_module(f"slr_plugin.streaming.{plan[-1]}")
