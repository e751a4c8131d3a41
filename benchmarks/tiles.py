"""Time of the streaming pass with tiles of other sizes, by which those in ``slr_plugin/streaming`` were chosen.

The forward pass is that of the whole loss with a queue, 768 rows over it and 256 further keys, and of two views, whose
matrix of logits is symmetric; the backward pass is the keys' of two views.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from benchmarks.contenders import Size
from benchmarks.loss import seconds
from benchmarks.machine import machine, publish
from slr_plugin.streaming import Pass, tiled

SIZES = {f"queue {queue:,}": Size(256, queue, 128) for queue in (4096, 65536)}
SIZES |= {f"two views of {rows:,}": Size(rows, 0, 128) for rows in (2048, 8192)}
SCALE = 5.0
CPU_TILES = [(512, 1024), (1024, 1024), (1024, 2048), (2048, 2048), (1024, 4608)]
ACCELERATOR_TILES = [(2048, 4096), (4096, 8192), (4096, 32768), (8192, 8192), (1024, 65536), (8192, 65536)]


def passes(size: Size, device: str) -> dict[str, Callable[[], Any]]:
    """The forward pass, and without a queue the backward one."""

    def draw(count: int) -> Tensor:
        return normalize(torch.randn(count, size.dim, device=device), dim=1)

    if size.queue:
        rows, keys, queue = draw(3 * size.rows), draw(size.rows), draw(size.queue)
        given = Pass(rows, keys, queue, scale=SCALE, bound=SCALE)
        return {"forward": lambda: tiled.softmax_stats(given)}
    rows = draw(2 * size.rows)
    hidden = torch.arange(len(rows), device=device)[:, None]
    given = Pass(rows, rows, hidden=hidden, scale=SCALE, bound=SCALE, symmetric=True)
    stats = tiled.softmax_stats(given)
    return {
        "forward": lambda: tiled.softmax_stats(given),
        "backward": lambda: tiled.keys_gradient(given, stats.reference_bits, stats.offset, rows),
    }


def run(device: str, rounds: int, precision: str, output: Path) -> None:
    """Measure, print the table, write tiles.json and tiles.md."""
    torch.set_float32_matmul_precision(precision)
    results: dict[str, dict[str, float]] = {}
    constant, tiles = ("CPU_TILE", CPU_TILES) if device == "cpu" else ("ACCELERATOR_TILE", ACCELERATOR_TILES)
    for tile in tqdm(tiles):
        row = results[str(tile)] = {}
        with mock.patch.object(tiled, constant, tile):
            for name, size in SIZES.items():
                for direction, step in passes(size, device).items():
                    step()
                    milliseconds = 1e3 * statistics.median(seconds(step, device) for _ in range(rounds))
                    row[f"{name}, {direction}"] = milliseconds
    heads = list(next(iter(results.values())))
    lines = ["| rows x keys, ms | " + " | ".join(heads) + " |", "|---|" + "--:|" * len(heads)]
    lines += [f"| {tile} | " + " | ".join(f"{row[head]:.2f}" for head in heads) + " |" for tile, row in results.items()]
    caption = (
        f"{machine(device)}; medians of {rounds}; float32, matmul precision {precision}; torch {torch.__version__}."
    )
    publish(output, "tiles", "\n".join(lines), caption, dict(results))
