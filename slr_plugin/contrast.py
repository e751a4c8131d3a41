r"""One streaming pass over the keys: log-sum-exp, maximum and softmax-weighted mean.

Everything SANE needs from its K keys are three numbers per row. For rows :math:`r_i`, keys :math:`b_k`, a scale
:math:`c` (an inverse temperature) and the keys :math:`V_i` that row i sees,

.. math::
    \ell_i = \log \sum_{k \in V_i} e^{c \langle r_i, b_k \rangle}, \qquad
    s_{ik} = e^{c \langle r_i, b_k \rangle - \ell_i}, \qquad
    \mathrm{peak}_i = \max_{k \in V_i} s_{ik}, \qquad
    a_i = \sum_{k \in V_i} s_{ik} b_k .

They are gathered tile by tile as in online softmax, so memory is O(rows * d + one tile) and no ``rows x K`` matrix
exists. The gradient needs nothing more: :math:`\partial \ell_i / \partial r_i = c\, a_i`.

The log-sum-exp is returned in two parts, a reference :math:`\rho_i` and :math:`\ell_i - \rho_i`, because every use
subtracts a logit x from it: :math:`(\rho_i - x) + (\ell_i - \rho_i)` keeps digits that :math:`\ell_i - x` loses. The
reference is the running maximum, which overflow forbids to do without, except where the logits are known to be small.

Where the rows are the keys (SimCLR's two views against themselves), a tile of logits serves its mirror image too: its
rows are then the other's keys, and half the tiles are enough.

Inside, logits are in bits, :math:`c \langle r_i, b_k \rangle / \ln 2`: as exact, and torch's ``exp2`` takes a third of
the time of its ``exp`` on the CPU. The factor rides on the matrix product for nothing.

After ``torch.set_float32_matmul_precision("medium")`` float32 rows meet the *queue* through bfloat16 products where the
CPU has instructions for them (torch itself reaches those units on few CPUs). The keys of the batch, with the positives
and their large logits, stay in float32, and so do all sums.

On a GPU :mod:`slr_plugin.fused` can take the pass, if ``SLR_PLUGIN_FUSED=1`` asks for it.

The pass is a ``torch.library`` custom operator: ``torch.compile`` takes it as one node, without a graph break.
"""

from __future__ import annotations

import functools
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

# Tiles of rows x keys. On the CPU 1,024 x 1,024 float32 values are 4 MB and stay in the cache between the two products.
# Smaller ones are no faster on a quiet machine and far slower where processes share the cores, as each operation on a
# tile waits for all threads. An accelerator wants fewer, larger launches (not measured yet).
_CPU_TILE = (1024, 1024)
_ACCELERATOR_TILE = (4096, 8192)
_WIDEST_FUSED = 256  # dimensions that the registers of a GPU hold
LN2 = math.log(2)
# Logits that cannot exceed 2^32 before the sum need no running maximum: float32 reaches 2^127.
_SAFE_BITS = 32


class Met(NamedTuple):
    """What r rows met at one scale: the fields of :class:`Contrast`."""

    reference: Tensor  # (r,)
    excess: Tensor  # (r,)
    peak: Tensor  # (r,)
    mean: Tensor  # (r, d)

    def above(self, logit: Tensor) -> Tensor:
        """The log-sum-exp minus a logit: large numbers are subtracted first."""
        return (self.reference - logit) + self.excess

    def split(self, count: int) -> tuple[Met, Met]:
        """The first ``count`` rows, and the others."""
        parts = (torch.split(field, [count, len(field) - count]) for field in self)
        first, others = zip(*parts, strict=True)
        return Met(*first), Met(*others)


class Contrast(NamedTuple):
    """What each row learns from its keys: ``m`` scales, ``r`` rows, ``d`` dimensions."""

    reference: Tensor  # (m, r), without gradient
    excess: Tensor  # (m, r), log-sum-exp minus reference, with the gradient of the log-sum-exp; -inf without any key
    peak: Tensor  # (m, r), without gradient: the largest softmax weight, in (0, 1]; 0 without any key
    mean: Tensor  # (m, r, d); 0 without any key

    def at(self, scale: int) -> Met:
        """At the scale of this number; -1 is the last."""
        return Met(*(field.unbind()[scale] for field in self))


class Hidden(NamedTuple):
    """Rows ``row .. row + length`` do not see keys ``key .. key + length``, one each: a diagonal of the logits."""

    row: int
    key: int
    length: int


