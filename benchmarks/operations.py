"""How many operations of torch a loss takes, forward and backward: where batches are small, that is its price."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks.contenders import ATTENTION, LIMIT, contenders
from benchmarks.loss import SIZES
from benchmarks.machine import publish

DEFAULT = ("queue-512", "queue-4096", "symmetric-256")
# What gives a tensor another shape, memory, or reads its kind, and computes nothing.
IDLE = {
    *("view", "reshape", "slice", "select", "expand", "transpose", "t", "permute", "unsqueeze", "squeeze", "detach"),
    *("alias", "as_strided", "split", "split_with_sizes", "chunk", "narrow", "unbind", "detach_", "squeeze_"),
    *("result_type", "promote_types", "resolve_conj", "resolve_neg", "lift_fresh", "item", "is_nonzero", "to"),
    *("empty", "empty_strided", "empty_like", "new_empty", "resize_"),
}


def count(step: Callable[[], Any]) -> int:
    """The operations of a call that compute something, and call no other one."""
    step()  # what is set up once
    with profile(activities=[ProfilerActivity.CPU]) as record:
        step()
    leaves = [
        event.name.removeprefix("aten::")
        for event in record.events()
        if event.name.startswith("aten::") and not any(part.name.startswith("aten::") for part in event.cpu_children)
    ]
    return sum(name not in IDLE for name in leaves)


def run(sizes: Sequence[str], output: Path) -> None:
    """Count, print the table, write operations.json and operations.md."""
    results: dict[str, dict[str, int]] = {}
    for name in sizes:
        steps = contenders(SIZES[name], "cpu")
        losses = {contender: step for contender, step in steps.items() if step and contender not in (ATTENTION, LIMIT)}
        results[name] = {contender: count(step) for contender, step in losses.items()}
    names = dict.fromkeys(contender for row in results.values() for contender in row)
    lines = [f"| loss | {' | '.join(results)} |", "|---|" + "--:|" * len(results)]
    lines += [f"| {name} | {' | '.join(str(row.get(name, '')) for row in results.values())} |" for name in names]
    caption = "Operations of forward and backward that torch's profiler finds on a CPU and that compute something."
    publish(output, "operations", "\n".join(lines), caption, results)
