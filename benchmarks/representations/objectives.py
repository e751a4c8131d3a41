"""What a method does with an image's views: networks around a loss."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import lightly.loss
import torch
import torch.nn.functional as F
from lightly.models.modules import BYOLPredictionHead, MoCoProjectionHead, NNCLRPredictionHead, NNMemoryBankModule
from lightly.models.utils import update_momentum
from torch import Tensor, nn

from benchmarks.representations import baselines
from benchmarks.representations.budgets import Budget, precision
from benchmarks.representations.data import Batch
from slr_plugin import CosineConfidence, MomentumMixup
from slr_plugin.diagnostics import LabelMonitor
from slr_plugin.presets import CIFAR10

DIM = 128
CLASSES = 10  # of CIFAR-10; only Supervised needs to know
HIDDEN = 512
EMA_MOMENTUM = 0.99  # ImageNet's usual 0.999 averages over 1,000 steps, much of a short run


class Network(nn.Module):
    """Encoder and the paper's three-layer projection head."""

    def __init__(self, budget: Budget) -> None:
        super().__init__()
        self.budget = budget
        self.encoder = budget.encoder().to(memory_format=torch.channels_last)
        self.head = MoCoProjectionHead(budget.feature_dim, HIDDEN, DIM, num_layers=3, batch_norm=False)

    def features(self, images: Tensor) -> Tensor:
        """(s, feature_dim) in float32."""
        with precision(images.device, self.budget):
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
    estimators: Tensor | None = None  # (n, e) features of all images, from which labels are estimated

    def estimator(self, batch: Batch) -> dict[str, Tensor]:
        """The argument of the criterion that brings these features, if there are."""
        return {} if self.estimators is None else {"estimator": self.estimators[batch.index]}


class Objective(nn.Module):
    """A loss with what it needs around the online network; its parameters are trained too."""

    def start(self, online: Network) -> None:
        """See the online network before its first step."""

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
        estimator: what the criterion is given besides.
    """

    def __init__(
        self,
        criterion: nn.Module,
        mixup: MomentumMixup | None = None,
        vanilla: bool = False,
        mixed_only: bool = False,
        estimator: Callable[[Batch], dict[str, Tensor]] = lambda batch: {},
    ) -> None:
        super().__init__()
        self.estimator = estimator
        self.criterion = criterion
        self.mixup = mixup
        self.vanilla = vanilla
        self.mixed_only = mixed_only

    def start(self, online: Network) -> None:
        """The momentum network is a copy at first."""
        self.target = copy.deepcopy(online).requires_grad_(False)

    def forward(self, online: Network, batch: Batch) -> Tensor:
        """Query and key view; the mixup takes the strong view in the key's place where there is one."""
        queries = None if self.mixed_only else online(batch.query)
        with torch.no_grad():
            keys = self.target(batch.key)
        if self.mixup is None:
            return self.criterion(queries, keys, **self.estimator(batch))
        first, second = batch.query, batch.key if batch.further is None else batch.further
        if self.vanilla:  # among queries
            first = second = batch.query if batch.further is None else batch.further
        images, mix = self.mixup(first, second)
        mixed = online(images)
        queries = mixed if queries is None else queries  # their weight is 0: any will do
        return self.criterion(queries, keys, mixed, mix, **self.estimator(batch))

    def after_step(self, online: Network) -> None:
        """Exponential moving average of the parameters."""
        update_momentum(online, self.target, m=EMA_MOMENTUM)


class Plain(Momentum):
    """Labels are estimated from the images as they are, through the momentum network: a forward pass more."""

    def __init__(self, criterion: nn.Module) -> None:
        super().__init__(criterion, estimator=self.features)

    @torch.no_grad()
    def features(self, batch: Batch) -> dict[str, Tensor]:
        """The argument of the criterion."""
        return {"estimator": self.target(batch.further)}


