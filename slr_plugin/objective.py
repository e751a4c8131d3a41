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
one-hot                the own key :math:`g_i`
refined, not mixed     :math:`(1 - \lambda) g_i + \lambda t_i`, with the refinery's :math:`t_i = w_i g_i + v_i a_i`
mixed with row j       :math:`\theta_i t_i + (1 - \theta_i) t_j`
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
    own_keys = key_set.own_keys()
    stats, labels, targets = _compare(key_set, own_keys, key_set.rows, key_set.hidden(), settings)
    losses = _own_key_added(stats.logsumexp_minus(_logits(key_set.rows, own_keys, settings)))
    if settings.refines:  # L_c(x, y) = L_c(x, onehot) + <f, g - t> / tau
        losses = losses + settings.refined_weight * _logits(key_set.rows, own_keys - targets, settings)
    return losses, labels


def _mixed_losses(
    key_set: KeySet, crops: Sequence[Tensor], mixes: Sequence[Mix], settings: Settings
) -> tuple[Tensor, Labels]:
    """The losses of mixed queries, crop after crop, over keys that only they see."""
    rows = torch.cat(list(crops))
    stats, labels, targets = _compare(key_set, key_set.own_keys(), rows, [], settings)
    return stats.logsumexp_minus(_logits(rows, _mixed_targets(targets, mixes), settings)), labels


def _losses_of_one_pass(
    key_set: KeySet, crops: Sequence[Tensor], mixes: Sequence[Mix], settings: Settings
) -> tuple[Tensor, Tensor, Labels]:
    """The losses (s,) of rows with one-hot labels, and those of mixed queries over the same keys."""
    rows, own_keys = torch.cat([key_set.rows, *crops]), key_set.own_keys()
    stats, labels, targets = _compare(key_set, own_keys, rows, key_set.hidden(), settings)
    targets = torch.cat([own_keys, _mixed_targets(targets, mixes)])
    losses = stats.logsumexp_minus(_logits(rows, targets, settings))
    others, refined = losses.tensor_split([len(key_set.rows)])
    return _own_key_added(others), refined, labels


def _compare(
    key_set: KeySet, own_keys: Tensor, rows: Tensor, hidden: list[Diagonal], settings: Settings
) -> tuple[SoftmaxStats, Labels, Tensor]:
    """Compare rows with their keys; return their softmax statistics, and labels and targets of the key set's samples.

    Args:
        key_set: the keys.
        own_keys: those of the key set, one per label, which they estimate unless there are other features.
        rows: the key set's rows, which do not see the ``hidden`` keys; or mixed queries, which see all; or both.
        hidden: as the pass takes it.
        settings: the numbers.
    """
    if settings.refines and key_set.estimator_keys is None and not key_set.is_symmetric():
        return _estimated_in_one_pass(key_set, own_keys, rows, hidden, settings)
    stats = _pass(rows, key_set, settings.temperature, hidden, settings)
    if not settings.refines:
        return stats, refinery.one_hot(own_keys), own_keys
    if key_set.estimator_keys is not None:
        return stats, *_estimated_by_features(key_set, key_set.estimator_keys, own_keys, settings)
    return stats, *_estimated_by_other_view(key_set, own_keys, stats, settings)


def _estimated_in_one_pass(
    key_set: KeySet, own_keys: Tensor, rows: Tensor, hidden: list[Diagonal], settings: Settings
) -> tuple[SoftmaxStats, Labels, Tensor]:
    """Where own keys are not rows, they become further rows of the pass, and estimate the labels.

    Divided by tau', they have the logits of tau tau' at the temperature tau of the others.
    """
    count, estimators = len(rows), own_keys.detach() / settings.sharpening
    rows, hidden = torch.cat([rows, estimators]), hidden + key_set.hidden(count)
    stats = _pass(rows, key_set, settings.temperature, hidden, settings, longest=1 / settings.sharpening)
    stats, estimates = stats.split(count)
    return stats, *_refined(own_keys, estimates, settings)


def _estimated_by_other_view(
    key_set: KeySet, own_keys: Tensor, stats: SoftmaxStats, settings: Settings
) -> tuple[Labels, Tensor]:
    """Own keys are rows too, whose statistics are known, unless sharpening gives them another temperature."""
    if settings.sharpening != 1:
        stats = _pass(key_set.rows.detach(), key_set, _sharp_temperature(settings), key_set.hidden(), settings)
    return _refined(own_keys, stats.roll(len(key_set.positives)), settings)


def _estimated_by_features(
    key_set: KeySet, estimator_keys: KeySet, own_keys: Tensor, settings: Settings
) -> tuple[Labels, Tensor]:
    """Other features estimate the labels in a pass over their own keys, which averages the key set's."""
    estimators, hidden = estimator_keys.own_keys(), estimator_keys.hidden()
    stats = _pass(estimators, estimator_keys, _sharp_temperature(settings), hidden, settings, values=key_set)
    return _refined(own_keys, stats, settings, estimators)


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
        has_changed=settings.has_changed,
        may_change=settings.may_change,
    )


def _refined(
    own_keys: Tensor, estimates: SoftmaxStats, settings: Settings, estimators: Tensor | None = None
) -> tuple[Labels, Tensor]:
    """The labels and target centroids (r, d), from what estimates them: the own keys or other features."""
    with torch.no_grad():
        sharp = _sharp_temperature(settings)
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
    """Add the own key to a log-sum-exp over the others, both less the own logit: log(1 + exp(others))."""
    return F.softplus(others, threshold=40.0)  # beyond which nothing is left of the 1 in float64


def _logits(rows: Tensor, targets: Tensor, settings: Settings) -> Tensor:
    return _dot(rows, targets) / settings.temperature


def _sharp_temperature(settings: Settings) -> float | Tensor:
    """The temperature of the estimators, to which nothing is differentiated."""
    temperature = settings.temperature
    return (temperature.detach() if isinstance(temperature, Tensor) else temperature) * settings.sharpening


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)
