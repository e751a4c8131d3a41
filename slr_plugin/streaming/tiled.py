r"""The streaming pass with torch's own operations, tile by tile, on any device.

Logits are kept in bits, :math:`c \langle r_i, b_k \rangle / \ln 2`: as exact, and torch's ``exp2`` takes a third of the
time of its ``exp`` on the CPU. The factor rides on the matrix product for nothing.

A running maximum prevents overflow; it is left out where logits are known to be small (``bound``). Where the keys
are the rows, the logits are a symmetric matrix: a tile then serves its mirror image too, and half the tiles are enough.

After ``torch.set_float32_matmul_precision("medium")`` float32 rows meet the *queue* through bfloat16 products where the
CPU has instructions for them (torch itself reaches those units on few CPUs). The keys of the batch, with the positives
and their large logits, stay in float32, and so do all sums. A queue that fits into one tile together with the batch is
joined with it, and then stays in float32 too.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from slr_plugin.streaming import threads
from slr_plugin.streaming.stats import Diagonal, Plan, SoftmaxStats, Source

# Tiles of rows x keys. On the CPU 1,024 x 1,024 float32 values are 4 MB and stay in the cache between the two products.
# An accelerator wants fewer, larger launches: on an H200, at precision "high", (8192, 65536) halves the forward pass of
# 256 images over 65,536 keys, then one tile of 200 MB. This one takes 134 MB at most (``python -m benchmarks tiles``).
CPU_TILE = (1024, 1024)
ACCELERATOR_TILE = (4096, 8192)
# A pass over at least so many pairs of rows and keys is shared among threads. Handing it over costs up to 8 ms, while
# the threads of torch's last operation still spin.
SHARED_PAIRS = 2**23
LEAST_HEIGHT = 256  # rows of a tile, however many threads there are
LN2 = math.log(2)
# Logits of at most so many bits need no running maximum: their weights stay below 2^32, and float32 reaches 2^127.
SAFE_BITS = 32


class Tiling(NamedTuple):
    """How a pass is cut into tiles, and the memory of one tile for each thread that computes a share of it.

    Every sum has one writer at a time and receives its parts in a fixed order, so that results are deterministic for a
    given number of threads.
    """

    height: int  # rows of a tile
    width: int  # keys of a tile; equal to the height, where a tile serves its mirror image too
    tiles: list[Tensor]

    @classmethod
    def of(cls, rows: Tensor, sources: Sequence[Source], chunk: int, mirrored: bool, shares_rows: bool) -> Tiling:
        """Choose tiles and threads by the device and the size of the pass; threads share its rows or its keys."""
        on_cpu = rows.device.type == "cpu"
        pairs = len(rows) * sum(len(source.keys) for source in sources)
        count = torch.get_num_threads() if on_cpu and pairs >= SHARED_PAIRS else 1
        height, width = _largest_tile(rows.device)
        height, width = max(height // count, min(height, LEAST_HEIGHT)), chunk or width
        if mirrored:
            width = height
        longest = max(len(source.keys) for source in sources)
        if not mirrored and shares_rows:
            height = min(height, -(-len(rows) // count))
        elif not mirrored:
            width = min(width, -(-longest // count))
        height, width = max(1, min(height, len(rows))), max(1, min(width, longest))
        return cls(height, width, [rows.new_empty(height * width) for _ in range(count)])

    def run_shares(self, count: int, compute: Callable[[Tensor, slice], None]) -> None:
        """Call ``compute(tile, share)`` for shares of ``range(count)``, one per thread."""
        stops = [count * i // len(self.tiles) for i in range(len(self.tiles) + 1)]
        shares = zip(self.tiles, itertools.starmap(slice, itertools.pairwise(stops)), strict=True)
        threads.run([functools.partial(compute, tile, share) for tile, share in shares])

    def run_pairs(self, count: int, compute: Callable[[Tensor, slice, slice], None]) -> None:
        """Call ``compute(tile, here, there)`` for every two blocks of ``range(count)``, and for each and itself.

        Pairs that are computed at the same time have no block in common, so no two threads write the same rows.
        """

        def share(tile: Tensor, pairs: list[tuple[slice, slice]]) -> None:
            for here, there in pairs:
                compute(tile, here, there)

        number = len(self.tiles)
        for pairs in _rounds(list(_slices(slice(0, count), self.height))):
            threads.run([functools.partial(share, tile, pairs[i::number]) for i, tile in enumerate(self.tiles)])


class Sums(NamedTuple):
    """What a pass knows of its rows so far, relative to 2^shift."""

    shift: Tensor  # (r, 1) the largest logit seen; 0 where logits are bounded
    total: Tensor  # (r, 1) the sum of weights
    largest: Tensor  # (r, 1) the largest weight
    mean: Tensor  # (r, v) the sum of weighted values

    def at(self, rows: slice) -> Sums:
        """The sums of some rows, as views."""
        return Sums(*(x[rows] for x in self))

    def add(self, weights: Tensor, values: Tensor) -> None:
        """Accumulate one block of keys: weights (rows, keys), values (keys, v)."""
        self.total.add_(weights.sum(1, keepdim=True))
        torch.maximum(self.largest, weights.amax(1, keepdim=True), out=self.largest)
        if values.dtype == weights.dtype:
            self.mean.addmm_(weights, values)
        else:
            self.mean.add_(weights.to(values.dtype) @ values)

    def raise_shift(self, logits: Tensor) -> None:
        """Raise the shift to the largest of ``logits``, which are made relative to it, as are the sums."""
        previous = self.shift.clone()
        torch.maximum(previous, logits.amax(1, keepdim=True), out=self.shift)
        shift = _finite(self.shift)  # of a row that saw no key so far: 2^(-inf - 0) = 0
        logits.sub_(shift)
        decay = (previous - shift).exp2_()
        for sums in (self.total, self.largest, self.mean):
            sums.mul_(decay)


def forward(rows: Tensor, sources: Sequence[Source], plan: Plan) -> SoftmaxStats:
    """Compute the statistics of (r, d) rows over all keys of all sources."""
    scale, bound, hidden, _, chunk = plan
    bounded, mirrored = _is_bounded(plan), _is_mirrored(plan)
    most = _largest_tile(rows.device)[1]
    if len(sources) > 1 and sum(len(source.keys) for source in sources) <= min(chunk or most, most):
        sources = [_one_source(sources, rows)]  # one tile in place of two, of some seven operations each
    tiling = Tiling.of(rows, sources, chunk, mirrored, shares_rows=True)
    count, values = len(rows), sources[0].values
    sums = Sums(
        rows.new_full((count, 1), 0.0 if bounded else -torch.inf),
        rows.new_zeros(count, 1),
        rows.new_zeros(count, 1),
        rows.new_zeros(count, values.shape[1]),
    )
    low = (rows * (scale / LN2)).bfloat16() if sources[-1].may_be_low and uses_bfloat16(rows) else rows

    def add_keys(tile: Tensor, share: slice) -> None:
        for left, block, averaged in _blocks(sources, tiling.width, rows, low.dtype):
            compared = rows if block.dtype == rows.dtype else low
            for here in _slices(share, tiling.height):
                logits = _fill_logits(compared[here], block, scale, tile, here.start, left, hidden)
                part = sums.at(here)
                if not bounded:
                    part.raise_shift(logits)
                part.add(logits.exp2_(), averaged)

    def add_each_other(tile: Tensor, here: slice, there: slice) -> None:
        weights = _fill_logits(rows[here], rows[there], scale, tile, here.start, there.start, hidden).exp2_()
        sums.at(here).add(weights, values[there])
        if here != there:
            sums.at(there).add(weights.T, values[here])

    if mirrored:
        tiling.run_pairs(count, add_each_other)
    else:
        tiling.run_shares(count, add_keys)
    total = sums.total
    if bounded:
        reference, offset = torch.full_like(total, bound), (total * math.exp(-bound)).log_()
    else:
        reference, offset = LN2 * _finite(sums.shift), total.log()
    total = total.masked_fill(total == 0, 1.0)
    return SoftmaxStats(reference[:, 0], offset[:, 0], (sums.largest / total)[:, 0], sums.mean.div_(total))


def keys_backward(rows: Tensor, keys: Tensor, logsumexp: Tensor, row_values: Tensor, plan: Plan) -> Tensor:
    r"""Compute :math:`\sum_i s_{ik} u_i` (b, v) from the rows' log-sum-exp (r,), finite, and their values u (r, v)."""
    scale, _, hidden, _, chunk = plan
    bounded, mirrored = _is_bounded(plan), _is_mirrored(plan)
    tiling = Tiling.of(rows, [Source(keys, keys)], chunk, mirrored, shares_rows=False)
    shift = logsumexp[:, None] / LN2
    values = row_values * (-shift).exp2() if bounded else row_values
    gradient = row_values.new_zeros(len(keys), row_values.shape[1])

    def weights_of(tile: Tensor, here: slice, there: slice) -> Tensor:
        weights = _fill_logits(rows[here], keys[there], scale, tile, here.start, there.start, hidden)
        if not bounded:
            weights.sub_(shift[here]).clamp_(max=0.0)  # at most 1, where rounding says otherwise
        return weights.exp2_()

    def add_rows(tile: Tensor, share: slice) -> None:
        for there in _slices(share, tiling.width):
            for here in _slices(slice(0, len(rows)), tiling.height):
                gradient[there].addmm_(weights_of(tile, here, there).T, values[here])

    def add_each_other(tile: Tensor, here: slice, there: slice) -> None:
        weights = weights_of(tile, here, there)
        gradient[there].addmm_(weights.T, values[here])
        if here != there:
            gradient[here].addmm_(weights, values[there])

    if mirrored:
        tiling.run_pairs(len(rows), add_each_other)
    else:
        tiling.run_shares(len(keys), add_rows)
    return gradient


