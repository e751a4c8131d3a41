"""The loss for pytorch-metric-learning, where equal labels say which samples belong together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import slr_plugin
from slr_plugin import distributed
from slr_plugin.adapters._require import require
from slr_plugin.key_sets import KeySet
from slr_plugin.settings import Confidence

require("metric-learning", "pytorch_metric_learning")

from pytorch_metric_learning.distances import CosineSimilarity  # noqa: E402
from pytorch_metric_learning.losses import BaseMetricLossFunction  # noqa: E402
from pytorch_metric_learning.utils import common_functions as c_f  # noqa: E402

__all__ = ["SLRLoss"]

_STATS = ("positive_weight", "alpha", "beta", "mu", "label_entropy")


class SLRLoss(BaseMetricLossFunction):  # type: ignore[misc]  # pytorch-metric-learning is untyped
    r""":class:`slr_plugin.SLRLoss` in the place of pytorch-metric-learning's NTXentLoss and SupConLoss.

    Equal labels are a group, as in :mod:`slr_plugin.groups`, and negative ones belong to nobody. With ``confidence=0``
    and their temperature (0.07 and 0.1 by default) values and gradients equal SupConLoss's, and NTXentLoss's where
    labels number pairs of views:

    - ``loss(embeddings, labels)``: all embeddings are keys, and those that share a label are rows. Where labels are
      refined, a row estimates the label of one partner in its class, and the last one of an odd number is a key alone.
    - ``loss(embeddings, labels, ref_emb=..., ref_labels=...)``: ``ref_emb`` are the keys; embeddings without a key of
      their label are left out.

    With a queue (``memory_bank_size``) the keys and their labels enter it afterwards: labels are then ids that mean the
    same in every call. An exception are labels that number the pairs of a batch, 0, 1, ... in the first views and again
    in the second, as :class:`~pytorch_metric_learning.losses.SelfSupervisedLoss` makes them: first views are then the
    queries, second ones the keys, which enter the queue without a label. Further rows of ``ref_emb`` do not.

    A queue takes the place of CrossBatchMemory, and ``gather_distributed=True`` that of DistributedLossWrapper (every
    process brings equally many samples that share a label with another of its own). No miner chooses the pairs.
    For mixed queries call ``loss.criterion(queries, keys, mixed, mix)``.

    SelfSupervisedLoss takes a loss if its class has one of thirteen names. This class therefore goes by the name of the
    loss that it replaces: ``type(loss).__name__ == "NTXentLoss"``. Pickled losses and printed ones say SLRLoss.

    Args:
        temperature: as in :class:`slr_plugin.SLRLoss`, and so are all others. ``in_batch_keys=False`` is for numbered
            pairs. With ``estimator_dim`` call ``loss.criterion(queries, keys, estimator=...)``.
        **kwargs: those of BaseMetricLossFunction: ``embedding_regularizer``, ``embedding_reg_weight``, ``reducer`` (of
            the regulariser alone: the loss is one number) and ``collect_stats``. The distance is the cosine.

    Attributes:
        criterion: the :class:`slr_plugin.SLRLoss`, whose settings may be assigned.
        positive_weight: a number of the last call for their record keeper, with ``collect_stats=True``; so are
            ``alpha``, ``beta``, ``mu`` and ``label_entropy``, the other ``stats`` of SLRLoss.

    Raises:
        ValueError: an argument is out of range; in a call, no label occurs twice, or pairs were mined.

    >>> import torch
    >>> from pytorch_metric_learning.losses import SelfSupervisedLoss
    >>> loss = SelfSupervisedLoss(SLRLoss(temperature=0.2))
    >>> views = torch.randn(2, 8, 16, requires_grad=True)
    >>> loss(views[0], views[1]).backward()
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        memory_bank_size: int | tuple[int, int] = 0,
        gather_distributed: bool = False,
        *,
        sharpening: float = 1.0,
        confidence: Confidence = 1.0,
        refined_weight: float = 0.5,
        in_batch_keys: bool = True,
        same_group: str = "positive",
        estimator_dim: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        c_f.assert_distance_type(self, CosineSimilarity)
        self.criterion = _LossByLabels(
            temperature,
            memory_bank_size,
            gather_distributed,
            sharpening=sharpening,
            confidence=confidence,
            refined_weight=refined_weight,
            in_batch_keys=in_batch_keys,
            same_group=same_group,
            estimator_dim=estimator_dim,
        )
        self.add_to_recordable_attributes(list_of_names=_STATS, is_stat=True)

    def compute_loss(
        self, embeddings: Tensor, labels: Tensor, indices_tuple: Any, ref_emb: Tensor, ref_labels: Tensor
    ) -> dict[str, dict[str, Any]]:
        """What BaseMetricLossFunction's ``forward`` calls and reduces."""
        c_f.indices_tuple_not_supported(indices_tuple)
        c_f.labels_required(labels)
        loss = self.criterion.by_labels(embeddings, labels, ref_emb, ref_labels)
        if self.collect_stats:
            for name in _STATS:
                setattr(self, name, self.criterion.stats[name].item())
        return {"loss": {"losses": loss, "indices": None, "reduction_type": "already_reduced"}}

    def get_default_distance(self) -> Any:
        """Cosine similarity."""
        return CosineSimilarity()

    def _get_name(self) -> str:
        return "SLRLoss"