class Oracle(Momentum):
    """What if the estimator knew? Q's part of each label is divided between own class and others by the classes.

    Within the own class and within the others it stays where q puts it.

    Args:
        setup: as of every method.
        purity: the share of q that lies on keys of the own class.
        temperature: of q; a high one spreads it over many keys.
        own_weight: what stays on the positive.
    """

    def __init__(self, setup: Setup, purity: float, temperature: float, own_weight: float = 0.5) -> None:
        settings = {"confidence": CosineConfidence(0.0, 0.0, 1), "refined_weight": CIFAR10.refined_weight}
        loss = baselines.SoftLabelLoss(setup.queue, self.label, CIFAR10.temperature, **settings)
        super().__init__(loss, CIFAR10.mixup(setup.mixing))
        self.purity = purity
        self.own_weight = own_weight
        self.estimate = baselines.sce(temperature, own_weight)
        self.monitor = LabelMonitor(loss)  # for the classes of the keys in the queue

    def forward(self, online: Network, batch: Batch) -> Tensor:
        """As a momentum method, which is told the classes."""
        self.classes = batch.classes
        self.monitor.announce(batch.classes, measure=False)
        return super().forward(online, batch)

    def label(self, similarity: Tensor, own: Tensor, confidence: Tensor) -> Tensor:
        """A labeler, see :mod:`benchmarks.representations.baselines`."""
        label = self.estimate(similarity, own, confidence)
        key_classes = torch.cat([self.classes, self.monitor.queue_classes])
        positive = torch.zeros_like(label, dtype=torch.bool).scatter(1, own[:, None], True)
        same = self.classes[:, None] == key_classes
        for share, keys in ((self.purity, same & ~positive), (1 - self.purity, ~same)):
            mass = (label * keys).sum(1, keepdim=True).clamp(min=torch.finfo(label.dtype).tiny)
            label = torch.where(keys, label * ((1 - self.own_weight) * share / mass), label)
        return label / label.sum(1, keepdim=True).clamp(min=1e-6)  # none yet, where the first keys are of other classes


class Siamese(Objective):
    """Both views through the online network.

    Args:
        criterion: called with both projections, and the mixed queries if there are.
        mixup: makes mixed queries.
        estimator: what the criterion is given besides.
    """

    def __init__(
        self,
        criterion: nn.Module,
        mixup: MomentumMixup | None = None,
        estimator: Callable[[Batch], dict[str, Tensor]] = lambda batch: {},
    ) -> None:
        super().__init__()
        self.criterion = criterion
        self.mixup = mixup
        self.estimator = estimator

    def forward(self, online: Network, batch: Batch) -> Tensor:
        """The loss of both views."""
        projections = online(batch.query), online(batch.key)
        if self.mixup is None:
            return self.criterion(*projections, **self.estimator(batch))
        images, mix = self.mixup(batch.query, batch.key)
        return self.criterion(*projections, online(images), mix, **self.estimator(batch))


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


class Bootstrap(Objective):
    """BYOL: predictions of the online network approach what its moving average makes of the other view.

    Momentum mixup and the pull towards alike images are ours: a mixed query approaches the same mixture of targets, and
    a target is the mean over the images of the batch that the moving average finds alike.

    Args:
        mixup: makes mixed queries.
        alike: the cosine of two targets from which on their images count as alike; above 1, none do.
    """

    def __init__(self, mixup: MomentumMixup | None = None, alike: float = 2.0) -> None:
        super().__init__()
        self.criterion = nn.Identity()  # none with labels
        self.prediction_head = BYOLPredictionHead(DIM, HIDDEN, DIM)
        self.mixup = mixup
        self.alike = alike

    def start(self, online: Network) -> None:
        """The momentum network is a copy at first."""
        self.target = copy.deepcopy(online).requires_grad_(False)

    def forward(self, online: Network, batch: Batch) -> Tensor:
        """Both views, and the mixed queries with half of the weight."""
        targets = {name: self.targets(view) for name, view in (("query", batch.query), ("key", batch.key))}
        loss = self.distance(online(batch.query), targets["key"]) / 2
        loss = loss + self.distance(online(batch.key), targets["query"]) / 2
        if self.mixup is None:
            return loss
        images, (theta, partner) = self.mixup(batch.query, batch.key)
        mixed = targets["key"][partner].lerp(targets["key"], theta[:, None])
        return (loss + self.distance(online(images), mixed)) / 2

    @torch.no_grad()
    def targets(self, view: Tensor) -> Tensor:
        """Unit rows (s, 128), or the means of those that are alike."""
        unit = F.normalize(self.target(view))
        near = unit @ unit.T > self.alike
        near.fill_diagonal_(True)
        return F.normalize(near.float() @ unit)

    def distance(self, projections: Tensor, targets: Tensor) -> Tensor:
        """The mean negative cosine of predictions with unit targets; linear in the targets."""
        return -(F.normalize(self.prediction_head(projections)) * targets).sum(1).mean()

    def after_step(self, online: Network) -> None:
        """Exponential moving average of the parameters."""
        update_momentum(online, self.target, m=EMA_MOMENTUM)


