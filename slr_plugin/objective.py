r"""Equations (4) and (9) for every key set: a row's loss is its log-sum-exp minus the logit of its target.

With :math:`L_c` the mean over the rows of equation (4), the whole loss is

.. math::
    (1 - \lambda)\, L_c(x, \mathrm{onehot}) + \lambda\, L_c(x', y')
    \qquad\text{or, without mixed queries,}\qquad
    (1 - \lambda)\, L_c(x, \mathrm{onehot}) + \lambda\, L_c(x, \bar y) . \tag{9}

Equation (4) needs a label only through its target centroid :math:`t_i = \sum_k y_{ik} \bar b_k`, since labels sum to 1:

.. math::
    L_c(x_i, y_i) = \log \sum_k e^{\langle f_i, \bar b_k \rangle / \tau} - \langle f_i, t_i \rangle / \tau .

Three targets occur, and mixing labels (8) or averaging the two terms of (9) is mixing their centroids:

=====================  =======================================================================================
row                    target
=====================  =======================================================================================
one-hot                the positive :math:`g_i`
refined, not mixed     :math:`(1 - \lambda) g_i + \lambda t_i`, with the refinery's :math:`t_i = w_i g_i + v_i a_i`
mixed with row j       :math:`\theta_i t_i + (1 - \theta_i) t_j`
=====================  =======================================================================================

A row's positive is hidden in the pass and added back here, as
:math:`\ell_i - s_{ii} = \log(1 + e^{\ell_i^{\text{others}} - s_{ii}})`, which is exact where its logit is large.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from slr_plugin import refinery
from slr_plugin.groups import GroupLabels, group_labels
from slr_plugin.key_sets import KeySet
from slr_plugin.mixup import Mix
from slr_plugin.refinery import Labels
from slr_plugin.settings import Settings
from slr_plugin.streaming import SoftmaxStats, softmax_stats


def slr_objective(
    key_set: KeySet, crops: Sequence[Tensor], mixes: Sequence[Mix], settings: Settings
) -> tuple[Tensor, Labels]:
    """Compute equation (9), and the refined labels in it.

    Args:
        key_set: rows (r, d) and their keys.
        crops: (s, d) unit features of mixed queries, each.
        mixes: how each of the crops was mixed.
        settings: the numbers.
    """
    rows, positives, temperature = key_set.rows, key_set.positives, settings.temperature
    apart = len(crops) > 0 and key_set.has_both_views()  # mixed queries then see other keys than the rows
    labelled = key_set.for_mixed() if apart else key_set
    # The positives estimate the labels. Divided by tau', they have the logits of tau tau' at the temperature tau and
    # join the pass; where both views are rows, they are in it already.
    joins = settings.refines and labelled.estimator is None and not labelled.has_both_views()
    mixed = Block(torch.cat(list(crops)) if crops else rows[:0], sees_all=True)
    estimators = Block(labelled.positives.detach() / settings.sharpening if joins else rows[:0])
    longest = 1 / settings.sharpening if joins else 1.0
    if not apart:
        of_rows, of_mixed, estimates = _pass(key_set, [Block(rows), mixed, estimators], temperature, settings, longest)
    else:
        (of_rows,) = _pass(key_set, [Block(rows)], temperature, settings)
        of_mixed, estimates = _pass(labelled, [mixed, estimators], temperature, settings, longest)
    known = group_labels(key_set)  # in the place of one-hot labels
    known_of_labelled = group_labels(labelled) if apart else known
    labels, targets = _labels_and_targets(labelled, known_of_labelled, estimates if joins else of_rows, settings)

    # log(1 + exp(others - own)) adds the positive; beyond 40 nothing is left of the 1 in float64.
    one_hot = F.softplus(of_rows.logsumexp_minus(_dot(rows, positives) / temperature), threshold=40.0)
    # L_c(x, y) = L_c(x, onehot) + <f, g - t> / tau
    first = one_hot if known.targets is positives else one_hot + _dot(rows, positives - known.targets) / temperature
    if crops:  # equation (8): the targets of mixed queries are those of the two samples, mixed
        mixed_targets = [targets[partner].lerp(targets, theta.to(targets)[:, None]) for theta, partner in mixes]
        refined = of_mixed.logsumexp_minus(_dot(mixed.rows, torch.cat(mixed_targets)) / temperature)
        return torch.lerp(first.mean(), refined.mean(), settings.refined_weight), labels
    if not settings.refines:
        return first.mean(), labels
    moved = _dot(rows, known.targets - targets) / temperature
    return (first + settings.refined_weight * moved).mean(), labels


def _labels_and_targets(
    key_set: KeySet, known: GroupLabels, stats: SoftmaxStats, settings: Settings
) -> tuple[Labels, Tensor]:
    """The labels, and their target centroids (r, d), that the positives or other features of the samples estimate.

    ``stats`` are the statistics of the estimators, or of the rows. Where both views are rows, each estimates the
    other's label, unless sharpening gives estimators another temperature.
    """
    positives, temperature = key_set.positives, settings.temperature
    if not settings.refines:
        return refinery.unrefined(positives, known.share), known.targets
    sharp = (temperature.detach() if isinstance(temperature, Tensor) else temperature) * settings.sharpening
    own = key_set.estimator is None
    estimating = key_set if key_set.estimator is None else key_set.estimator
    if not own or (key_set.has_both_views() and settings.sharpening != 1):
        blocks = [Block(estimating.rows.detach())]
        (stats,) = _pass(estimating, blocks, sharp, settings, values=None if own else key_set)
    if key_set.has_both_views():
        stats = stats.roll(len(positives) // 2)
    has_groups = known.targets is not positives
    with torch.no_grad():
        positive_logit = _dot(estimating.positives, estimating.positives) / sharp
        # Means of other values say nothing of the estimators' logits, and labels of groups have another entropy.
        mean_logit = _dot(positives, stats.mean) / sharp if own and not has_groups else None
    labels = refinery.estimate(stats, positive_logit, mean_logit, settings.confidence, key_set.key_count())
    targets = labels.targets(positives, stats.mean)
    if has_groups:
        weight = 1 - labels.alpha - labels.beta  # of the label that is known
        targets = targets + weight[:, None] * (known.targets - positives)
        labels = labels.shared(weight * (1 - known.share))
    return labels, targets


class Block(NamedTuple):
    """Rows of a pass."""

    rows: Tensor  # (n, d), n may be 0
    sees_all: bool = False  # else they belong to the key set's rows one to one, and see what those see


def _pass(
    key_set: KeySet,
    blocks: Sequence[Block],
    temperature: float | Tensor,
    settings: Settings,
    longest: float = 1.0,
    values: KeySet | None = None,
) -> list[SoftmaxStats]:
    """Compare blocks of rows with the keys in one pass; return statistics by block.

    Args:
        key_set: the keys.
        blocks: the rows.
        temperature: of the logits.
        settings: the numbers.
        longest: the length that no row exceeds.
        values: what is averaged in the place of the keys: those of this key set.
    """
    present = [block for block in blocks if len(block.rows)]
    rows = present[0].rows if len(present) == 1 else torch.cat([block.rows for block in present])
    scale, bound = 1.0, math.inf
    if isinstance(temperature, Tensor):
        rows = rows / temperature
    else:
        scale, bound = 1 / temperature, longest / abs(temperature)
    groups = key_set.groups if key_set.ignores_group else None
    # The keys are the rows: half of the logits are then enough.
    square = len(present) == 1 and key_set.queue is None and key_set.keys is key_set.rows and rows is present[0].rows
    stats = softmax_stats(
        rows,
        key_set.keys,
        key_set.queue,
        values=None if values is None else values.keys,
        queue_values=None if values is None else values.queue,
        hidden=_by_block(key_set.hidden(), present),
        row_groups=_by_block(groups, present),
        key_groups=None if groups is None else key_set.key_groups,
        scale=scale,
        bound=bound,
        symmetric=square,
        chunk_size=settings.chunk_size,
        repeatable=settings.repeatable,
    )
    return stats.split([len(block.rows) for block in blocks])


def _by_block(mask: Tensor | None, blocks: Sequence[Block]) -> Tensor | None:
    """What the key set's rows do not see, for the rows of all blocks."""
    if mask is None or (len(blocks) == 1 and not blocks[0].sees_all):
        return mask
    nothing = torch.full_like(mask[:1], -1)
    parts = [nothing.expand(len(b.rows), *mask.shape[1:]) if b.sees_all else mask for b in blocks]
    return torch.cat(parts)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)
