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
not refined            :math:`t^0_i`: the positive :math:`g_i`, or where groups are known the mean of the group's keys
refined, not mixed     :math:`(1 - \lambda) t^0_i + \lambda t_i`, of the refinery :math:`t_i`, which is
                       :math:`(1 - v_i) g_i + v_i a_i + (t^0_i - g_i) / z_i`
mixed with row j       :math:`\theta_i t_i + (1 - \theta_i) t_j`
=====================  =======================================================================================

A row's positive is hidden in the pass and added back here, as
:math:`\log(1 + e^{\ell_i - \langle f_i, g_i \rangle / \tau})`.

The gradient is in closed form and computed with the value. Labels are constants; with :math:`\sigma_{ik}` the softmax
of row i over all its keys and r rows,

.. math::
    \frac{\partial L_c}{\partial f_i} = \frac{1}{r \tau} \Big( \sum_k \sigma_{ik} \bar b_k - t_i \Big), \qquad
    \frac{\partial L_c}{\partial \bar b_k} = \frac{1}{r \tau} \sum_i (\sigma_{ik} - y_{ik}) f_i, \qquad
    \frac{\partial L_c}{\partial \tau}
    = - \frac1\tau \sum_i \Big\langle f_i, \frac{\partial L_c}{\partial f_i} \Big\rangle .
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from slr_plugin import refinery
from slr_plugin._inputs import unit_rows
from slr_plugin.groups import GroupLabels, group_labels
from slr_plugin.key_sets import KeySet
from slr_plugin.mixup import Mix
from slr_plugin.passes import Passes, compare
from slr_plugin.refinery import Labels
from slr_plugin.settings import Settings
from slr_plugin.streaming import symmetric_gradient


def slr_objective(
    key_set: KeySet, crops: Sequence[Tensor], mixes: Sequence[Mix], settings: Settings
) -> tuple[Tensor, Labels]:
    """Compute equation (9), and the refined labels in it.

    Args:
        key_set: rows (r, d) and their keys.
        crops: (s, d) features of mixed queries, each.
        mixes: how each of the crops was mixed.
        settings: the numbers.
    """
    mixed = unit_rows(torch.cat(list(crops)) if len(crops) > 1 else crops[0]) if crops else None
    label_keys = key_set.for_mixed() if crops else key_set
    apart = mixed is not None and key_set.sees_both_views()
    known = group_labels(key_set)
    known_of_samples = group_labels(label_keys) if apart else known
    has_groups = known.targets is not key_set.positives
    # What the loss may be differentiated by. Known targets are means of keys, through which autograd goes on.
    through_keys = _trained(
        positives=key_set.positives if key_set.positive_index is None else None,  # else they are among the keys
        keys=None if key_set.rows_are_keys() else key_set.keys,
        known=known.targets if has_groups else None,
        known_of_samples=known_of_samples.targets if has_groups and apart else None,
    )
    inputs = _trained(rows=key_set.rows, mixed=mixed, temperature=settings.temperature)
    keys_too = len(through_keys) > 0 or (key_set.rows_are_keys() and len(inputs) > 0)
    inputs.update(through_keys)
    with torch.no_grad():
        call = Call(key_set, label_keys, apart, mixed, mixes, known, known_of_samples, settings)
        loss, labels, gradients = _evaluate(call, len(inputs) > 0, keys_too)
    if not inputs:
        return loss, labels
    return _WithGradients.apply(loss, *inputs.values(), *[gradients[name] for name in inputs]), labels


def _trained(**inputs: Tensor | float | None) -> dict[str, Tensor]:
    """Those that ask for a gradient."""
    is_recorded = torch.is_grad_enabled()
    return {name: x for name, x in inputs.items() if isinstance(x, Tensor) and x.requires_grad and is_recorded}


class Call(NamedTuple):
    """What the loss is computed from."""

    key_set: KeySet  # the rows and their keys
    label_keys: KeySet  # the keys that refined labels spread over and mixed queries see
    apart: bool  # whether that is another key set: mixed queries see the second views alone
    mixed: Tensor | None
    mixes: Sequence[Mix]
    known: GroupLabels  # of the rows
    known_of_samples: GroupLabels  # of the rows of ``label_keys``
    settings: Settings


