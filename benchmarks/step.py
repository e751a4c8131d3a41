"""Where the time of a whole training step goes: encoder, loss, queue, mixup."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from lightly.models.modules import MoCoProjectionHead
from lightly.models.utils import update_momentum
from torch import nn
from torchvision.models import resnet18, resnet50

from benchmarks.machine import machine, publish, wait
from slr_plugin.adapters.lightly import cifar_stem
from slr_plugin.presets import CIFAR10, IMAGENET, Preset

DIM = 128


class Workload(NamedTuple):
    """What is trained."""

    backbone: Callable[[], nn.Module]
    side: int  # of the images, in pixels
    batch_size: int
    preset: Preset


WORKLOADS = {
    "resnet18-cifar": Workload(lambda: cifar_stem(resnet18()), 32, 256, CIFAR10),
    "resnet50-224": Workload(resnet50, 224, 32, IMAGENET),
}
PARTS = ("encoder", "loss", "queue", "mixup", "optimiser and average")


def network(workload: Workload) -> nn.Module:
    """Backbone and the paper's three-layer head."""
    backbone = workload.backbone()
    features = backbone.fc.in_features
    backbone.fc = nn.Identity()
    return nn.Sequential(backbone, MoCoProjectionHead(features, 2048, DIM, num_layers=3, batch_norm=False))


def measure(workload: Workload, device: str, rounds: int) -> dict[str, float]:
    """Median seconds of every part of a step of SANE; the images are random, their values cost nothing."""
    torch.manual_seed(0)
    online = network(workload).to(device)
    target = copy.deepcopy(online).requires_grad_(False)
    criterion = workload.preset.loss(DIM, total_steps=1000).to(device)
    mixup = workload.preset.mixup()
    optimizer = torch.optim.SGD(online.parameters(), 0.01, 0.9, weight_decay=1e-4)
    x0, x1 = torch.randn(2, workload.batch_size, 3, workload.side, workload.side, device=device)
    spent: dict[str, list[float]] = {part: [] for part in PARTS}

    for _ in range(rounds + 1):
        seconds = dict.fromkeys(PARTS, 0.0)
        with clock(seconds, "mixup", device):
            mixed_images, mix = mixup(x0, x1)
        with clock(seconds, "encoder", device):
            outputs = online(x0), online(mixed_images)
            with torch.no_grad():
                keys = target(x1)
        queries, mixed = (output.detach().requires_grad_() for output in outputs)
        with clock(seconds, "loss", device):
            criterion(queries, keys, mixed, mix, update=False).backward()
        with clock(seconds, "queue", device):
            criterion.memory_bank.enqueue(nn.functional.normalize(keys, dim=1))
        with clock(seconds, "encoder", device):
            optimizer.zero_grad()
            torch.autograd.backward(outputs, [queries.grad, mixed.grad])
        with clock(seconds, "optimiser and average", device):
            optimizer.step()
            update_momentum(online, target, m=0.99)
        for part in PARTS:
            spent[part].append(seconds[part])
    return {part: statistics.median(times[1:]) for part, times in spent.items()}  # the first round warms up


@contextmanager
def clock(seconds: dict[str, float], part: str, device: str) -> Iterator[None]:
    """Add the wall time of the block to its part."""
    wait(device)
    start = time.perf_counter()
    yield
    wait(device)
    seconds[part] += time.perf_counter() - start


def table(results: dict[str, dict[str, float]]) -> str:
    """Milliseconds and shares as Markdown."""
    lines = ["| step | part | ms | share % |", "|---|---|--:|--:|"]
    for name, parts in results.items():
        total = sum(parts.values())
        for part, seconds in parts.items():
            lines.append(f"| {name} | {part} | {1e3 * seconds:,.1f} | {100 * seconds / total:.2f} |")
    return "\n".join(lines)


def run(names: list[str], device: str, rounds: int, precision: str, output: Path) -> None:
    """Measure, print the table, write step.json and step.md."""
    torch.set_float32_matmul_precision(precision)
    results = {name: measure(WORKLOADS[name], device, rounds) for name in names}
    caption = f"{machine(device)}; float32, matmul precision {precision}; torch {torch.__version__}; "
    caption += f"medians of {rounds} steps of SANE."
    publish(output, "step", table(results), caption, results)
