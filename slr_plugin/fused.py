r"""The pass of :mod:`slr_plugin.contrast` as Triton kernels: one launch where the chunked pass needs seven for a tile.

The same sums, in bits as there. A program holds a block of rows and walks along a part of the keys, whose logits never
leave the chip. There are few rows and many keys (768 and 65,536), so the keys are split until all processors of the GPU
have work, and what the splits found is put together afterwards. With the largest logit :math:`m_s` of split s,
its sum of weights :math:`t_s` and its sum of weighted keys :math:`u_s`,

.. math::
    m = \max_s m_s, \qquad
    t = \sum_s 2^{m_s - m} t_s, \qquad
    a = \frac1t \sum_s 2^{m_s - m} u_s .

Products are tensor cores' (TF32, or bfloat16 with the queue); sums are float32. Factors are rounded here, because the
units themselves drop the low bits of a float32, which pulls all logits the same way. Nothing here waits for the device
or reads a value from it, so a CUDA graph can record a pass.

Imported only where it is used: Triton is no dependency of this package, torch brings it along on Linux.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LN2 = math.log(2)
NO_KEY = -1
# The numbers of a product's factors: "tf32", "bf16", or "float32", which is exact in the interpreter and only there.
BATCH, QUEUE_AT_MEDIUM = "tf32", "bf16"


class Tile(NamedTuple):
    """Rows and keys of a tile, and the warps that work on it."""

    rows: int
    keys: int
    warps: int


# By dimension: the largest tried whose accumulators fit the registers of sm_80 and sm_90, and which fit their shared
# memory, on sm_80 the 99 KB of consumer cards. Tests compile them; no GPU has timed them.
FORWARD = {128: Tile(128, 32, 8), 256: Tile(32, 32, 4)}
BACKWARD = {128: Tile(32, 64, 4), 256: Tile(16, 32, 4)}
STAGES = 2


class Source(NamedTuple):
    """One table of keys, and how the pass goes through it."""

    table: Tensor  # (n, d)
    first: int  # the number of its first key among all keys
    numbers: str  # of a product's factors
    splits: int
    span: int  # keys per split


@triton.jit
def _load(table, number, column, count, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Rows ``number`` of a (count, DIM) table; 0 beyond its ends."""
    inside = number[:, None] < count
    if DIM != BLOCK_DIM:
        inside = inside & (column[None, :] < DIM)
    return tl.load(table + number[:, None].to(tl.int64) * DIM + column[None, :], mask=inside, other=0.0)


@triton.jit
def _store(table, number, column, count, values, DIM: tl.constexpr):
    inside = (number[:, None] < count) & (column[None, :] < DIM)
    tl.store(table + number[:, None].to(tl.int64) * DIM + column[None, :], values, mask=inside)


@triton.jit
def _rounded(x, NUMBERS: tl.constexpr):
    if NUMBERS == "bf16":
        x = x.to(tl.bfloat16)
    elif NUMBERS == "tf32":
        large = x * 8193.0  # 2^13 + 1: what is left of x has 13 bits less, to nearest; not a number stays one
        x = large - (large - x)
    return x


@triton.jit
def _sees(unseen, row, key, first, count, width, SLOTS: tl.constexpr):
    """Whether rows see keys, in the shape that ``row`` and ``key`` broadcast to; ``first`` is the number of key 0."""
    seen = (row < count) & (key < width)
    for slot in tl.static_range(SLOTS):
        hidden = tl.load(unseen + slot * count + row, mask=row < count, other=-1)
        seen = seen & (hidden != first + key)
    return seen


