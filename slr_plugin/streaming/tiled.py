r"""The streaming pass with torch's own operations, tile by tile, on any device.

Logits are kept in bits, :math:`c \langle r_i, b_k \rangle / \ln 2`: as exact, and torch's ``exp2`` takes a third of the
time of its ``exp`` on the CPU. The factor rides on the matrix product for nothing.

A running maximum prevents overflow; it is left out where logits are known to be small (``bound``). Where the keys
are the rows, the logits are a symmetric matrix: a tile then serves its mirror image too, and half the tiles are enough;
a quarter where rows see the other half of the rows only, as images see texts.

On a CPU a large pass is shared: worker i of n takes every n-th tile into sums of its own, and the sums are merged in
the order of the workers. Results are therefore deterministic for a number of threads.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from slr_plugin.streaming import threads
from slr_plugin.streaming.stats import LN2, Pass, SoftmaxStats, Source

T = TypeVar("T")

# Tiles of rows x keys. On the CPU 1,024 x 1,024 float32 values are 4 MB and stay in the cache between the two products.
# An accelerator wants fewer, larger launches: on an H200, at precision "high", (8192, 65536) halves the forward pass of
# 256 images over 65,536 keys, then one tile of 200 MB. This one takes 134 MB at most (``python -m benchmarks tiles``).
CPU_TILE = (1024, 1024)
ACCELERATOR_TILE = (4096, 8192)
LEAST_WIDTH, LEAST_PAIRS = 256, 2**17  # of a tile, however many workers there are: smaller products take longer
# A pass over at least so many pairs of rows and keys is shared. Handing it over costs up to 8 ms, while the threads of
# torch's last operation still spin.
SHARED_PAIRS = 2**23
SPARE = 16  # columns before a tile's keys, and as many after them, which keep rows aligned: see ``logits``
# Logits of at most so many bits need no running maximum: their weights stay below 2^32, and float32 reaches 2^127.
SAFE_BITS = 32


class Sums(NamedTuple):
    """What a pass knows of its rows so far, relative to 2^shift."""

    shift: Tensor | None  # (r, 1) the largest logit seen; None, for no shift, where logits are bounded
    table: Tensor  # (r, v + 2): the sum of weighted values, the sum of weights, the largest weight

    def at(self, rows: slice) -> Sums:
        """The sums of some rows, as views."""
        return Sums(None if self.shift is None else self.shift[rows], self.table[rows])

    def add(self, block: Tensor, values: Tensor) -> None:
        """Accumulate some keys.

        Args:
            block: (rows, keys) of logits, which are made weights in place; where logits are bounded, of weights.
            values: (keys, v).
        """
        width = values.shape[1]
        if self.shift is not None:
            previous = self.shift.clone()
            torch.maximum(previous, block.amax(1, keepdim=True), out=self.shift)
            shift = _finite(self.shift)  # of a row that saw no key so far: 2^(-inf - 0) = 0
            self.table.mul_((previous - shift).exp2_())
            block.sub_(shift).exp2_()
        self.table[:, :width].addmm_(block, values)
        self.table[:, width].add_(block.sum(1))
        largest = self.table[:, width + 1]
        torch.maximum(largest, block.amax(1), out=largest)

    def merge(self, other: Sums) -> Sums:
        """The sums over the keys of both, in this one's memory."""
        shift = self.shift
        if self.shift is not None and other.shift is not None:
            shift = torch.maximum(self.shift, other.shift)
            self.table.mul_((self.shift - _finite(shift)).exp2_())
            other.table.mul_((other.shift - _finite(shift)).exp2_())
        largest = torch.maximum(self.table[:, -1], other.table[:, -1])
        self.table.add_(other.table)[:, -1] = largest
        return Sums(shift, self.table)


class Tile(NamedTuple):
    """Some rows and some keys of a pass, and the memory for their logits."""

    rows: slice
    keys: slice  # by their number among all keys
    block: Tensor  # the keys (w, d), on the device and in the dtype of the rows
    values: Tensor  # (w, v)
    memory: Tensor  # for the largest tile, with twice ``SPARE`` further columns


