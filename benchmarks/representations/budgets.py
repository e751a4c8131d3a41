"""How much is spent on a run: data, encoder, epochs, hardware."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from lightly.models import ResNetGenerator
from torch import nn
from torchvision.models import resnet18

from slr_plugin.adapters.lightly import cifar_stem


@dataclass(frozen=True)
class Budget:
    """Everything that all methods of a comparison share. Optimiser, temperature and so on are the CIFAR-10 preset's."""

    encoder: Callable[[], nn.Module]  # images to features (s, d)
    feature_dim: int
    side: int  # of the views, in pixels; the images that are evaluated keep their 32
    train_images: int | None  # None: all
    test_images: int | None
    epochs: int
    batch_size: int
    queue_size: int
    evaluations: int  # of kNN accuracy over a run; label quality is measured in each of these epochs
    threads: int | None  # of one run on the CPU; a fixed number, so that a run repeats to the last digit
    keeps_views: bool  # on the disk, for the other methods of the seed
    strong_group: int  # images that share one draw of strong operations, which kornia makes once per call
    channels: int = 3  # 1: images are grey, and so are augmented otherwise
    copies: int = 1  # of every training image, all different, among the train_images
    rates: tuple[
        float, ...
    ] = ()  # learning rates, of which each method takes its best on held-out images; (): the preset's
    widens: bool = False  # tries further rates, by the same factor, until a method's best is no longer at an end
    tuning_seeds: int = 2  # by whose mean a learning rate is chosen
    confirmations: int = 1  # seeds that the best one must have: while it has fewer, it is trained with the next
    half: bool = True  # encoder in bfloat16
    halves_side: bool = False  # images are trained and judged with half of their pixels a side; what is known sees all


def small_resnet() -> nn.Module:
    """ResNet-9 of width 16 (of lightly), for images of any size: what a CPU core trains in minutes."""
    parts = ResNetGenerator("resnet-9", width=0.25)
    stages = [parts.layer1, parts.layer2, parts.layer3, parts.layer4]
    return nn.Sequential(parts.conv1, parts.bn1, nn.ReLU(), *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def strided_resnet() -> nn.Module:
    """The same with a first convolution of stride 2: a third of the time."""
    network = small_resnet()
    network[0].stride = (2, 2)
    return network


def three_layers() -> nn.Module:
    """Three strided convolutions, for small grey images."""

    def layer(channels: int, width: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(channels, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())

    return nn.Sequential(layer(1, 32), layer(32, 64), layer(64, 128), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def cifar_resnet18() -> nn.Module:
    """Torchvision's ResNet-18 with the usual stem for small images."""
    model = cifar_stem(resnet18())
    model.fc = nn.Identity()
    return model


CPU = Budget(
    encoder=small_resnet,
    feature_dim=128,
    side=24,
    train_images=5000,
    test_images=5000,
    epochs=40,
    batch_size=128,
    queue_size=2048,
    evaluations=4,
    threads=1,
    keeps_views=True,
    strong_group=8,
)
GPU = Budget(
    encoder=cifar_resnet18,
    feature_dim=512,
    side=32,
    train_images=None,
    test_images=None,
    epochs=200,
    batch_size=256,
    queue_size=4096,
    evaluations=20,
    threads=None,
    keeps_views=False,
    strong_group=256,
)
# Five times the steps, each method at its own learning rate; some 25 minutes a run on a CPU core.
CPU_LONG = replace(CPU, epochs=200, rates=(0.01, 0.025, 0.06), widens=True)
# Fashion-MNIST: 1,560 steps.
FASHION = replace(
    CPU,
    encoder=three_layers,
    side=28,
    train_images=10000,
    test_images=None,
    epochs=20,
    queue_size=4096,
    channels=1,
    rates=(0.02, 0.06, 0.18),
)
# 1,000 of these images, of each of which the queue of 4,096 holds some four earlier keys; 1,561 steps. The learning
# rate is what every method with a queue chose with 10,000 images.
FEW = replace(FASHION, train_images=1000, epochs=223, rates=(0.06,))
# 8,000 images that are copies of 8,000, 4,000, 2,000 or 1,000; 1,550 steps. The queue of 4,096 holds every second one.
COPIES = {f"copies-{copies}": replace(FEW, train_images=8000, copies=copies, epochs=25) for copies in (1, 2, 4, 8)}
# How pure labels must be, at the rate that every method with a queue chose; as long, and four times as long.
PURITY = replace(FASHION, rates=(0.06,))
PURITY_LONG = replace(PURITY, epochs=80)
# A teacher that is gone in use; 312 steps, a minute a run on a CPU core without bfloat16.
TEACHER = replace(
    CPU,
    encoder=strided_resnet,
    test_images=None,
    epochs=8,
    evaluations=1,
    rates=(0.009, 0.03, 0.1, 0.3333),
    widens=True,
    tuning_seeds=1,
    confirmations=2,
    half=False,
)
# The same with all images; not run yet.
TEACHER_ALL = replace(TEACHER, train_images=None)
# Fashion-MNIST again, for what is known of some images; 468 steps, without bfloat16, which some CPUs only imitate.
# Accuracy has two hills over the rates, so that a search must not climb the nearest one.
KNOWN_RATES = (0.0067, 0.02, 0.06, 0.18)
KNOWN = replace(
    FASHION, epochs=6, evaluations=1, rates=KNOWN_RATES, widens=True, tuning_seeds=1, confirmations=2, half=False
)
# The same network on images of 14 pixels, whose labels come from all 28; 936 steps.
FOURTEEN = replace(KNOWN, side=14, epochs=12, halves_side=True)
# 1,000 images in bursts of eight, as in `copies-8`, told or not; 496 steps.
BURST = replace(KNOWN, train_images=8000, copies=8, epochs=8)
# For the tests of the harness: a second or less, and no result.
SMOKE = replace(
    CPU,
    encoder=strided_resnet,
    side=16,
    train_images=96,
    test_images=64,
    epochs=2,
    batch_size=32,
    queue_size=64,
    evaluations=2,
    half=False,
)
BUDGETS = {
    "cpu": CPU,
    "cpu-long": CPU_LONG,
    "gpu": GPU,
    "gpu-100": replace(GPU, epochs=100),
    "fashion": FASHION,
    "few": FEW,
    **COPIES,
    "purity": PURITY,
    "purity-long": PURITY_LONG,
    "teacher": TEACHER,
    "teacher-all": TEACHER_ALL,
    "known": KNOWN,
    "fourteen": FOURTEEN,
    "burst": BURST,
    "smoke": SMOKE,
}


def precision(device: torch.device, budget: Budget) -> torch.autocast:
    """What the encoder computes in; projections and losses are in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=budget.half)
