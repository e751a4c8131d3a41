"""Time of the streaming pass with tiles of other sizes, by which those in ``slr_plugin/streaming`` were chosen.

The forward pass is that of the whole loss with a queue, 768 rows over it and 256 further keys, and of two views, whose
matrix of logits is symmetric; the backward pass is the keys' of two views.
"""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
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
CPU_TILES = [(512, 1024), (1024, 1024), (1024, 2048), (2048, 2048)]
ACCELERATOR_TILES = [(2048, 4096), (4096, 8192), (4096, 32768), (8192, 8192), (1024, 65536), (8192, 65536)]
# Rows, keys and warps of a kernel's program.
FORWARD = [(64, 32, 4), (64, 64, 4), (128, 32, 8), (128, 64, 8), (256, 32, 8)]
BACKWARD = [(32, 32, 4), (32, 64, 4), (32, 128, 8), (64, 64, 4), (64, 128, 8)]

Passes = dict[str, Callable[[], Any]]


def passes(backend: ModuleType, size: Size, device: str) -> Passes:
    """The forward pass, and without a queue the backward one."""

    def draw(count: int) -> Tensor:
        return normalize(torch.randn(count, size.dim, device=device), dim=1)

    if size.queue:
        rows, keys, queue = draw(3 * size.rows), draw(size.rows), draw(size.queue)
        given = Pass(rows, keys, queue, scale=SCALE, bound=SCALE)
        return {"forward": lambda: backend.forward(given)}
    rows = draw(2 * size.rows)
    hidden = torch.arange(len(rows), device=device)[:, None]
    given = Pass(rows, rows, hidden=hidden, scale=SCALE, bound=SCALE, symmetric=True)
    stats = tiled.forward(given)
    return {
        "forward": lambda: backend.forward(given),
        "backward": lambda: backend.keys_backward(given, stats.reference, stats.offset, rows),
    }


class Choice(NamedTuple):
    """A value for a backend's constant, and the passes that it matters to."""

    backend: str
    constant: str
    value: Any
    words: str
    directions: tuple[str, ...] = ("forward", "backward")


def choices(device: str) -> list[Choice]:
    """All that are timed on a device."""
    if device == "cpu":
        return [Choice("tiled", "CPU_TILE", tile, str(tile)) for tile in CPU_TILES]
    every = [Choice("tiled", "ACCELERATOR_TILE", tile, str(tile)) for tile in ACCELERATOR_TILES]
    if torch.get_float32_matmul_precision() != "highest":
        kernels = importlib.import_module("slr_plugin.streaming.triton")
        for direction, tiles in (("forward", FORWARD), ("backward", BACKWARD)):
            for tile in tiles:
                value = {128: kernels.Tile(*tile)}
                every.append(Choice("triton", direction.upper(), value, str(tile), (direction,)))
    return every


def run(device: str, rounds: int, precision: str, output: Path) -> None:
    """Measure, print the table, write tiles.json and tiles.md."""
    torch.set_float32_matmul_precision(precision)
    results: dict[str, dict[str, float]] = {}
    for choice in tqdm(choices(device)):
        module = importlib.import_module(f"slr_plugin.streaming.{choice.backend}")
        row = results[f"{choice.backend} {choice.constant} {choice.words}"] = {}
        with mock.patch.object(module, choice.constant, choice.value):
            for name, size in SIZES.items():
                for direction, step in passes(module, size, device).items():
                    if direction in choice.directions:
                        step()
                        milliseconds = 1e3 * statistics.median(seconds(step, device) for _ in range(rounds))
                        row[f"{name}, {direction}"] = milliseconds
    heads = list(dict.fromkeys(head for row in results.values() for head in row))
    lines = ["| tile | " + " | ".join(heads) + " |", "|---|" + "--:|" * len(heads)]
    for tile, row in results.items():
        lines.append(f"| {tile} | " + " | ".join(f"{row[head]:.2f}" if head in row else "" for head in heads) + " |")
    caption = f"{machine(device)}; milliseconds, medians of {rounds}; float32, matmul precision {precision}; "
    caption += f"torch {torch.__version__}."
    publish(output, "tiles", "\n".join(lines), caption, dict(results))
