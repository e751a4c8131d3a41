r"""The streaming pass as Triton kernels: one launch where the tiled pass needs seven for a tile.

The same sums, in bits as in ``tiled.py``. A program holds a block of rows and walks along a part of the keys, whose
logits never leave the chip. There are few rows and many keys (768 and 65,536), so the keys are split until all
processors of the GPU have work, and the sums of the splits are joined afterwards. With the largest logit :math:`m_s` of
split s, its sum of weights :math:`t_s` and its sum of weighted values :math:`u_s`,

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
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from slr_plugin.streaming.stats import LN2, Pass, SoftmaxStats, Source

# The numbers of a product's factors: "tf32", "bf16", or "float32", which is exact in the interpreter and only there.
BATCH_NUMBERS, QUEUE_NUMBERS_AT_MEDIUM = "tf32", "bf16"


class Tile(NamedTuple):
    """Rows and keys of a tile, and the warps that work on it."""

    rows: int
    keys: int
    warps: int


# By dimension, among those that fit the registers of sm_80 and sm_90 and the 99 KB of shared memory of consumer cards.
# On an H200 (``python -m benchmarks tiles``) this backward is the fastest. A forward of (128, 64, 8), which does not
# fit sm_80, takes up to an eighth less for large sizes; (64, 64, 4) takes half for 2,048 images without a queue.
FORWARD = {128: Tile(128, 32, 8), 256: Tile(32, 32, 4)}
BACKWARD = {128: Tile(32, 32, 4), 256: Tile(16, 32, 4)}
STAGES = 2


class SplitSource(NamedTuple):
    """One source of keys, and how the pass goes through it."""

    keys: Tensor  # (n, d)
    values: Tensor  # (n, v)
    first: int  # the number of its first key among all keys
    numbers: str  # of a product's factors
    parts: int
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
def _sees(masked_keys, row, key, first, count, width, SLOTS: tl.constexpr):
    """Whether rows see keys, in the shape that ``row`` and ``key`` broadcast to; ``first`` is the number of key 0."""
    seen = (row < count) & (key < width)
    for slot in tl.static_range(SLOTS):
        hidden = tl.load(masked_keys + slot * count + row, mask=row < count, other=-1)
        seen = seen & (hidden != first + key)
    return seen


@triton.jit
def _forward_kernel(
    rows,
    keys,
    values,  # (width, VALUE_DIM), not read unless APART
    masked_keys,  # (SLOTS, count) the keys that each row does not see
    largest,  # (splits, count)
    total,  # (splits, count)
    mean,  # (splits, count, VALUE_DIM)
    count,
    width,
    first,
    span,
    scale,
    SLOTS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_VALUE_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    NUMBERS: tl.constexpr,
    APART: tl.constexpr,
):
    """Accumulate one split of the keys into largest logit, sum of weights and weighted values of a block of rows."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column, value_column = tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK_VALUE_DIM)
    split = tl.program_id(1)
    part = _rounded(_load(rows, row, column, count, DIM, BLOCK_DIM) * scale, NUMBERS)
    top = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_ROWS], tl.float32)
    sums = tl.zeros([BLOCK_ROWS, BLOCK_VALUE_DIM], tl.float32)
    stop = tl.minimum(split * span + span, width)
    for left in range(split * span, stop, BLOCK_KEYS):
        key = left + tl.arange(0, BLOCK_KEYS)
        block = _rounded(_load(keys, key, column, width, DIM, BLOCK_DIM).to(tl.float32), NUMBERS)
        seen = _sees(masked_keys, row[:, None], key[None, :], first, count, width, SLOTS)
        logits = tl.dot(part, tl.trans(block), input_precision="tf32")
        logits = tl.where(seen, logits, float("-inf"))
        previous = top
        top = tl.maximum(top, tl.max(logits, 1))
        shift = tl.where(top == float("-inf"), 0.0, top)  # a row that saw no key so far
        decay = tl.exp2(previous - shift)
        weights = tl.exp2(logits - shift[:, None])
        weight = weight * decay + tl.sum(weights, 1)
        if APART:
            block = _load(values, key, value_column, width, VALUE_DIM, BLOCK_VALUE_DIM).to(tl.float32)
            block = _rounded(block, NUMBERS)
        sums = tl.dot(_rounded(weights, NUMBERS), block, sums * decay[:, None], input_precision="tf32")
    tl.store(largest + split * count + row, top, mask=row < count)
    tl.store(total + split * count + row, weight, mask=row < count)
    _store(mean + split.to(tl.int64) * count * VALUE_DIM, row, value_column, count, sums, VALUE_DIM)


