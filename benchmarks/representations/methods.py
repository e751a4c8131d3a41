"""The methods that are compared: what each does with an image's views."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import lightly.loss
import torch
from lightly.models.modules import MoCoProjectionHead, NNCLRPredictionHead, NNMemoryBankModule
from lightly.models.utils import update_momentum
from torch import Tensor, nn

from benchmarks.representations import baselines
from benchmarks.representations.budgets import Budget, precision
from benchmarks.representations.data import Batch
from slr_plugin import CosineConfidence, MomentumMixup
from slr_plugin.presets import CIFAR10

DIM = 128
HIDDEN = 512
EMA_MOMENTUM = 0.99  # ImageNet's usual 0.999 averages over 1,000 steps, much of a short run
# A forward pass counts 1, its backward pass 2: what a step costs in passes of a batch through the encoder.
FORWARD, TRAINED = 1, 3


class Network(nn.Module):
    """Encoder and the paper's three-layer projection head."""

    def __init__(self, budget: Budget) -> None:
        super().__init__()
        self.encoder = budget.encoder().to(memory_format=torch.channels_last)
        self.head = MoCoProjectionHead(budget.feature_dim, HIDDEN, DIM, num_layers=3, batch_norm=False)

    def features(self, images: Tensor) -> Tensor:
        """(s, feature_dim) in float32."""
        with precision(images.device):
            features = self.encoder(images)
        return features.float()

    def forward(self, images: Tensor) -> Tensor:
        """Projections (s, 128)."""
        return self.head(self.features(images))


class Setup(NamedTuple):
    """What a method may depend on."""

    queue: tuple[int, int]
    total_steps: int
    mixing: torch.Generator  # never the global one, which would shift other draws


class Objective(nn.Module):
    """A loss with what it needs around the online network; its parameters are trained too."""

    def forward(self, online: Network, batch: Batch) -> Tensor:
        """The loss of one minibatch."""
        raise NotImplementedError

    def after_step(self, online: Network) -> None:
        """Follow the online network."""


class Momentum(Objective):
    """Queries of the online network meet the keys of its moving average; optionally also mixed queries."""

    def __init__(self, criterion: nn.Module, mixup: MomentumMixup | None = None, vanilla: bool = False) -> None:
        super().__init__()
        self.criterion = criterion
        self.mixup = mixup
        self.vanilla = vanilla

    def follow(self, online: Network) -> None:
        """Start as a copy of the online network."""
        self.target = copy.deepcopy(online).requires_grad_(False)

    def forward(self, online: Network, batch: Batch) -> Tensor:
        """Query and key view; the mixup takes the strong view in the key's place where there is one."""
        queries = online(batch.query)
        with torch.no_grad():
            keys = self.target(batch.key)
        if self.mixup is None:
            return self.criterion(queries, keys)
        first, second = batch.query, batch.key if batch.strong is None else batch.strong
        if self.vanilla:  # among queries
            first = second = batch.query if batch.strong is None else batch.strong
        mixed, mix = self.mixup(first, second)
        return self.criterion(queries, keys, online(mixed), mix)

    def after_step(self, online: Network) -> None:
        """Exponential moving average of the parameters."""
        update_momentum(online, self.target, m=EMA_MOMENTUM)


class Siamese(Objective):
    """Both views through the online network."""

    def __init__(self, criterion: nn.Module) -> None:
        super().__init__()
        self.criterion = criterion

    def forward(self, online: Network, batch: Batch) -> Tensor:
        """The loss of both views."""
        return self.criterion(online(batch.query), online(batch.key))


class NearestNeighbour(Objective):
    """NNCLR as in lightly's benchmarks: the prediction of a view meets the nearest neighbour of the other."""

    def __init__(self, queue: tuple[int, int]) -> None:
        super().__init__()
        self.criterion = lightly.loss.NTXentLoss(temperature=0.1)
        self.prediction_head = NNCLRPredictionHead(DIM, HIDDEN, DIM)
        self.memory_bank = NNMemoryBankModule(size=queue)

    def forward(self, online: Network, batch: Batch) -> Tensor:
        """The mean over the two directions."""
        z0, z1 = online(batch.query), online(batch.key)
        p0, p1 = self.prediction_head(z0), self.prediction_head(z1)
        near0, near1 = self.memory_bank(z0.detach(), update=False), self.memory_bank(z1.detach(), update=True)
        return (self.criterion(near0, p1) + self.criterion(near1, p0)) / 2


@dataclass(frozen=True)
class Method:
    """One entry of the comparison."""

    summary: str
    build: Callable[[Setup], Objective]
    passes: int  # per step, see FORWARD and TRAINED
    views: tuple[str, ...] = ("query", "key")  # see benchmarks.representations.data
    stretch: float = 1.0  # trains so many times the budget's epochs


PLAIN = TRAINED + FORWARD
MIXED = 2 * TRAINED + FORWARD
TWO_VIEWS = 2 * TRAINED
STRONG = ("query", "key", "strong")
WEAK = ("query", "weak")  # the key network sees weakly augmented images, as in ReSSL and SCE


