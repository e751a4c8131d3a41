r"""Equations (4) and (9) for every key set: a row's loss is its log-sum-exp minus the logit of its target.

Equation (4) needs a label only through its target centroid :math:`t_i = \sum_k y_{ik} \bar b_k`, since labels sum to 1:

.. math::
    L_c(x_i, y_i) = \log \sum_k e^{\langle f_i, \bar b_k \rangle / \tau} - \langle f_i, t_i \rangle / \tau .

Three targets occur, and mixing labels (8) or averaging the two terms of (9) is mixing their centroids:

=====================  =======================================================================================
row                    target
=====================  =======================================================================================
one-hot                the own key :math:`g_i`
refined, not mixed     :math:`(1 - \lambda) g_i + \lambda t_i`, with the refinery's :math:`t_i = w_i g_i + v_i a_i`
mixed                  :math:`\theta_i t_i + (1 - \theta_i) t_k`
=====================  =======================================================================================

A row's own key is hidden in the pass and added back here, as
:math:`\ell_i - s_{ii} = \log(1 + e^{\ell_i^{\text{others}} - s_{ii}})`, which is exact where the own logit is large.
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
from slr_plugin.streaming import Diagonal, SoftmaxStats, softmax_stats


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
    if not crops:
        losses, labels = _unmixed_losses(key_set, settings)
        return losses.mean(), labels
    if key_set.mixed_keys:  # which are not what the rows see: a pass of their own
        one_hot, _ = _unmixed_losses(key_set, settings.one_hot())
        refined, labels = _mixed_losses(key_set.mixed_keys, crops, mixes, settings)
    else:
        one_hot, refined, labels = _losses_of_one_pass(key_set, crops, mixes, settings)
    return torch.lerp(one_hot.mean(), refined.mean(), settings.refined_weight), labels


def _unmixed_losses(key_set: KeySet, settings: Settings) -> tuple[Tensor, Labels]:
    """The losses (r,) of rows whose label is one-hot by 1 - lambda and refined by lambda."""
    stats, labels, targets = _compare(key_set, key_set.rows, key_set.hidden(), settings)
    own_keys = key_set.own_keys()
    losses = _own_key_added(stats.logsumexp_minus(_logits(key_set.rows, own_keys, settings)))
    if settings.refines:  # L_c(x, y) = L_c(x, onehot) + <f, g - t> / tau
        losses = losses + settings.refined_weight * _logits(key_set.rows, own_keys - targets, settings)
    return losses, labels


def _mixed_losses(
    key_set: KeySet, crops: Sequence[Tensor], mixes: Sequence[Mix], settings: Settings
) -> tuple[Tensor, Labels]:
    """The losses of mixed queries, crop after crop, over keys that only they see."""
    rows = torch.cat(list(crops))
    stats, labels, targets = _compare(key_set, rows, [], settings)
    return stats.logsumexp_minus(_logits(rows, _mixed_targets(targets, mixes), settings)), labels


def _losses_of_one_pass(
    key_set: KeySet, crops: Sequence[Tensor], mixes: Sequence[Mix], settings: Settings
) -> tuple[Tensor, Tensor, Labels]:
    """The losses (s,) of rows with one-hot labels, and those of mixed queries over the same keys."""
    rows = torch.cat([key_set.rows, *crops])
    stats, labels, targets = _compare(key_set, rows, key_set.hidden(), settings)
    targets = torch.cat([key_set.positives, _mixed_targets(targets, mixes)])
    losses = stats.logsumexp_minus(_logits(rows, targets, settings))
    others, refined = losses.tensor_split([len(key_set.rows)])
    return _own_key_added(others), refined, labels


def _compare(
    key_set: KeySet, rows: Tensor, hidden: list[Diagonal], settings: Settings
) -> tuple[SoftmaxStats, Labels, Tensor]:
    """The softmax statistics of rows over their keys, and the labels and target centroids of the key set's rows.

    ``rows`` are the key set's, which do not see the ``hidden`` keys, or mixed queries, which see all, or both.
    What estimates the labels depends on the key set:

    ======================  ===========================================================================================
    key set                 estimators, and the pass that compares them with the keys
    ======================  ===========================================================================================
    with positives alone    the positives, further rows of the one pass
    both views              the rows: the pass itself, and at tau' below 1 a second one
    with other features     these, in a pass of their own over their own keys, which averages the keys
    ======================  ===========================================================================================
    """
    temperature, sharp = settings.temperature, settings.sharpening
    if not settings.refines:
        stats = _pass(rows, key_set, temperature, hidden, settings)
        return stats, refinery.one_hot(stats.reference), key_set.positives
    if key_set.estimator_keys is None and not key_set.is_symmetric():
        # One pass for both. Divided by tau', the estimators have the logits of tau tau' at the common temperature tau.
        count, estimators = len(rows), key_set.positives.detach() / sharp
        hidden = hidden + key_set.hidden(count)
        stats = _pass(torch.cat([rows, estimators]), key_set, temperature, hidden, settings, longest=1 / sharp)
        stats, estimates = stats.split(count)
        return stats, *_refined(key_set.positives, estimates, settings)
    stats = _pass(rows, key_set, temperature, hidden, settings)
    constant = temperature.detach() if isinstance(temperature, Tensor) else temperature
    estimator = key_set.estimator_keys
    if estimator is not None:
        estimating = estimator.own_keys()  # of two views both halves are the same features
        estimates = _pass(estimating, estimator, constant * sharp, estimator.hidden(), settings, values=key_set)
        return stats, *_refined(key_set.own_keys(), estimates, settings, estimating)
    # Both views: a row is estimated by its other view, a row too, and so estimates the label of its other view.
    estimates = stats
    if sharp != 1 or isinstance(temperature, Tensor):
        estimates = _pass(key_set.rows.detach(), key_set, constant * sharp, hidden, settings)
    labels, targets = _refined(key_set.rows, estimates, settings)
    return stats, labels, targets.roll(len(key_set.positives), 0)


def _pass(
    rows: Tensor,
    key_set: KeySet,
    temperature: float | Tensor,
    hidden: list[Diagonal],
    settings: Settings,
    longest: float = 1.0,
    values: KeySet | None = None,
) -> SoftmaxStats:
    """Pass over a key set with rows of at most the length ``longest``; averages its keys, or those of ``values``."""
    scale, bound = 1.0, math.inf
    if isinstance(temperature, Tensor):
        compared = rows / temperature
    else:
        compared, scale, bound = rows, 1 / temperature, longest / abs(temperature)
    return softmax_stats(
        compared,
        key_set.keys,
        key_set.queue,
        values=None if values is None else values.keys,
        queue_values=None if values is None else values.queue,
        scale=scale,
        bound=bound,
        hidden=hidden,
        symmetric=key_set.is_square() and not isinstance(temperature, Tensor),
        chunk_size=settings.chunk_size,
        stale=settings.stale,
        once=settings.once,
    )


def _refined(
    own_keys: Tensor, estimates: SoftmaxStats, settings: Settings, estimators: Tensor | None = None
) -> tuple[Labels, Tensor]:
    """The labels and target centroids (r, d) of rows, from what estimates them: their own keys or other features."""
    with torch.no_grad():
        sharp = settings.temperature * settings.sharpening
        estimating = own_keys if estimators is None else estimators
        own_logit = _dot(estimating, estimating) / sharp
        # Means of other values say nothing of the estimators' logits.
        mean_logit = _dot(estimating, estimates.mean) / sharp if estimators is None else None
    labels = refinery.estimate(estimates, own_logit, mean_logit, settings.confidence)
    return labels, labels.targets(own_keys, estimates.mean)


def _mixed_targets(targets: Tensor, mixes: Sequence[Mix]) -> Tensor:
    """The targets of mixed queries, crop after crop: equation (8) mixes those of the two samples."""
    return torch.cat([targets[partner].lerp(targets, theta.to(targets)[:, None]) for theta, partner in mixes])


def _own_key_added(others: Tensor) -> Tensor:
    """The log-sum-exp over all keys from that over the others, both less the own logit: log(1 + exp(others))."""
    return F.softplus(others, threshold=40.0)  # beyond which nothing is left of the 1 in float64


def _logits(rows: Tensor, targets: Tensor, settings: Settings) -> Tensor:
    return _dot(rows, targets) / settings.temperature


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)
