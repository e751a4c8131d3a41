r"""Theorem 2, simulated: refined labels recover corrupted ones, and training on them forgets the corruption.

    python examples/theory/label_recovery.py            minutes on 2 cores; writes outputs/label_recovery.png

Crops lie within eps of the unit centre of their cluster. A cluster has a class, a value gamma in [-1, 1]; a share rho
of each cluster's labels is corrupted to another class. The network :math:`f(W, x) = v^\top \phi(W x)`, :math:`v = \pm
1/\sqrt k` fixed and :math:`W \sim \mathcal N(0, 1)`, is trained by gradient descent on the squared loss. Its labels are
refined by its prediction for another crop of the same image, the positive:

.. math:: \bar y_i = (1 - \alpha_t) y_i + \alpha_t f(W_t, \tilde x_i)

The theorem holds for rho <= delta / 32, delta the distance of the class values, small eps, alpha_t >= 1 - 3 delta / 4.
Without refinement, alpha = 0, labels stay as they are and the network fits the corrupted ones in the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import command
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

CLUSTERS, IMAGES, DIM, WIDTH = 6, 32, 16, 512  # images per cluster: rho = 1 / 32 corrupts one of them
GAMMAS = torch.tensor([-1.0, 0.0, 1.0])
DELTA = 1.0
ALPHA = 0.9
STEPS = 1000
RHOS = (1 / 32, 4 / 32, 8 / 32, 12 / 32)
RADII = (0.05, 0.2, 0.4, 0.8)


class Recovery(NamedTuple):
    """Shares in [0, 1] after training."""

    labels: float  # of the corrupted labels that lie nearest to their true class
    training: float  # of the corrupted images whose training crop the network puts nearest to the true class
    test: float  # of fresh crops that the network puts nearest to the true class


class Images(NamedTuple):
    """Crops (n, d) of every image: queries, positives and unseen ones; true and given labels (n,)."""

    queries: Tensor
    positives: Tensor
    unseen: Tensor
    true: Tensor
    given: Tensor


def draw_images(rho: float, radius: float, seed: int) -> Images:
    """Clusters with all classes among them, corrupted labels in each."""
    generator = torch.Generator().manual_seed(seed)
    centres = F.normalize(torch.randn(CLUSTERS, DIM, generator=generator), dim=1).repeat_interleave(IMAGES, 0)

    def crops() -> Tensor:
        direction = F.normalize(torch.randn(centres.shape, generator=generator), dim=1)
        return F.normalize(centres + radius * torch.rand(len(centres), 1, generator=generator) * direction, dim=1)

    classes = torch.arange(CLUSTERS).remainder(len(GAMMAS)).repeat_interleave(IMAGES)
    is_corrupted = torch.arange(IMAGES).repeat(CLUSTERS) < round(rho * IMAGES)
    shift = torch.randint(1, len(GAMMAS), classes.shape, generator=generator)
    given = torch.where(is_corrupted, (classes + shift).remainder(len(GAMMAS)), classes)
    return Images(crops(), crops(), crops(), GAMMAS[classes], GAMMAS[given])


def simulate(rho: float, radius: float, alpha: float, seed: int, steps: int = STEPS) -> Recovery:
    """Train one network and see what became of the corrupted labels."""
    images = draw_images(rho, radius, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    weights = torch.randn(WIDTH, DIM, generator=generator)
    signs = torch.ones(WIDTH).index_fill_(0, torch.arange(0, WIDTH, 2), -1.0) / math.sqrt(WIDTH)

    def predict(crops: Tensor) -> Tensor:
        return F.softplus(crops @ weights.T) @ signs

    def refine() -> Tensor:
        return (1 - alpha) * images.given + alpha * predict(images.positives)

    for _ in range(steps):
        activation = images.queries @ weights.T
        residual = F.softplus(activation) @ signs - refine()
        # The gradient of the mean squared error / 2 by W: residual_i v_j phi'(w_j x_i) x_i.
        slope = torch.sigmoid(activation) * signs * residual[:, None]
        weights = weights - CLUSTERS * slope.T @ images.queries / len(residual)
    corrupted = images.true != images.given

    def share(predicted: Tensor, of: Tensor) -> float:
        nearest = GAMMAS[(predicted[:, None] - GAMMAS).abs().argmin(1)]
        return (nearest == images.true)[of].float().mean().item()

    everyone = torch.ones_like(corrupted)
    return Recovery(
        share(refine(), corrupted), share(predict(images.queries), corrupted), share(predict(images.unseen), everyone)
    )


def study(seeds: int, steps: int = STEPS) -> dict[float, np.ndarray]:
    """Recovery for both alphas: arrays (rhos, radii, seeds, 3)."""
    cases = [(rho, radius, seed) for rho in RHOS for radius in RADII for seed in range(seeds)]
    shape = (len(RHOS), len(RADII), seeds, len(Recovery._fields))
    found = {}
    for alpha in (0.0, ALPHA):
        runs = [simulate(rho, radius, alpha, seed, steps) for rho, radius, seed in tqdm(cases, desc=f"alpha {alpha}")]
        found[alpha] = np.array(runs).reshape(shape)
    return found


TITLES = ("corrupted labels recovered", "network, crops of corrupted labels", "network, fresh crops")


def report(found: dict[float, np.ndarray]) -> str:
    """The table: mean over the seeds in per cent, and the worst seed's where it differs."""
    lines = ["| rho | eps | alpha | " + " | ".join(TITLES) + " |", "|--:|--:|--:|--:|--:|--:|"]
    for i, rho in enumerate(RHOS):
        for j, radius in enumerate(RADII):
            for alpha, values in found.items():
                runs = 100 * values[i, j]
                cells = [
                    f"{mean:.1f}" + (f" (worst {low:.1f})" if low < mean else "")
                    for mean, low in zip(runs.mean(0), runs.min(0), strict=True)
                ]
                lines.append(f"| {rho:.3f} | {radius} | {alpha} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(found: dict[float, np.ndarray], path: Path) -> None:
    """One map over rho and eps per alpha and measure."""
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    for row, (alpha, values) in zip(figure.subplots(len(found), len(TITLES)), found.items(), strict=True):
        for axes, title, shares in zip(row, TITLES, np.moveaxis(values.mean(2), -1, 0), strict=True):
            axes.imshow(100 * shares, vmin=0, vmax=100, cmap="viridis", aspect="auto")
            for (i, j), share in np.ndenumerate(shares):
                axes.text(j, i, f"{100 * share:.0f}", ha="center", va="center", color="w" if share < 0.7 else "k")
            axes.set_xticks(range(len(RADII)), RADII)
            axes.set_yticks(range(len(RHOS)), [f"{rho:.3f}" for rho in RHOS])
            axes.set(title=f"{title} (%)", xlabel="eps", ylabel=f"alpha {alpha}: rho")
            axes.title.set_size("medium")
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    """Simulate, print, draw."""
    command.run(__doc__, 3, "outputs/label_recovery.png", study, report, draw, argv)


if __name__ == "__main__":
    main()