class _WithGradients(torch.autograd.Function):
    """Attaches gradients to a loss."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *inputs_and_gradients: Tensor) -> Tensor:
        """The loss, from as many inputs as gradients."""
        ctx.save_for_backward(*inputs_and_gradients[len(inputs_and_gradients) // 2 :])
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients times that of the loss."""
        # Under create_graph=True only. ``once_differentiable`` would be silent, since nothing here records a gradient.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "SLRLoss has no second derivative: its gradient is in closed form; drop create_graph=True"
            )
        gradients = ctx.saved_tensors
        return None, *[gradient * grad for gradient in gradients], *[None] * len(gradients)


def _evaluate(call: Call, needs_gradients: bool, keys_too: bool) -> tuple[Tensor, Labels, dict[str, Tensor]]:
    """The loss, its labels, and its gradients by name."""
    key_set, mixed, settings = call.key_set, call.mixed, call.settings
    rows, positives, temperature = key_set.rows, key_set.positives, settings.temperature
    inverse, refined_weight = 1 / temperature, settings.refined_weight
    passes = compare(key_set, call.label_keys, call.apart, mixed, settings)
    labels, refined = _labels_and_targets(call, passes)

    # L_c(x, y) = L_c(x, onehot) + <f, g - t> / tau
    of_rows = passes.rows.by_block["rows"]
    # Of the other keys' log-sum-exp over the positive's logit.
    excess = of_rows.logsumexp_minus(_dot(rows, positives), inverse)
    loss = F.softplus(excess, threshold=40.0)  # beyond 40 nothing is left of the 1 in float64
    target = call.known.targets
    if mixed is None and settings.refines:
        target = torch.lerp(target, refined, refined_weight)
    if target is not positives:
        loss = loss + _dot(rows, positives - target) * inverse
    loss = loss.mean()
    if mixed is not None:  # equation (8): the targets of mixed queries are those of the two samples, mixed
        mixed_target, of_mixed = _mixed(refined, call.mixes), passes.mixed.by_block["mixed"]
        loss = loss.lerp(of_mixed.logsumexp_minus(_dot(mixed, mixed_target), inverse).mean(), refined_weight)
    if not needs_gradients:
        return loss, labels, {}

    # Of rows and mixed queries: the softmax's mean of the keys, minus the target.
    pull = inverse * ((1.0 if mixed is None else 1 - refined_weight) / len(rows))
    push = 0.0 if mixed is None else inverse * (refined_weight / len(mixed))
    others = torch.sigmoid(excess)  # the softmax's weight on the keys besides the positive
    both = None  # of rows that are keys too, the softmax's part as both
    if passes.one_hot_pairs:
        both = symmetric_gradient(passes.rows.given, passes.rows.stats, pull * others)
        of_row = (positives * (1 - others)[:, None]).sub_(target).mul_(pull)
    else:
        of_row = torch.lerp(positives, of_rows.mean, others[:, None]).sub_(target).mul_(pull)
    gradients = {"rows": of_row}
    if mixed is not None:
        gradients["mixed"] = (of_mixed.mean - mixed_target).mul_(push)
    if isinstance(temperature, Tensor):  # all logits are proportional to 1 / tau
        by_scale = _dot(rows, of_row).sum()
        if mixed is not None:
            by_scale += _dot(mixed, gradients["mixed"]).sum()
        if both is not None:  # which has the part of the rows twice, once as that of the keys
            by_scale += _dot(rows, both).sum() / 2
        gradients["temperature"] = -inverse * by_scale
    if keys_too:
        del refined, target  # the passes over the keys need the memory
        gradients.update(_of_keys(call, passes, labels, pull, push, others, both))
        if key_set.rows_are_keys():
            of_row.add_(gradients["keys"])
    return loss, labels, gradients


