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

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from slr_plugin import refinery
from slr_plugin._inputs import unit_rows
from slr_plugin.groups import GroupLabels, group_labels
from slr_plugin.key_sets import KeySet
from slr_plugin.mixup import Mix
from slr_plugin.refinery import Labels
from slr_plugin.settings import Settings
from slr_plugin.streaming import Pass, SoftmaxStats, keys_gradient, softmax_stats, symmetric_gradient


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
    apart = len(crops) > 0 and key_set.has_both_views()  # mixed queries then see other keys than the rows
    labelled = key_set.for_mixed() if apart else key_set  # what the refined labels spread over
    known = group_labels(key_set)
    known_of_labelled = group_labels(labelled) if apart else known
    has_groups = known.targets is not key_set.positives
    inputs = Gradients(
        key_set.rows,
        mixed,
        key_set.positives if key_set.positive_index is None else None,
        None if key_set.keys is key_set.rows else key_set.keys,
        known.targets if has_groups else None,
        known_of_labelled.targets if has_groups and apart else None,
        settings.temperature if isinstance(settings.temperature, Tensor) else None,
    )
    needed = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]
    with torch.no_grad():
        call = Call(key_set, labelled, apart, mixed, mixes, known, known_of_labelled, settings)
        loss, labels, gradients = _evaluate(call, any(needed), key_set.keys is key_set.rows or any(needed[2:6]))
    if not any(needed):
        return loss, labels
    pairs = [pair for *pair, needs in zip(inputs, gradients, needed, strict=True) if needs]
    return _WithGradients.apply(loss, *[x for x, _ in pairs], *[x for _, x in pairs]), labels


class Call(NamedTuple):
    """What the loss is computed from."""

    key_set: KeySet
    labelled: KeySet  # the keys that refined labels spread over, and mixed queries see
    apart: bool  # whether that is not ``key_set``
    mixed: Tensor | None
    mixes: Sequence[Mix]
    known: GroupLabels  # of ``key_set``, and of ``labelled``
    known_of_labelled: GroupLabels
    settings: Settings


class Gradients(NamedTuple):
    """The gradients of a loss; None for what it has none for."""

    rows: Tensor | None = None
    mixed: Tensor | None = None
    positives: Tensor | None = None  # where they are not among the keys
    keys: Tensor | None = None  # where they are not the rows
    known: Tensor | None = None  # the known targets of the rows
    known_of_labelled: Tensor | None = None  # and of the samples that are mixed, where they see other keys
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
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # under create_graph=True only
            raise RuntimeError(
                "SLRLoss has no second derivative: its gradient is in closed form; drop create_graph=True"
            )
        gradients = ctx.saved_tensors
        return None, *[gradient * grad for gradient in gradients], *[None] * len(gradients)


