"""Forward plus backward of contrastive losses, side by side: time in paired rounds, peak extra memory.

Each round runs every contender once, in random order, on the same tensors; ratios are taken within a round and their
median is reported. Memory is the peak of live allocations above those at the start (the profiler's record on the CPU,
the allocator's on CUDA).

Under load every contender is measured once more, while other processes keep the cores busy.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tqdm import tqdm

from benchmarks.contenders import BASELINE, GRAPH, LIMIT, Size, contenders, finds_solo_learn
from benchmarks.load import busy
from benchmarks.machine import machine, publish, wait
from slr_plugin.streaming import threads

SIZES = {
    "queue-512": Size(64, 512, 128),
    "queue-65536": Size(256, 65536, 128),
    "queue-4096": Size(256, 4096, 128),
    "symmetric-256": Size(256, 0, 128),
    "symmetric-2048": Size(2048, 0, 128),
    "symmetric-8192": Size(8192, 0, 128),
    "symmetric-32768": Size(32768, 0, 128),
}
HUGE = {"symmetric-32768"}  # measured where it is named; NTXentLoss takes 83 GB

# Contenders that take seconds where the others take milliseconds.
SLOW, SLOW_ROUNDS = {"pytorch-metric-learning NTXentLoss"}, 3

# Marks in the profiler's record: a pass shared among threads begins or ends, one thread's share of it ends.
SHARED, SHARE_ENDS = "slr_plugin: shared pass", "slr_plugin: share ends"


Steps = dict[str, Callable[[], Any] | None]


def peak_memory(step: Callable[[], Any], device: str) -> int:
    """Bytes alive at the peak of one call beyond those at its start."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with mock.patch.object(threads, "run", run_in_turn), profiler as profile:
        step()
    alive = top = others = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            alive += event.nbytes()
            top = max(top, alive)
            peak = max(peak, alive + others)
        elif event.name() == SHARE_ENDS:
            others, top = others + top - alive, alive
        elif event.name() == SHARED:
            others, top = 0, alive
    return peak


def run_in_turn(tasks: Sequence[Callable[[], Any]]) -> list[Any]:
    """Compute the shares of a pass in this thread, the only one whose memory torch's profiler records.

    The marks let ``peak_memory`` add up what each share holds at most, as if all did at the same time.
    """
    mark(SHARED)
    results = []
    for task in tasks:
        results.append(task())
        mark(SHARE_ENDS)
    mark(SHARED)
    return results


def mark(name: str) -> None:
    """Write a name between the events of the profiler."""
    with torch.profiler.record_function(name):
        pass


def seconds(step: Callable[[], Any], device: str, clock: Callable[[], float] = time.perf_counter) -> float:
    """Wall time of one call, or what another clock says."""
    wait(device)
    start = clock()
    step()
    wait(device)
    return clock() - start


# By hand: torch.utils.benchmark times one contender after the other, and a shared machine changes meanwhile.
def paired(
    steps: dict[str, Callable[[], Any]],
    device: str,
    rounds: int,
    title: str,
    clock: Callable[[], float] = time.perf_counter,
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
            times[name].append(seconds(steps[name], device, clock))
    return times, memory


def measure(every: Steps, device: str, rounds: int, title: str) -> list[dict[str, Any]]:
    """One row of results per contender."""
    steps = {name: step for name, step in every.items() if step is not None}
    fast = {name: step for name, step in steps.items() if name not in SLOW}
    times, memory = paired(fast, device, rounds, title)
    if len(fast) < len(steps):
        # Afterwards, beside the yardsticks alone: gigabytes taken and given back change the allocator under the others.
        slow = {name: step for name, step in steps.items() if name in SLOW | {BASELINE, LIMIT}}
        slow_times, slow_memory = paired(slow, device, SLOW_ROUNDS, "slow ones")
    else:
        slow_times, slow_memory = {}, {}

    def ratio(name: str, other: str) -> float:
        among = slow_times if name in SLOW else times
        return statistics.median(a / b for a, b in zip(among[name], among[other], strict=True))

    def measured_memory(name: str, of: dict[str, int]) -> dict[str, float]:
        if name.endswith(GRAPH):  # takes its memory when it is recorded, and keeps it
            return {}
        return {"megabytes": of[name] / 1e6, "memory_ratio": of[name] / of[BASELINE]}

    return [
        {"contender": name}
        if name not in steps
        else {
            "contender": name,
            "milliseconds": 1e3 * statistics.median((slow_times | times)[name]),
            "quartiles": [1e3 * q for q in statistics.quantiles((slow_times | times)[name], n=4)[::2]],
            "time_ratio": ratio(name, BASELINE),
            **measured_memory(name, slow_memory | memory),
            "products_ratio": ratio(name, LIMIT),
            "worst_ratio": max((slow_times | times)[name]) / statistics.median((slow_times | times)[name]),
        }
        for name in every
    ]


def measure_both(size: Size, device: str, rounds: int, compiles: bool, load: int) -> list[dict[str, Any]]:
    """One row of results per contender: quiet, and beside ``load`` busy processes."""
    every = contenders(size, device, compiles)
    rows = measure(every, device, rounds, str(tuple(size)))
    if load:
        with busy(load):
            under_load = measure(every, device, rounds, f"{tuple(size)} under load")
        rows = [row | {"under_load": loaded} for row, loaded in zip(rows, under_load, strict=True)]
    return rows


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """The results as Markdown."""
    heads = ["rows, queue, d", "loss", "ms (quartiles)", "time", "peak MB", "memory", "time / bare products"]
    if any("under_load" in row for rows in results.values() for row in rows):
        heads += ["time under load", "worst call / median under load"]
    lines = ["| " + " | ".join(heads) + " |", "|---|---|" + "--:|" * (len(heads) - 2)]
    for name, rows in results.items():
        rows_, queue, dim = SIZES[name]
        for row in rows:
            cells = [f"{rows_:,}, {f'{queue:,}' if queue else 'none'}, {dim}", row["contender"]]
            if "milliseconds" in row:
                cells += [
                    "{:.1f} ({:.1f} to {:.1f})".format(row["milliseconds"], *row["quartiles"]),
                    f"{row['time_ratio']:.2f}",
                    *((f"{row['megabytes']:.1f}", f"{row['memory_ratio']:.3f}") if "megabytes" in row else ("", "")),
                    f"{row['products_ratio']:.2f}",
                ]
                if "under_load" in row:
                    cells += [f"{row['under_load'][name]:.2f}" for name in ("time_ratio", "worst_ratio")]
            else:
                cells += ["not run: one tensor over 1 GiB", *[""] * (len(heads) - 3)]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def run(sizes: list[str], device: str, rounds: int, precision: str, compiles: bool, load: int, output: Path) -> None:
    """Measure, print the table, write loss.json and loss.md."""
    torch.set_float32_matmul_precision(precision)
    results = {name: measure_both(SIZES[name], device, rounds, compiles, load) for name in sizes}
    peers = ("torch", "lightly", "info-nce-pytorch", "pytorch-metric-learning")
    versions = ", ".join(f"{name} {version(name)}" for name in peers)
    versions += ", solo-learn from a clone" if finds_solo_learn() else ""
    caption = f"{machine(device)}; float32, matmul precision {precision}; {versions}; {rounds} paired rounds"
    caption += f", and {rounds} beside {load} busy processes." if load else "."
    publish(output, "loss", table(results), caption, results)