def _of_keys(
    call: Call,
    passes: Passes,
    labels: Labels,
    pull: float | Tensor,
    push: float | Tensor,
    others: Tensor,
    both: Tensor | None,
) -> dict[str, Tensor]:
    """The gradients that reach keys: as the softmax's keys, and through the targets, which are means of them.

    =========================================  =======================  ================================================
    gradient                                   of                       goes to
    =========================================  =======================  ================================================
    w f, w = pull * others                     the softmax of rows      the other keys by their share of the softmax,
                                                                        and minus w f to the positive, which would be
                                                                        all if it were the target
    push f'                                    that of mixed queries    all keys by their share of the softmax
    minus pull f or push f', times the share   the targets              1 / z of it to the known target, v to the other
    of the label                                                        keys by q, the rest to the positive
    =========================================  =======================  ================================================

    Args:
        call: what is differentiated.
        passes: over its keys.
        labels: of its rows.
        pull: the derivative of the loss by a row's cosine where the softmax is 1.
        push: that by a mixed query's.
        others: (r,) the softmax's weight on the keys besides the positive.
        both: of rows that are the keys, the softmax's part of both; None otherwise.
    """
    key_set, label_keys, apart, mixed, mixes, known, _, settings = call
    rows, refined_weight = key_set.rows, settings.refined_weight
    labelled = len(label_keys.rows)

    of_softmax = rows * (pull * others)[:, None]
    of_positive, of_refined = -of_softmax, rows * (-refined_weight * pull)
    passes.rows.send("rows", of_softmax)
    if mixed is not None:
        passes.mixed.send("mixed", mixed * push)
        of_refined = torch.zeros_like(rows[:labelled])
        for crop, (theta, partner) in zip(torch.split(mixed, labelled), mixes, strict=True):
            part = crop * _column(theta, mixed)
            of_refined.sub_(part).index_add_(0, partner, part - crop)
        of_refined.mul_(push)
        of_positive[:labelled] += of_refined
    gradients = {"positives": of_positive}
    if known.targets is not key_set.positives:
        of_known_of_samples = of_refined * labels.known_weight()[:, None]
        of_positive[:labelled] -= of_known_of_samples
        of_known = rows * (-pull if mixed is not None else (refined_weight - 1) * pull)
        of_positive -= of_known
        if not apart:
            of_known += of_known_of_samples
        gradients["known"], gradients["known_of_samples"] = of_known, of_known_of_samples
    if settings.refines:
        of_estimators = of_refined.mul_(labels.rest_weight[:, None])
        of_positive[:labelled] -= of_estimators
        if label_keys.sees_both_views():  # each view estimates the other's label
            of_estimators = of_estimators.roll(-(labelled // 2), 0)
        passes.estimators.send(passes.block, of_estimators)
        del of_estimators
    del of_refined, of_softmax
    of_keys = gradients["keys"] = passes.rows.keys_gradient() if both is None else both
    of_label_keys = of_keys[len(of_keys) - len(label_keys.keys) :]  # a view: what is added to it reaches of_keys
    if apart:
        of_label_keys += passes.mixed.keys_gradient()
    if passes.estimators is not passes.rows and passes.estimators is not passes.mixed:
        of_label_keys += passes.estimators.keys_gradient()
    if key_set.positive_index is not None:
        of_keys.index_add_(0, key_set.positive_index, of_positive)
    return gradients


def _labels_and_targets(call: Call, passes: Passes) -> tuple[Labels, Tensor]:
    """The labels over ``label_keys``, and their target centroids.

    Known labels are those of :func:`group_labels`, one-hot without groups. What :func:`compare` compared refines them:
    the positives, which are the other view where both are rows, or ``estimator``. :func:`_mixed` mixes the targets.
    """
    label_keys, known, settings = call.label_keys, call.known_of_samples, call.settings
    if not settings.refines:
        return refinery.unrefined(label_keys.rows, known.positive_share), known.targets
    stats = passes.estimators.by_block[passes.block]
    if label_keys.sees_both_views():  # each view estimates the other's label
        stats = stats.roll(len(label_keys.positives) // 2)
    estimators = label_keys if label_keys.estimator is None else label_keys.estimator
    scale = 1 / (settings.temperature * settings.sharpening)
    positive_cosine = _dot(estimators.positives, estimators.positives)  # positives estimate; 1, but for a row of zeros
    # Means of other values say nothing of the estimators' logits, and labels of groups have another entropy.
    tells_entropy = label_keys.estimator is None and known.targets is label_keys.positives
    mean_cosine = _dot(label_keys.positives, stats.mean) if tells_entropy else None
    labels = refinery.refine(stats, positive_cosine, mean_cosine, scale, settings.confidence, known.positive_share)
    return labels, labels.targets(known.targets, label_keys.positives, stats.mean)


def _mixed(targets: Tensor, mixes: Sequence[Mix]) -> Tensor:
    mixed = [targets[partner].lerp(targets, _column(theta, targets)) for theta, partner in mixes]
    return torch.cat(mixed) if len(mixed) > 1 else mixed[0]


def _column(weights: Tensor, like: Tensor) -> Tensor:
    return weights.to(like)[:, None]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)
