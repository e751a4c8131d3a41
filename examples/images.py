"""Images in memory, and two random views of each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from tqdm import tqdm


class Images(NamedTuple):
    """Images (n, channels, side, side) in uint8, and their classes (n,)."""

    pixels: Tensor
    classes: Tensor

    def __len__(self) -> int:
        return len(self.classes)


class Views(NamedTuple):
    """How far the views of an image may differ."""

    area: float  # of the smallest crop, as a share of the image
    degrees: float  # of rotation
    flip: bool
    jitter: float  # of brightness, contrast and saturation


class Dataset(NamedTuple):
    """Training images, held-out images, and how to augment them."""

    name: str
    train: Images
    test: Images
    views: Views


def load_scans(limit: int | None) -> Dataset:
    """scikit-learn's 1,797 scanned digits, 8 x 8 pixels. They come writer by writer; the last quarter is held out."""
    digits = load_digits()
    pixels = torch.from_numpy(digits.images * (255 / 16)).to(torch.uint8)[:, None]  # its values are 0 to 16
    classes = torch.from_numpy(digits.target)
    train, test = (Images(pixels[part][:limit], classes[part][:limit]) for part in (slice(1347), slice(1347, None)))
    # No flips: a mirrored digit is none. Milder crops than for photographs: a fifth of a digit could be any digit's.
    return Dataset("scikit-learn's digits", train, test, Views(area=0.5, degrees=15, flip=False, jitter=0.4))


def load_folder(root: Path, size: int, limit: int | None, workers: int) -> Dataset:
    """A folder of images, decoded once, at ``size`` x ``size`` pixels.

    Raises:
        ValueError: there is nothing to learn from at ``root``; the message says how to arrange the images.
    """
    if not root.is_dir():
        raise ValueError(f"there is no folder {root}")
    layout = f"arrange the images as {root}/train/<class>/* and {root}/test/<class>/*, or as {root}/<class>/*"
    transform = v2.Compose([v2.Resize(size), v2.CenterCrop(size), v2.PILToTensor()])
    is_split = (root / "train").is_dir() and (root / "test").is_dir()
    roots = (root / "train", root / "test") if is_split else (root, root)
    try:
        train, test = (ImageFolder(part, transform) for part in roots)
    except FileNotFoundError as error:  # no class folder, or one without images
        raise ValueError(f"{str(error).splitlines()[0].rstrip('.')}; {layout}") from error
    if train.classes != test.classes:
        raise ValueError(f"{roots[0]} and {roots[1]} must have the same class folders; {layout}")
    if len(train.classes) < 2:
        raise ValueError(f"{train.root} has one class folder only, {train.classes[0]!r}; {layout}")
    draws = [np.random.default_rng(0).permutation(len(folder)) for folder in (train, test)]
    if not is_split:  # both are the whole folder, and so both draws are the same
        held_out = max(1, len(train) // 4)
        draws = [draws[0][held_out:], draws[0][:held_out]]
    views = Views(area=0.2, degrees=0, flip=True, jitter=0.4)
    parts = (decode(folder, draw[:limit], workers) for folder, draw in zip((train, test), draws, strict=True))
    return Dataset(str(root), *parts, views)


def decode(folder: ImageFolder, index: np.ndarray, workers: int) -> Images:
    """The indexed images of a folder as one tensor."""
    batches = DataLoader(Subset(folder, index.tolist()), batch_size=256, num_workers=workers)
    pixels, classes = zip(*tqdm(batches, desc=f"reading {folder.root}", leave=False), strict=True)
    return Images(torch.cat(pixels), torch.cat(classes))


def minibatches(
    images: Images, views: Views, batch_size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """One epoch in random order: two views, and the classes. The last, incomplete batch is left out."""
    order = torch.randperm(len(images), generator=generator)
    for index in order[: len(order) // batch_size * batch_size].split(batch_size):
        pixels = images.pixels[index]
        yield augment(pixels, views, generator), augment(pixels, views, generator), images.classes[index]


def augment(pixels: Tensor, views: Views, generator: torch.Generator) -> Tensor:
    """Random crop, rotation, flip, colour jitter and greyscale, as float32.

    torchvision's transforms draw once per call, so a batch would share its draw; these draw per image in one call.
    """

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(pixels), generator=generator)

    # As RandomResizedCrop: the crop's area and aspect ratio are random, then its centre. Lengths in halves of a side.
    area, aspect = draw(views.area, 1), draw(math.log(3 / 4), math.log(4 / 3)).exp()
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    x, y = draw(-1, 1) * (1 - width), draw(-1, 1) * (1 - height)
    angle = draw(-1, 1) * math.radians(views.degrees)
    mirror = draw(-1, 1).sign() if views.flip else 1
    # The view's coordinates -> the image's: scale and mirror, rotate, move to the crop's centre.
    matrix = [
        torch.stack([angle.cos() * width * mirror, -angle.sin() * height, x], dim=1),
        torch.stack([angle.sin() * width * mirror, angle.cos() * height, y], dim=1),
    ]
    grid = F.affine_grid(torch.stack(matrix, dim=1), list(pixels.shape), align_corners=False)
    images = F.grid_sample(pixels / 255, grid, align_corners=False)

    brightness, contrast, saturation = (draw(1 - views.jitter, 1 + views.jitter) for _ in range(3))
    saturation = saturation * (draw(0, 1) >= 0.2)  # one view in five is grey
    images = images * brightness.view(-1, 1, 1, 1)
    images = torch.lerp(images.mean((1, 2, 3), keepdim=True), images, contrast.view(-1, 1, 1, 1))
    return torch.lerp(images.mean(1, keepdim=True), images, saturation.view(-1, 1, 1, 1))