@triton.jit
def _keys_backward_kernel(
    rows,
    keys,
    masked_keys,
    reference,  # (count,) in bits
    values,  # (count, VALUE_DIM), of the rows
    gradient,  # (width, VALUE_DIM)
    count,
    width,
    scale,
    SLOTS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_VALUE_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    NUMBERS: tl.constexpr,
):
    """Add ``sum_i s_ik value_i`` to the gradient of a block of keys."""
    key = tl.program_id(0) * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    column, value_column = tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK_VALUE_DIM)
    block = _rounded(_load(keys, key, column, width, DIM, BLOCK_DIM) * scale, NUMBERS)
    sums = _load(gradient, key, value_column, width, VALUE_DIM, BLOCK_VALUE_DIM)
    for start in range(0, count, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        part = _rounded(_load(rows, row, column, count, DIM, BLOCK_DIM), NUMBERS)
        shift = tl.load(reference + row, mask=row < count, other=0.0)
        logits = tl.dot(block, tl.trans(part), input_precision="tf32")
        seen = _sees(masked_keys, row[None, :], key[:, None], 0, count, width, SLOTS)
        # At most 1, where rounding says otherwise.
        bits = tl.minimum(logits - shift[None, :], 0.0, propagate_nan=tl.PropagateNan.ALL)
        weights = tl.where(seen, tl.exp2(bits), 0.0)
        value = _rounded(_load(values, row, value_column, count, VALUE_DIM, BLOCK_VALUE_DIM), NUMBERS)
        sums = tl.dot(_rounded(weights, NUMBERS), value, sums, input_precision="tf32")
    _store(gradient, key, value_column, width, sums, VALUE_DIM)


def forward(given: Pass) -> SoftmaxStats:
    """Compute the statistics of all rows over all keys; d at most 256.

    ``bound`` and ``symmetric`` would save nothing here, and ``chunk`` is ignored.
    """
    rows, sources = given.rows.contiguous(), given.sources()
    (count, dim), value_dim = rows.shape, sources[0].values.shape[1]
    masked_keys, (tile, sizes) = _masked_keys(given), _sizes(FORWARD, dim, value_dim)
    tables = list(_split_sources(rows, sources, tile))
    found = sum(table.parts for table in tables)
    largest = rows.new_full((max(found, 1), count), -torch.inf)
    total = torch.zeros_like(largest)
    sums = rows.new_zeros(*largest.shape, value_dim)
    at = 0
    for table in tables:
        with torch.cuda.device_of(rows):  # Triton launches on the current one
            _forward_kernel[triton.cdiv(count, tile.rows), table.parts](
                rows,
                table.keys,
                table.values,
                masked_keys,
                largest[at:],
                total[at:],
                sums[at:],
                count,
                len(table.keys),
                table.first,
                table.span,
                given.scale / LN2,
                SLOTS=len(masked_keys),
                NUMBERS=table.numbers,
                APART=table.values is not table.keys,
                **sizes,
            )
        at += table.parts
    return _joined(largest, total, sums)


def keys_backward(given: Pass, reference: Tensor, offset: Tensor, row_values: Tensor) -> Tensor:
    r"""Compute :math:`\sum_i s_{ik} u_i` (b, v) from the rows' statistics (r,), finite, and their values u (r, v)."""
    rows, keys = given.rows.contiguous(), given.keys.contiguous()
    (count, dim), value_dim = rows.shape, row_values.shape[1]
    masked_keys, (tile, sizes) = _masked_keys(given), _sizes(BACKWARD, dim, value_dim)
    values = row_values * (-offset[:, None]).exp()
    gradient = rows.new_zeros(len(keys), value_dim)
    if not len(keys):
        return gradient
    with torch.cuda.device_of(rows):
        _keys_backward_kernel[(triton.cdiv(len(keys), tile.keys),)](
            rows,
            keys,
            masked_keys,
            reference,
            values,
            gradient,
            count,
            len(keys),
            given.scale / LN2,
            SLOTS=len(masked_keys),
            NUMBERS=BATCH_NUMBERS,
            **sizes,
        )
    return gradient


def _joined(largest: Tensor, total: Tensor, sums: Tensor) -> SoftmaxStats:
    """The statistics from the sums of all splits, (splits, r) each (equations at the top of this module)."""
    top = largest.amax(0)
    shift = top.masked_fill(top == -torch.inf, 0.0)  # a row that sees no key
    share = (largest - shift).exp2_()
    weight = (share * total).sum(0)
    offset = weight.log()
    weight.masked_fill_(weight == 0, 1.0)
    mean = sums.mul_(share[..., None]).sum(0) / weight[..., None]  # not a product, which TF32 would round
    return SoftmaxStats(shift, offset, (top - shift).exp2_() / weight, mean)


def _sizes(tiles: dict[int, Tile], dim: int, value_dim: int) -> tuple[Tile, dict[str, int]]:
    """The tile for two dimensions, and the sizes that a kernel is compiled for."""
    tile = next(tile for widest, tile in tiles.items() if max(dim, value_dim) <= widest)
    return tile, {
        "DIM": dim,
        "BLOCK_DIM": max(16, triton.next_power_of_2(dim)),  # a product takes no less
        "VALUE_DIM": value_dim,
        "BLOCK_VALUE_DIM": max(16, triton.next_power_of_2(value_dim)),
        "BLOCK_ROWS": tile.rows,
        "BLOCK_KEYS": tile.keys,
        "num_warps": tile.warps,
        "num_stages": STAGES,
    }


def _split_sources(rows: Tensor, sources: Sequence[Source], tile: Tile) -> Iterator[SplitSource]:
    """The sources that hold keys, each split so that all processors of the GPU have work."""
    medium = torch.get_float32_matmul_precision() == "medium"
    first = 0
    for number, source in enumerate(sources):
        width = len(source.keys)
        if not width:
            continue
        splits = _part_count(triton.cdiv(len(rows), tile.rows), _processors(rows.device))
        span = tile.keys * triton.cdiv(triton.cdiv(width, tile.keys), splits)
        keys = source.keys.to(rows.device).contiguous()
        values = keys if source.values is source.keys else source.values.to(rows.device).contiguous()
        numbers = QUEUE_NUMBERS_AT_MEDIUM if medium and number else BATCH_NUMBERS
        yield SplitSource(keys, values, first, numbers, triton.cdiv(width, span), span)
        first += width


def _part_count(blocks: int, processors: int) -> int:
    """Into how many parts each of so many equal tasks goes, for the processors to finish them soonest."""
    most = max(processors // blocks, 4 if blocks < 4 * processors else 1)  # more tasks are even enough, and parts cost
    return min(range(1, most + 1), key=lambda parts: triton.cdiv(blocks * parts, processors) / parts)


@functools.cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; under Triton's interpreter as few as a test needs."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def _masked_keys(given: Pass) -> Tensor:
    """For each row the keys that it does not see, (slots, r) int32; -1 where there is none."""
    if given.hidden is None:
        return given.rows.new_empty(0, len(given.rows), dtype=torch.int32)
    return given.hidden.T.to(torch.int32).contiguous()