def _is_bounded(plan: Plan) -> bool:
    return plan.bound / LN2 <= SAFE_BITS


def _is_mirrored(plan: Plan) -> bool:
    """Whether a tile serves its mirror image too."""
    return plan.symmetric and _is_bounded(plan) and not plan.chunk


def _largest_tile(device: torch.device) -> tuple[int, int]:
    return CPU_TILE if device.type == "cpu" else ACCELERATOR_TILE


def _one_source(sources: Sequence[Source], like: Tensor) -> Source:
    """All keys in one source, on the device and in the dtype of ``like``."""
    keys = torch.cat([source.keys.to(like) for source in sources])
    if all(source.values is source.keys for source in sources):
        return Source(keys, keys)
    return Source(keys, torch.cat([source.values.to(like) for source in sources]))


def _fill_logits(
    rows: Tensor, keys: Tensor, scale: float, tile: Tensor, top: int, left: int, hidden: Sequence[Diagonal]
) -> Tensor:
    """Logits in bits of rows ``top ..`` with keys ``left ..``, in a tile's memory; minus infinity where hidden.

    Rows in bfloat16 are scaled already.
    """
    height, width = len(rows), len(keys)
    logits = tile[: height * width].view(height, width)
    if rows.dtype == tile.dtype:
        torch.addmm(logits, rows, keys.T, beta=0, alpha=scale / LN2, out=logits)
    else:
        logits.copy_(rows @ keys.T)
    for row, key, length in hidden:
        # The part of the diagonal (row + t, key + t), t < length, inside this tile.
        start = max(top - row, left - key, 0)
        stop = min(top + height - row, left + width - key, length)
        if start < stop:
            corner = logits[row + start - top :, key + start - left :]
            corner.diagonal()[: stop - start].fill_(-torch.inf)
    return logits


