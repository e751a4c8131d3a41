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
from slr_plugin.diagnostics import LabelMonitor
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
    """Queries of the online network meet the keys of its moving average.

    Args:
        criterion: called with queries and keys, and the mixed queries if there are.
        mixup: makes mixed queries.
        vanilla: mixes among queries.
        mixed_only: has no other queries; the criterion's refined weight is 1.
    """

    def __init__(
        self,
        criterion: nn.Module,
        mixup: MomentumMixup | None = None,
        vanilla: bool = False,
        mixed_only: bool = False,
    ) -> None:
        super().__init__()
        self.criterion = criterion
        self.mixup = mixup
        self.vanilla = vanilla
        self.mixed_only = mixed_only

    def follow(self, online: Network) -> None:
        """Start as a copy of the online network."""
        self.target = copy.deepcopy(online).requires_grad_(False)

    def forward(self, online: Network, batch: Batch) -> Tensor:
        """Query and key view; the mixup takes the strong view in the key's place where there is one."""
        queries = None if self.mixed_only else online(batch.query)
        with torch.no_grad():
            keys = self.target(batch.key)
        if self.mixup is None:
            return self.criterion(queries, keys)
        first, second = batch.query, batch.key if batch.strong is None else batch.strong
        if self.vanilla:  # among queries
            first = second = batch.query if batch.strong is None else batch.strong
        images, mix = self.mixup(first, second)
        mixed = online(images)
        return self.criterion(mixed if queries is None else queries, keys, mixed, mix)  # weight 0: any queries will do

    def after_step(self, online: Network) -> None:
        """Exponential moving average of the parameters."""
        update_momentum(online, self.target, m=EMA_MOMENTUM)


class Oracle(Momentum):
    """How pure must an estimator be? Half of each label, q's, is divided between own class and others by the classes.

    Within the own class and within the others it stays where q puts it.

    Args:
        setup: as of every method.
        purity: the share of q that lies on keys of the own class.
    """

    def __init__(self, setup: Setup, purity: float) -> None:
        settings = {"confidence": CosineConfidence(0.0, 0.0, 1), "refined_weight": CIFAR10.refined_weight}
        loss = baselines.SoftLabelLoss(setup.queue, self.label, CIFAR10.temperature, **settings)
        super().__init__(loss, CIFAR10.mixup(setup.mixing))
        self.purity = purity
        self.estimate = baselines.sce()
        self.monitor = LabelMonitor(loss)  # for the classes of the keys in the queue

    def forward(self, online: Network, batch: Batch) -> Tensor:
        """As a momentum method, which is told the classes."""
        self.classes = batch.classes
        self.monitor.announce(batch.classes, measure=False)
        return super().forward(online, batch)

    def label(self, similarity: Tensor, own: Tensor, confidence: float) -> Tensor:
        """A labeler, see :mod:`benchmarks.representations.baselines`."""
        label = self.estimate(similarity, own, confidence)
        key_classes = torch.cat([self.classes, self.monitor.queue_classes])
        positive = torch.zeros_like(label, dtype=torch.bool).scatter(1, own[:, None], True)
        same = self.classes[:, None] == key_classes
        for share, keys in ((self.purity, same & ~positive), (1 - self.purity, ~same)):
            mass = (label * keys).sum(1, keepdim=True).clamp(min=torch.finfo(label.dtype).tiny)
            label = torch.where(keys, label * (0.5 * share / mass), label)
        return label / label.sum(1, keepdim=True)


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
    """Queries against the keys of the momentum network; options are Momentum's or Method's."""
    how = {name: options.pop(name) for name in ("vanilla", "mixed_only") if name in options}
    return Method(
        summary,
        lambda setup: Momentum(criterion(setup), CIFAR10.mixup(setup.mixing) if mixed else None, **how),
        MIXED if mixed and "mixed_only" not in how else PLAIN,
        **options,
    )


