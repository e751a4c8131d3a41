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

import torch
import torch.nn.functional as F
from torch import Tensor

from slr_plugin import refinery
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
    rows, positives = key_set.rows, key_set.positives
    labelled = key_set.for_mixed() if crops else key_set
    # The positives estimate the labels. Divided by tau', they have the logits of tau tau' at the temperature tau and
    # join the pass; where both views are rows, they are in it already.
    joins = settings.refines and labelled.estimator is None and not labelled.has_both_views()
    mixed = torch.cat(list(crops)) if crops else rows[:0]
    estimators = labelled.positives.detach() / settings.sharpening if joins else rows[:0]
    longest = 1 / settings.sharpening if joins else 1.0
    hidden = key_set.hidden()
    if labelled is key_set:
        blocks = [(rows, hidden), (mixed, None), (estimators, hidden)]
        of_rows, of_mixed, estimates = _pass(key_set, blocks, settings.temperature, settings, longest)
    else:
        (of_rows,) = _pass(key_set, [(rows, hidden)], settings.temperature, settings)
        blocks = [(mixed, None), (estimators, labelled.hidden())]
        of_mixed, estimates = _pass(labelled, blocks, settings.temperature, settings, longest)
    labels, targets = _labels_and_targets(labelled, settings, estimates if joins else of_rows)

    # log(1 + exp(others - own)) adds the positive; beyond 40 nothing is left of the 1 in float64.
    one_hot = F.softplus(of_rows.logsumexp_minus(_dot(rows, positives) / settings.temperature), threshold=40.0)
    if not settings.refines and not crops:
        return one_hot.mean(), labels
    if crops:  # equation (8): the targets of mixed queries are those of the two samples, mixed
        mixed_targets = [targets[partner].lerp(targets, theta.to(targets)[:, None]) for theta, partner in mixes]
        refined = of_mixed.logsumexp_minus(_dot(mixed, torch.cat(mixed_targets)) / settings.temperature)
        return torch.lerp(one_hot.mean(), refined.mean(), settings.refined_weight), labels
    # L_c(x, y) = L_c(x, onehot) + <f, g - t> / tau
    moved = _dot(rows, positives - targets) / settings.temperature
    return (one_hot + settings.refined_weight * moved).mean(), labels


def _labels_and_targets(key_set: KeySet, settings: Settings, known: SoftmaxStats) -> tuple[Labels, Tensor]:
    """The labels, and their target centroids (r, d), that the positives or other features of the samples estimate.

    ``known`` are the statistics of the estimators, or of the rows. Where both views are rows, each estimates the
    other's label, unless sharpening gives estimators another temperature.
    """
    positives, temperature = key_set.positives, settings.temperature
    if not settings.refines:
        return refinery.one_hot(positives), positives
    sharp = (temperature.detach() if isinstance(temperature, Tensor) else temperature) * settings.sharpening
    own = key_set.estimator is None
    estimating = key_set if key_set.estimator is None else key_set.estimator
    if not own or (key_set.has_both_views() and settings.sharpening != 1):
        blocks = [(estimating.rows.detach(), estimating.hidden())]
        (known,) = _pass(estimating, blocks, sharp, settings, values=None if own else key_set)
    if key_set.has_both_views():
        known = known.roll(len(positives) // 2)
    with torch.no_grad():
        positive_logit = _dot(estimating.positives, estimating.positives) / sharp
        # Means of other values say nothing of the estimators' logits.
        mean_logit = _dot(positives, known.mean) / sharp if own else None
    key_count = len(key_set.keys) + (0 if key_set.queue is None else len(key_set.queue)) + 1
    labels = refinery.estimate(known, positive_logit, mean_logit, settings.confidence, key_count)
    return labels, labels.targets(positives, known.mean)


def _pass(
    key_set: KeySet,
    blocks: Sequence[tuple[Tensor, Tensor | None]],
    temperature: float | Tensor,
    settings: Settings,
    longest: float = 1.0,
    values: KeySet | None = None,
) -> list[SoftmaxStats]:
    """Compare blocks of rows with the keys in one pass; return statistics by block.

    Args:
        key_set: the keys.
        blocks: rows (n, d), where n may be 0, and the keys (n, h) that they do not see; None where they see all.
        temperature: of the logits.
        settings: the numbers.
        longest: the length that no row exceeds.
        values: what is averaged in the place of the keys: those of this key set.
    """
    present = [block for block in blocks if len(block[0])]
    rows, hidden = present[0]
    if len(present) > 1:
        rows = torch.cat([block for block, _ in present])
        masks = [mask for _, mask in present if mask is not None]
        if masks:
            nothing = masks[0].new_full((1, 1), -1)
            width = masks[0].shape[1]
            hidden = torch.cat([nothing.expand(len(r), width) if h is None else h for r, h in present])
    square = (
        len(present) == 1 and key_set.queue is None and key_set.keys is key_set.rows
    )  # half of the logits are then enough
    scale, bound = 1.0, math.inf
    if isinstance(temperature, Tensor):
        rows, square = rows / temperature, False
    else:
        scale, bound = 1 / temperature, longest / abs(temperature)
    stats = softmax_stats(
        rows,
        key_set.keys,
        key_set.queue,
        values=None if values is None else values.keys,
        queue_values=None if values is None else values.queue,
        hidden=hidden,
        scale=scale,
        bound=bound,
        symmetric=square,
        chunk_size=settings.chunk_size,
        repeatable=settings.repeatable,
    )
    return stats.split([len(block) for block, _ in blocks])


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)
