"""Labels from known groups beside SupCon's dense losses: time in paired rounds, peak extra memory."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytorch_metric_learning.losses
import torch
from torch import Tensor

from benchmarks.clip import measure, table
from benchmarks.machine import machine, publish
from slr_plugin import SLRLoss, dense

DIM, IMAGES, OF_A_GROUP = 128, (1024, 4096), 8
DENSE_LIMIT = 4096  # images up to which the dense losses are measured: their matrices grow with the square
OURS = "SLRLoss, groups"


def contenders(images: int, device: str) -> dict[str, Callable[[], Any]]:
    """One callable per loss, which computes it and the gradients of both views."""
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(images, DIM, generator=generator).to(device).requires_grad_() for _ in range(2)]
    ids = (torch.arange(images) // OF_A_GROUP).to(device)
    supcon = pytorch_metric_learning.losses.SupConLoss(0.1)

    def step(loss: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            for leaf in views:
                leaf.grad = None
            loss().backward()

        return run

    plain, refining, ignoring = (
        SLRLoss(0.1, confidence=0.0),
        SLRLoss(0.1),
        SLRLoss(0.1, confidence=0.0, same_group="ignored"),
    )
    losses: dict[str, Callable[[], Tensor]] = {
        "SLRLoss, no groups": lambda: plain(*views),
        OURS: lambda: plain(*views, groups=ids),
        "SLRLoss, groups, refinement": lambda: refining(*views, groups=ids),
        "SLRLoss, groups ignored": lambda: ignoring(*views, groups=ids),
    }
    if images <= DENSE_LIMIT:
        losses |= {
            "dense.py": lambda: dense.symmetric_slr_loss(*views, temperature=0.1, confidence=0.0, groups=ids),
            "pytorch-metric-learning SupConLoss": lambda: supcon(torch.cat(views), ids.repeat(2)),
        }
    return {name: step(loss) for name, loss in losses.items()}


def run(sizes: list[int], device: str, rounds: int, precision: str, output: Path) -> None:
    """Measure, print the table, write groups.json and groups.md."""
    torch.set_float32_matmul_precision(precision)
    results = {n: measure(contenders(n, device), OURS, f"{n} images", device, rounds) for n in sizes}
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "pytorch-metric-learning"))
    caption = (
        f"`python -m benchmarks groups --images {' '.join(map(str, sizes))} --rounds {rounds} "
        f"--precision {precision}`: "
        f"forward and backward of the loss alone, both views of images in groups of {OF_A_GROUP}, d = {DIM}; "
        f"{machine(device)}; float32; {versions}; medians of {rounds} paired rounds, ratios within a round. Dense "
        f"losses are measured up to {DENSE_LIMIT:,} images."
    )
    publish(output, "groups", table(results, "images"), caption, {str(n): rows for n, rows in results.items()})