def _slr(summary: str, mixed: bool, settings: dict[str, Any], **options: Any) -> Method:
    """The paper's CIFAR-10 settings, overridden."""

    def criterion(setup: Setup) -> nn.Module:
        scheduled = _scheduled(settings, setup.total_steps)
        return CIFAR10.loss(DIM, setup.total_steps, memory_bank_size=setup.queue, **scheduled)

    return _method(summary, criterion, mixed, **options)


def _soft(
    summary: str, mixed: bool, labeler: baselines.Labeler, settings: dict[str, Any] | None = None, **options: Any
) -> Method:
    """The same with other labels."""
    defaults = {
        "temperature": CIFAR10.temperature,
        "confidence": CIFAR10.confidence,
        "refined_weight": CIFAR10.refined_weight,
    }

    def criterion(setup: Setup) -> nn.Module:
        scheduled = _scheduled(defaults | (settings or {}), setup.total_steps)
        return baselines.SoftLabelLoss(setup.queue, labeler, **scheduled)

    return _method(summary, criterion, mixed, **options)


def _oracle(purity: float) -> Method:
    """Labels that are told the classes."""
    return Method(f"half q, {purity:.0%} of it on the own class", lambda setup: Oracle(setup, purity), MIXED)


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


ONE_HOT: dict[str, Any] = {"confidence": 0.0}
SHARP: dict[str, Any] = {"sharpening": 0.25, "confidence": (0.5, 10.0)}
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
    "sce": _soft(
        "half one-hot, half similarities", False, baselines.sce(), {"temperature": 0.1, "refined_weight": 1.0}
    ),
    "one-hot": _slr("one-hot labels over batch and queue", False, ONE_HOT),
    "p": _soft("p alone", False, P),
    "q": _soft("q alone", False, Q),
    "p+q": _slr("refined labels", False, {}),
    "mm": _slr("momentum mixup, one-hot labels", True, ONE_HOT),
    "p+mm": _soft("p alone, momentum mixup", True, P),
    "q+mm": _soft("q alone, momentum mixup", True, Q),
    "sane": _slr("refined labels, momentum mixup", True, {}),
    "vanilla": _slr("vanilla mixup, one-hot labels", True, ONE_HOT, vanilla=True),
    "vanilla-strong": _slr("the same, strong views", True, ONE_HOT, vanilla=True, views=STRONG),
    "mm-strong": _slr("momentum mixup, strong views", True, ONE_HOT, views=STRONG),
    "sane-strong": _slr("SANE, strong views", True, {}, views=STRONG),
    **{
        f"sane-lambda-{weight}": _slr(f"lambda {weight}", True, {"refined_weight": weight})
        for weight in (0.0, 0.25, 0.75)
    },
    # At lambda 1 the queries that are not mixed need no pass: a step costs what MoCo's does.
    "sane-lambda-1.0": _slr("lambda 1.0", True, {"refined_weight": 1.0}, mixed_only=True),
    "sane-lambda-1.0-longer": _slr(
        "the same, as many passes as SANE", True, {"refined_weight": 1.0}, mixed_only=True, stretch=MIXED / PLAIN
    ),
    # When does refinement add to momentum mixup?
    "sane-sharp": _slr("tau' 0.25, mu 0.5 to 10", True, SHARP),
    "mm-weak": _slr("momentum mixup, weak keys", True, ONE_HOT, views=WEAK),
    "sane-weak": _slr("SANE, weak keys", True, {}, views=WEAK),
    "sane-weak-sharp": _slr("weak keys, tau' 0.25, mu 0.5 to 10", True, SHARP, views=WEAK),
    "half-q+mm": _soft("q at tau' 0.25 has half the label", True, baselines.sce(0.05)),
    "half-q+mm-weak": _soft("the same, weak keys", True, baselines.sce(0.05), views=WEAK),
    **{f"oracle-{purity}": _oracle(purity) for purity in (0.1, 0.25, 0.5, 0.75, 1.0)},
}
