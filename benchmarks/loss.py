"""Forward plus backward of contrastive losses, side by side: time in paired rounds, peak extra memory.

Each round runs every contender once, in random order, on the same tensors; ratios are taken within a round and their
median is reported. Memory is the peak of live allocations above those at the start (the profiler's record on the CPU,
the allocator's on CUDA).
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.contenders import BASELINE, LIMIT, Size, contenders, finds_solo_learn
from benchmarks.machine import machine, publish, wait

SIZES = {
    "queue-512": Size(64, 512, 128),
    "queue-65536": Size(256, 65536, 128),
    "queue-4096": Size(256, 4096, 128),
    "symmetric-2048": Size(2048, 0, 128),
    "symmetric-8192": Size(8192, 0, 128),
}

# Contenders that take seconds where the others take milliseconds.
SLOW, SLOW_ROUNDS = {"pytorch-metric-learning NTXentLoss"}, 3


def peak_memory(step: Callable[[], Any], device: str) -> int:
    """Bytes alive at the peak of one call beyond those at its start."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def seconds(step: Callable[[], Any], device: str) -> float:
    """Wall time of one call."""
    wait(device)
    start = time.perf_counter()
    step()
    wait(device)
    return time.perf_counter() - start


def paired(
    steps: dict[str, Callable[[], Any]], device: str, rounds: int, title: str
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of every contender in every round, and bytes at its peak."""
    memory = {}
    for name, step in steps.items():
        step()
        memory[name] = peak_memory(step, device)
    times: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    shuffle = random.Random(0).shuffle
    for _ in tqdm(range(rounds), desc=title, leave=False):
        shuffle(order)
        for name in order:
            times[name].append(seconds(steps[name], device))
    return times, memory


def measure(size: Size, device: str, rounds: int, compiles: bool) -> list[dict[str, Any]]:
    """One row of results per contender."""
    every = contenders(size, device, compiles)
    steps = {name: step for name, step in every.items() if step is not None}
    fast = {name: step for name, step in steps.items() if name not in SLOW}
    times, memory = paired(fast, device, rounds, str(tuple(size)))
    if len(fast) < len(steps):
        # Afterwards, beside the yardsticks alone: gigabytes taken and given back change the allocator under the others.
        slow = {name: step for name, step in steps.items() if name in SLOW | {BASELINE, LIMIT}}
        slow_times, slow_memory = paired(slow, device, SLOW_ROUNDS, "slow ones")
    else:
        slow_times, slow_memory = {}, {}

    def ratio(name: str, other: str) -> float:
        among = slow_times if name in SLOW else times
        return statistics.median(a / b for a, b in zip(among[name], among[other], strict=True))

    return [
        {"contender": name}
        if name not in steps
        else {
            "contender": name,
            "milliseconds": 1e3 * statistics.median((slow_times | times)[name]),
            "quartiles": [1e3 * q for q in statistics.quantiles((slow_times | times)[name], n=4)[::2]],
            "megabytes": (slow_memory | memory)[name] / 1e6,
            "time_ratio": ratio(name, BASELINE),
            "memory_ratio": (slow_memory | memory)[name] / memory[BASELINE],
            "products_ratio": ratio(name, LIMIT),
        }
        for name in every
    ]


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """The results as Markdown."""
    lines = [
        "| rows, queue, d | loss | ms (quartiles) | time | peak MB | memory | time / bare products |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for name, rows in results.items():
        rows_, queue, dim = SIZES[name]
        for row in rows:
            cells = [f"{rows_:,}, {f'{queue:,}' if queue else 'none'}, {dim}", row["contender"]]
            if "milliseconds" in row:
                cells += [
                    "{:.1f} ({:.1f} to {:.1f})".format(row["milliseconds"], *row["quartiles"]),
                    f"{row['time_ratio']:.2f}",
                    f"{row['megabytes']:.1f}",
                    f"{row['memory_ratio']:.3f}",
                    f"{row['products_ratio']:.2f}",
                ]
            else:
                cells += ["not run: one tensor over 1 GiB", "", "", "", ""]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def run(sizes: list[str], device: str, rounds: int, precision: str, compiles: bool, output: Path) -> None:
    """Measure, print the table, write loss.json and loss.md."""
    torch.set_float32_matmul_precision(precision)
    results = {name: measure(SIZES[name], device, rounds, compiles) for name in sizes}
    peers = ("torch", "lightly", "info-nce-pytorch", "pytorch-metric-learning")
    versions = ", ".join(f"{name} {version(name)}" for name in peers)
    versions += ", solo-learn from a clone" if finds_solo_learn() else ""
    caption = f"{machine(device)}; float32, matmul precision {precision}; {versions}; {rounds} paired rounds."
    publish(output, "loss", table(results), caption, results)
