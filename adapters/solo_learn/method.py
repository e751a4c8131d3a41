"""SANE as a method of solo-learn, beside its MoCoV2Plus."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from solo.methods.base import BaseMomentumMethod
from solo.utils.misc import omegaconf_select
from solo.utils.momentum import initialize_momentum_params
from torch import Tensor, nn

from slr_plugin.adapters._run import SelfLabelingModule
from slr_plugin.adapters.knowledge import Knowledge, read
from slr_plugin.adapters.lightning import LabelQualityCallback
from slr_plugin.adapters.solo_learn.settings import add_defaults, build, check_crops, confidence_of
from slr_plugin.adapters.solo_learn.symmetric import mix_views, symmetric_loss

_SETTINGS = "slr_plugin_method_kwargs"  # in a checkpoint


class SANE(SelfLabelingModule, BaseMomentumMethod):  # type: ignore[misc]  # solo-learn is untyped
    r"""MoCo v2+ with refined labels and momentum mixup, symmetric over the two large crops.

    .. math:: L = \tfrac12 \sum_{v \in \{0, 1\}} L^{(9)}(f(x_v), g(x_{1-v}), f(x'_v))

    Each large crop is the query once and the key once. Either direction has its own queue and its own
    :class:`slr_plugin.SLRLoss`, equation (9). A mixed image is theta x query + (1 - theta) x another image's positive:

    - With two large crops alone, each is mixed with the other.
    - Small crops are mixed in place of the large ones, each with its direction's positive, a large crop, resized. They
      serve the two directions in turn, which weigh alike: of five small crops the three of the first count a sixth
      each. A small crop of full size is written ``crop_size: [224]``: solo-learn counts crops as large by their size.
    - With ``strong_crops: true`` small crops are the positives that are mixed in, and the large ones, resized, the
      queries. So strong augmentation never reaches the keys or the labels.

    ``method_kwargs`` (defaults: the paper's, of ``presets.CIFAR10`` for CIFAR and ``presets.IMAGENET`` else):

    - ``proj_hidden_dim``, ``proj_output_dim``: of the two-layer projector, 2048 and 256 as in mocov2plus;
    - ``queue_size``: the length of either queue, for any batch size;
    - ``temperature``, ``sharpening``, ``refined_weight``, ``same_group``: as in :class:`slr_plugin.SLRLoss`;
    - ``confidence``: ``[m1, m2]``, mu grows from m1 to m2 over the run; a number is constant, 0 means one-hot labels;
    - ``kappa``: > 0, theta ~ Beta(kappa, kappa); null or false: nothing is mixed, labels are refined all the same;
    - ``strong_crops``: see above, false by default;
    - ``in_batch_keys``: false for mocov2plus's keys, the own positive and the queue; needs ``kappa: null`` and no small
      crops. With ``confidence: 0`` the loss is then mocov2plus's;
    - ``groups``, ``estimator``: files of what is known of the training images, see ``read`` in
      ``adapters/knowledge.py``: ids of images that belong together, and features that estimate the labels;
    - ``label_quality_every``: at every n-th step, n >= 1, logs what
      :class:`slr_plugin.adapters.lightning.LabelQualityCallback` finds by the classes; null, the default, does not.

    Raises:
        ValueError: a setting is unknown, out of range, or contradicts another.
        TypeError: a setting is of the wrong type.
    """

    queue_setting = "method_kwargs.queue_size"
    place_of_images = 0

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__(cfg)
        settings = cfg.method_kwargs
        check_crops(settings, self.num_large_crops, self.num_small_crops)
        self.strong_crops: bool = settings.strong_crops
        self.knowledge = Knowledge(**read("method_kwargs.", settings.groups, settings.estimator))
        if self.knowledge.tables and omegaconf_select(cfg, "data.format") == "dali":
            raise ValueError("method_kwargs.groups and estimator need the numbers of images, which DALI does not give")
        losses, self.mixup = build(settings, self.knowledge.estimator_dim)
        self.confidence = confidence_of(settings)
        # By view of the query. No submodule may be called backbone or encoder: main_linear.py renames by these words.
        self.criteria: Any = nn.ModuleList(losses)
        self._follow(*losses)
        self.projector = self._new_projector(settings)
        self.momentum_projector = self._new_projector(settings)
        initialize_momentum_params(self.projector, self.momentum_projector)

    @staticmethod
    def add_and_assert_specific_cfg(cfg: DictConfig) -> DictConfig:
        """Add the defaults of ``method_kwargs`` to ``cfg``, in place, and return it."""
        if omegaconf_select(cfg, "method_kwargs") is None:  # absent, or written without anything below it
            cfg.method_kwargs = {}
        cfg = super(SANE, SANE).add_and_assert_specific_cfg(cfg)
        add_defaults(cfg.method_kwargs, cfg.data.dataset)
        return cfg

    @property
    def learnable_params(self) -> list[dict[str, Any]]:
        """The parent's and the projector's."""
        extra = [{"name": "projector", "params": self.projector.parameters()}]
        return super().learnable_params + extra  # type: ignore[no-any-return]

    @property
    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """The parent's and the projectors."""
        return [*super().momentum_pairs, (self.projector, self.momentum_projector)]

    def forward(self, X: Tensor) -> dict[str, Tensor]:  # noqa: N803  # solo-learn's name
        """The parent's outputs and ``z`` (s, proj_output_dim), of unit length."""
        return self._with_projection(super().forward(X), self.projector)

    def multicrop_forward(self, X: Tensor) -> dict[str, Tensor]:  # noqa: N803
        """As :meth:`forward`, without the online classifier."""
        return self._with_projection(super().multicrop_forward(X), self.projector)

    @torch.no_grad()
    def momentum_forward(self, X: Tensor) -> dict[str, Tensor]:  # noqa: N803
        """As :meth:`forward`, by the momentum network."""
        return self._with_projection(super().momentum_forward(X), self.momentum_projector)

    def configure_callbacks(self) -> list[Any]:
        """The watch over the labels, which solo-learn's scripts have no other way to take."""
        every = self.cfg.method_kwargs.label_quality_every
        return [] if every is None else [LabelQualityCallback(every)]

    def on_train_start(self) -> None:
        """Place the momentum too where a run goes on: solo-learn's is ``base_tau`` again for the first step."""
        super().on_train_start()
        if step := self.trainer.global_step:
            self.momentum_updater.update_tau(step, self.trainer.estimated_stepping_batches)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the settings."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[_SETTINGS] = OmegaConf.to_container(self.cfg.method_kwargs)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Warn where a run goes on with other settings: solo-learn's automatic resumption does not compare them."""
        super().on_load_checkpoint(checkpoint)
        now: Any = OmegaConf.to_container(self.cfg.method_kwargs)
        before = checkpoint.get(_SETTINGS, now) | {"label_quality_every": now["label_quality_every"]}  # watches only
        changed = [f"{name} from {before.get(name)} to {new}" for name, new in now.items() if before.get(name) != new]
        if changed:
            warnings.warn(
                f"the checkpoint was written with other method_kwargs ({', '.join(changed)}): if this is to be another "
                "run, give it another name, or set auto_resume.enabled=False",
                stacklevel=2,
            )

    def training_step(self, batch: Sequence[Any], batch_idx: int) -> Tensor:
        """Equation (9) in both directions, plus the loss of the online classifier where there are classes.

        Args:
            batch: ``[indexes, [X_1, ..., X_n], targets]``, the two large crops first; see on_before_batch_transfer.
            batch_idx: unused.
        """
        indexes, views, targets = batch
        large, small = views[: self.num_large_crops], views[self.num_large_crops :]
        mixed = mix_views(large, small, self.mixup, self.strong_crops)
        images, mixes = [image for image, _ in mixed], [mix for _, mix in mixed]
        # What is given as small crops the base class encodes by multicrop_forward.
        out = super().training_step([indexes, [*large, *(images if small else [])], targets], batch_idx)
        queries, projections = out["z"][: self.num_large_crops], out["z"][self.num_large_crops :]
        if not small:
            projections = [self.multicrop_forward(image)["z"] for image in images]

        known = indexes if isinstance(indexes, dict) else {}
        loss = symmetric_loss(self.criteria, queries, out["momentum_z"], projections, mixes, **known)
        self.log("train_slr_loss", loss, on_epoch=True, sync_dist=True)
        first, second = (criterion.stats for criterion in self.criteria)
        self.log_dict({f"train_slr_{name}": (first[name] + second[name]) / 2 for name in first})

        # Without any class its mean is 0 / 0 = NaN. Its gradient is 0 all the same, which DDP waits for.
        has_classes = (targets != -1).any()
        class_loss = torch.where(has_classes, out["loss"], torch.zeros_like(out["loss"]))
        total: Tensor = loss + class_loss
        return total

    def _new_projector(self, settings: DictConfig) -> nn.Sequential:
        return nn.Sequential(
            nn.Linear(self.features_dim, settings.proj_hidden_dim),
            nn.ReLU(),
            nn.Linear(settings.proj_hidden_dim, settings.proj_output_dim),
        )

    def _with_projection(self, out: dict[str, Tensor], projector: nn.Module) -> dict[str, Tensor]:
        return out | {"z": F.normalize(projector(out["feats"]), dim=-1)}