@triton.jit
def _forward_kernel(
    rows,
    keys,
    unseen,  # (SLOTS, count) the keys that each row does not see
    largest,  # (splits, count)
    total,  # (splits, count)
    mean,  # (splits, count, DIM)
    count,
    width,
    first,
    span,
    scale,
    SLOTS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    NUMBERS: tl.constexpr,
):
    """What a block of rows learns from one split of the keys."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_DIM)
    split = tl.program_id(1)
    part = _rounded(_load(rows, row, column, count, DIM, BLOCK_DIM) * scale, NUMBERS)
    top = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_ROWS], tl.float32)
    sums = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
    stop = tl.minimum(split * span + span, width)
    for left in range(split * span, stop, BLOCK_KEYS):
        key = left + tl.arange(0, BLOCK_KEYS)
        block = _rounded(_load(keys, key, column, width, DIM, BLOCK_DIM).to(tl.float32), NUMBERS)
        seen = _sees(unseen, row[:, None], key[None, :], first, count, width, SLOTS)
        logits = tl.dot(part, tl.trans(block), input_precision="tf32")
        logits = tl.where(seen, logits, float("-inf"))
        previous = top
        top = tl.maximum(top, tl.max(logits, 1))
        shift = tl.where(top == float("-inf"), 0.0, top)  # a row that saw no key so far
        decay = tl.exp2(previous - shift)
        weights = tl.exp2(logits - shift[:, None])
        weight = weight * decay + tl.sum(weights, 1)
        sums = tl.dot(_rounded(weights, NUMBERS), block, sums * decay[:, None], input_precision="tf32")
    tl.store(largest + split * count + row, top, mask=row < count)
    tl.store(total + split * count + row, weight, mask=row < count)
    _store(mean + split.to(tl.int64) * count * DIM, row, column, count, sums, DIM)


@triton.jit
def _keys_backward_kernel(
    rows,
    keys,
    unseen,
    logsumexp,  # (count,) in bits
    values,  # (count, DIM)
    gradient,  # (width, DIM)
    count,
    width,
    scale,
    SLOTS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    NUMBERS: tl.constexpr,
):
    """Add ``sum_i s_ik value_i`` to the gradient of a block of keys."""
    key = tl.program_id(0) * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    column = tl.arange(0, BLOCK_DIM)
    block = _rounded(_load(keys, key, column, width, DIM, BLOCK_DIM) * scale, NUMBERS)
    sums = _load(gradient, key, column, width, DIM, BLOCK_DIM)
    for start in range(0, count, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        part = _rounded(_load(rows, row, column, count, DIM, BLOCK_DIM), NUMBERS)
        shift = tl.load(logsumexp + row, mask=row < count, other=0.0)
        logits = tl.dot(block, tl.trans(part), input_precision="tf32")
        seen = _sees(unseen, row[None, :], key[:, None], 0, count, width, SLOTS)
        # At most 1, where rounding says otherwise.
        bits = tl.minimum(logits - shift[None, :], 0.0, propagate_nan=tl.PropagateNan.ALL)
        weights = tl.where(seen, tl.exp2(bits), 0.0)
        value = _rounded(_load(values, row, column, count, DIM, BLOCK_DIM), NUMBERS)
        sums = tl.dot(_rounded(weights, NUMBERS), value, sums, input_precision="tf32")
    _store(gradient, key, column, width, sums, DIM)


def forward(
    rows: Tensor, keys: Tensor, queue: Tensor | None, scales: Sequence[float], hidden: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of :class:`slr_plugin.contrast.Contrast`.

    Args:
        rows: (r, d) float32, d at most 256.
        keys: (b, d) float32.
        queue: (n, d), or None.
        scales: factors on the similarities; each takes a pass of its own.
        hidden: diagonals, three numbers each (:class:`slr_plugin.contrast.Hidden`).
    """
    rows, (count, dim) = rows.contiguous(), rows.shape
    unseen, (tile, sizes) = _unseen(rows, hidden), _sizes(FORWARD, dim)
    sources = list(_sources(rows, keys, queue, tile))
    found = sum(source.splits for source in sources)
    largest = rows.new_full((len(scales), max(found, 1), count), -torch.inf)
    total = torch.zeros_like(largest)
    sums = rows.new_zeros(*largest.shape, dim)
    for j, scale in enumerate(scales):
        at = 0
        for source in sources:
            with torch.cuda.device_of(rows):  # Triton launches on the current one
                _forward_kernel[triton.cdiv(count, tile.rows), source.splits](
                    rows,
                    source.table,
                    unseen,
                    largest[j, at:],
                    total[j, at:],
                    sums[j, at:],
                    count,
                    len(source.table),
                    source.first,
                    source.span,
                    scale / LN2,
                    SLOTS=len(unseen),
                    NUMBERS=source.numbers,
                    **sizes,
                )
            at += source.splits
    return _together(largest, total, sums)


