"""SANE as a ``forward`` of stable-pretraining's Module, from Python or by its name in a YAML."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from slr_plugin import SLRLoss
from slr_plugin.adapters._require import require
from slr_plugin.adapters._run import mixing_generator

require("stable-pretraining", "stable_pretraining")

__all__ = ["sane"]


def sane(self: Any, batch: Mapping[str, Any], stage: str) -> dict[str, Tensor]:
    """Compute the loss of two views, with refined labels and mixed queries, for stable-pretraining's Module.

    Where ``backbone`` and ``projector`` are TeacherStudentWrappers, the students encode the first views, the queries,
    and the teachers the second ones, the keys. Their Manager adds the callback that updates teachers; give a plain
    Trainer a TeacherStudentCallback. Where they are not, both views are trained. Queue and step are in checkpoints.

    A schedule of the confidence goes by ``trainer.global_step``: give CosineConfidence the run's optimizer steps as
    ``total_steps``. With several processes give the loss ``gather_distributed=True``. Logs ``{stage}/loss`` and
    the loss's statistics as ``slr/...``.

    Args:
        self: the Module, with attributes ``backbone`` and ``projector``, both or neither TeacherStudentWrappers;
            ``criterion``, a :class:`slr_plugin.SLRLoss` (or another loss of two views, as a baseline); and ``mixup``, a
            :class:`slr_plugin.MomentumMixup`, or None for none.
        batch: as MultiViewTransform makes it, of two views with ``image`` and perhaps ``label``; one is enough beside
            training. ``groups`` (s,) and ``estimator`` (s, e), beside the views or in the first, go to the criterion.
        stage: ``"fit"``, ``"validate"`` or another, for the log.

    Returns:
        ``embedding`` and ``label`` (if there are labels) for OnlineProbe and OnlineKNN, and in training ``loss``.
        Embeddings are the trained backbone's: of the queries, or of both views if both are trained.

    Raises:
        ValueError: not two views in training.
    """
    views = _views(batch)
    if self.training and len(views) != 2:
        raise ValueError(f"SANE needs two views of each image in training, got {len(views)}: use MultiViewTransform")
    networks = self.backbone, self.projector
    has_teacher = any(hasattr(network, "forward_teacher") for network in networks)
    backbone, projector = (network.forward_student for network in networks) if has_teacher else networks
    encoded = views[:1] if self.training and has_teacher else views
    embeddings = [backbone(view["image"]) for view in encoded]
    out = {"embedding": torch.cat(embeddings)}
    if "label" in views[0]:
        out["label"] = torch.cat([view["label"] for view in encoded])
    if not self.training:
        return out

    queries, positives = (view["image"] for view in views)
    projections = [projector(embedding) for embedding in embeddings]
    if has_teacher:
        projections.append(self.projector.forward_teacher(self.backbone.forward_teacher(positives)))
    mixup = getattr(self, "mixup", None)
    if mixup is not None:
        if mixup.generator is None:
            mixup.generator = mixing_generator(self.trainer.global_step)
        mixed, mix = mixup(queries, positives)
        projections += [projector(backbone(mixed)), mix]
    known = {}
    if isinstance(self.criterion, SLRLoss):
        self.criterion.set_step(self.trainer.global_step)
        known = {name: place[name] for place in (views[0], batch) for name in ("groups", "estimator") if name in place}
    out["loss"] = self.criterion(*projections, **known)
    self.log(f"{stage}/loss", out["loss"], on_step=True, on_epoch=True, sync_dist=True, batch_size=len(queries))
    if isinstance(self.criterion, SLRLoss):
        stats = {f"slr/{name}": value for name, value in self.criterion.stats.items()}
        self.log_dict(stats, on_step=True, on_epoch=True, batch_size=len(queries))
    return out


def _views(batch: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The views of a batch: a list or a dictionary of them, in ``views`` or the batch itself, or the batch as one."""
    if "image" in batch:
        return [batch]
    views = batch.get("views", batch)
    if isinstance(views, Mapping):
        return [view for view in views.values() if isinstance(view, Mapping)]
    return list(views)