SLRLoss.__name__ = "NTXentLoss"  # see its docstring; pickle goes by __qualname__, which stays


class _LossByLabels(slr_plugin.SLRLoss):
    """The loss with a call in which equal labels say which keys are a row's."""

    # Of a call by labels in progress, whose keys all come as further negatives: their labels (m,), the key (r,) that is
    # each row's positive, and the one (r,) that is the row itself, if they are one set.
    _keys: tuple[Tensor, Tensor, Tensor | None] | None = None

    def by_labels(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> Tensor:
        """Compare samples with others (those of one set if they are the same tensor)."""
        is_one_set = ref_emb is embeddings
        count = (len(labels) + 1) // 2 if is_one_set else len(labels)  # of first views, if labels number pairs
        keys, key_labels = (embeddings[count:], labels[count:]) if is_one_set else (ref_emb, ref_labels)
        if _are_numbered(labels[:count], key_labels):
            self.symmetric = is_one_set and not len(self.memory_bank)
            negatives = keys[count:] if len(keys) > count else None
            loss: Tensor = self(embeddings[:count], keys[:count], negatives=negatives)
            return loss
        rows, positive = _pairs(labels, refines=self.confidence != 0) if is_one_set else _matches(labels, ref_labels)
        if not len(rows):
            raise ValueError("no sample has a key of its label: take MPerClassSampler, or SelfSupervisedLoss")
        self.symmetric = False
        self._keys = ref_labels, positive, rows if is_one_set else None
        try:
            loss = self(embeddings[rows], ref_emb[positive], negatives=ref_emb, groups=labels[rows])
        finally:
            self._keys = None
        return loss

    def _key_set(self, features: Any) -> KeySet:
        """Those of a call as they are, and not once more as positives of the rows."""
        key_set = super()._key_set(features)
        if self._keys is None or key_set.key_groups is None:
            return key_set
        (labels, positive, own), first = self._keys, 0
        keys = key_set.keys[key_set.batch_count :]
        if len(keys) > len(labels):  # gathered
            labels, first = distributed.gather(labels, "labels"), distributed.rank() * len(labels)
        known = labels >= 0
        return key_set._replace(
            keys=keys,
            positive_index=positive + first,
            self_index=None if own is None else own + first,
            batch_count=len(keys),
            key_groups=torch.cat([labels, key_set.key_groups[len(key_set.keys) :]]),
            keys_to_enqueue=keys[known],
            groups_to_enqueue=labels[known],
        )


def _are_numbered(labels: Tensor, ref_labels: Tensor) -> bool:
    """Whether labels number the samples, 0, 1, ..., in the order of their keys, behind which are those of others."""
    count = len(labels)
    others = ref_labels[count:]
    return (
        torch.equal(labels, torch.arange(count).to(labels))
        and torch.equal(ref_labels[:count], labels)
        and not bool(((others >= 0) & (others < count)).any())
    )


def _pairs(labels: Tensor, refines: bool) -> tuple[Tensor, Tensor]:
    """The samples that share their label, and for each of them another one with it.

    They are in pairs, the first ones before the second ones. The last of an odd number joins one of the others, or
    stays out where labels are refined, since the loss asks the partner of each row for its label.
    """
    _, number, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    order = number.argsort(stable=True)
    size = counts[number[order]].where(labels[order] >= 0, 1)
    rank = torch.arange(len(labels), device=labels.device) - (counts.cumsum(0) - counts)[number[order]]
    is_second, is_last = rank % 2 == 1, rank + 1 == size
    is_row = (size > 1) & (is_second | ~is_last) if refines else size > 1
    place = is_row.nonzero().flatten()
    place = place[is_second[place].long().argsort(stable=True)]
    other = place + torch.where(is_second | is_last, -1, 1)[place]
    return order[place], order[other]


def _matches(labels: Tensor, ref_labels: Tensor) -> tuple[Tensor, Tensor]:
    """The samples whose label occurs in ``ref_labels``, and where."""
    order = ref_labels.argsort(stable=True)
    found = ref_labels[order]
    place = torch.searchsorted(found, labels.contiguous()).clamp(max=len(found) - 1)
    rows = ((found[place] == labels) & (labels >= 0)).nonzero().flatten()
    return rows, order[place[rows]]
