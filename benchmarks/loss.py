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
from pathlib import Path
from typing import Any, NamedTuple

import lightly
import lightly.loss
import pytorch_metric_learning
import pytorch_metric_learning.losses
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.machine import machine, publish, wait
from slr_plugin import MomentumMixup, SLRLoss, dense

TEMPERATURE = 0.2
BASELINE, LIMIT = "lightly NTXentLoss", "bare products"


class Size(NamedTuple):
    """Rows per view, keys in the queue, dimension."""

    rows: int
    queue: int
    dim: int


SIZES = {
    "queue-65536": Size(256, 65536, 128),
    "queue-4096": Size(256, 4096, 128),
    "symmetric-2048": Size(2048, 0, 128),
    "symmetric-8192": Size(8192, 0, 128),
}

# A contender that would hold one tensor beyond this many bytes is named but not run.
LARGEST_TENSOR = 2**30
# Contenders that take seconds where the others take milliseconds.
SLOW, SLOW_ROUNDS = {"pytorch-metric-learning NTXentLoss"}, 3


def contenders(size: Size, device: str) -> dict[str, Callable[[], Any] | None]:
    """One callable per contender that computes the loss and its gradients; None where it does not fit."""
    generator = torch.Generator().manual_seed(0)
    queries, positives, mixed = (torch.randn(size.rows, size.dim, generator=generator).to(device) for _ in range(3))
    queries.requires_grad_()
    mixed.requires_grad_()
    positives.requires_grad_(not size.queue)
    memory_bank_size = (size.queue, size.dim) if size.queue else 0
    _, mix = MomentumMixup(2.0)(queries.detach(), positives.detach())
    slr = SLRLoss(TEMPERATURE, memory_bank_size).to(device)
    ntxent = lightly.loss.NTXentLoss(TEMPERATURE, memory_bank_size).to(device)
    bank = slr.memory_bank.bank

    losses: dict[str, Callable[[], Tensor]] = {
        BASELINE: lambda: ntxent(queries, positives),
        "SLRLoss, refinement": lambda: slr(queries, positives),
    }
    if size.queue:
        losses["SLRLoss, refinement and mixup"] = lambda: slr(queries, positives, mixed, mix)
        losses["dense.py, refinement and mixup"] = lambda: dense.slr_loss(
            queries, positives, bank, mixed, mix, temperature=TEMPERATURE
        )
    else:
        decoupled = lightly.loss.DCLLoss(TEMPERATURE)
        losses["lightly DCLLoss"] = lambda: decoupled(queries, positives)
        losses["dense.py, refinement"] = lambda: dense.symmetric_slr_loss(queries, positives, temperature=TEMPERATURE)
    losses["pytorch-metric-learning NTXentLoss"] = metric_learning(queries, positives, bank)

    def step(loss: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            queries.grad = positives.grad = mixed.grad = None
            loss().backward()

        return run

    count, keys = (size.rows, size.rows + size.queue) if size.queue else (2 * size.rows, 2 * size.rows)
    largest = {
        "dense.py, refinement": 4 * count * keys,
        # It compares every positive pair with every negative pair, one byte each.
        "pytorch-metric-learning NTXentLoss": count * count * keys,
    }
    steps = {name: step(loss) if largest.get(name, 0) < LARGEST_TENSOR else None for name, loss in losses.items()}
    return steps | {LIMIT: bare_products(size, device)}


def metric_learning(queries: Tensor, positives: Tensor, bank: Tensor) -> Callable[[], Tensor]:
    """pytorch-metric-learning's NT-Xent: with itself as SelfSupervisedLoss, or against the queue as reference."""
    loss = pytorch_metric_learning.losses.NTXentLoss(TEMPERATURE)
    if not len(bank):
        symmetric = pytorch_metric_learning.losses.SelfSupervisedLoss(loss)
        return lambda: symmetric(queries, positives)
    labels = torch.arange(len(queries), device=queries.device)
    reference_labels = torch.arange(len(queries) + len(bank), device=queries.device)
    return lambda: loss(queries, labels, ref_emb=torch.cat([positives, bank]), ref_labels=reference_labels)


def bare_products(size: Size, device: str) -> Callable[[], Any]:
    """The matrix products that the whole loss cannot do without, and nothing else: its limit.

    With a queue, the rows of queries, mixed queries and positives times all keys, twice. Without one, all rows times
    all keys, twice forward and twice for the gradient of the keys. Tiled as the loss tiles; at once is slower.
    """
    count, keys = (3 * size.rows, size.rows + size.queue) if size.queue else (2 * size.rows, 2 * size.rows)
    passes = 1 if size.queue else 2
    rows, table = torch.randn(count, size.dim, device=device), torch.randn(keys, size.dim, device=device)
    result = torch.empty_like(rows)

    def run() -> None:
        for _ in range(passes):
            for part, out in zip(rows.split(1024), result.split(1024), strict=True):
                for block in table.split(1024):
                    out.addmm_(part @ block.T, block, beta=0)

    return run


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


def measure(size: Size, device: str, rounds: int) -> list[dict[str, Any]]:
    """One row of results per contender."""
    every = contenders(size, device)
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


def run(sizes: list[str], device: str, rounds: int, precision: str, output: Path) -> None:
    """Measure, print the table, write loss.json and loss.md."""
    torch.set_float32_matmul_precision(precision)
    results = {name: measure(SIZES[name], device, rounds) for name in sizes}
    versions = f"torch {torch.__version__}, lightly {lightly.__version__}"
    versions += f", pytorch-metric-learning {pytorch_metric_learning.__version__}"
    caption = f"{machine(device)}; float32, matmul precision {precision}; {versions}; {rounds} paired rounds."
    publish(output, "loss", table(results), caption, results)
