r"""One streaming pass over the keys: log-sum-exp, maximum and softmax-weighted mean.

Everything SANE needs from its K keys are three numbers per row. For unit rows :math:`r_i` (already divided by their
temperature), keys :math:`b_k`, a scale :math:`c` and the keys :math:`V_i` that row i sees,

.. math::
    \ell_i = \log \sum_{k \in V_i} e^{c \langle r_i, b_k \rangle}, \qquad
    m_i = \max_{k \in V_i} c \langle r_i, b_k \rangle, \qquad
    a_i = \sum_{k \in V_i} s_{ik} b_k, \quad s_{ik} = e^{c \langle r_i, b_k \rangle - \ell_i}.

They are gathered tile by tile with the running maximum of online softmax, so memory is O(rows * d + one tile) and no
``rows x K`` matrix exists. The gradient needs nothing more: :math:`\partial \ell_i / \partial r_i = c\, a_i`.

The pass is a ``torch.library`` custom operator: ``torch.compile`` takes it as one node, without a graph break.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Tiles of rows x keys. On the CPU 1,024 x 512 float32 values are 2 MB and stay in the cache between the two products;
# an accelerator wants fewer, larger launches.
_CPU_TILE = (1024, 512)
_ACCELERATOR_TILE = (4096, 8192)


class Contrast(NamedTuple):
    """What each row learns from its keys. ``m`` scales, ``r`` rows, ``d`` dimensions."""

    logsumexp: Tensor  # (m, r); -inf where a row sees no key
    maximum: Tensor  # (m, r), without gradient; -inf where a row sees no key
    mean: Tensor  # (m, r, d); 0 where a row sees no key


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
    hidden: Sequence[Hidden] = (),
    scales: Sequence[float] = (1.0,),
    chunk_size: int | None = None,
) -> Contrast:
    """Let every row meet every key once (the equations are at the top of this module).

    Args:
        rows: (r, d) float32 or float64, divided by the temperature.
        keys: (b, d), the keys of the batch; b may be 0.
        queue: (n, d) further keys, without gradient; any float dtype, any device. They are numbered after ``keys``.
        hidden: the (row, key) pairs that are left out, as diagonals.
        scales: positive factors on the logits. Several of them share one product of rows and keys.
        chunk_size: keys per tile; ``None`` chooses by device.

    Returns:
        The :class:`Contrast`. ``logsumexp`` has gradients for rows and keys. ``mean`` has a gradient for the keys only:
        its weights count as constants, because they serve as labels.
    """
    flat = [number for diagonal in hidden for number in diagonal]
    return Contrast(*_contrast(rows, keys, queue, flat, list(scales), chunk_size or 0))


@torch.library.custom_op(
    "slr_plugin::contrast",
    mutates_args=(),
    schema="(Tensor rows, Tensor keys, Tensor? queue, SymInt[] hidden, float[] scales, SymInt chunk) "
    "-> (Tensor, Tensor, Tensor)",
)
def _contrast(
    rows: Tensor, keys: Tensor, queue: Tensor | None, hidden: Sequence[int], scales: Sequence[float], chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    (count, dim), (height, width) = rows.shape, _tile_shape(rows, chunk)
    logsumexp = rows.new_empty(len(scales), count)
    maximum = rows.new_empty(len(scales), count)
    mean = rows.new_zeros(len(scales), count, dim)
    tile, scratch = _buffers(rows, 1 + (len(scales) > 1), height, width)
    for top in range(0, count, height):
        part = rows[top : top + height]
        peak = part.new_full((len(part), 1), -torch.inf)
        total = part.new_zeros(len(scales), len(part), 1)
        sums = mean[:, top : top + height]
        for left, block in _blocks(keys, queue, width, rows):
            logits = _logits(part, block, tile, top, left, hidden)
            previous, peak = peak, torch.maximum(peak, logits.amax(1, keepdim=True))
            shift = peak.masked_fill(peak == -torch.inf, 0.0)  # a row without a key so far: exp(-inf - 0) = 0
            logits.sub_(shift)
            for j, scale in enumerate(scales):
                last = j == len(scales) - 1
                weights = logits if last else _shaped(scratch, logits.shape).copy_(logits)
                weights = (weights if scale == 1 else weights.mul_(scale)).exp_()
                decay = (scale * (previous - shift)).exp_()
                total[j].mul_(decay).add_(weights.sum(1, keepdim=True))
                sums[j].mul_(decay).addmm_(weights, block)
        for j, scale in enumerate(scales):
            maximum[j, top : top + height] = scale * peak[:, 0]
            shift = peak.masked_fill(peak == -torch.inf, 0.0)
            logsumexp[j, top : top + height] = (scale * shift + total[j].log())[:, 0]
            sums[j].div_(total[j].masked_fill(total[j] == 0, 1.0))
    return logsumexp, maximum, mean


@torch.library.custom_op(
    "slr_plugin::contrast_keys_backward",
    mutates_args=(),
    schema="(Tensor rows, Tensor keys, Tensor logsumexp, Tensor? grad_logsumexp, Tensor? grad_mean, "
    "SymInt[] hidden, float[] scales, SymInt chunk) -> Tensor",
)
def _keys_backward(
    rows: Tensor,
    keys: Tensor,
    logsumexp: Tensor,
    grad_logsumexp: Tensor | None,
    grad_mean: Tensor | None,
    hidden: Sequence[int],
    scales: Sequence[float],
    chunk: int,
) -> Tensor:
    r"""The gradient :math:`\partial / \partial b_k = \sum_i s_{ik} (c\, \dot\ell_i r_i + \dot a_i)`, s recomputed."""
    height, width = _tile_shape(rows, chunk)
    gradient = torch.zeros_like(keys)
    shift = logsumexp.masked_fill(logsumexp == -torch.inf, 0.0)[..., None]
    tile, scratch = _buffers(rows, 1 + (len(scales) > 1), height, width)
    for top in range(0, len(rows), height):
        part = rows[top : top + height]
        for left, block in _blocks(keys, None, width, rows):
            logits = _logits(part, block, tile, top, left, hidden)
            for j, scale in enumerate(scales):
                here = slice(top, top + len(part))
                last = j == len(scales) - 1
                weights = logits if last else _shaped(scratch, logits.shape).copy_(logits)
                weights = (weights if scale == 1 else weights.mul_(scale)).sub_(shift[j, here]).exp_()
                if grad_logsumexp is None:
                    value = part.new_zeros(part.shape)
                else:
                    value = (scale * grad_logsumexp[j, here, None]) * part
                if grad_mean is not None:
                    value = value + grad_mean[j, here]
                gradient[left : left + len(block)].addmm_(weights.T, value)
    return gradient


@_contrast.register_fake
def _(rows: Tensor, keys: Tensor, queue: Any, hidden: Any, scales: Sequence[float], chunk: Any) -> Any:
    shape = (len(scales), rows.shape[0])
    return rows.new_empty(shape), rows.new_empty(shape), rows.new_empty((*shape, rows.shape[1]))


@_keys_backward.register_fake
def _(rows: Tensor, keys: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(keys)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    rows, keys, _, ctx.hidden, ctx.scales, ctx.chunk = inputs
    logsumexp, _, mean = output
    ctx.save_for_backward(rows, keys, logsumexp, mean)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_logsumexp: Tensor | None, _: Any, grad_mean: Tensor | None) -> tuple[Tensor | None, ...]:
    rows, keys, logsumexp, mean = ctx.saved_tensors
    grad_rows = grad_keys = None
    if ctx.needs_input_grad[0] and grad_logsumexp is not None:
        grad_rows = sum(c * g[:, None] * a for c, g, a in zip(ctx.scales, grad_logsumexp, mean, strict=True))
    if ctx.needs_input_grad[1]:
        given = (grad_logsumexp, grad_mean)
        grad_keys = _keys_backward(rows, keys, logsumexp, *given, ctx.hidden, ctx.scales, ctx.chunk)
    return grad_rows, grad_keys, None, None, None, None


_contrast.register_autograd(_backward, setup_context=_save)


def _tile_shape(rows: Tensor, chunk: int) -> tuple[int, int]:
    height, width = _CPU_TILE if rows.device.type == "cpu" else _ACCELERATOR_TILE
    return min(height, max(len(rows), 1)), chunk or width


def _buffers(rows: Tensor, count: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """A flat tile of logits and, when several scales need one, a second tile; otherwise the first one twice."""
    buffers = [rows.new_empty(height * width) for _ in range(count)]
    return buffers[0], buffers[-1]


def _shaped(buffer: Tensor, shape: torch.Size) -> Tensor:
    return buffer[: shape[0] * shape[1]].view(shape)


def _blocks(keys: Tensor, queue: Tensor | None, width: int, like: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Chunks of the keys and then of the queue, each with the number of its first key."""
    first = 0
    for source in (keys, queue):
        if source is None:
            continue
        for left in range(0, len(source), width):
            yield first + left, source[left : left + width].to(like)
        first += len(source)


def _logits(part: Tensor, block: Tensor, tile: Tensor, top: int, left: int, hidden: Sequence[int]) -> Tensor:
    """Rows ``top ..`` times keys ``left ..``, with the hidden pairs at minus infinity."""
    logits = torch.mm(part, block.T, out=_shaped(tile, torch.Size((len(part), len(block)))))
    for row, key, count in zip(hidden[::3], hidden[1::3], hidden[2::3], strict=True):
        # The diagonal (row + t, key + t), t < count, inside this tile.
        start = max(top - row, left - key, 0)
        stop = min(top + len(part) - row, left + len(block) - key, count)
        if start < stop:
            logits[row + start - top :, key + start - left :].diagonal()[: stop - start].fill_(-torch.inf)
    return logits