def contrast(
    rows: Tensor,
    keys: Tensor,
    queue: Tensor | None = None,
    *,
    scales: Sequence[float] = (1.0,),
    bound: float = math.inf,
    hidden: Sequence[Hidden] = (),
    chunk_size: int | None = None,
) -> Contrast:
    """Let every row meet every key once (the equations are at the top of this module).

    Args:
        rows: (r, d) float32 or float64.
        keys: (b, d), the keys of the batch; b may be 0.
        queue: (n, d) further keys, without gradient; any float dtype, any device. They are numbered after ``keys``.
        scales: factors c on the similarities, of one sign. Several of them share one product of rows and keys.
        bound: no logit is larger in magnitude, at any scale. A small one saves the running maximum.
        hidden: the (row, key) pairs that are left out, as diagonals.
        chunk_size: keys per tile; ``None`` chooses by device.

    Returns:
        The :class:`Contrast`. ``excess`` has gradients for rows and keys. ``mean`` has one for the keys only: its
        weights count as constants, because they serve as labels.

    Raises:
        RuntimeError: on second derivatives and on forward-mode derivatives, which would come out wrong.
    """
    if not torch.compiler.is_compiling() and (_has_tangent(rows) or _has_tangent(keys)):
        raise RuntimeError("SLRLoss has no forward-mode derivative; use backward() or torch.autograd.grad")
    flat = [number for diagonal in hidden for number in diagonal]
    reference, excess, peak, mean = _contrast(rows, keys, queue, list(scales), bound, flat, chunk_size or 0)
    # Autograd follows all outputs of an operator; cut off here, the others cost nothing in the backward.
    return Contrast(reference.detach(), excess, peak.detach(), mean if keys.requires_grad else mean.detach())