class Tiling:
    """Cuts a pass into tiles and goes through them, alone or with several workers."""

    def __init__(self, given: Pass) -> None:
        rows, sources = given.rows, given.sources()
        on_cpu = rows.device.type == "cpu"
        count, total = len(rows), sum(len(source.keys) for source in sources)
        height, width = CPU_TILE if on_cpu else ACCELERATOR_TILE
        if len(sources) > 1 and total <= min(width, given.chunk or width):
            sources = [_one_source(sources, rows)]  # one tile in place of two, of some seven operations each
        self.given, self.sources = given, sources
        self.bounded = given.bound / LN2 <= SAFE_BITS
        self.workers = torch.get_num_threads() if on_cpu and count * total >= SHARED_PAIRS else 1
        if self.workers > 1:  # their tiles together stay in the cache, and are enough for all
            least = 0 if given.symmetric else LEAST_PAIRS // min(height, count)
            width = max(LEAST_WIDTH, least, width // self.workers)
        width, half = given.chunk or width, count // 2 if given.cross else 0
        if given.symmetric:  # a square tile serves its mirror image too
            height = width = min(height, width, half or width)
        self.height = max(1, min(height, count))
        self.width = max(1, min(width, max(len(source.keys) for source in sources)))
        firsts = itertools.accumulate((len(source.keys) for source in sources), initial=0)
        self.cuts = [
            (source, first, here, there)
            for source, first in zip(sources, firsts, strict=False)
            for there in _slices(half, len(source.keys), self.width)
            for here in _slices(0, half or count, self.height)
            if not given.symmetric or here.start <= there.start
        ]

    def run(self, compute: Callable[[Iterator[Tile]], T]) -> list[T]:
        """What ``compute`` returns for every n-th tile, one worker each."""

        def task(worker: int) -> T:
            return compute(self._tiles(worker))

        return threads.run([functools.partial(task, worker) for worker in range(self.workers)])

    def _tiles(self, worker: int) -> Iterator[Tile]:
        rows = self.given.rows
        memory = rows.new_empty(self.height * (self.width + 2 * SPARE))
        for source, first, here, there in self.cuts[worker :: self.workers]:
            block = source.keys[there].to(rows)
            values = block if source.values is source.keys else source.values[there].to(rows)
            yield Tile(here, slice(first + there.start, first + there.stop), block, values, memory)

    def logits(self, tile: Tile) -> Tensor:
        """The logits of a tile in bits, in its memory; minus infinity where hidden."""
        given, height, width = self.given, tile.rows.stop - tile.rows.start, tile.keys.stop - tile.keys.start
        table = tile.memory[: height * (width + 2 * SPARE)].view(height, width + 2 * SPARE)
        logits = table[:, SPARE : SPARE + width]
        torch.addmm(logits, given.rows[tile.rows], tile.block.T, beta=0, alpha=given.scale / LN2, out=logits)
        if given.hidden is not None and tile.keys.start < len(given.keys):  # the queue's keys are not hidden
            # A number outside this tile lands in a spare column.
            column = given.hidden[tile.rows] + (SPARE - tile.keys.start)
            table[: len(column)].scatter_(1, column.clamp_(SPARE - 1, SPARE + width), -torch.inf)
        if given.row_groups is not None and given.key_groups is not None:
            rows, keys = given.row_groups[tile.rows], given.key_groups[tile.keys]
            if rows.device.type != "cpu" or bool(torch.isin(keys, rows).any()):  # few tiles hold two of one group
                logits[: len(rows)].masked_fill_((rows[:, None] == keys) & (rows[:, None] >= 0), -torch.inf)
        return logits

    def factor(self, offset: Tensor) -> Tensor:
        """What weights 2^(logit - reference) of a row, or 2^logit if bounded, are yet to be multiplied by, (r, 1)."""
        # Finite for a row that sees no key; others have at least -2 * 32 ln 2.
        factor = offset.clamp(min=-64.0).neg_()
        return (factor.sub_(self.given.bound) if self.bounded else factor).exp_()[:, None]


def softmax_stats(given: Pass) -> SoftmaxStats:
    """Compute the statistics of all rows over all keys."""
    tiling, rows = Tiling(given), given.rows
    width = tiling.sources[0].values.shape[1]

    def add_keys(tiles: Iterator[Tile]) -> Sums:
        shift = None if tiling.bounded else rows.new_full((len(rows), 1), -torch.inf)
        sums = Sums(shift, rows.new_zeros(len(rows), width + 2))
        for tile in tiles:
            logits = tiling.logits(tile)
            if tiling.bounded:
                logits.exp2_()  # the weights of the rows, and of the mirrored ones
            mirror = given.symmetric and tile.rows != tile.keys
            copy = logits.clone() if mirror and not tiling.bounded else logits  # to be shifted otherwise
            sums.at(tile.rows).add(logits, tile.values)
            if mirror:
                sums.at(tile.keys).add(copy.T, tiling.sources[0].values[tile.rows])
        return sums

    shift, table = functools.reduce(Sums.merge, tiling.run(add_keys))
    total, bound = table[:, width], given.bound
    if shift is None:
        reference, offset = torch.full_like(total, bound / LN2), (total * math.exp(-bound)).log_()
    else:
        reference, offset = _finite(shift[:, 0]), total.log()
    # A row that sees no key has sums of 0. In place, as the table is as large as the rows.
    table.div_(total.clamp(min=torch.finfo(total.dtype).tiny)[:, None])
    return SoftmaxStats(reference, offset, table[:, width + 1], table[:, :width])


def keys_gradient(given: Pass, reference: Tensor, offset: Tensor, row_values: Tensor) -> Tensor:
    r"""Compute :math:`\sum_i s_{ik} u_i` (b, v) from the rows' statistics (r,) and their values u (r, v)."""
    tiling = Tiling(given._replace(queue=None, values=None, queue_values=None))
    keys, shift = given.keys, reference[:, None]
    values = row_values * tiling.factor(offset)

    def add_rows(tiles: Iterator[Tile]) -> Tensor:
        gradient = values.new_zeros(len(keys), values.shape[1])
        for tile in tiles:
            logits = tiling.logits(tile)
            mirror = given.symmetric and tile.rows != tile.keys
            weights = logits.exp2_() if tiling.bounded else _weights(logits, shift[tile.rows], keep=mirror)
            gradient[tile.keys].addmm_(weights.T, values[tile.rows])
            if mirror:
                if not tiling.bounded:
                    weights = _weights(logits.T, shift[tile.keys]).T
                gradient[tile.rows].addmm_(weights, values[tile.keys])
        return gradient

    return functools.reduce(Tensor.add_, tiling.run(add_rows))


def symmetric_gradient(given: Pass, reference: Tensor, offset: Tensor, weights: Tensor) -> Tensor:
    r"""Compute :math:`\sum_k (w_i s_{ik} + w_k s_{ki}) b_k` (r, d) of a symmetric pass, for weights w (r,)."""
    tiling, keys, shift = Tiling(given._replace(values=None)), given.keys, reference[:, None]
    factor = tiling.factor(offset) * weights[:, None]

    def add_both(tiles: Iterator[Tile]) -> Tensor:
        gradient = torch.zeros_like(keys)
        for tile in tiles:
            logits, here, there = tiling.logits(tile), tile.rows, tile.keys
            if tiling.bounded:
                pairs = logits.exp2_().mul_(factor[here] + factor[there].T)
            else:
                mirrored = _weights(logits.T, shift[there], keep=True).mul_(factor[there])
                pairs = _weights(logits, shift[here]).mul_(factor[here]).add_(mirrored.T)
            gradient[here].addmm_(pairs, keys[there])
            if here != there:
                gradient[there].addmm_(pairs.T, keys[here])
        return gradient

    return functools.reduce(Tensor.add_, tiling.run(add_both))


def _weights(logits: Tensor, shift: Tensor, keep: bool = False) -> Tensor:
    """Powers of two of logits minus a shift (rows, 1), in their memory unless that is kept."""
    # At most 1, where rounding says otherwise.
    return (logits - shift if keep else logits.sub_(shift)).clamp_(max=0.0).exp2_()


def _one_source(sources: Sequence[Source], like: Tensor) -> Source:
    """All keys in one source, on the device and in the dtype of ``like``."""
    keys = torch.cat([source.keys.to(like) for source in sources])
    if all(source.values is source.keys for source in sources):
        return Source(keys, keys)
    return Source(keys, torch.cat([source.values.to(like) for source in sources]))


def _slices(first: int, last: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, last)) for start in range(first, last, size)]


def _finite(logits: Tensor) -> Tensor:
    return logits.masked_fill(logits == -torch.inf, 0.0)
