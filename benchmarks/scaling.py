"""How time and memory of the loss grow with keys, rows and dimension."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import lightly
import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks.contenders import BASELINE, LIMIT, Size, contenders
from benchmarks.loss import paired
from benchmarks.machine import machine, publish

# One quantity at a time grows, the others stay.
AXES = {
    "keys": [Size(256, 4**power, 128) for power in range(4, 9)],
    "rows": [Size(rows, 4096, 128) for rows in (256, 512, 1024, 2048, 4096)],
    "dimension": [Size(256, 16384, dim) for dim in (32, 64, 128, 256, 512)],
    "rows, no queue": [Size(rows, 0, 128) for rows in (256, 512, 1024, 2048, 4096, 8192)],
}
COMPARED = (BASELINE, "lightly DCLLoss", "SLRLoss, refinement", "SLRLoss, refinement and mixup", LIMIT)
QUANTITIES = ("milliseconds", "megabytes")
FITTED = 3  # the largest sizes, where what grows outweighs what does not


def grows(axis: str, size: Size) -> int:
    """The quantity on the axis."""
    return {"keys": size.queue, "dimension": size.dim}.get(axis, size.rows)


def exponent(x: list[int], y: list[float]) -> float:
    """The slope of log y over log x at the largest sizes."""
    return float(np.polyfit(np.log(x[-FITTED:]), np.log(y[-FITTED:]), 1)[0])


def measure(axis: str, device: str, rounds: int) -> list[dict[str, Any]]:
    """One row per size and contender."""
    rows = []
    for size in AXES[axis]:
        steps = {name: step for name, step in contenders(size, device).items() if name in COMPARED and step is not None}
        times, memory = paired(steps, device, rounds, f"{axis} {grows(axis, size)}")
        for name in steps:
            median = 1e3 * statistics.median(times[name])
            rows.append({"contender": name, **size._asdict(), "milliseconds": median, "megabytes": memory[name] / 1e6})
    return rows


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Exponents as Markdown, with the smallest and the largest size."""
    lines = ["| grows | loss | ms | exponent | peak MB | exponent |", "|---|---|--:|--:|--:|--:|"]
    for axis, rows in results.items():
        x = [grows(axis, size) for size in AXES[axis]]
        for name in dict.fromkeys(row["contender"] for row in rows):
            cells = [f"{axis}: {x[0]:,} to {x[-1]:,}", name]
            for quantity in QUANTITIES:
                y = [row[quantity] for row in rows if row["contender"] == name]
                cells += [f"{y[0]:,.1f} to {y[-1]:,.1f}", f"{exponent(x, y):.2f}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(results: dict[str, list[dict[str, Any]]]) -> Figure:
    """Time above, memory below, one column per axis, all logarithmic."""
    figure = Figure(figsize=(4 * len(results), 7), layout="constrained")
    panels = figure.subplots(2, len(results), squeeze=False, sharex="col")
    for column, (axis, rows) in zip(panels.T, results.items(), strict=True):
        x = [grows(axis, size) for size in AXES[axis]]
        for number, name in enumerate(COMPARED):
            own = [row for row in rows if row["contender"] == name]
            if own:
                for axes, quantity in zip(column, QUANTITIES, strict=True):
                    axes.loglog(x, [row[quantity] for row in own], "o-", color=f"C{number}", label=name, base=10)
        column[1].set_xlabel(axis)
        column[1].set_xticks(x, [f"{value:,}" for value in x])
        column[1].minorticks_off()
    panels[0, 0].set_ylabel("ms")
    panels[1, 0].set_ylabel("peak MB")
    for column in (0, -1):  # between them all contenders
        panels[0, column].legend(frameon=False, fontsize="small")
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def run(axes: list[str], device: str, rounds: int, precision: str, output: Path) -> None:
    """Measure, print the exponents, write scaling.json, scaling.md and scaling.png."""
    torch.set_float32_matmul_precision(precision)
    results = {axis: measure(axis, device, rounds) for axis in axes}
    caption = f"{machine(device)}; float32, matmul precision {precision}; torch {torch.__version__}, "
    caption += f"lightly {lightly.__version__}; medians of {rounds} paired rounds; "
    caption += f"exponents of the largest {FITTED} sizes."
    publish(output, "scaling", table(results), caption, results)
    draw(results).savefig(output / "scaling.png", dpi=100)