@torch.library.custom_op(
    "slr_plugin::contrast",
    mutates_args=(),
    schema="(Tensor rows, Tensor keys, Tensor? queue, float[] scales, float bound, SymInt[] hidden, SymInt chunk) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _contrast(
    rows: Tensor,
    keys: Tensor,
    queue: Tensor | None,
    scales: Sequence[float],
    bound: float,
    hidden: Sequence[int],
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if _runs_fused(rows, chunk):
        from slr_plugin import fused

        return fused.forward(rows, keys, queue, scales, hidden)
    ratios = [scale / scales[0] for scale in scales]
    bounded, mirrored = _is_bounded(bound), _is_mirrored(rows, keys, queue, bound, hidden, chunk)
    height, width = _tile_shape(rows, keys, queue, chunk, mirrored)
    shift = rows.new_full((len(rows), 1), 0.0 if bounded else -torch.inf)
    total = rows.new_zeros(len(scales), len(rows), 1)
    largest, mean = torch.zeros_like(total), rows.new_zeros(len(scales), *rows.shape)
    tiles = _tiles(rows, len(scales), height, width)
    queue_dtype = torch.bfloat16 if _meets_queue_in_bfloat16(rows) else rows.dtype
    for top in range(0, len(rows), height):
        here = slice(top, top + height)
        part = rows[here]
        for left, block in _blocks(keys, queue, width, rows, queue_dtype):
            if mirrored and left < top:
                continue
            logits = _logits(part, block, scales[0], tiles[0], top, left, hidden)
            if not bounded:
                previous = shift[here].clone()
                torch.maximum(previous, logits.amax(1, keepdim=True), out=shift[here])
                logits.sub_(_finite(shift[here]))  # a row that saw no key so far: 2^(-inf - 0) = 0
                for j, ratio in enumerate(ratios):
                    decay = (ratio * (previous - _finite(shift[here]))).exp2_()
                    for sums in (total, largest, mean):
                        sums[j, here].mul_(decay)
            for j, weights in _scaled(logits, ratios, tiles):
                weights.exp2_()
                _add(weights, block, total[j, here], largest[j, here], mean[j, here])
                if mirrored and left > top:
                    there = slice(left, left + width)
                    _add(weights.T, part, total[j, there], largest[j, there], mean[j, there])
    if bounded:
        reference, excess = torch.full_like(total, bound), (total * math.exp(-bound)).log_()
    else:
        reference, excess = torch.stack([ratio * LN2 * _finite(shift) for ratio in ratios]), total.log()
    total.masked_fill_(total == 0, 1.0)
    return reference[..., 0], excess[..., 0], (largest / total)[..., 0], mean.div_(total)


@torch.library.custom_op(
    "slr_plugin::contrast_keys_backward",
    mutates_args=(),
    schema="(Tensor rows, Tensor keys, Tensor logsumexp, Tensor? grad_excess, Tensor? grad_mean, "
    "float[] scales, float bound, SymInt[] hidden, SymInt chunk) -> Tensor",
)
def _keys_backward(
    rows: Tensor,
    keys: Tensor,
    logsumexp: Tensor,
    grad_excess: Tensor | None,
    grad_mean: Tensor | None,
    scales: Sequence[float],
    bound: float,
    hidden: Sequence[int],
    chunk: int,
) -> Tensor:
    r"""The gradient :math:`\partial / \partial b_k = \sum_i s_{ik} (c\, \dot\ell_i r_i + \dot a_i)`, s recomputed."""
    logsumexp = _finite(logsumexp)
    values = rows.new_zeros(len(scales), *rows.shape) if grad_mean is None else grad_mean.clone()
    if grad_excess is not None:
        for value, scale, grad in zip(values, scales, grad_excess, strict=True):
            value.addcmul_(grad[:, None], rows, value=scale)
    if _runs_fused(rows, chunk):
        from slr_plugin import fused

        return fused.keys_backward(rows, keys, logsumexp, values, scales, hidden)
    ratios = [scale / scales[0] for scale in scales]
    bounded, mirrored = _is_bounded(bound), _is_mirrored(rows, keys, None, bound, hidden, chunk)
    height, width = _tile_shape(rows, keys, None, chunk, mirrored)
    shift = logsumexp[..., None] / LN2
    if bounded:
        values *= (-shift).exp2()  # once here, not in every tile
    gradient = torch.zeros_like(keys)
    tiles = _tiles(rows, len(scales), height, width)
    for top in range(0, len(rows), height):
        here = slice(top, top + height)
        for left, block in _blocks(keys, None, width, rows):
            if mirrored and left < top:
                continue
            there = slice(left, left + width)
            logits = _logits(rows[here], block, scales[0], tiles[0], top, left, hidden)
            for j, weights in _scaled(logits, ratios, tiles):
                if not bounded:
                    weights.sub_(shift[j, here]).clamp_(max=0.0)  # at most 1, where rounding says otherwise
                weights.exp2_()
                gradient[there].addmm_(weights.T, values[j, here])
                if mirrored and left > top:
                    gradient[here].addmm_(weights, values[j, there])
    return gradient


@_contrast.register_fake
def _(rows: Tensor, keys: Tensor, queue: Any, scales: Sequence[float], *args: Any) -> Any:
    shape = (len(scales), rows.shape[0])
    return *(rows.new_empty(shape) for _ in range(3)), rows.new_empty((*shape, rows.shape[1]))


@_keys_backward.register_fake
def _(rows: Tensor, keys: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(keys)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    rows, keys, _, ctx.scales, ctx.bound, ctx.hidden, ctx.chunk = inputs
    reference, excess, _, mean = output
    ctx.save_for_backward(rows, keys, reference + excess, mean)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():  # under create_graph=True only
        raise RuntimeError("SLRLoss has no second derivative: its gradient is in closed form; drop create_graph=True")
    _, grad_excess, _, grad_mean = grad_outputs
    rows, keys, logsumexp, mean = ctx.saved_tensors
    grad_rows = grad_keys = None
    if ctx.needs_input_grad[0] and grad_excess is not None:
        first, *others = (c * g[:, None] * a for c, g, a in zip(ctx.scales, grad_excess, mean, strict=True))
        grad_rows = sum(others, first)
    if ctx.needs_input_grad[1]:
        given = (grad_excess, grad_mean)
        grad_keys = _keys_backward(rows, keys, logsumexp, *given, ctx.scales, ctx.bound, ctx.hidden, ctx.chunk)
    return grad_rows, grad_keys, None, None, None, None, None


_contrast.register_autograd(_backward, setup_context=_save)


def _has_tangent(tensor: Tensor) -> bool:
    """Whether forward-mode differentiation is under way, which an operator drops silently."""
    return forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


def _runs_fused(rows: Tensor, chunk: int) -> bool:
    """Whether the Triton kernels take the pass."""
    if os.environ.get("SLR_PLUGIN_FUSED") != "1" or rows.device.type != "cuda" or rows.dtype != torch.float32:
        return False
    if torch.get_float32_matmul_precision() == "highest":
        warnings.warn(
            'SLR_PLUGIN_FUSED=1 has no effect at torch\'s default precision of products, "highest": call '
            'torch.set_float32_matmul_precision("high")',
            stacklevel=2,
        )
        return False
    return not chunk and rows.shape[1] <= _WIDEST_FUSED


def _is_bounded(bound: float) -> bool:
    return bound / LN2 <= _SAFE_BITS


def _is_mirrored(
    rows: Tensor, keys: Tensor, queue: Tensor | None, bound: float, hidden: Sequence[int], chunk: int
) -> bool:
    """Whether the logits are a symmetric matrix that needs no running maximum: half its tiles are then enough.

    Not with a chunk size, which could make them so small that their number outweighs that.
    """
    diagonals = set(zip(hidden[::3], hidden[1::3], hidden[2::3], strict=True))
    if chunk or queue is not None or diagonals != {(key, row, length) for row, key, length in diagonals}:
        return False
    if not _is_bounded(bound) or rows.shape != keys.shape or rows.stride() != keys.stride():
        return False
    return rows.data_ptr() == keys.data_ptr()


def _tile_shape(rows: Tensor, keys: Tensor, queue: Tensor | None, chunk: int, mirrored: bool) -> tuple[int, int]:
    height, width = _CPU_TILE if rows.device.type == "cpu" else _ACCELERATOR_TILE
    width = chunk or width
    if mirrored:
        height = width = min(height, width)
    longest = max(len(keys), 0 if queue is None else len(queue))
    return min(height, max(len(rows), 1)), min(width, max(longest, 1))


def _tiles(rows: Tensor, scales: int, height: int, width: int) -> list[Tensor]:
    """Memory of one tile of logits and, where several scales need it, of a second."""
    return [rows.new_empty(height * width) for _ in range(min(scales, 2))]


def _add(weights: Tensor, block: Tensor, total: Tensor, largest: Tensor, mean: Tensor) -> None:
    """What rows learn from a block of keys, by weights (rows, keys), onto what they knew."""
    total += weights.sum(1, keepdim=True)
    torch.maximum(largest, weights.amax(1, keepdim=True), out=largest)
    if block.dtype == weights.dtype:
        mean.addmm_(weights, block)
    else:
        mean += weights.to(block.dtype) @ block


def _shaped(tile: Tensor, height: int, width: int) -> Tensor:
    return tile[: height * width].view(height, width)


def _finite(logits: Tensor) -> Tensor:
    return logits.masked_fill(logits == -torch.inf, 0.0)


def _blocks(
    keys: Tensor, queue: Tensor | None, width: int, like: Tensor, queue_dtype: torch.dtype | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Chunks of the keys and then of the queue, each with the number of its first key."""
    first = 0
    for source, dtype in ((keys, like.dtype), (queue, queue_dtype)):
        if source is None:
            continue
        for left in range(0, len(source), width):
            yield first + left, source[left : left + width].to(like.device, dtype)
        first += len(source)


def _meets_queue_in_bfloat16(rows: Tensor) -> bool:
    """Whether float32 products may be approximate, and the CPU is faster at bfloat16."""
    if rows.device.type != "cpu" or rows.dtype != torch.float32:
        return False
    return torch.get_float32_matmul_precision() == "medium" and _cpu_has_bfloat16()


@functools.cache
def _cpu_has_bfloat16() -> bool:
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # private, and not in every torch
    return supported is not None and bool(supported())


def _logits(
    part: Tensor, block: Tensor, scale: float, tile: Tensor, top: int, left: int, hidden: Sequence[int]
) -> Tensor:
    """Logits, in bits, of rows ``top ..`` and keys ``left ..``, with the hidden pairs at minus infinity."""
    logits = _shaped(tile, len(part), len(block))
    if block.dtype == part.dtype:
        torch.addmm(logits, part, block.T, beta=0, alpha=scale / LN2, out=logits)
    else:
        logits.copy_((part * (scale / LN2)).to(block.dtype) @ block.T)
    for row, key, length in zip(hidden[::3], hidden[1::3], hidden[2::3], strict=True):
        # The diagonal (row + t, key + t), t < length, inside this tile.
        start = max(top - row, left - key, 0)
        stop = min(top + len(part) - row, left + len(block) - key, length)
        if start < stop:
            logits[row + start - top :, key + start - left :].diagonal()[: stop - start].fill_(-torch.inf)
    return logits


def _scaled(logits: Tensor, ratios: Sequence[float], tiles: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """``ratio * logits`` for each ratio, free to be overwritten; ``logits`` itself comes last, as ratio 1."""
    for j in range(1, len(ratios)):
        yield j, torch.mul(logits, ratios[j], out=_shaped(tiles[1], *logits.shape))
    yield 0, logits
