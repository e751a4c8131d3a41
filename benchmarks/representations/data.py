"""Images in memory and, for every seed and epoch, the same views for all methods."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import kornia.augmentation as K
import torch
from kornia.augmentation.auto import RandAugment
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from benchmarks.representations.budgets import Budget

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


class Images(NamedTuple):
    """Images (n, 3, 32, 32) in uint8, and their classes (n,)."""

    pixels: Tensor
    classes: Tensor

    def __len__(self) -> int:
        return len(self.classes)


class Batch(NamedTuple):
    """Normalised views (s, 3, 32, 32), and the classes (s,), which no method may use, but for oracle and supervised."""

    query: Tensor
    key: Tensor
    strong: Tensor | None  # a further view, strongly augmented, for the mixup
    classes: Tensor


# The stream of random numbers of each view, so that it is the same whichever others a method takes; 0 is the order's.
STREAMS = {"query": 1, "key": 2, "strong": 3, "weak": 3}


def load(root: Path, budget: Budget, device: torch.device) -> tuple[Images, Images]:
    """Training and test images, ``root``/train/<class>/* and ``root``/test/<class>/*; the same for every seed."""
    return _decode(root / "train", budget.train_images, device), _decode(root / "test", budget.test_images, device)


def _decode(root: Path, count: int | None, device: torch.device) -> Images:
    transform = v2.Compose([v2.Resize(32), v2.CenterCrop(32), v2.PILToTensor()])
    folder = ImageFolder(root, transform)
    order = torch.randperm(len(folder), generator=torch.Generator().manual_seed(0))[:count]
    pixels, classes = zip(*DataLoader(Subset(folder, order.tolist()), batch_size=256), strict=True)
    return Images(torch.cat(pixels).to(device), torch.cat(classes).to(device))


def minibatches(
    images: Images, budget: Budget, seed: int, epoch: int, names: Sequence[str], cache: Path
) -> Iterator[Batch]:
    """One epoch in random order; the last, incomplete batch is left out.

    Args:
        images: what to augment.
        budget: the batch size s, the side of the views, and whether to keep them for the seed's other methods.
        seed: with ``epoch``, determines order and views, whatever the method draws.
        epoch: counts from 1.
        names: of STREAMS, those of query and key and perhaps a strong one.
        cache: the folder in which views are kept, 9 MB per view and epoch of 5,000 images.
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(_stream(seed, epoch, 0)))
    views = [_views(images, budget, seed, epoch, name, cache) for name in names]
    whole = len(order) // budget.batch_size * budget.batch_size
    for index in order[:whole].to(images.pixels.device).split(budget.batch_size):
        query, key, *rest = (normalize(view[index]) for view in views)
        yield Batch(query, key, rest[0] if rest else None, images.classes[index])


def normalize(pixels: Tensor) -> Tensor:
    """uint8 to float32 of mean 0 and variance 1 per channel."""
    mean, std = (pixels.new_tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (MEAN, STD))
    return ((pixels / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def _views(images: Images, budget: Budget, seed: int, epoch: int, name: str, cache: Path) -> Tensor:
    """One view of every image, (n, 3, side, side) in uint8."""
    path = cache / f"{len(images)}-images-{budget.side}-pixels" / f"seed-{seed}" / f"epoch-{epoch}-{name}.pt"
    if path.exists():
        return torch.load(path)
    with torch.random.fork_rng():
        torch.manual_seed(_stream(seed, epoch, STREAMS[name]))
        augment = _augmentation(budget.side, colours=name != "weak")
        views = torch.cat([augment(part / 255) for part in images.pixels.split(512)])
        if name == "strong":
            views = torch.cat([_strengthen(group) for group in views.split(budget.strong_group)])
    views = (views.clamp(0, 1) * 255).round().to(torch.uint8)
    if budget.keeps_views:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")  # another process may be making the same file
        torch.save(views, unfinished)
        unfinished.replace(path)
    return views


def _augmentation(side: int, colours: bool) -> K.AugmentationSequential:
    """The MoCo authors' CIFAR demo's; without colours the weak one of ReSSL and SCE."""
    geometric = [
        K.RandomResizedCrop((side, side), scale=(0.08 if colours else 0.2, 1.0)),
        K.RandomHorizontalFlip(),
    ]
    coloured = [K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8), K.RandomGrayscale(p=0.2)]
    return K.AugmentationSequential(*geometric, *(coloured if colours else []), data_keys=["input"])


def _strengthen(images: Tensor) -> Tensor:
    """As CLSA: each of five draws of an operation applies with probability 0.5, its magnitude is uniform.

    Unlike CLSA's, the draws are common to the images of a call, and no operation is drawn twice.
    """
    count = int(torch.rand(5).ge(0.5).sum())
    magnitude = 1 + int(torch.randint(29, ()))
    return RandAugment(count, magnitude)(images) if count else images


def _stream(seed: int, epoch: int, use: int) -> int:
    """A seed of its own for every use."""
    return (seed * 10_000 + epoch) * 4 + use
