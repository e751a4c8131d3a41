"""SANE as a LightningModule, beside MoCoV2 and SimCLR of lightly's benchmarks."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from lightly.models.modules import MoCoProjectionHead
from lightly.models.utils import batch_shuffle, batch_unshuffle, get_weight_decay_parameters, update_momentum
from lightly.utils.benchmarking import KNNClassifier, OnlineLinearClassifier, knn_predict
from lightly.utils.benchmarking.topk import mean_topk_accuracy
from lightly.utils.scheduler import CosineWarmupScheduler
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader
from torchvision.models import ResNet, resnet50

from slr_plugin import CosineConfidence, Mix, MomentumMixup, SLRLoss
from slr_plugin.adapters._random import gather_random_states, seed_mixing, set_random_state
from slr_plugin.checks import check_flag, check_integer, check_number
from slr_plugin.distributed import rank, world_size
from slr_plugin.presets import IMAGENET, Preset

_RANDOM = "slr_plugin_random_states"  # in a checkpoint: one per process

Views = Sequence[Tensor]


class SANE(LightningModule):
    r"""MoCo v2 with refined labels and momentum mixup; the paper's settings for ImageNet by default.

    A batch is ``(views, targets, ...)`` with the views of :class:`SANETransform`: the key view, the query view, then
    for every crop in the mixup term the positive that is mixed in and the query. Of two views alone these are mixed.
    Classes train the online linear classifier and vote in the kNN classifier; they never reach backbone or projection
    head.

    Checkpoints hold queue, momentum network, schedules and the random state of every process: a run that is continued
    from the end of an epoch repeats the uninterrupted one. With persistent workers that also needs
    ``seed_everything(seed, workers=True)``, which makes this module restart them at every epoch.

    Args:
        batch_size_per_device: scales the learning rate, 0.03 for 256 images over all devices.
        num_classes: of the online classifiers, which report the top 5 accuracy from 5 classes on.
        knn_k: neighbours; of fewer training images all vote.
        knn_t: temperature of the vote, > 0.
        backbone: images to features (s, d, ...); ``None`` is torchvision's ResNet-50. A final linear layer ``fc`` is
            taken off, in place.
        feature_dim: d; ``None`` reads it off ``fc``, or ``num_features`` of a timm model.
        projection_head: features (s, d) to what is contrasted; ``None`` is the paper's three-layer perceptron to 128.
        preset: the paper's settings, ``presets.IMAGENET`` or ``presets.CIFAR10``, or your own
            ``dataclasses.replace`` of one.
        queue_size: instead of the preset's.
        confidence: instead of the preset's: ``(m1, m2)`` grows from m1 to m2 over the whole run, a number is constant,
            a callable is a schedule ``step -> mu``. 0 means one-hot labels.
        mixup: False: no mixed queries; refined labels then belong to the queries themselves.
        share_mix: True: all crops share theta and partners. False: every crop draws its own.
        in_batch_keys: False: MoCo's keys, without the batch's other positives; needs ``mixup=False``.
        ema_momentum: of the momentum network, in [0, 1].
        warmup_epochs: of linear growth of the learning rate, before its cosine decay (lightly's, to a thousandth).

    Attributes:
        backbone, projection_head: the network that is trained.
        key_backbone, key_projection_head: its moving average.
        criterion: the :class:`slr_plugin.SLRLoss`; its stats are logged as ``slr/...``.

    Raises:
        ValueError: an argument out of range or arguments that contradict each other; at the first step, a batch that
            is not one of views.
        TypeError: an argument of the wrong type.
    """

    def __init__(
        self,
        batch_size_per_device: int,
        num_classes: int,
        knn_k: int = 200,
        knn_t: float = 0.1,
        *,
        backbone: nn.Module | None = None,
        feature_dim: int | None = None,
        projection_head: nn.Module | None = None,
        preset: Preset | Mapping[str, Any] = IMAGENET,
        queue_size: int | None = None,
        confidence: float | tuple[float, float] | Callable[[int], float] | None = None,
        mixup: bool = True,
        share_mix: bool = False,
        in_batch_keys: bool = True,
        ema_momentum: float = 0.999,
        warmup_epochs: int = 0,
    ) -> None:
        check_integer("batch_size_per_device", batch_size_per_device, low=1)
        check_integer("num_classes", num_classes, low=1)
        check_integer("knn_k", knn_k, low=1)
        check_number("knn_t", knn_t, low=1e-8)
        check_flag("mixup", mixup)
        check_flag("share_mix", share_mix)
        check_number("ema_momentum", ema_momentum, low=0.0, high=1.0)
        check_integer("warmup_epochs", warmup_epochs, low=0)
        if mixup and in_batch_keys is False:
            raise ValueError("in_batch_keys=False leaves mixed queries without keys for their labels: add mixup=False")
        super().__init__()
        preset = preset if isinstance(preset, Preset) else Preset(**preset)
        # Plain values alone, for a checkpoint that loads with weights_only=True.
        objects = ["backbone", "projection_head", "preset"] + (["confidence"] if callable(confidence) else [])
        self.save_hyperparameters(ignore=objects)
        self.save_hyperparameters({"preset": asdict(preset)})
        self.preset = preset
        self.batch_size_per_device = batch_size_per_device
        self.ema_momentum = ema_momentum
        self.share_mix = share_mix
        self.warmup_epochs = warmup_epochs
        self.confidence = preset.confidence if confidence is None else confidence

        self.backbone, feature_dim = _without_classifier(resnet50() if backbone is None else backbone, feature_dim)
        self.projection_head = projection_head or MoCoProjectionHead(feature_dim, feature_dim, num_layers=3)
        self.key_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
        self.key_projection_head = copy.deepcopy(self.projection_head).requires_grad_(False)
        size = preset.queue_size if queue_size is None else queue_size
        self.criterion = SLRLoss(
            preset.temperature,
            (size, _output_dim(self.key_projection_head, feature_dim)),
            gather_distributed=True,
            sharpening=preset.sharpening,
            # The end of a schedule (m1, m2) is not known before the trainer is, see configure_optimizers.
            confidence=CosineConfidence(*self.confidence, total_steps=1)
            if isinstance(self.confidence, Sequence)
            else self.confidence,
            refined_weight=preset.refined_weight,
            in_batch_keys=in_batch_keys,
        )
        # Its own generator, as Lightning seeds all processes alike: they would all mix alike.
        self._mixing = torch.Generator()
        self.mixup = MomentumMixup(preset.kappa, generator=self._mixing) if mixup else None
        self._resumed: dict[str, Any] | None = None

        topk = (1, 5) if num_classes >= 5 else (1,)
        self.online_classifier = OnlineLinearClassifier(feature_dim, num_classes, topk)
        self.knn_classifier = KNNClassifier(None, num_classes, knn_k, knn_t, 0, 1, topk)

    def forward(self, x: Tensor) -> Tensor:
        """Backbone features of images (s, channels, height, width)."""
        features: Tensor = self.backbone(x)
        return features

    def training_step(self, batch: Sequence[Any], batch_idx: int) -> Tensor:
        """Equation (9), plus the loss of the online classifier on detached features."""
        views, targets = self._checked(batch, batch_idx)
        features = self(views[1]).flatten(start_dim=1)
        queries = self.projection_head(features)
        # Between queries and keys, as in the MoCo authors' code.
        update_momentum(self.backbone, self.key_backbone, m=self.ema_momentum)
        update_momentum(self.projection_head, self.key_projection_head, m=self.ema_momentum)
        keys = self.forward_keys(views[0])
        if self.mixup is None:
            loss = self.criterion(queries, keys)
        else:
            loss = self.criterion(queries, keys, *self._mixed_queries(views))
        size = len(targets)
        self.log("train_loss", loss, prog_bar=True, sync_dist=True, batch_size=size)
        self.log_dict({f"slr/{name}": value for name, value in self.criterion.stats.items()}, batch_size=size)

        class_loss, logs = self.online_classifier.training_step((features.detach(), targets), batch_idx)
        self.log_dict(logs, sync_dist=True, batch_size=size)
        total: Tensor = loss + class_loss
        return total

    @torch.no_grad()
    def forward_keys(self, x: Tensor) -> Tensor:
        """Projections by the momentum network, of shuffled batches: batch norm must not tell who belongs to whom."""
        distributed = world_size() > 1
        x, shuffle = batch_shuffle(x, distributed=distributed)
        projections = self.key_projection_head(self.key_backbone(x).flatten(start_dim=1))
        keys: Tensor = batch_unshuffle(projections, shuffle, distributed=distributed)
        return keys

    def validation_step(self, batch: Sequence[Any], batch_idx: int, dataloader_idx: int | None = None) -> Tensor | None:
        """Both online classifiers on the last of one or two loaders; of two, the first holds the images that vote."""
        images, targets = batch[0], batch[1]
        features = self(images).flatten(start_dim=1).detach()
        logs: dict[str, Tensor] = {}
        # The trainer's sanity check shows two batches, which are too few to vote.
        if dataloader_idx is not None and not self.trainer.sanity_checking:
            if dataloader_idx == 0:
                self._remember(features, targets, is_first=batch_idx == 0)
                return None
            logs |= self._vote(features, targets, is_first=batch_idx == 0)
        elif dataloader_idx == 0:
            return None
        class_loss, class_logs = self.online_classifier.validation_step((features, targets), batch_idx)
        self.log_dict(
            logs | class_logs, prog_bar=True, sync_dist=True, batch_size=len(targets), add_dataloader_idx=False
        )
        loss: Tensor = class_loss
        return loss

    def on_validation_epoch_end(self) -> None:
        """Drop the images that voted."""
        self.knn_classifier.reset_storage()

    def configure_optimizers(self) -> Any:
        """SGD with momentum, cosine decay per step; the confidence's schedule gets its end here, too."""
        steps = self.trainer.estimated_stepping_batches
        if not 0 < steps < float("inf"):
            raise ValueError(
                f"learning rate and confidence follow schedules to the end of the run, which has {steps} steps: set "
                "max_epochs or max_steps of the Trainer"
            )
        if isinstance(self.confidence, Sequence):
            # The criterion counts batches, the trainer optimizer steps.
            total = int(steps) * self.trainer.accumulate_grad_batches
            self.criterion.confidence = CosineConfidence(*self.confidence, total_steps=total)
        decayed, free = get_weight_decay_parameters([self.backbone, self.projection_head])
        optimizer = SGD(
            [
                {"name": "sane", "params": decayed},
                {"name": "sane_no_weight_decay", "params": free, "weight_decay": 0.0},
                {"name": "online_classifier", "params": self.online_classifier.parameters(), "weight_decay": 0.0},
            ],
            lr=self.preset.learning_rate
            * self.batch_size_per_device
            * self.trainer.world_size
            / self.preset.batch_size,
            momentum=self.preset.momentum,
            weight_decay=self.preset.weight_decay,
        )
        epochs = self.trainer.max_epochs or 0
        if self.warmup_epochs and epochs < 1:
            raise ValueError(f"warmup_epochs={self.warmup_epochs} needs epochs to count: set max_epochs of the Trainer")
        warmup = self.warmup_epochs * int(steps) // max(1, epochs)
        scheduler = CosineWarmupScheduler(optimizer, warmup_epochs=warmup, max_epochs=int(steps))
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def on_train_start(self) -> None:
        """Seed the mixing; restore the random state of a run that is continued, and begin its first epoch by it."""
        seed_mixing(self._mixing, self.trainer.global_step)
        if self._resumed is None:
            return
        # To count the steps, Lightning made this epoch's iterator before it knew which: its workers load other images.
        for loader in self._train_loaders():
            if hasattr(loader.sampler, "set_epoch"):
                loader.sampler.set_epoch(self.trainer.current_epoch)
            loader._iterator = None
        set_random_state(self._resumed, self._mixing)
        self._resumed = None
        fetcher = self.trainer.fit_loop._data_fetcher
        assert fetcher is not None
        iter(fetcher)

    def on_train_epoch_start(self) -> None:
        """Restart persistent workers, if reproducible workers were asked for."""
        if os.environ.get("PL_SEED_WORKERS") != "1":
            return
        # They would go on with random states that no checkpoint can hold; new ones are seeded from this process's.
        for loader in self._train_loaders():
            if self.trainer.current_epoch > 0:
                loader._iterator = None  # what a DataLoader without persistent workers has

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the random state of every process."""
        checkpoint[_RANDOM] = gather_random_states(self._mixing)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the random state of this process, if a run is continued by as many processes as began it."""
        states = checkpoint.get(_RANDOM, [])
        is_continued = self._trainer is not None and self._trainer.state.fn == "fit"
        if is_continued and len(states) == world_size():
            self._resumed = states[rank()]

    def _train_loaders(self) -> list[DataLoader[Any]]:
        loaders = self.trainer.train_dataloader
        loaders = loaders if isinstance(loaders, Sequence) else [loaders]
        return [loader for loader in loaders if isinstance(loader, DataLoader)]

    def _checked(self, batch: Sequence[Any], batch_idx: int) -> tuple[Views, Tensor]:
        """Views and targets, or an error that says what the data set should do."""
        wanted = "give the data set transform=SANETransform(...) of slr_plugin.adapters.lightly"
        if not isinstance(batch, Sequence) or len(batch) < 2:
            raise ValueError(f"a batch must be (views, targets, ...), got {type(batch).__name__}; {wanted}")
        views, targets = batch[0], batch[1]
        if not isinstance(views, Sequence) or not all(isinstance(view, Tensor) for view in views):
            raise ValueError(f"batch[0] must be a list of views (tensors), got {_describe(views)}; {wanted}")
        if len(views) < 2 or len(views) % 2:
            raise ValueError(
                f"batch[0] must hold a key view, a query view and two crops per mixed pair, got {len(views)} views; "
                f"{wanted}"
            )
        if self.mixup is None and len(views) > 2:
            raise ValueError(f"mixup=False uses two views, got {len(views)}; take SANETransform(crops=())")
        for place in range(0, len(views), 2):
            if views[place].shape != views[place + 1].shape:
                raise ValueError(
                    f"views {place} and {place + 1} must have one shape to be "
                    f"{'mixed' if place else 'contrasted'}, got {tuple(views[place].shape)} and "
                    f"{tuple(views[place + 1].shape)}; {wanted}"
                )
        sizes = [len(view) for view in views] + [len(targets)]
        if len(set(sizes)) > 1:
            raise ValueError(f"views and targets must belong to the same images, got {sizes[:-1]} and {sizes[-1]}")
        if batch_idx == 0 and self.trainer.current_epoch == 0 and sizes[0] != self.batch_size_per_device:
            warnings.warn(
                f"the learning rate is meant for batch_size_per_device={self.batch_size_per_device} but the batch has "
                f"{sizes[0]} images: pass the DataLoader's batch_size, and drop_last=True to the DataLoader",
                stacklevel=2,
            )
        return views, targets

    def _mixed_queries(self, views: Views) -> tuple[list[Tensor], list[Mix]]:
        """The trained network's projections of every crop's mixed images, and how they were mixed."""
        assert self.mixup is not None
        mixed: list[Tensor] = []
        mixes: list[Mix] = []
        crops = views[2:] or views
        for positives, queries in zip(crops[::2], crops[1::2], strict=True):
            shared = mixes[0] if mixes and self.share_mix else (None, None)
            images, mix = self.mixup(queries, positives, *shared)
            mixed.append(self.projection_head(self(images).flatten(start_dim=1)))
            mixes.append(mix)
        return mixed, mixes

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # lists that grow would be compiled anew at every batch
    def _remember(self, features: Tensor, targets: Tensor, is_first: bool) -> None:
        if is_first:
            self.knn_classifier.reset_storage()
        self.knn_classifier.append_train_features(self.knn_classifier._prepare_features(features), targets)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _vote(self, features: Tensor, targets: Tensor, is_first: bool) -> dict[str, Tensor]:
        """Accuracies of lightly's kNN vote, whose own validation_step would log by itself and limit k to the images."""
        knn = self.knn_classifier
        if is_first:
            knn.concat_train_features()
        bank, labels = knn._train_features_tensor, knn._train_targets_tensor
        assert bank is not None
        assert labels is not None
        with torch.autocast(features.device.type, enabled=False):
            predicted = knn_predict(
                knn._prepare_features(features), bank, labels, knn.num_classes, min(knn.knn_k, len(labels)), knn.knn_t
            )
        accuracies = mean_topk_accuracy(predicted, targets, k=knn.topk)
        return {f"val_knn_top{k}": accuracy for k, accuracy in accuracies.items()}


def _without_classifier(backbone: nn.Module, feature_dim: int | None) -> tuple[nn.Module, int]:
    """The backbone that ends in features, and their number."""
    classifier = getattr(backbone, "fc", None)
    if isinstance(classifier, nn.Linear):
        feature_dim = classifier.in_features if feature_dim is None else feature_dim
        backbone.fc = nn.Identity()
    if feature_dim is None:
        feature_dim = getattr(backbone, "num_features", None)
    if feature_dim is None:
        raise ValueError(
            f"feature_dim cannot be read off this backbone, a {type(backbone).__name__} without a linear layer fc: "
            "pass feature_dim, the number of features of an image"
        )
    check_integer("feature_dim", feature_dim, low=1)
    return backbone, feature_dim


@torch.no_grad()
def _output_dim(head: nn.Module, feature_dim: int) -> int:
    training = head.training
    dim = int(head.eval()(torch.zeros(1, feature_dim)).shape[1])
    head.train(training)
    return dim


def cifar_stem(resnet: ResNet) -> ResNet:
    """A torchvision ResNet for 32 x 32 images, changed in place: first convolution 3 x 3, stride 1, no pooling."""
    resnet.conv1 = nn.Conv2d(3, resnet.conv1.out_channels, kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(resnet.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision
    resnet.maxpool = nn.Identity()
    return resnet


def _describe(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
