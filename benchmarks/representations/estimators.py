"""Ways to weigh the other keys, compared on one trained network: what would an estimator see?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.representations.budgets import Budget
from benchmarks.representations.data import Images, minibatches, normalize
from benchmarks.representations.objectives import Network
from benchmarks.representations.training import train
from slr_plugin.presets import CIFAR10

ROWS = 1024  # images that estimate; the next ones, as many as the queue holds, are the keys
Similarity = Callable[[Tensor, Tensor], Tensor]


def cosine(rows: Tensor, keys: Tensor) -> Tensor:
    """The paper's."""
    return rows @ keys.T


def centred(rows: Tensor, keys: Tensor) -> Tensor:
    """Cosines after the mean key is taken off."""
    mean = keys.mean(0)
    return F.normalize(rows - mean) @ F.normalize(keys - mean).T


def whitened(rows: Tensor, keys: Tensor) -> Tensor:
    """Cosines after the keys' covariance is divided out."""
    mean = keys.mean(0)
    values, vectors = torch.linalg.eigh((keys - mean).T.cov())
    scale = vectors / (values + 0.01 * values.mean()).sqrt()
    return F.normalize((rows - mean) @ scale) @ F.normalize((keys - mean) @ scale).T


def at_temperature(temperature: float) -> Callable[[Tensor], Tensor]:
    """The softmax of the paper."""
    return lambda similarity: (similarity / temperature).softmax(1)


def at_perplexity(perplexity: float) -> Callable[[Tensor], Tensor]:
    """The softmax whose temperature is sought row by row, as t-SNE does; also standardises the similarities."""

    def weigh(similarity: Tensor) -> Tensor:
        low, high = (similarity.new_full((len(similarity), 1), bound) for bound in (-8.0, 3.0))  # of ln temperature
        for _ in range(40):
            middle = (low + high) / 2
            q = (similarity / middle.exp()).softmax(1)
            entropy = -torch.xlogy(q, q).sum(1, keepdim=True)
            is_flat = entropy.exp() > perplexity
            low, high = torch.where(is_flat, low, middle), torch.where(is_flat, middle, high)
        return q

    return weigh


def at_rank(count: int) -> Callable[[Tensor], Tensor]:
    """The same weight for the nearest keys and none for the others."""
    return lambda similarity: torch.zeros_like(similarity).scatter(1, similarity.topk(count).indices, 1 / count)


ESTIMATORS: dict[str, tuple[Similarity, Callable[[Tensor], Tensor]]] = {
    **{
        f"cosine, tau' {sharpening}": (cosine, at_temperature(CIFAR10.temperature * sharpening))
        for sharpening in (0.8, 0.5, 0.25, 0.1)
    },
    **{
        f"{similarity.__name__}, perplexity {perplexity}": (similarity, at_perplexity(perplexity))
        for perplexity in (100, 10)
        for similarity in (cosine, centred, whitened)
    },
    "cosine, the nearest 10": (cosine, at_rank(10)),
}


def compare(method: str, seed: int, budget: Budget, train_images: Images, test_images: Images, cache: Path) -> str:
    """Train with a method; then the table, for the views of an epoch and for the images as they are."""
    networks: list[Network] = []
    train(method, seed, budget, train_images, test_images, cache, observe=networks.append)
    project = networks[0].train()  # batch norm as in training
    with torch.no_grad():
        batches = list(minibatches(train_images, budget, seed, 1, ("query", "key"), cache))
        views = torch.cat([F.normalize(project(normalize(batch.key))) for batch in batches])
        view_classes = torch.cat([batch.classes for batch in batches])
        parts = train_images.pixels.split(budget.batch_size)
        plain = torch.cat([F.normalize(project(normalize(part))) for part in parts])
    lines = [
        "| estimator | augmented: purity % | perplexity | as they are: purity % | perplexity |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, (similarity, weigh) in ESTIMATORS.items():
        cells = [name]
        for features, classes in ((views, view_classes), (plain, train_images.classes)):
            rows, keys = features[:ROWS], features[ROWS : ROWS + budget.queue_size]
            q = weigh(similarity(rows, keys))
            same = classes[:ROWS, None] == classes[ROWS : ROWS + budget.queue_size]
            perplexity = (-torch.xlogy(q, q).sum(1)).exp().mean()
            cells += [f"{100 * (q * same).sum(1).mean():.1f}", f"{perplexity:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