def _blocks(
    sources: Sequence[Source], width: int, like: Tensor, low: torch.dtype
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """All keys in blocks: the number of the first among all, the keys, their values.

    They come on the device and in the dtype of ``like``, or ``low`` where that may be.
    """
    first = 0
    for keys, values, may_be_low in sources:
        dtype = low if may_be_low else like.dtype
        for here in _slices(slice(0, len(keys)), width):
            block = keys[here].to(like.device, dtype)
            averaged = block if values is keys else values[here].to(like.device, dtype)
            yield first + here.start, block, averaged
        first += len(keys)


def _slices(of: slice, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, of.stop)) for start in range(of.start, of.stop, size))


def _rounds(blocks: Sequence[slice]) -> Iterator[list[tuple[slice, slice]]]:
    """Every two of the blocks once, in rounds of disjoint pairs as in a tournament; first each block with itself."""
    yield [(block, block) for block in blocks]
    fixed, *others = [*blocks, None] if len(blocks) % 2 else blocks
    for _ in range(len(others)):
        circle = [fixed, *others]
        pairs = zip(circle[: len(circle) // 2], reversed(circle), strict=False)
        yield [(here, there) for here, there in pairs if here is not None and there is not None]
        others = [others[-1], *others[:-1]]


def _finite(logits: Tensor) -> Tensor:
    return logits.masked_fill(logits == -torch.inf, 0.0)


def uses_bfloat16(rows: Tensor) -> bool:
    """Whether float32 products may be approximate, and the CPU is faster at bfloat16."""
    if rows.device.type != "cpu" or rows.dtype != torch.float32:
        return False
    return torch.get_float32_matmul_precision() == "medium" and cpu_has_bfloat16()


@functools.cache
def cpu_has_bfloat16() -> bool:
    """Whether the CPU has instructions for bfloat16 products."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # private, and not in every torch
    return supported is not None and bool(supported())
