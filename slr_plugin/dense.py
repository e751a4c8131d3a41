r"""The textbook version: p, q, the refined label and the cross-entropy as the paper prints them.

Every matrix is (rows, K) and stored. For reading, for diagnostics and as the baseline of the benchmarks; training uses
:class:`slr_plugin.SLRLoss`, which computes the same numbers without these matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from slr_plugin._inputs import Features
from slr_plugin.key_sets import KeySet, build_key_set
from slr_plugin.mixup import Mix
from slr_plugin.settings import Settings


class SelfLabels(NamedTuple):
    """Label matrices, (rows, K) each."""

    p: Tensor  #: over all keys
    q: Tensor  #: over all but the own positive
    refined: Tensor  #: both with the one-hot or known label


def self_labels(
    similarity: Tensor,
    own: Tensor,
    hidden: Tensor | None = None,
    *,
    known: Tensor | None = None,
    temperature: float | Tensor,
    sharpening: float = 1.0,
    confidence: float | Tensor = 1.0,
) -> SelfLabels:
    r"""Equation (5).

    .. math::
        p_{ik} = \mathrm{softmax}_k(\langle g_i, \bar b_k \rangle / \tau\tau'), \quad
        q_{ik} = \mathrm{softmax}_{k \ne i}(\langle g_i, \bar b_k \rangle / \tau\tau'), \quad
        \bar y_i = (1 - \alpha_i - \beta_i)\,\mathrm{onehot}_i + \alpha_i p_i + \beta_i q_i

    with :math:`\alpha_i = \mu \max_k p_{ik} / z_i`, :math:`\beta_i = \mu \max_k q_{ik} / z_i` and
    :math:`z_i = 1 + \mu \max_k p_{ik} + \mu \max_k q_{ik}`.

    Args:
        similarity: (rows, K) cosines of each row's estimator with the keys.
        own: (rows,) the column of each row's positive.
        hidden: (rows, K) bool, columns that are no keys of the row; None for none.
        known: (rows, K) labels in the place of the one-hot ones.
        temperature: tau.
        sharpening: tau'.
        confidence: mu.
    """
    logits = similarity / (temperature * sharpening)
    if hidden is not None:
        logits = logits.masked_fill(hidden, -torch.inf)
    p = logits.softmax(1)
    others = logits.scatter(1, own[:, None], -torch.inf)
    # Not a number where there is no other key to resemble.
    q = others.softmax(1).masked_fill((others == -torch.inf).all(1, keepdim=True), 0.0)
    p_max, q_max = p.amax(1, keepdim=True), q.amax(1, keepdim=True)
    z = 1 + confidence * p_max + confidence * q_max
    alpha, beta = confidence * p_max / z, confidence * q_max / z
    known = torch.zeros_like(p).scatter(1, own[:, None], 1.0) if known is None else known
    return SelfLabels(p, q, (1 - alpha - beta) * known + alpha * p + beta * q)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Equation (4), :math:`-\frac1s \sum_i \sum_k y_{ik} \log \mathrm{softmax}_k(\mathrm{logits}_{ik})`."""
    return -(labels * logits.log_softmax(1)).sum(1).mean()


def known_labels(key_set: KeySet) -> Tensor:
    """The labels y0 (r, K) in the place of the one-hot ones: uniform over the keys of the group."""
    same = key_set.same_group() & (not key_set.ignores_group)
    known = same.scatter(1, key_set.positive_columns()[:, None], True).to(key_set.rows)
    return known / known.sum(1, keepdim=True)


def unseen(key_set: KeySet) -> Tensor:
    """The columns (r, K) that are no keys of the row: itself, and other keys of its group where these are ignored."""
    same = key_set.same_group() & key_set.ignores_group
    return same if key_set.self_index is None else same.scatter(1, key_set.self_index[:, None], True)


def labels(key_set: KeySet, settings: Settings) -> Tensor:
    """The refined labels (r, K) of a key set's rows, its columns in their order."""
    estimators = key_set.estimator or key_set
    return self_labels(
        estimators.similarity(estimators.positives),
        key_set.positive_columns(),
        unseen(key_set),
        known=known_labels(key_set),
        temperature=settings.temperature,
        sharpening=settings.sharpening,
        confidence=settings.confidence,
    ).refined


def objective(key_set: KeySet, crops: Sequence[Tensor], mixes: Sequence[Mix], settings: Settings) -> Tensor:
    """Equation (9) over a key set; ``crops`` are (s, d) unit features of mixed queries."""
    logits = key_set.similarity(key_set.rows) / settings.temperature
    # A finite stand-in for minus infinity: labels are 0 there, and 0 * inf is not.
    logits = logits.masked_fill(unseen(key_set), torch.finfo(logits.dtype).min)
    known_term = cross_entropy(logits, known_labels(key_set))
    labelled = key_set.for_mixed() if crops else key_set
    with torch.no_grad():
        refined = labels(labelled, settings)
    if not crops:
        refined_term = cross_entropy(logits, refined)
    else:
        terms = []
        for crop, (theta, partner) in zip(crops, mixes, strict=True):
            share = theta.to(refined)[:, None]
            mixed_labels = share * refined + (1 - share) * refined[partner]
            terms.append(cross_entropy(labelled.similarity(crop) / settings.temperature, mixed_labels))
        refined_term = torch.stack(terms).mean()
    return (1 - settings.refined_weight) * known_term + settings.refined_weight * refined_term


def slr_loss(
    queries: Tensor,
    positives: Tensor,
    queue: Tensor | None = None,
    mixed: Tensor | Sequence[Tensor] | None = None,
    mix: Mix | Sequence[Mix] | None = None,
    *,
    negatives: Tensor | None = None,
    temperature: float | Tensor = 0.5,
    sharpening: float = 1.0,
    confidence: float = 1.0,
    refined_weight: float = 0.5,
    in_batch_keys: bool = True,
    symmetric: bool = False,
    groups: Tensor | None = None,
    queue_groups: Tensor | None = None,
    same_group: str = "positive",
) -> Tensor:
    """Equation (9) for one direction: rows are the queries. Arguments as in :func:`slr_plugin.functional.slr_loss`.

    Nothing is checked or converted; for both directions see :func:`symmetric_slr_loss`.
    """
    queries, positives = F.normalize(queries, dim=1), F.normalize(positives, dim=1)
    negatives = None if negatives is None else F.normalize(negatives, dim=1)
    key_set = build_key_set(
        Features(queries, positives, negatives=negatives, groups=groups),
        queue,
        in_batch_keys=in_batch_keys,
        symmetric=symmetric,
        queue_groups=queue_groups,
        ignores_group=same_group == "ignored",
    )
    crops = [mixed] if isinstance(mixed, Tensor) else list(mixed or [])
    mixes: Any = [mix] if isinstance(mixed, Tensor) else list(mix or [])
    settings = Settings(temperature, sharpening, refined_weight, confidence, refines=True)
    return objective(key_set, [F.normalize(crop, dim=1) for crop in crops], mixes, settings)


def symmetric_slr_loss(view0: Tensor, view1: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Equation (9) for both directions: rows and keys are both views. Arguments as in :func:`slr_loss`; no queue."""
    return slr_loss(view0, view1, None, *args, **kwargs, symmetric=True)
