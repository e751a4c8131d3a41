"""Features of the images as they are, from which labels can be estimated: what the trained views do not show."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from benchmarks.representations.data import Images

LABELLED = 250  # of the images, for a classifier that guesses the classes of the others
PURITIES = (25, 50, 75)  # per cent
TOLD = ("classes", *(f"classes-{percent}" for percent in PURITIES))  # estimators that are told the classes
COMPONENTS, CELL, ORIENTATIONS = 64, 4, 9


def pixels(images: Images) -> Tensor:
    """Principal components of the pixels."""
    return principal(images.pixels.flatten(1).float())


def gradients(images: Images) -> Tensor:
    """Principal components of histograms of oriented gradients (Dalal and Triggs, 2005)."""
    return principal(torch.cat([histograms(part) for part in images.pixels.split(1000)]))


def classes(images: Images) -> Tensor:
    """The classes: the estimator that knows all."""
    return F.one_hot(images.classes).float()


def guesses(images: Images) -> Tensor:
    """Probabilities of the classes by a classifier of these histograms that learned from the first few images."""
    table = gradients(images).cpu().numpy()
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    classifier.fit(table[:LABELLED], images.classes[:LABELLED].cpu().numpy())
    return torch.from_numpy(classifier.predict_proba(table)).float().to(images.pixels.device)


def guessed_classes(purity: float, images: Images) -> Tensor:
    """Classes that are wrong for some images, so that two which are said to be alike are with this probability.

    Of C classes, with a share a of right ones and all others alike, that probability is a^2 + (1 - a)^2 / (C - 1).
    """
    count = int(images.classes.max()) + 1
    right = (1 + ((count - 1) * (count * purity - 1)) ** 0.5) / count
    generator = torch.Generator().manual_seed(0)
    is_right = torch.rand(len(images), generator=generator) < right
    shift = torch.randint(1, count, (len(images),), generator=generator) * ~is_right
    return F.one_hot((images.classes + shift.to(images.classes.device)) % count).float()


def copies(images: Images) -> Tensor:
    """Which image each is a copy of, as random signs: the cosine of two others is 0 but for some 0.04."""
    numbers = torch.arange(len(images), device=images.pixels.device) // images.copies
    signs = torch.randint(2, (int(numbers.max()) + 1, 512), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    return signs.to(numbers.device)[numbers]


FEATURES: dict[str, Callable[[Images], Tensor]] = {
    "pixels": pixels,
    "gradients": gradients,
    "copies": copies,
    "guesses": guesses,
    "classes": classes,
    **{f"classes-{percent}": functools.partial(guessed_classes, percent / 100) for percent in PURITIES},
}


def principal(table: Tensor) -> Tensor:
    """The first principal components, each divided by the root of its standard deviation."""
    table = table - table.mean(0)
    variances, axes = torch.linalg.eigh(table.T @ table / len(table))
    variances, axes = variances[-COMPONENTS:], axes[:, -COMPONENTS:]
    return table @ axes / variances.clamp(min=1e-12) ** 0.25


def histograms(pixels: Tensor) -> Tensor:
    """Histograms of the directions of gradients in cells of 4 x 4 pixels, normalised over 2 x 2 cells."""
    grey = pixels.float().mean(1, keepdim=True) / 255
    padded = F.pad(grey, (1, 1, 1, 1), mode="replicate")
    across, down = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2], padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    length = torch.hypot(across, down)
    angle = torch.atan2(down, across).remainder(torch.pi) * (ORIENTATIONS / torch.pi)
    lower = angle.floor()
    votes = length.new_zeros(len(grey), ORIENTATIONS, *grey.shape[2:])
    votes.scatter_add_(1, lower.long() % ORIENTATIONS, length * (1 + lower - angle))
    votes.scatter_add_(1, (lower.long() + 1) % ORIENTATIONS, length * (angle - lower))
    blocks = F.unfold(F.avg_pool2d(votes, CELL), 2)
    return F.normalize(F.normalize(blocks, dim=1).clamp(max=0.2), dim=1).flatten(1)