def _evaluate(call: Call, needs_gradients: bool, of_keys_too: bool) -> tuple[Tensor, Labels, Gradients]:
    """The loss, its labels and its gradients."""
    key_set, labelled, apart, mixed, mixes, known, _, settings = call
    rows, positives, share = key_set.rows, key_set.positives, settings.refined_weight
    temperature, sharpening = settings.temperature, settings.sharpening
    inverse = 1 / temperature if isinstance(temperature, Tensor) else rows.new_full((), 1 / temperature)
    refines, both_views = settings.refines, labelled.has_both_views()
    # Rows that are the keys, and whose labels are no means over the softmax: one pass gives the value, and one both
    # parts of the gradient, that of the rows and that of the keys.
    mirrors = key_set.cross or not settings.chunk_size
    plain = key_set.keys is rows and mixed is None and not refines and mirrors

    # Passes, as few as the keys allow. The positives estimate the labels. Divided by tau', they have the logits of
    # tau tau' at the temperature tau and join the pass; where both views are rows, they are in it already.
    own = labelled.estimator is None
    estimating = labelled if labelled.estimator is None else labelled.estimator
    joins = refines and own and not both_views
    further = {} if mixed is None else {"mixed": mixed}
    if joins:
        further["estimators"] = labelled.positives if sharpening == 1 else labelled.positives / sharpening
    longest = 1 / sharpening if joins else 1.0
    if not apart:
        first = second = _Comparison(key_set, {"rows": rows, **further}, temperature, settings, longest, plain=plain)
    else:
        first = _Comparison(key_set, {"rows": rows}, temperature, settings)
        second = _Comparison(labelled, further, temperature, settings, longest)
    third, block = (second, "estimators") if joins else (first, "rows")
    alone = refines and not joins and (not own or sharpening != 1)
    if alone:
        values = None if own else labelled
        third = _Comparison(estimating, {"rows": estimating.rows}, temperature * sharpening, settings, values=values)

    labels, refined = _labels_and_targets(call, third.by_block[block], inverse)
    size, half = len(refined), len(refined) // 2 if both_views else 0

    # L_c(x, y) = L_c(x, onehot) + <f, g - t> / tau
    of_rows = first.by_block["rows"]
    margin = of_rows.logsumexp_minus(_dot(rows, positives) * inverse)
    loss = F.softplus(margin, threshold=40.0)  # beyond 40 nothing is left of the 1 in float64
    target = known.targets if mixed is not None or not refines else torch.lerp(known.targets, refined, share)
    if target is not positives:
        loss = loss + _dot(rows, positives - target) * inverse
    loss = loss.mean()
    if mixed is not None:  # equation (8): the targets of mixed queries are those of the two samples, mixed
        mixed_target, of_mixed = _mixed(refined, mixes), second.by_block["mixed"]
        loss = loss.lerp(of_mixed.logsumexp_minus(_dot(mixed, mixed_target) * inverse).mean(), share)
    if not needs_gradients:
        return loss, labels, Gradients()

    # The softmax's mean of the keys, minus the target.
    pull = inverse * ((1.0 if mixed is None else 1 - share) / len(rows))
    others = torch.sigmoid(margin)  # the softmax's weight on the keys besides the positive
    both = None
    if plain:
        both = symmetric_gradient(first.given, first.stats, pull * others)
        of_row = (positives * (1 - others)[:, None]).sub_(target).mul_(pull)
    else:
        of_row = torch.lerp(positives, of_rows.mean, others[:, None]).sub_(target).mul_(pull)
    of_temperature, of_mixed_row = None, torch.zeros_like(rows[:0])
    if mixed is not None:
        push = inverse * (share / len(mixed))
        of_mixed_row = (of_mixed.mean - mixed_target).mul_(push)
    if isinstance(temperature, Tensor):  # all logits are proportional to 1 / tau
        of_temperature = -inverse * _dot(rows, of_row).sum()
        if mixed is not None:
            of_temperature -= inverse * _dot(mixed, of_mixed_row).sum()
        if both is not None:  # which has the part of the rows twice, once as that of the keys
            of_temperature -= inverse * _dot(rows, both).sum() / 2
    if not of_keys_too:
        return loss, labels, Gradients(of_row, of_mixed_row, temperature=of_temperature)

    # Of the keys: as the softmax's, and through the targets, which are means of them. Were the positive the target of
    # every row, it would get - sigma_i f_i; labels move some of that from the positive to other keys.
    del refined, target  # the passes need the room
    moved = rows * (pull * others)[:, None]
    of_positive, of_refined = -moved, rows * (-share * pull)
    first.send("rows", moved)
    if mixed is not None:
        second.send("mixed", mixed * push)
        of_refined = torch.zeros_like(rows[:size])
        for crop, (theta, partner) in zip(torch.split(mixed, size), mixes, strict=True):
            part = crop * _column(theta, mixed)
            of_refined.sub_(part).index_add_(0, partner, part - crop)
        of_positive[:size] += of_refined.mul_(push)
    if refines:
        moved = of_refined * labels.rest_weight[:, None]
        of_positive[:size] -= moved
        third.send(block, moved.roll(-half, 0) if both_views else moved)
    of_known = of_known_of_labelled = None
    if known.targets is not positives:
        of_known_of_labelled = of_refined * labels.known_weight[:, None]
        of_positive[:size] -= of_known_of_labelled
        of_known = rows * (-pull if mixed is not None else (share - 1) * pull)
        of_positive -= of_known
        if not apart:
            of_known += of_known_of_labelled
    of_keys = first.keys_gradient() if both is None else both
    start = len(of_keys) - len(labelled.keys)
    if apart:
        of_keys[start:] += second.keys_gradient()
    if alone:
        of_keys[start:] += third.keys_gradient()
    if key_set.positive_index is not None:
        of_keys.index_add_(0, key_set.positive_index, of_positive)
    if key_set.keys is rows:
        of_row += of_keys
    gradients = Gradients(of_row, of_mixed_row, of_positive, of_keys, of_known, of_known_of_labelled, of_temperature)
    return loss, labels, gradients


