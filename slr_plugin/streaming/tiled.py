r"""The streaming pass with torch's own operations, tile by tile, on any device.

Logits are kept in bits, :math:`c \langle r_i, b_k \rangle / \ln 2`: as exact, and torch's ``exp2`` takes a third of the
time of its ``exp`` on the CPU. The factor rides on the matrix product for nothing.

A running maximum prevents overflow; it is left out where logits are known to be small (``bound``). Where the keys
are the rows, the logits are a symmetric matrix: a tile then serves its mirror image too, and half the tiles are enough.

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
from slr_plugin.streaming.stats import LN2, Plan, SoftmaxStats, Source

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
# Logits of at most so many bits need no running maximum: their weights stay below 2^32, and float32 reaches 2^127.
SAFE_BITS = 32


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
        self.mean.addmm_(weights, values)

    def rescale(self, logits: Tensor) -> None:
        """Raise the shift to the largest of ``logits``, which are made relative to it, as are the sums."""
        previous = self.shift.clone()
        torch.maximum(previous, logits.amax(1, keepdim=True), out=self.shift)
        shift = _finite(self.shift)  # of a row that saw no key so far: 2^(-inf - 0) = 0
        logits.sub_(shift)
        decay = (previous - shift).exp2_()
        for sums in (self.total, self.largest, self.mean):
            sums.mul_(decay)

    def merge(self, other: Sums) -> Sums:
        """The sums over the keys of both, in this one's memory."""
        shift = torch.maximum(self.shift, other.shift)
        for sums in (self, other):
            decay = (sums.shift - _finite(shift)).exp2_()
            for x in (sums.total, sums.largest, sums.mean):
                x.mul_(decay)
        self.total.add_(other.total)
        torch.maximum(self.largest, other.largest, out=self.largest)
        self.mean.add_(other.mean)
        return self._replace(shift=shift)


class Tile(NamedTuple):
    """Some rows and some keys of a pass, and the memory for their logits."""

    rows: slice
    keys: slice  # by their number among all keys
    block: Tensor  # the keys (w, d), on the device and in the dtype of the rows
    values: Tensor  # (w, v)
    memory: Tensor  # as many numbers as the largest tile has pairs, and a spare one


