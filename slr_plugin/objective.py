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
from torch import Tensor

from slr_plugin import refinery
from slr_plugin.key_sets import KeySet
from slr_plugin.mixup import Mix
from slr_plugin.refinery import Labels
from slr_plugin.settings import Settings
from slr_plugin.streaming import Diagonal, SoftmaxStats, softmax_stats


def slr_objective(
    key_set: KeySet, mixed: Tensor | None, mixes: Sequence[Mix], settings: Settings
) -> tuple[Tensor, Labels]:
    """Compute equation (9), and the refined labels in it.

    Args:
        key_set: rows (r, d) and their keys.
        mixed: (c * s, d) unit features of mixed queries, crop after crop, or None.
        mixes: how each of the c crops was mixed.
        settings: the numbers.
    """
    rows, positives = key_set.rows, key_set.positives
    if mixed is None:
        stats, estimates = _compare(key_set, rows, settings)
    elif key_set.is_symmetric:
        stats, _ = _compare(key_set, rows, settings._replace(refines=False))
        key_set = key_set.for_mixed()
        mixed_stats, estimates = _compare(key_set, mixed, settings, has_own=False)
    else:
        stats, estimates = _compare(key_set, torch.cat([rows, mixed]), settings)
        stats, mixed_stats = stats.split(len(rows))
    others = stats.logsumexp_minus(_logits(rows, positives, settings))
    one_hot = torch.logaddexp(others, torch.zeros_like(others)).mean()
    labels, targets = _refined(key_set, estimates, settings)
    if mixed is not None:
        losses = mixed_stats.logsumexp_minus(_logits(mixed, _mixed(targets, mixes), settings))
        return torch.lerp(one_hot, losses.mean(), settings.refined_weight), labels
    if not settings.refines:
        return one_hot, labels
    # Rows that are not mixed: L_c(x, y) = L_c(x, onehot) + <f, g - t> / tau.
    return one_hot + settings.refined_weight * _logits(rows, positives - targets, settings).mean(), labels


def _compare(
    key_set: KeySet, rows: Tensor, settings: Settings, has_own: bool = True
) -> tuple[SoftmaxStats, SoftmaxStats | None]:
    """The statistics of rows, and of the estimators of the labels if these are refined; own keys are left out.

    ``rows`` begins with those of the key set, unless ``has_own`` is False; mixed queries follow, which see all keys.
    """
    temperature, sharp = settings.temperature, settings.sharpening
    hidden = key_set.hidden() if has_own else []
    if not settings.refines:
        return _pass(rows, key_set, temperature, hidden, settings), None
    if key_set.estimator is None and not key_set.is_symmetric:
        # One pass for both. Divided by tau', the estimators have the logits of tau tau' at the common temperature tau.
        both, hidden = torch.cat([rows, key_set.positives.detach() / sharp]), hidden + key_set.hidden(len(rows))
        return _pass(both, key_set, temperature, hidden, settings, longest=1 / sharp).split(len(rows))
    stats = _pass(rows, key_set, temperature, hidden, settings)
    constant = temperature.detach() if isinstance(temperature, Tensor) else temperature
    if key_set.estimator is not None:
        estimator = key_set.estimator
        hidden = estimator.hidden()
        return stats, _pass(estimator.positives, estimator, constant * sharp, hidden, settings, values=key_set)
    # Both views: the estimator of a row is its other view, which is a row too.
    of_rows = stats
    if sharp != 1 or isinstance(temperature, Tensor):
        of_rows = _pass(rows.detach(), key_set, constant * sharp, hidden, settings)
    return stats, of_rows.roll(len(rows) // 2)


def _pass(
    rows: Tensor,
    key_set: KeySet,
    temperature: float | Tensor,
    hidden: list[Diagonal],
    settings: Settings,
    longest: float = 1.0,
    values: KeySet | None = None,
) -> SoftmaxStats:
    """The streaming pass of rows, the longest of length ``longest``, over a key set, averaging its keys or ``values``."""
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
        symmetric=key_set.keys is key_set.rows and compared is rows,
        chunk_size=settings.chunk_size,
        stale=settings.stale,
    )


def _refined(key_set: KeySet, estimates: SoftmaxStats | None, settings: Settings) -> tuple[Labels, Tensor]:
    """The labels of a key set's rows and their target centroids (r, d)."""
    if estimates is None:
        return refinery.one_hot(key_set.positives), key_set.positives
    estimators = (key_set.estimator or key_set).positives
    with torch.no_grad():
        sharp = settings.temperature * settings.sharpening
        own_logit = _dot(estimators, estimators) / sharp
        mean_logit = None if key_set.estimator else _dot(estimators, estimates.mean) / sharp
    labels = refinery.estimate(estimates, own_logit, mean_logit, settings.confidence)
    return labels, labels.targets(key_set.positives, estimates.mean)


def _mixed(targets: Tensor, mixes: Sequence[Mix]) -> Tensor:
    """Equation (8) for labels, crop after crop."""
    return torch.cat([targets[partner].lerp(targets, theta.to(targets)[:, None]) for theta, partner in mixes])


def _logits(rows: Tensor, targets: Tensor, settings: Settings) -> Tensor:
    return _dot(rows, targets) / settings.temperature


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)