def _labels_and_targets(call: Call, stats: SoftmaxStats, inverse: Tensor) -> tuple[Labels, Tensor]:
    """The labels, and their target centroids, by the softmax statistics of what estimates them."""
    labelled, known, settings = call.labelled, call.known_of_labelled, call.settings
    if not settings.refines:
        return refinery.unrefined(labelled.rows, known.share), known.targets
    if labelled.has_both_views():  # each view estimates the other's label
        stats = stats.roll(len(labelled.positives) // 2)
    estimating = labelled if labelled.estimator is None else labelled.estimator
    sharp = inverse if settings.sharpening == 1 else inverse / settings.sharpening
    positive_logit = _dot(estimating.positives, estimating.positives) * sharp
    # Means of other values say nothing of the estimators' logits, and labels of groups have another entropy.
    tells_entropy = labelled.estimator is None and known.targets is labelled.positives
    mean_logit = _dot(labelled.positives, stats.mean) * sharp if tells_entropy else None
    labels = refinery.estimate(stats, positive_logit, mean_logit, settings.confidence, known.share)
    return labels, labels.targets(known.targets, labelled.positives, stats.mean)


class _Comparison:
    """Blocks of rows, compared with the keys of a key set in one pass."""

    def __init__(
        self,
        key_set: KeySet,
        blocks: Mapping[str, Tensor],
        temperature: float | Tensor,
        settings: Settings,
        longest: float = 1.0,
        values: KeySet | None = None,
        plain: bool = False,
    ) -> None:
        """Compute the statistics.

        Args:
            key_set: the keys.
            blocks: (n, d) each. Mixed queries see all keys; other blocks belong to the key set's rows one to one, and
                see what those see.
            temperature: of the logits.
            settings: the numbers.
            longest: the length that no row exceeds.
            values: what is averaged in the place of the keys: those of this key set.
            plain: whether means of the keys are not needed.
        """
        self.sizes = {name: len(block) for name, block in blocks.items()}
        rows = torch.cat(list(blocks.values())) if len(blocks) > 1 else next(iter(blocks.values()))
        scale, bound = 1.0, math.inf
        if isinstance(temperature, Tensor):
            rows = rows / temperature
        else:
            scale, bound = 1 / temperature, longest / abs(temperature)
        groups = key_set.groups if key_set.ignores_group else None
        self.given = Pass(
            rows,
            key_set.keys,
            key_set.queue,
            values=key_set.keys[:, :0] if plain else None if values is None else values.keys,
            queue_values=None if values is None else values.queue,
            hidden=self._by_block(key_set.hidden()),
            row_groups=self._by_block(groups),
            key_groups=None if groups is None else key_set.key_groups,
            scale=scale,
            bound=bound,
            # The keys are the rows: half of the logits are then enough.
            symmetric=key_set.queue is None and len(blocks) == 1 and blocks.get("rows") is key_set.keys,
            cross=key_set.cross,
            chunk=settings.chunk_size or 0,
        )
        self.stats = softmax_stats(self.given, repeatable=settings.repeatable)
        self.by_block = dict(zip(blocks, self.stats.split(list(self.sizes.values())), strict=True))
        self.row_values: dict[str, Tensor] = {}

    def _by_block(self, mask: Tensor | None) -> Tensor | None:
        """What the key set's rows do not see, for the rows of all blocks."""
        if mask is None or list(self.sizes) == ["rows"]:
            return mask
        nothing = torch.full_like(mask[:1], -1)
        shape = mask.shape[1:]
        return torch.cat([nothing.expand(n, *shape) if name == "mixed" else mask for name, n in self.sizes.items()])

    def send(self, block: str, values: Tensor) -> None:
        """Let the gradient of the keys be the sum of these (n, d), by the softmax of the block's rows."""
        self.row_values[block] = self.row_values[block].add_(values) if block in self.row_values else values

    def keys_gradient(self) -> Tensor:
        """The gradient (b, d) of the keys by what was sent."""
        zero = torch.zeros_like(next(iter(self.row_values.values()))[:1])
        parts = [self.row_values.get(name, zero).expand(size, -1) for name, size in self.sizes.items()]
        return keys_gradient(self.given, self.stats, torch.cat(parts) if len(parts) > 1 else parts[0])


def _mixed(targets: Tensor, mixes: Sequence[Mix]) -> Tensor:
    return torch.cat([targets[partner].lerp(targets, _column(theta, targets)) for theta, partner in mixes])


def _column(weights: Tensor, like: Tensor) -> Tensor:
    return weights.to(like)[:, None]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)