class Tiling:
    """Cuts a pass into tiles and goes through them, alone or with several workers."""

    def __init__(self, rows: Tensor, sources: Sequence[Source], plan: Plan) -> None:
        on_cpu = rows.device.type == "cpu"
        count, total = len(rows), sum(len(source.keys) for source in sources)
        height, width = CPU_TILE if on_cpu else ACCELERATOR_TILE
        if len(sources) > 1 and total <= min(width, plan.chunk or width):
            sources = [_one_source(sources, rows)]  # one tile in place of two, of some seven operations each
        self.rows, self.sources, self.plan = rows, sources, plan
        self.bounded = plan.bound / LN2 <= SAFE_BITS
        self.mirrored = plan.symmetric and self.bounded and not plan.chunk
        self.workers = torch.get_num_threads() if on_cpu and count * total >= SHARED_PAIRS else 1
        if self.workers > 1:  # their tiles together stay in the cache, and are enough for all
            least = 0 if self.mirrored else LEAST_PAIRS // min(height, count)
            width = max(LEAST_WIDTH, least, width // self.workers)
        width = min(height, width) if self.mirrored else plan.chunk or width
        self.height = max(1, min(width if self.mirrored else height, count))
        self.width = max(1, min(width, max(len(source.keys) for source in sources)))
        firsts = itertools.accumulate((len(source.keys) for source in sources), initial=0)
        self.cuts = [
            (source, first, here, there)
            for source, first in zip(sources, firsts, strict=False)
            for there in _slices(len(source.keys), self.width)
            for here in _slices(count, self.height)
            if not self.mirrored or here.start <= there.start
        ]

    def run(self, compute: Callable[[Iterator[Tile]], T]) -> list[T]:
        """What ``compute`` returns for every n-th tile, one worker each."""
        return threads.run([functools.partial(self._work, compute, worker) for worker in range(self.workers)])

    def _work(self, compute: Callable[[Iterator[Tile]], T], worker: int) -> T:
        return compute(self._tiles(worker))

    def _tiles(self, worker: int) -> Iterator[Tile]:
        memory = self.rows.new_empty(self.height * self.width + 1)
        for source, first, here, there in self.cuts[worker :: self.workers]:
            block = source.keys[there].to(self.rows)
            values = block if source.values is source.keys else source.values[there].to(self.rows)
            yield Tile(here, slice(first + there.start, first + there.stop), block, values, memory)

    def logits(self, tile: Tile) -> Tensor:
        """The logits of a tile in bits, in its memory; minus infinity where hidden."""
        height, width = tile.rows.stop - tile.rows.start, tile.keys.stop - tile.keys.start
        logits = tile.memory[: height * width].view(height, width)
        torch.addmm(logits, self.rows[tile.rows], tile.block.T, beta=0, alpha=self.plan.scale / LN2, out=logits)
        if self.plan.hidden is not None and tile.keys.start < len(self.sources[0].keys):  # further sources hide nothing
            column = self.plan.hidden[tile.rows] - tile.keys.start
            inside = (column >= 0) & (column < width)
            if column.device.type != "cpu" or bool(inside.any()):  # asking an accelerator would wait for it
                place = column + torch.arange(0, height * width, width, device=column.device)[:, None]
                spare = len(tile.memory) - 1  # takes what is hidden in other tiles
                tile.memory.index_fill_(0, place.where(inside, spare).flatten(), -torch.inf)
        if self.plan.row_groups is not None and self.plan.key_groups is not None:
            rows, keys = self.plan.row_groups[tile.rows], self.plan.key_groups[tile.keys]
            if rows.device.type != "cpu" or bool(torch.isin(keys, rows).any()):  # few tiles hold two of one group
                logits.masked_fill_((rows[:, None] == keys) & (rows[:, None] >= 0), -torch.inf)
        return logits


def forward(rows: Tensor, sources: Sequence[Source], plan: Plan) -> SoftmaxStats:
    """Compute the statistics of (r, d) rows over all keys of all sources."""
    tiling = Tiling(rows, sources, plan)

    def add_keys(tiles: Iterator[Tile]) -> Sums:
        zeros = [rows.new_zeros(len(rows), width) for width in (1, 1, 1, sources[0].values.shape[1])]
        sums = Sums(*zeros) if tiling.bounded else Sums(zeros[0].fill_(-torch.inf), *zeros[1:])
        for tile in tiles:
            logits, own = tiling.logits(tile), sums.at(tile.rows)
            if not tiling.bounded:
                own.rescale(logits)
            weights = logits.exp2_()
            own.add(weights, tile.values)
            if tiling.mirrored and tile.rows != tile.keys:
                sums.at(tile.keys).add(weights.T, sources[0].values[tile.rows])
        return sums

    sums = functools.reduce(Sums.merge, tiling.run(add_keys))
    total, bound = sums.total, plan.bound
    if tiling.bounded:
        reference, offset = torch.full_like(total, bound / LN2), (total * math.exp(-bound)).log_()
    else:
        reference, offset = _finite(sums.shift), total.log()
    total = total.masked_fill(total == 0, 1.0)
    return SoftmaxStats(reference[:, 0], offset[:, 0], (sums.largest / total)[:, 0], sums.mean.div_(total))


def keys_backward(
    rows: Tensor, keys: Tensor, reference: Tensor, offset: Tensor, row_values: Tensor, plan: Plan
) -> Tensor:
    r"""Compute :math:`\sum_i s_{ik} u_i` (b, v) from the rows' statistics (r,), finite, and their values u (r, v)."""
    tiling = Tiling(rows, [Source(keys, keys)], plan)
    shift = reference[:, None]
    factor = (-offset[:, None]).exp()  # which all weights of a row have, and no tile needs
    values = row_values * (factor * (-shift).exp2() if tiling.bounded else factor)

    def add_rows(tiles: Iterator[Tile]) -> Tensor:
        gradient = values.new_zeros(len(keys), values.shape[1])
        for tile in tiles:
            weights = tiling.logits(tile)
            if not tiling.bounded:
                weights.sub_(shift[tile.rows]).clamp_(max=0.0)  # at most 1, where rounding says otherwise
            weights.exp2_()
            gradient[tile.keys].addmm_(weights.T, values[tile.rows])
            if tiling.mirrored and tile.rows != tile.keys:
                gradient[tile.rows].addmm_(weights, values[tile.keys])
        return gradient

    return functools.reduce(Tensor.add_, tiling.run(add_rows))


def _one_source(sources: Sequence[Source], like: Tensor) -> Source:
    """All keys in one source, on the device and in the dtype of ``like``."""
    keys = torch.cat([source.keys.to(like) for source in sources])
    if all(source.values is source.keys for source in sources):
        return Source(keys, keys)
    return Source(keys, torch.cat([source.values.to(like) for source in sources]))


def _slices(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _finite(logits: Tensor) -> Tensor:
    return logits.masked_fill(logits == -torch.inf, 0.0)