def keys_backward(
    rows: Tensor, keys: Tensor, logsumexp: Tensor, values: Tensor, scales: Sequence[float], hidden: Sequence[int]
) -> Tensor:
    r"""The gradient :math:`\sum_i s_{ik} v_i` of the keys, summed over scales.

    Args:
        rows: (r, d) float32, as in :func:`forward`.
        keys: (b, d) float32.
        logsumexp: (m, r), finite, of every scale.
        values: (m, r, d), the :math:`v_i` of every scale.
        scales: as in :func:`forward`.
        hidden: as in :func:`forward`.
    """
    rows, keys, (count, dim) = rows.contiguous(), keys.contiguous(), rows.shape
    unseen, (tile, sizes) = _unseen(rows, hidden), _sizes(BACKWARD, dim)
    gradient = torch.zeros_like(keys)
    for j, scale in enumerate(scales if len(keys) else ()):
        with torch.cuda.device_of(rows):
            _keys_backward_kernel[(triton.cdiv(len(keys), tile.keys),)](
                rows,
                keys,
                unseen,
                logsumexp[j] / LN2,
                values[j].contiguous(),
                gradient,
                count,
                len(keys),
                scale / LN2,
                SLOTS=len(unseen),
                NUMBERS=BATCH,
                **sizes,
            )
    return gradient


def _together(largest: Tensor, total: Tensor, sums: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the splits found, (m, splits, r) each, put together (the equations at the top of this module)."""
    top = largest.amax(1)
    shift = top.masked_fill(top == -torch.inf, 0.0)  # a row that saw no key
    share = (largest - shift[:, None]).exp2_()
    weight = (share * total).sum(1)
    excess = weight.log()
    weight.masked_fill_(weight == 0, 1.0)
    mean = sums.mul_(share[..., None]).sum(1) / weight[..., None]  # not a product, which TF32 would round
    return LN2 * shift, excess, (top - shift).exp2_() / weight, mean


def _sizes(tiles: dict[int, Tile], dim: int) -> tuple[Tile, dict[str, int]]:
    """The tile for a dimension, and the sizes that a kernel is compiled for."""
    tile = next(tile for widest, tile in tiles.items() if dim <= widest)
    return tile, {
        "DIM": dim,
        "BLOCK_DIM": max(16, triton.next_power_of_2(dim)),  # a product takes no less
        "BLOCK_ROWS": tile.rows,
        "BLOCK_KEYS": tile.keys,
        "num_warps": tile.warps,
        "num_stages": STAGES,
    }


def _sources(rows: Tensor, keys: Tensor, queue: Tensor | None, tile: Tile) -> Iterator[Source]:
    """The tables that hold keys, each split so that all processors of the GPU have work."""
    medium = torch.get_float32_matmul_precision() == "medium"
    first = 0
    for table, numbers in ((keys, BATCH), (queue, QUEUE_AT_MEDIUM if medium else BATCH)):
        if table is None or not len(table):
            continue
        tiles = triton.cdiv(len(table), tile.keys)
        splits = _splits(triton.cdiv(len(rows), tile.rows), _processors(rows.device))
        span = tile.keys * triton.cdiv(tiles, splits)
        yield Source(table.to(rows.device).contiguous(), first, numbers, triton.cdiv(len(table), span), span)
        first += len(table)


def _splits(blocks: int, processors: int) -> int:
    """Into how many parts each of so many equal tasks goes, for the processors to finish them soonest."""
    most = max(processors // blocks, 4 if blocks < 4 * processors else 1)  # more tasks are even enough, and parts cost
    return min(range(1, most + 1), key=lambda parts: triton.cdiv(blocks * parts, processors) / parts)


@functools.cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; under Triton's interpreter as few as a test needs."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def _unseen(rows: Tensor, hidden: Sequence[int]) -> Tensor:
    """For each row the keys that it does not see, (slots, r) int32; ``NO_KEY`` where there is none."""
    slots: list[list[tuple[int, int, int]]] = []
    for row, key, length in zip(hidden[::3], hidden[1::3], hidden[2::3], strict=True):
        slot = next((slot for slot in slots if all(row + length <= r or r + n <= row for r, _, n in slot)), None)
        if slot is None:
            slots.append(slot := [])
        slot.append((row, key, length))
    unseen = torch.full((len(slots), len(rows)), NO_KEY, dtype=torch.int32, device=rows.device)
    for line, diagonals in zip(unseen, slots, strict=True):
        for row, key, length in diagonals:
            torch.arange(key, key + length, out=line[row : row + length])
    return unseen