def _method(summary: str, criterion: Callable[[Setup], nn.Module], mixed: bool, **options: Any) -> Method:
    """Queries against the keys of the momentum network."""
    vanilla = options.pop("vanilla", False)
    return Method(
        summary,
        lambda setup: Momentum(criterion(setup), CIFAR10.mixup(setup.mixing) if mixed else None, vanilla),
        MIXED if mixed else PLAIN,
        **options,
    )


def _slr(
    summary: str, mixed: bool, *, views: tuple[str, ...] = ("query", "key"), vanilla: bool = False, **settings: Any
) -> Method:
    """The paper's CIFAR-10 settings, overridden."""
    return _method(
        summary,
        lambda setup: CIFAR10.loss(
            DIM, setup.total_steps, memory_bank_size=setup.queue, **_scheduled(settings, setup.total_steps)
        ),
        mixed,
        views=views,
        vanilla=vanilla,
    )


def _soft(
    summary: str, mixed: bool, labeler: baselines.Labeler, *, views: tuple[str, ...] = ("query", "key"), **settings: Any
) -> Method:
    """The same with other labels."""
    defaults = {
        "temperature": CIFAR10.temperature,
        "confidence": CIFAR10.confidence,
        "refined_weight": CIFAR10.refined_weight,
    }
    return _method(
        summary,
        lambda setup: baselines.SoftLabelLoss(
            setup.queue, labeler, **_scheduled(defaults | settings, setup.total_steps)
        ),
        mixed,
        views=views,
    )


def _scheduled(settings: dict[str, Any], total_steps: int) -> dict[str, Any]:
    """Settings with a pair (m1, m2) as the schedule of the confidence."""
    confidence = settings.get("confidence")
    if isinstance(confidence, tuple):
        return settings | {"confidence": CosineConfidence(*confidence, total_steps)}
    return settings


def _moco(summary: str, **options: Any) -> Method:
    return _method(
        summary, lambda setup: lightly.loss.NTXentLoss(CIFAR10.temperature, setup.queue), mixed=False, **options
    )


P, Q = (baselines.one_estimator(which, CIFAR10.temperature * CIFAR10.sharpening) for which in "pq")

METHODS: dict[str, Method] = {
    "moco": _moco("MoCo v2, lightly's NTXentLoss"),
    "moco-longer": _moco("the same, as many passes as SANE", stretch=MIXED / PLAIN),
    "simclr": Method("SimCLR, lightly's NTXentLoss", lambda setup: Siamese(lightly.loss.NTXentLoss(0.5)), TWO_VIEWS),
    "dcl": Method("lightly's DCLLoss", lambda setup: Siamese(lightly.loss.DCLLoss(0.1)), TWO_VIEWS),
    "nnclr": Method("NNCLR of lightly's parts", lambda setup: NearestNeighbour(setup.queue), TWO_VIEWS),
    "co2": _method(
        "InfoNCE and consistency", lambda setup: baselines.CO2Loss(setup.queue, CIFAR10.temperature), mixed=False
    ),
    "sce": _soft("half one-hot, half similarities", False, baselines.sce(), temperature=0.1, refined_weight=1.0),
    "one-hot": _slr("one-hot labels over batch and queue", mixed=False, confidence=0.0),
    "p": _soft("p alone", False, P),
    "q": _soft("q alone", False, Q),
    "p+q": _slr("refined labels", mixed=False),
    "mm": _slr("momentum mixup, one-hot labels", mixed=True, confidence=0.0),
    "p+mm": _soft("p alone, momentum mixup", True, P),
    "q+mm": _soft("q alone, momentum mixup", True, Q),
    "sane": _slr("refined labels, momentum mixup", mixed=True),
    "vanilla": _slr("vanilla mixup, one-hot labels", mixed=True, vanilla=True, confidence=0.0),
    "vanilla-strong": _slr("the same, strong views", mixed=True, vanilla=True, views=STRONG, confidence=0.0),
    "mm-strong": _slr("momentum mixup, strong views", mixed=True, views=STRONG, confidence=0.0),
    "sane-strong": _slr("SANE, strong views", mixed=True, views=STRONG),
    **{
        f"sane-lambda-{weight}": _slr(f"lambda {weight}", mixed=True, refined_weight=weight)
        for weight in (0.0, 0.25, 0.75, 1.0)
    },
    # When does refinement add to momentum mixup?
    "sane-sharp": _slr("tau' 0.25, mu 0.5 to 10", mixed=True, sharpening=0.25, confidence=(0.5, 10.0)),
    "mm-weak": _slr("momentum mixup, weak keys", mixed=True, views=WEAK, confidence=0.0),
    "sane-weak": _slr("SANE, weak keys", mixed=True, views=WEAK),
    "sane-weak-sharp": _slr(
        "weak keys, tau' 0.25, mu 0.5 to 10", mixed=True, views=WEAK, sharpening=0.25, confidence=(0.5, 10.0)
    ),
    "half-q+mm": _soft("q at tau' 0.25 has half the label", True, baselines.sce(0.05)),
    "half-q+mm-weak": _soft("the same, weak keys", True, baselines.sce(0.05), views=WEAK),
}
