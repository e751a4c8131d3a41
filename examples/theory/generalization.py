r"""Theorem 1, simulated: the generalisation error of instance discrimination grows with E ||y - y*||.

    python examples/theory/generalization.py            a minute on 2 cores; writes outputs/generalization.png

Images come in classes. A network is trained by the contrastive loss of equation (4) over a fixed dictionary of images.
The labels y of a share of the images are wrong: one-hot, as in instance discrimination, or those of another class. All
others are true: y*, uniform over the keys of the image's class. The generalisation error is the loss of fresh crops
under y* minus the loss of the training crops under y. The share moves E ||y - y*||; both are measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import command
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from slr_plugin.dense import cross_entropy

CLASSES, IMAGES, DIM = 5, 12, 32  # images of each class
TEMPERATURE = 0.2
SHARES = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
WRONG = ("one-hot", "another class")
STEPS = 300


class Point(NamedTuple):
    """One trained network."""

    distance: float  # E ||y - y*||
    error: float  # loss of fresh crops under y* minus loss of training crops under y


def draw_crops(centres: Tensor, generator: torch.Generator) -> Tensor:
    """A crop of every image: the image and noise."""
    return centres + 0.3 * torch.randn(centres.shape, generator=generator)


def simulate(wrong: str, share: float, seed: int, steps: int = STEPS) -> Point:
    """Train with the labels of a share of the images replaced."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.arange(CLASSES).repeat_interleave(IMAGES)
    images = torch.randn(CLASSES, DIM, generator=generator)[classes]
    images = images + torch.randn(images.shape, generator=generator)
    same = (classes[:, None] == classes).float()
    truth = same / same.sum(1, keepdim=True)
    other = (classes[:, None] == (classes + 1) % CLASSES).float()
    replacement = torch.eye(len(classes)) if wrong == "one-hot" else other / other.sum(1, keepdim=True)
    is_wrong = torch.randperm(len(classes), generator=generator) < share * len(classes)
    labels = torch.where(is_wrong[:, None], replacement, truth)

    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(DIM, 128), nn.ReLU(), nn.Linear(128, 32))
    crops, keys = draw_crops(images, generator), draw_crops(images, generator)

    def loss(queries: Tensor, targets: Tensor) -> Tensor:
        logits = F.normalize(network(queries)) @ F.normalize(network(keys)).T / TEMPERATURE
        return cross_entropy(logits, targets)

    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(crops, labels).backward()
        optimizer.step()
    with torch.no_grad():
        fresh = torch.stack([loss(draw_crops(images, generator), truth) for _ in range(10)]).mean()
        error = (fresh - loss(crops, labels)).item()
    return Point((labels - truth).norm(dim=1).mean().item(), error)


def study(seeds: int) -> dict[str, np.ndarray]:
    """Points (shares, seeds, 2) of both kinds of wrong labels."""
    cases = [(wrong, share, seed) for wrong in WRONG for share in SHARES for seed in range(seeds)]
    points = [simulate(*case) for case in tqdm(cases)]
    return dict(zip(WRONG, np.array(points).reshape(len(WRONG), len(SHARES), seeds, 2), strict=True))


def fit(points: np.ndarray) -> tuple[float, float]:
    """Slope of the straight line through all points, and the share of their variance that it explains."""
    distance, error = points.reshape(-1, 2).T
    return np.polyfit(distance, error, 1)[0], np.corrcoef(distance, error)[0, 1] ** 2


def report(found: dict[str, np.ndarray]) -> str:
    """The table."""
    lines = ["| wrong labels | share wrong | E \\|\\|y - y*\\|\\| | generalisation error |", "|---|--:|--:|--:|"]
    for wrong, points in found.items():
        for share, (mean, spread) in zip(SHARES, zip(points.mean(1), points.std(1, ddof=1), strict=True), strict=True):
            lines.append(f"| {wrong} | {share} | {mean[0]:.3f} | {mean[1]:.3f} ± {spread[1]:.3f} |")
    fits = ["{}: slope {:.2f}, R² {:.3f}".format(wrong, *fit(points)) for wrong, points in found.items()]
    return "\n".join([*lines, "", "Straight lines: " + "; ".join(fits) + "."])


def draw(found: dict[str, np.ndarray], path: Path) -> None:
    """All points, and the lines through them."""
    figure = Figure(figsize=(5.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for wrong, points in found.items():
        distance, error = points.reshape(-1, 2).T
        axes.scatter(distance, error, s=12, label=f"labels {wrong}" if wrong == "one-hot" else f"labels of {wrong}")
        axes.plot(distance, np.polyval(np.polyfit(distance, error, 1), distance))
    axes.set(xlabel="E ||y - y*||", ylabel="generalisation error")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    """Simulate, print, draw."""
    command.run(__doc__, 5, "outputs/generalization.png", study, report, draw, argv)


if __name__ == "__main__":
    main()
