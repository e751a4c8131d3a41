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
refined, not mixed     :math:`(1 - \lambda) g_i + \lambda t_i`, of the refinery :math:`t_i = (1 - v_i) g_i + v_i a_i`
mixed with row j       :math:`\theta_i t_i + (1 - \theta_i) t_j`
=====================  =======================================================================================

Where groups are known, :math:`t^0_i`, the mean of the group's keys, stands in the place of the one-hot label's target
:math:`g_i`. A row's positive is hidden in the pass and added back here, as
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
    apart = mixed is not None and key_set.has_both_views()  # whether these are not the key set itself
    known = group_labels(key_set)
    known_of_samples = group_labels(label_keys) if apart else known
    has_groups = known.targets is not key_set.positives
    inputs = Inputs(
        rows=key_set.rows,
        mixed=mixed,
        positives=key_set.positives if key_set.positive_index is None else None,
        keys=None if key_set.keys is key_set.rows else key_set.keys,
        known=known.targets if has_groups else None,
        known_of_samples=known_of_samples.targets if has_groups and apart else None,
        temperature=settings.temperature if isinstance(settings.temperature, Tensor) else None,
    )
    needed = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]
    keys_too = key_set.keys is key_set.rows or any(needed[2:6])  # what reaches keys, as such or through targets
    with torch.no_grad():
        call = Call(key_set, label_keys, mixed, mixes, known, known_of_samples, settings)
        loss, labels, gradients = _evaluate(call, any(needed), keys_too)
    if not any(needed):
        return loss, labels
    pairs = [pair for *pair, needs in zip(inputs, gradients, needed, strict=True) if needs]
    return _WithGradients.apply(loss, *[x for x, _ in pairs], *[x for _, x in pairs]), labels


class Call(NamedTuple):
    """What the loss is computed from."""

    key_set: KeySet  # the rows and their keys
    label_keys: KeySet  # the keys that refined labels spread over and mixed queries see
    mixed: Tensor | None
    mixes: Sequence[Mix]
    known: GroupLabels  # of the rows
    known_of_samples: GroupLabels  # of the rows of ``label_keys``
    settings: Settings


class Inputs(NamedTuple):
    """What a loss may be differentiated by, or its gradients; None for what there is not."""

    rows: Tensor | None = None
    mixed: Tensor | None = None
    positives: Tensor | None = None  # where they are not among the keys
    keys: Tensor | None = None  # where they are not the rows
    known: Tensor | None = None  # the known targets of the rows
    known_of_samples: Tensor | None = None  # and of the samples that are mixed, where they see other keys
    temperature: Tensor | None = None


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


def _evaluate(call: Call, needs_gradients: bool, keys_too: bool) -> tuple[Tensor, Labels, Inputs]:
    """The loss, its labels and its gradients."""
    key_set, mixed, settings = call.key_set, call.mixed, call.settings
    rows, positives, temperature = key_set.rows, key_set.positives, settings.temperature
    inverse, refined_weight = 1 / temperature, settings.refined_weight
    passes = compare(key_set, call.label_keys, mixed, settings)
    labels, refined = _labels_and_targets(call, passes)

    # L_c(x, y) = L_c(x, onehot) + <f, g - t> / tau
    of_rows = passes.rows.by_block["rows"]
    # Of the other keys' log-sum-exp over the positive's logit.
    excess = of_rows.logsumexp_minus(_dot(rows, positives) * inverse)
    loss = F.softplus(excess, threshold=40.0)  # beyond 40 nothing is left of the 1 in float64
    target = call.known.targets
    if mixed is None and settings.refines:
        target = torch.lerp(target, refined, refined_weight)
    if target is not positives:
        loss = loss + _dot(rows, positives - target) * inverse
    loss = loss.mean()
    if mixed is not None:  # equation (8): the targets of mixed queries are those of the two samples, mixed
        mixed_target, of_mixed = _mixed(refined, call.mixes), passes.mixed.by_block["mixed"]
        loss = loss.lerp(of_mixed.logsumexp_minus(_dot(mixed, mixed_target) * inverse).mean(), refined_weight)
    if not needs_gradients:
        return loss, labels, Inputs()

    # Of rows and mixed queries: the softmax's mean of the keys, minus the target.
    pull = inverse * ((1.0 if mixed is None else 1 - refined_weight) / len(rows))
    others = torch.sigmoid(excess)  # the softmax's weight on the keys besides the positive
    both = of_mixed_row = of_temperature = None  # both: the softmax's part of rows that are keys too
    if passes.one_hot_pairs:
        both = symmetric_gradient(passes.rows.given, passes.rows.stats, pull * others)
        of_row = (positives * (1 - others)[:, None]).sub_(target).mul_(pull)
    else:
        of_row = torch.lerp(positives, of_rows.mean, others[:, None]).sub_(target).mul_(pull)
    if mixed is not None:
        of_mixed_row = (of_mixed.mean - mixed_target).mul_(inverse * (refined_weight / len(mixed)))
    if isinstance(temperature, Tensor):  # all logits are proportional to 1 / tau
        of_temperature = -inverse * _dot(rows, of_row).sum()
        if mixed is not None and of_mixed_row is not None:
            of_temperature -= inverse * _dot(mixed, of_mixed_row).sum()
        if both is not None:  # which has the part of the rows twice, once as that of the keys
            of_temperature -= inverse * _dot(rows, both).sum() / 2
    gradients = Inputs(of_row, of_mixed_row, temperature=of_temperature)
    if keys_too:
        del refined, target  # the passes over the keys need the memory
        gradients = _with_keys(gradients, call, passes, labels, pull, others, both)
    return loss, labels, gradients


