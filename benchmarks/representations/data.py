"""Images in memory and, for every seed and epoch, the same views for all methods."""

from __future__ import annotations

import functools
import gzip
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import kornia.augmentation as K
import torch
import torch.nn.functional as F
from kornia.augmentation.auto import RandAugment
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from benchmarks.representations.budgets import Budget

STATISTICS = {3: ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)), 1: ((0.2860,), (0.3530,))}  # by channels


HELD_OUT = 5000


class Images(NamedTuple):
    """Images (n, channels, height, width) in uint8, and their classes (n,)."""

    pixels: Tensor
    classes: Tensor
    copies: int = 1  # so many in a row show the same
    name: str = ""  # of these images among others, whose views may be kept beside theirs

    def __len__(self) -> int:
        return len(self.classes)


class Batch(NamedTuple):
    """Views, in uint8 until they are normalised, and the classes (s,), which only those methods use that are told."""

    query: Tensor
    key: Tensor
    further: Tensor | None  # strongly augmented, for the mixup, or the images as they are
    classes: Tensor
    index: Tensor  # (s,) the numbers of the images

    def normalized(self) -> Batch:
        """The same with views in float32."""
        further = None if self.further is None else normalize(self.further)
        return Batch(normalize(self.query), normalize(self.key), further, self.classes, self.index)


# The stream of random numbers of each view, so that it is the same whichever others a method takes; 0 is the order's.
STREAMS = {"query": 1, "key": 2, "strong": 3, "weak": 3}

# Views that are kept on a GPU for the other runs of this process, by the names that their files would have.
_KEPT: dict[Path, Tensor] = {}


