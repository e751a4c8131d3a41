"""SANE as a LightningModule, beside MoCoV2 and SimCLR of lightly's benchmarks."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from lightly.models.modules import MoCoProjectionHead
from lightly.models.utils import batch_shuffle, batch_unshuffle, get_weight_decay_parameters, update_momentum
from lightly.utils.benchmarking import KNNClassifier, OnlineLinearClassifier
from lightly.utils.scheduler import CosineWarmupScheduler
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.optim import SGD
from torchvision.models import ResNet, resnet50

from slr_plugin import Mix
from slr_plugin.adapters._run import SelfLabelingModule, schedule
from slr_plugin.adapters.knowledge import Knowledge
from slr_plugin.checks import check_integer
from slr_plugin.distributed import world_size
from slr_plugin.presets import IMAGENET, Preset


def cifar_stem(resnet: ResNet) -> ResNet:
    """A torchvision ResNet for 32 x 32 images, changed in place: first convolution 3 x 3, stride 1, no pooling."""
    resnet.conv1 = nn.Conv2d(3, resnet.conv1.out_channels, kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(resnet.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision
    resnet.maxpool = nn.Identity()
    return resnet


class SANE(SelfLabelingModule, LightningModule):
    r"""MoCo v2 with refined labels and momentum mixup; the paper's settings for ImageNet by default.

    A batch is ``(views, targets, ...)`` with the views of :class:`SANETransform`. Classes train the online linear
    classifier and vote in the kNN classifier; they never reach backbone or projection head. With ``groups`` or
    ``estimator`` the batch goes on with the names of the images, as in lightly's LightlyDataset, or with their indices:
    wrap another data set in :class:`Indexed`.

    A run from ``ckpt_path`` goes on in the schedules of the learning rate and the confidence, which end with it where
    its ``max_epochs`` is larger; any other run begins them.

    Args:
        batch_size_per_device: scales the learning rate, 0.03 for 256 images over all devices.
        num_classes: of the online classifiers, which report the top 5 accuracy from 5 classes on.
        knn_k: neighbours; of fewer training images all vote.
        knn_t: temperature of the vote, > 0.
        backbone: images to features (s, d, ...); ``None`` is torchvision's ResNet-50. A final linear layer ``fc`` is
            taken off, in place.
        feature_dim: d; ``None`` measures it.
        projection_head: features (s, d) to what is contrasted; ``None`` is the paper's three-layer perceptron to 128.
        preset: the paper's settings, ``presets.IMAGENET``, ``presets.CIFAR10``, or a ``dataclasses.replace`` of one.
        queue_size: instead of the preset's.
        confidence: instead of the preset's: ``(m1, m2)`` grows from m1 to m2 over the whole run, a number is constant,
            a callable is a schedule ``optimizer step -> mu``. 0 means one-hot labels.
        mixup: False: no mixed queries; refined labels then belong to the queries themselves.
        share_mix: True: all crops share theta and partners. False: every crop draws its own.
        in_batch_keys: False: MoCo's keys, without the batch's other positives; needs ``mixup=False``.
        ema_momentum: of the momentum network, in [0, 1].
        warmup_epochs: of linear growth of the learning rate, before its cosine decay (lightly's, to a thousandth).
        groups: (n,) ids for the training images in the data set's order, negative for none: images of a group are
            positives of each other, or with ``criterion.same_group = "ignored"`` no negatives.
        estimator: (n, e) features of the training images, which estimate the labels in the keys' place. For labels that
            follow them, ``preset=dataclasses.replace(presets.FROM_FEATURES, queue_size=4096, temperature=0.2)``.
            Neither is in checkpoints: a run that goes on is given them again.

    Attributes:
        backbone: the network that is trained; ``key_backbone`` is its moving average.
        projection_head: the same; ``key_projection_head`` is its moving average.
        criterion: the :class:`slr_plugin.SLRLoss`; its stats are logged as ``slr/...``.

    Raises:
        ValueError: an argument is out of range, the backbone ends in a classifier; in training, a batch has no views.
        TypeError: an argument is of the wrong type.
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
        groups: Tensor | None = None,
        estimator: Tensor | None = None,
    ) -> None:
        preset = Preset(**preset) if isinstance(preset, Mapping) else preset  # what a checkpoint keeps of one
        preset = preset if queue_size is None else replace(preset, queue_size=queue_size)
        check_integer("queue_size", preset.queue_size, low=1)  # a preset may go without
        super().__init__()
        # Plain values alone, for a checkpoint that loads with weights_only=True.
        objects = ["backbone", "projection_head", "preset", "groups", "estimator"]
        self.save_hyperparameters(ignore=objects + ["confidence"] * callable(confidence))
        self.save_hyperparameters({"preset": asdict(preset)})
        self.preset = preset
        self.confidence = preset.confidence if confidence is None else confidence
        self.batch_size_per_device = batch_size_per_device
        self.ema_momentum = ema_momentum
        self.share_mix = share_mix
        self.warmup_epochs = warmup_epochs
        self.knowledge = Knowledge(groups, estimator)

        self.backbone = resnet50() if backbone is None else backbone
        if isinstance(getattr(self.backbone, "fc", None), nn.Linear):
            self.backbone.fc = nn.Identity()
        if feature_dim is None:
            if isinstance([*self.backbone.modules()][-1], nn.Linear):
                raise ValueError("backbone seems to end in a classifier: take that off, or pass feature_dim")
            feature_dim = _width(self.backbone, 2, 3, 224, 224)
        if projection_head is None:
            projection_head = MoCoProjectionHead(feature_dim, feature_dim, num_layers=3)
        self.projection_head = projection_head
        self.key_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
        self.key_projection_head = copy.deepcopy(self.projection_head).requires_grad_(False)
        self.criterion = preset.loss(
            _width(self.projection_head, 2, feature_dim),
            total_steps=1,
            gather_distributed=True,
            confidence=schedule(self.confidence, total_steps=1),  # the run's length is not known before on_train_start
            in_batch_keys=in_batch_keys,
            estimator_dim=self.knowledge.estimator_dim,
        )
        self.mixup = preset.mixup() if mixup else None
        self._follow(self.criterion)

        topk = (1, 5) if num_classes >= 5 else (1,)
        self.online_classifier = OnlineLinearClassifier(feature_dim, num_classes, topk)
        self.knn_classifier = _KNNVote(None, num_classes, knn_k, knn_t, 0, 1, topk)

    def forward(self, x: Tensor) -> Tensor:
        """Backbone features of images (s, channels, height, width)."""
        return self.backbone(x)  # type: ignore[no-any-return]

    def training_step(self, batch: Sequence[Any], batch_idx: int) -> Tensor:
        """Equation (9), plus the loss of the online classifier on detached features."""
        views, targets = batch[0], batch[1]
        if isinstance(views, Tensor) or len(views) % 2:
            wanted = "transform=SANETransform(...) of slr_plugin.adapters.lightly"
            raise ValueError(f"batch[0] must be a list of key, query, and pairs of crops: give the data set {wanted}")
        features = self(views[1]).flatten(start_dim=1)
        queries = self.projection_head(features)
        # Between queries and keys, as in the MoCo authors' code.
        update_momentum(self.backbone, self.key_backbone, m=self.ema_momentum)
        update_momentum(self.projection_head, self.key_projection_head, m=self.ema_momentum)
        keys = self.forward_keys(views[0])
        known = batch[2] if self.knowledge.tables else {}
        loss = self.criterion(queries, keys, *self._mixed_queries(views), **known)
        size = len(targets)
        self.log("train_loss", loss, prog_bar=True, sync_dist=True, batch_size=size)
        self.log_dict({f"slr/{name}": value for name, value in self.criterion.stats.items()}, batch_size=size)

        class_loss, logs = self.online_classifier.training_step((features.detach(), targets), batch_idx)
        self.log_dict(logs, sync_dist=True, batch_size=size)
        return loss + class_loss  # type: ignore[no-any-return]

    @torch.no_grad()
    def forward_keys(self, x: Tensor) -> Tensor:
        """Projections by the momentum network, of shuffled batches: batch statistics must not leak the pairs."""
        distributed = world_size() > 1
        x, shuffle = batch_shuffle(x, distributed=distributed)
        projections = self.key_projection_head(self.key_backbone(x).flatten(start_dim=1))
        return batch_unshuffle(projections, shuffle, distributed=distributed)  # type: ignore[no-any-return]

    def validation_step(self, batch: Sequence[Any], batch_idx: int, dataloader_idx: int | None = None) -> Tensor | None:
        """Both online classifiers on the last of one or two loaders; of two, the first holds the images that vote."""
        features, targets = self(batch[0]).flatten(start_dim=1).detach(), batch[1]
        logs: dict[str, Tensor] = {}
        if dataloader_idx is not None:
            logs = self.knn_classifier.validation_step((features, targets), batch_idx, dataloader_idx)
        if dataloader_idx == 0:
            return None
        class_loss, class_logs = self.online_classifier.validation_step((features, targets), batch_idx)
        logs |= class_logs
        self.log_dict(logs, prog_bar=True, sync_dist=True, batch_size=len(targets), add_dataloader_idx=False)
        return class_loss  # type: ignore[no-any-return]

    def on_validation_epoch_end(self) -> None:
        """Drop the images that voted."""
        self.knn_classifier.reset_storage()

    def configure_optimizers(self) -> Any:
        """SGD with momentum, cosine decay per step."""
        decayed, free = get_weight_decay_parameters([self.backbone, self.projection_head])
        batch_size = self.batch_size_per_device * self.trainer.world_size
        optimizer = SGD(
            [
                {"name": "sane", "params": decayed},
                {"name": "sane_no_weight_decay", "params": free, "weight_decay": 0.0},
                {"name": "online_classifier", "params": self.online_classifier.parameters(), "weight_decay": 0.0},
            ],
            lr=self.preset.learning_rate * batch_size / self.preset.batch_size,
            momentum=self.preset.momentum,
            weight_decay=self.preset.weight_decay,
        )
        steps = self.total_steps()
        warmup = int(self.trainer.estimated_stepping_batches / (self.trainer.max_epochs or -1) * self.warmup_epochs)
        scheduler = _Cosine(optimizer, warmup_epochs=warmup, max_epochs=steps)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Place the schedules; warn if the learning rate is meant for batches of another size."""
        super().on_train_batch_start(batch, batch_idx)
        if self.trainer.global_step == batch_idx == 0 and len(batch[1]) != self.batch_size_per_device:
            seen = f"batch_size_per_device={self.batch_size_per_device} but the batch has {len(batch[1])} images"
            warnings.warn(f"{seen}: pass the DataLoader's batch_size, and drop_last=True to it", stacklevel=2)

    def _mixed_queries(self, views: Sequence[Tensor]) -> tuple[()] | tuple[list[Tensor], list[Mix]]:
        """The trained network's projections of every crop's mixed images, and how they were mixed."""
        if self.mixup is None:
            return ()
        mixed: list[Tensor] = []
        mixes: list[Mix] = []
        crops = views[2:] or views
        for positives, queries in zip(crops[::2], crops[1::2], strict=True):
            images, mix = self.mixup(queries, positives, *(mixes[0] if mixes and self.share_mix else ()))
            mixed.append(self.projection_head(self(images).flatten(start_dim=1)))
            mixes.append(mix)
        return mixed, mixes


class _Cosine(CosineWarmupScheduler):  # type: ignore[misc]  # lightly is untyped
    """lightly's decay; a run that goes on keeps its place, and takes its own length and rates for the checkpoint's."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        own = {name: getattr(self, name) for name in ("max_epochs", "warmup_epochs", "base_lrs")}
        super().load_state_dict(state_dict | own)
        for group, rate in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = rate * self.scale_lr(self.last_epoch)


class _KNNVote(KNNClassifier):  # type: ignore[misc]  # lightly is untyped
    """lightly's vote on features, in float32; of fewer than ``knn_k`` images all vote. The module around it logs."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # lists that grow would be compiled anew at every batch
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int) -> Any:
        with torch.autocast(batch[0].device.type, enabled=False):
            return super().validation_step(batch, batch_idx, dataloader_idx)

    def concat_train_features(self) -> None:
        super().concat_train_features()
        self.knn_k = min(self.hparams.knn_k, len(self._train_targets_tensor))

    def log_dict(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: Lightning lets only the outermost module log."""


@torch.no_grad()
def _width(network: nn.Module, *shape: int) -> int:
    """The width of what a network makes of inputs of a shape, measured on a copy without data."""
    network = copy.deepcopy(network).to("meta").eval()
    like = next(network.parameters(), torch.empty(0, device="meta"))
    return int(network(like.new_empty(shape)).flatten(start_dim=1).shape[1])
