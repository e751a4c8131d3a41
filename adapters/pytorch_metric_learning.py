"""The loss for pytorch-metric-learning, where labels say which samples are views of one another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import slr_plugin
from slr_plugin.adapters._require import require
from slr_plugin.settings import Confidence

require("metric-learning", "pytorch_metric_learning")

from pytorch_metric_learning.distances import CosineSimilarity  # noqa: E402
from pytorch_metric_learning.losses import BaseMetricLossFunction  # noqa: E402

__all__ = ["SLRLoss"]

_STATS = ("positive_weight", "alpha", "beta", "mu", "label_entropy")


class SLRLoss(BaseMetricLossFunction):  # type: ignore[misc]  # pytorch-metric-learning is untyped
    r""":class:`slr_plugin.SLRLoss` in the place of pytorch-metric-learning's NTXentLoss.

    With ``confidence=0`` and their temperature (0.07 by default) values and gradients equal NTXentLoss's.

    Labels are no classes but number the pairs, as :class:`~pytorch_metric_learning.losses.SelfSupervisedLoss` does:

    - ``loss(embeddings, labels)``: samples with the same label are two views of one. Both views are compared with both.
      With a queue the first one is the query, the second one the key. A sample alone with its label is a further
      negative.
    - ``loss(embeddings, labels, ref_emb=..., ref_labels=...)``: the rows of ``embeddings`` are the queries, and each
      has one key with its label in ``ref_emb``. Other rows of ``ref_emb``, such as mined ones, are further negatives.

    A queue (``memory_bank_size``) takes the place of CrossBatchMemory, and ``gather_distributed=True`` that of
    DistributedLossWrapper; neither wraps this loss, nor does a miner choose its pairs. For mixed queries call
    ``loss.criterion(queries, keys, mixed, mix)``.

    SelfSupervisedLoss takes a loss if its class has one of thirteen names. This class therefore goes by the name of the
    loss that it replaces: ``type(loss).__name__ == "NTXentLoss"``. Nothing of pytorch-metric-learning is changed, and
    pickled losses and printed ones say SLRLoss.

    Args:
        temperature, memory_bank_size, gather_distributed, sharpening, confidence, refined_weight, in_batch_keys: as in
            :class:`slr_plugin.SLRLoss`.
        **kwargs: those of BaseMetricLossFunction: ``embedding_regularizer``, ``embedding_reg_weight``, ``reducer`` (of
            the regulariser alone: the loss is one number), ``collect_stats``, and as ``distance`` CosineSimilarity,
            which it is anyway.

    Attributes:
        criterion: the :class:`slr_plugin.SLRLoss`, whose settings may be assigned.
        positive_weight: with ``collect_stats=True``, from its ``stats`` of the last call, as a number that their record
            keeper logs; so are ``alpha``, ``beta``, ``mu`` and ``label_entropy``.

    Raises:
        ValueError: an argument is out of range; in a call, labels do not pair the samples, or pairs were mined.

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
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not isinstance(self.distance, CosineSimilarity):
            raise ValueError(
                f"distance must be CosineSimilarity, got {type(self.distance).__name__}: the refined labels are made "
                "of cosines; leave the argument out"
            )
        self.criterion = slr_plugin.SLRLoss(
            temperature,
            memory_bank_size,
            gather_distributed,
            sharpening=sharpening,
            confidence=confidence,
            refined_weight=refined_weight,
            in_batch_keys=in_batch_keys,
        )
        self.add_to_recordable_attributes(list_of_names=_STATS, is_stat=True)

    def compute_loss(
        self, embeddings: Tensor, labels: Tensor | None, indices_tuple: Any, ref_emb: Tensor, ref_labels: Tensor | None
    ) -> dict[str, dict[str, Any]]:
        """What BaseMetricLossFunction's ``forward`` calls and reduces."""
        if indices_tuple is not None:
            raise ValueError(
                "SLRLoss compares all pairs and takes no indices_tuple: leave the miner out (mined negatives may come "
                "as ref_emb), and set memory_bank_size=(n, d) in place of CrossBatchMemory"
            )
        if labels is None or ref_labels is None:
            raise ValueError("SLRLoss needs labels that say which samples belong together: use SelfSupervisedLoss")
        has_ref = ref_emb is not embeddings
        if has_ref:
            keys, others = _matches(labels, ref_labels)
            queries, positives, negatives = embeddings, ref_emb[keys], ref_emb[others]
        else:
            first, second, alone = _pairs(labels)
            queries, positives, negatives = embeddings[first], embeddings[second], embeddings[alone]
        self.criterion.symmetric = not has_ref and not len(self.criterion.memory_bank)
        loss = self.criterion(queries, positives, negatives=negatives if len(negatives) else None)
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


def _pairs(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The first and the second sample of each pair, in the order of the first ones, and the samples without partner."""
    if not len(labels):
        raise ValueError("the batch is empty; skip it")
    _, numbers, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    if counts.max() != 2:
        frequent = labels[counts[numbers].argmax()]
        raise ValueError(
            f"labels must number the pairs, each at most twice and one at least, got {frequent} {counts.max()} times: "
            "pass two views to SelfSupervisedLoss, and use gather_distributed=True in place of DistributedLossWrapper"
        )
    order = numbers.argsort(stable=True)
    paired = (counts == 2)[numbers[order]]
    pairs = order[paired].view(-1, 2)
    first, second = pairs[pairs[:, 0].argsort()].unbind(1)
    return first, second, order[~paired]


def _matches(labels: Tensor, ref_labels: Tensor) -> tuple[Tensor, Tensor]:
    """The one sample with each of ``labels`` among ``ref_labels``, and those that belong to none of them."""
    order = ref_labels.argsort(stable=True)
    found = ref_labels[order]
    begin, end = torch.searchsorted(found, labels), torch.searchsorted(found, labels, right=True)
    unmatched = end - begin != 1
    if unmatched.any():
        label, count = labels[unmatched][0], (end - begin)[unmatched][0]
        raise ValueError(f"every label must occur once in ref_labels, got {label} {count} times: labels number pairs")
    keys = order[begin]
    is_other = torch.ones_like(ref_labels, dtype=torch.bool)
    is_other[keys] = False
    if is_other.sum() != len(ref_labels) - len(labels):
        raise ValueError("labels must differ where ref_emb is given, since they number the pairs")
    return keys, is_other.nonzero().flatten()