class Classified(Objective):
    """A classifier behind the projection of both views, told what each image is said to be.

    Args:
        targets: (n, c) of all images, rows of sum 1.
    """

    def __init__(self, targets: Tensor) -> None:
        super().__init__()
        self.criterion = nn.CrossEntropyLoss()
        self.targets = targets
        self.classifier = nn.Linear(DIM, targets.shape[1])

    def forward(self, online: Network, batch: Batch) -> Tensor:
        """The mean cross-entropy of both views."""
        targets = self.targets[batch.index]
        return sum(self.criterion(self.classifier(online(view)), targets) for view in (batch.query, batch.key)) / 2


class Regressed(Objective):
    """Both views predict known features of the image, as their cosine has it.

    Args:
        known: (n, e) of all images, of mean 0.
    """

    def __init__(self, known: Tensor) -> None:
        super().__init__()
        self.criterion = nn.CosineSimilarity()
        self.known = known
        self.predictor = nn.Linear(DIM, known.shape[1])

    def forward(self, online: Network, batch: Batch) -> Tensor:
        """One minus the mean cosine of both views."""
        known = self.known[batch.index]
        cosines = [self.criterion(self.predictor(online(view)), known) for view in (batch.query, batch.key)]
        return 1 - torch.cat(cosines).mean()


class Grouped(Objective):
    """Both views, told which images belong together.

    Args:
        criterion: called with both projections and the groups (s,).
        groups: (n,) of all images.
    """

    def __init__(self, criterion: nn.Module, groups: Tensor) -> None:
        super().__init__()
        self.criterion = criterion
        self.groups = groups

    def forward(self, online: Network, batch: Batch) -> Tensor:
        """The loss of both views."""
        return self.criterion(online(batch.query), online(batch.key), groups=self.groups[batch.index])


class PartlyClassified(Classified):
    """NT-Xent of both views, and beside it a classifier behind their projections, of those with a class.

    Args:
        criterion: of two views.
        targets: (n, c), rows of zeros where the class is not known.
    """

    def __init__(self, criterion: nn.Module, targets: Tensor) -> None:
        super().__init__(targets)
        self.contrast = criterion

    def forward(self, online: Network, batch: Batch) -> Tensor:
        """The sum of both losses, the classifier's over the samples with a class."""
        targets, views = self.targets[batch.index], [online(view) for view in (batch.query, batch.key)]
        told = targets.sum(1) > 0
        loss = self.contrast(*views)
        if bool(told.any()):
            loss = loss + sum(self.criterion(self.classifier(view[told]), targets[told]) for view in views) / 2
        return loss


class Supervised(Objective):
    """A classifier behind the projection, told the classes: what perfect labels are worth in a budget."""

    def __init__(self) -> None:
        super().__init__()
        self.criterion = nn.CrossEntropyLoss()
        self.classifier = nn.Linear(DIM, CLASSES)

    def forward(self, online: Network, batch: Batch) -> Tensor:
        """Cross-entropy of the query view."""
        return self.criterion(self.classifier(online(batch.query)), batch.classes)