def load(root: Path, budget: Budget, device: torch.device, held_out: bool = False) -> tuple[Images, Images]:
    """Training and test images, the same for every seed.

    Args:
        root: holds ``train/<class>/*`` and ``test/<class>/*``, or grey images as MNIST's four ``*-ubyte.gz`` files.
        budget: how many.
        device: where to.
        held_out: take the last fifth of the training images, at most 5,000, in place of the test images: settings are
            chosen by them.
    """
    train, order = _part(root, "train")
    rest = len(order) - min(HELD_OUT, len(order) // 5) if held_out else len(order)
    count = min(rest, budget.train_images or rest) // budget.copies
    images = _named(_copies(_gather(train, order[:count], device), budget.copies))
    if held_out:
        return images, _named(_gather(train, order[rest:], device))
    test, order = _part(root, "test")
    return images, _named(_gather(test, order[: budget.test_images], device))


def _part(root: Path, part: str) -> tuple[Dataset[Any], list[int]]:
    """The images of a part and their classes, and a random order of them."""
    dataset: Dataset[Any]
    if (root / part).is_dir():
        dataset = ImageFolder(root / part, v2.Compose([v2.Resize(32), v2.CenterCrop(32), v2.PILToTensor()]))
    else:
        prefix = {"train": "train", "test": "t10k"}[part]
        pixels = _idx(root / f"{prefix}-images-idx3-ubyte.gz", 16).view(-1, 1, 28, 28)
        dataset = TensorDataset(pixels, _idx(root / f"{prefix}-labels-idx1-ubyte.gz", 8).long())
    return dataset, torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()  # type: ignore[arg-type]


def _gather(dataset: Dataset[Any], indices: list[int], device: torch.device) -> Images:
    pixels, classes = zip(*DataLoader(Subset(dataset, indices), batch_size=256), strict=True)
    return Images(torch.cat(pixels).to(device), torch.cat(classes).to(device))


def _named(images: Images) -> Images:
    """The same with a name that other images do not have."""
    name = hashlib.sha256(images.pixels[:64].cpu().numpy().tobytes()).hexdigest()[:12]
    return Images(images.pixels, images.classes, images.copies, name)


def halved(images: Images) -> Images:
    """The same with half of the pixels a side, means of four."""
    pixels = F.avg_pool2d(images.pixels.float(), 2) / 255
    return Images(_bytes(pixels), images.classes, images.copies, f"{images.name}-halved")


def _copies(images: Images, copies: int) -> Images:
    """Every image so many times, shifted by up to two pixels and up to a tenth lighter or darker, as in a burst."""
    if copies == 1:
        return images
    pixels, classes = (values.repeat_interleave(copies, 0) for values in images[:2])
    shake = K.AugmentationSequential(
        K.RandomAffine(0, (2 / pixels.shape[3], 2 / pixels.shape[2]), p=1.0), K.RandomBrightness((0.9, 1.1), p=1.0)
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pixels = torch.cat([shake(part / 255) for part in pixels.split(500)])
    return Images(_bytes(pixels), classes, copies)


def _bytes(pixels: Tensor) -> Tensor:
    """From [0, 1] to uint8."""
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8)


# By hand: torchvision reads these files unpacked, and in folders of its own.
def _idx(path: Path, header: int) -> Tensor:
    with gzip.open(path) as file:
        return torch.frombuffer(bytearray(file.read()), dtype=torch.uint8, offset=header)


def minibatches(
    images: Images, budget: Budget, seed: int, epoch: int, names: Sequence[str], cache: Path
) -> Iterator[Batch]:
    """One epoch in random order; the last, incomplete batch is left out.

    Args:
        images: what to augment.
        budget: the batch size s, the side of the views, and whether to keep them for the seed's other methods.
        seed: with ``epoch``, determines order and views, whatever the method draws.
        epoch: counts from 1.
        names: of STREAMS, those of query and key and perhaps a strong one; "plain" are the images as they are.
        cache: the folder in which views are kept, 9 MB per view and epoch of 5,000 images; on a GPU they stay there.
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(_stream(seed, epoch, 0)))
    views = [_views(images, budget, seed, epoch, name, cache) for name in names]
    whole = len(order) // budget.batch_size * budget.batch_size
    for index in order[:whole].to(images.pixels.device).split(budget.batch_size):
        query, key, *rest = (view[index] for view in views)
        yield Batch(query, key, rest[0] if rest else None, images.classes[index], index)


def normalize(pixels: Tensor) -> Tensor:
    """uint8 to float32 of mean 0 and variance 1 per channel."""
    mean, std = _statistics(pixels.shape[1], pixels.device)
    return ((pixels / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


@functools.cache
def _statistics(channels: int, device: torch.device) -> list[Tensor]:
    return [torch.tensor(values, device=device).view(-1, 1, 1) for values in STATISTICS[channels]]


def _views(images: Images, budget: Budget, seed: int, epoch: int, name: str, cache: Path) -> Tensor:
    """One view of every image, (n, channels, side, side) in uint8: made now, or kept by an earlier run."""
    if name == "plain":
        return images.pixels
    make = functools.partial(_augmented, images, budget, _stream(seed, epoch, STREAMS[name]), name)
    if not budget.keeps_views:
        return make()
    path = (
        cache / f"{images.name}-{len(images)}-images-{budget.side}-pixels" / f"seed-{seed}" / f"epoch-{epoch}-{name}.pt"
    )
    return (_kept_on_disk if images.pixels.device.type == "cpu" else _kept_on_gpu)(path, make)


def _kept_on_disk(path: Path, make: Callable[[], Tensor]) -> Tensor:
    if path.exists():
        return torch.load(path)
    views = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")  # another process may be making the same file
    torch.save(views, unfinished)
    unfinished.replace(path)
    return views


def _kept_on_gpu(path: Path, make: Callable[[], Tensor]) -> Tensor:
    if path not in _KEPT:
        _KEPT[path] = make()
        torch.cuda.current_stream().synchronize()  # other runs read them on streams of their own
    return _KEPT[path]


def _augmented(images: Images, budget: Budget, seed: int, name: str) -> Tensor:
    """One view of every image. 512 share what kornia draws once per call, such as the order of changes in colour."""
    on_cpu = images.pixels.device.type == "cpu"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        augment = (
            _grey_augmentation(budget.side, on_cpu)
            if budget.channels == 1
            else _augmentation(budget.side, name != "weak", on_cpu)
        )
        views = torch.cat([augment(part / 255) for part in images.pixels.split(512)])
        if name == "strong":
            views = torch.cat([_strengthen(group) for group in views.split(budget.strong_group)])
    return _bytes(views)


def _augmentation(side: int, colours: bool, on_cpu: bool) -> K.AugmentationSequential:
    """The MoCo authors' CIFAR demo's; without colours the weak one of ReSSL and SCE."""
    geometric = [
        _crop(side, 0.08 if colours else 0.2, on_cpu),
        K.RandomHorizontalFlip(),
    ]
    coloured = [K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8), K.RandomGrayscale(p=0.2)]
    return K.AugmentationSequential(*geometric, *(coloured if colours else []), data_keys=["input"])


def _crop(side: int, least: float, on_cpu: bool) -> K.RandomResizedCrop:
    """The same pixels either way, but for rounding; "slice" takes the images one by one."""
    return K.RandomResizedCrop((side, side), (least, 1.0), cropping_mode="slice" if on_cpu else "resample")


def _grey_augmentation(side: int, on_cpu: bool) -> K.AugmentationSequential:
    """Milder crops, since clothes fill the image, and what ColorJitter does to grey."""
    return K.AugmentationSequential(
        _crop(side, 0.3, on_cpu),
        K.RandomHorizontalFlip(),
        K.RandomBrightness((0.6, 1.4)),
        K.RandomContrast((0.6, 1.4)),
        data_keys=["input"],
    )


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
