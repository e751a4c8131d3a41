"""The loss of images and texts beside open_clip's ClipLoss: time in paired rounds, peak extra memory."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.loss import paired
from benchmarks.machine import machine, publish
from slr_plugin.adapters.open_clip import SLRClipLoss

DIM, PAIRS = 512, (1024, 4096, 16384)
SCALE = 100.0  # where CLIP's ends up, and is clamped
BASELINE = "open_clip ClipLoss"


def contenders(pairs: int, device: str) -> dict[str, Callable[[], Any]]:
    """One callable per loss, which computes it and the gradients of features and scale."""
    import open_clip

    generator = torch.Generator().manual_seed(0)
    images = torch.randn(pairs, DIM, generator=generator)
    texts = images + torch.randn(pairs, DIM, generator=generator)  # whose image they resemble
    features = [normalize(x).to(device).requires_grad_() for x in (images, texts)]
    exponent = torch.tensor(math.log(SCALE), device=device, requires_grad=True)

    def step(loss: Callable[..., Tensor]) -> Callable[[], None]:
        def run() -> None:
            for leaf in (*features, exponent):
                leaf.grad = None
            loss(*features, exponent.exp()).backward()

        return run

    losses = {
        BASELINE: open_clip.ClipLoss(),
        "SLRClipLoss": SLRClipLoss().to(device),
        "SLRClipLoss, refinement": SLRClipLoss(confidence=1.0).to(device),
    }
    return {name: step(loss) for name, loss in losses.items()}


def measure(
    steps: dict[str, Callable[[], Any]],
    baseline: str,
    title: str,
    device: str,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[dict[str, Any]]:
    """One row of results per contender; ratios to the baseline's, taken within a round."""
    times, memory = paired(steps, device, rounds, title, clock)

    def ratio(name: str) -> float:
        return statistics.median(a / b for a, b in zip(times[name], times[baseline], strict=True))

    return [
        {
            "contender": name,
            "milliseconds": 1e3 * statistics.median(taken),
            "range": [1e3 * min(taken), 1e3 * max(taken)],
            "time_ratio": ratio(name),
            "megabytes": memory[name] / 1e6,
            "memory_ratio": memory[name] / memory[baseline],
        }
        for name, taken in times.items()
    ]


def table(results: dict[int, list[dict[str, Any]]], what: str) -> str:
    """The results as Markdown, by the number of ``what``."""
    lines = [f"| {what} | loss | ms (range) | time | peak MB | memory |", "|--:|---|--:|--:|--:|--:|"]
    for size, rows in results.items():
        for row in rows:
            spread = "{:,.1f} to {:,.1f}".format(*row["range"])
            lines.append(
                f"| {size:,} | {row['contender']} | {row['milliseconds']:,.1f} ({spread}) | {row['time_ratio']:.2f} "
                f"| {row['megabytes']:,.1f} | {row['memory_ratio']:.3f} |"
            )
    return "\n".join(lines)


def run(sizes: list[int], device: str, rounds: int, precision: str, cpu_time: bool, output: Path) -> None:
    """Measure, print the table, write clip.json and clip.md.

    With ``cpu_time`` one thread computes, and what counts is the time that it had a core: for a machine that is busy.
    """
    torch.set_float32_matmul_precision(precision)
    if cpu_time:
        torch.set_num_threads(1)
    clock = time.process_time if cpu_time else time.perf_counter
    results = {
        pairs: measure(contenders(pairs, device), BASELINE, f"{pairs} pairs", device, rounds, clock) for pairs in sizes
    }
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "open_clip_torch"))
    caption = (
        f"`python -m benchmarks clip --pairs {' '.join(map(str, sizes))} --rounds {rounds} --precision {precision}"
        f"{' --cpu-time' * cpu_time}`: "
        f"forward and backward of the loss alone, d = {DIM}, a learnable scale at {SCALE:g}; {machine(device)}; "
        f"float32; {versions}; medians of {rounds} paired rounds, ratios taken within a round"
        f"{'; time is that of one thread on a core, beside other processes' * cpu_time}."
    )
    publish(output, "clip", table(results, "pairs"), caption, {str(pairs): rows for pairs, rows in results.items()})