def _with_keys(
    gradients: Inputs,
    call: Call,
    passes: Passes,
    labels: Labels,
    pull: float | Tensor,
    others: Tensor,
    both: Tensor | None,
) -> Inputs:
    """The gradients with those of the keys: as the softmax's keys, and through the targets, which are means of them.

    Were the positive the target of every row, it would get -w f, with w the softmax's weight on the other keys times
    ``pull``. A part of the label that lies on other keys gives its share of -pull f to them, and takes it back from the
    positive.

    Args:
        gradients: of rows, mixed queries and temperature.
        call: what is differentiated.
        passes: over its keys.
        labels: of its rows.
        pull: the derivative of the loss by a row's logits, where labels and softmax are 1.
        others: (r,) the softmax's weight on the keys besides the positive.
        both: of rows that are the keys, the softmax's part of both; None otherwise.
    """
    key_set, label_keys, mixed, mixes, known, _, settings = call
    rows, inverse, refined_weight = key_set.rows, 1 / settings.temperature, settings.refined_weight
    samples, apart = len(label_keys.rows), mixed is not None and key_set.has_both_views()

    of_others = rows * (pull * others)[:, None]
    of_positive, of_refined = -of_others, rows * (-refined_weight * pull)
    passes.rows.send("rows", of_others)
    if mixed is not None:
        push = inverse * (refined_weight / len(mixed))
        passes.mixed.send("mixed", mixed * push)
        of_refined = torch.zeros_like(rows[:samples])
        for crop, (theta, partner) in zip(torch.split(mixed, samples), mixes, strict=True):
            part = crop * _column(theta, mixed)
            of_refined.sub_(part).index_add_(0, partner, part - crop)
        of_positive[:samples] += of_refined.mul_(push)
    of_known = of_known_of_samples = None
    if known.targets is not key_set.positives:
        of_known_of_samples = of_refined * labels.known_weight[:, None]
        of_positive[:samples] -= of_known_of_samples
        of_known = rows * (-pull if mixed is not None else (refined_weight - 1) * pull)
        of_positive -= of_known
        if not apart:
            of_known += of_known_of_samples
    if settings.refines:
        of_others = of_refined.mul_(labels.rest_weight[:, None])
        of_positive[:samples] -= of_others
        if label_keys.has_both_views():  # each view estimates the other's label
            of_others = of_others.roll(-(samples // 2), 0)
        passes.estimators.send(passes.block, of_others)
    del of_refined, of_others
    of_keys = passes.rows.keys_gradient() if both is None else both
    of_label_keys = of_keys[len(of_keys) - len(label_keys.keys) :]
    if apart:
        of_label_keys += passes.mixed.keys_gradient()
    if passes.estimators is not passes.rows and passes.estimators is not passes.mixed:
        of_label_keys += passes.estimators.keys_gradient()
    if key_set.positive_index is not None:
        of_keys.index_add_(0, key_set.positive_index, of_positive)
    if key_set.keys is rows and gradients.rows is not None:
        gradients.rows.add_(of_keys)
    of_row, of_mixed_row, *_, of_temperature = gradients  # torch.compile cannot trace _replace in torch 2.4
    return Inputs(of_row, of_mixed_row, of_positive, of_keys, of_known, of_known_of_samples, of_temperature)


def _labels_and_targets(call: Call, passes: Passes) -> tuple[Labels, Tensor]:
    """The labels over ``label_keys``, and their target centroids."""
    label_keys, known, settings = call.label_keys, call.known_of_samples, call.settings
    if not settings.refines:
        return refinery.unrefined(label_keys.rows, known.positive_share), known.targets
    stats = passes.estimators.by_block[passes.block]
    if label_keys.has_both_views():  # each view estimates the other's label
        stats = stats.roll(len(label_keys.positives) // 2)
    estimators = label_keys if label_keys.estimator is None else label_keys.estimator
    inverse = 1 / (settings.temperature * settings.sharpening)
    positive_logit = _dot(estimators.positives, estimators.positives) * inverse
    # Means of other values say nothing of the estimators' logits, and labels of groups have another entropy.
    tells_entropy = label_keys.estimator is None and known.targets is label_keys.positives
    mean_logit = _dot(label_keys.positives, stats.mean) * inverse if tells_entropy else None
    labels = refinery.refine(stats, positive_logit, mean_logit, settings.confidence, known.positive_share)
    return labels, labels.targets(known.targets, label_keys.positives, stats.mean)


def _mixed(targets: Tensor, mixes: Sequence[Mix]) -> Tensor:
    return torch.cat([targets[partner].lerp(targets, _column(theta, targets)) for theta, partner in mixes])


def _column(weights: Tensor, like: Tensor) -> Tensor:
    return weights.to(like)[:, None]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)
