r"""Compares labels with classes.

The theory's measure is the distance of the labels from the true soft labels: the generalisation error grows with
:math:`\mathbb E \|\bar y - y^*\|_2` (theorem 1), :math:`y^*` uniform over the keys of the query's own class.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from slr_plugin.checks import check_float_tensor, check_index_tensor
from slr_plugin.loss import SLRLoss

NOTHING_MEASURED = "nothing was measured: call announce(classes) before the criterion"
NO_CLASSES = "no query has a class: all of them are -1"
NO_KEYS = "no key besides the own positives has a class: announce more of them; a queue begins with keys that have none"
NOT_NUMBERS = "the labels are not numbers themselves: the run has diverged"
ONE_HOT = "nothing lies on other keys: the labels are one-hot"


class _Measures(NamedTuple):
    own: Tensor
    same: Tensor
    other: Tensor
    chance: Tensor
    nearest: Tensor
    distance: Tensor
    one_hot_distance: Tensor
    blind_distance: Tensor
    purity: Tensor


class LabelQuality(_Measures):
    """Means over the labelled queries, as scalar tensors; ``print`` shows what each says.

    Attributes:
        own: label mass on the own positive. The three masses sum to 1 where all keys have a class.
        same: label mass on other keys of the own class.
        other: label mass on keys of other classes.
        chance: the share of the own class among the other keys: the purity of a blind estimator.
        nearest: how often the other key with the largest label is of the own class.
        distance: E ||label - true label||, where the true label is uniform over the keys of the own class.
        one_hot_distance: that of the label that stays on the own positive.
        blind_distance: that of the label that keeps its mass on the own positive and spreads the rest evenly.
        purity: same / (same + other), the share of the own class in what the label gives away.
        reason: why values are not a number, or None.
    """

    reason: str | None = None

    @classmethod
    def average(cls, qualities: Iterable[LabelQuality]) -> LabelQuality:
        """The mean of several, without those that are not a number; its purity is that of the mean masses."""
        qualities = list(qualities)
        if not qualities:
            return cls._of([torch.tensor(torch.nan)] * len(cls._fields), NOTHING_MEASURED)
        values = [torch.stack(column).nanmean() for column in zip(*qualities, strict=True)]
        return cls._of(values[:-1], next((q.reason for q in qualities if q.reason not in (None, ONE_HOT)), None))

    @classmethod
    def _of(cls, values: Sequence[Tensor], reason: str | None) -> LabelQuality:
        """With the purity of these masses, and the reason if one is needed."""
        given = values[1] + values[2]
        quality = cls._make([*values[:8], values[1] / given])
        if not math.isfinite(quality.own):
            quality.reason = reason or NOT_NUMBERS
        elif not math.isfinite(quality.purity):
            quality.reason = ONE_HOT
        return quality

    def __repr__(self) -> str:
        v = {name: value.item() for name, value in self._asdict().items()}
        if math.isnan(v["own"]):
            return f"LabelQuality: not a number, since {self.reason}"
        purity = "none" if math.isnan(v["purity"]) else f"{v['purity']:.1%}"
        unknown = 1 - v["own"] - v["same"] - v["other"]
        lines = [
            f"LabelQuality{f' ({self.reason})' if self.reason else ''}",
            f"  label mass    {v['own']:.1%} own positive, {v['same']:.1%} other keys of the own class, "
            f"{v['other']:.1%} other classes" + (f", {unknown:.1%} unknown ones" if unknown > 5e-4 else ""),
            f"  purity        {purity} of what lies on other keys is on the own class; chance is {v['chance']:.1%}",
            f"  nearest       {v['nearest']:.1%} of the largest other keys are of the own class",
            f"  distance      {v['distance']:.3f} from the true labels; one-hot {v['one_hot_distance']:.3f}, blind "
            f"{v['blind_distance']:.3f}",
        ]
        return "\n".join(lines)

    __str__ = __repr__


@torch.no_grad()
def label_quality(labels: Tensor, classes: Tensor, key_classes: Tensor, own: Tensor | None = None) -> LabelQuality:
    r"""Compare labels with classes.

    The true label of a query is uniform over the keys of its class, its own positive among them.
    Keys without a class (-1) and queries without one are left out: a labelled part of the data will do.

    Args:
        labels: (s, K) labels, what ``criterion.labels(out0, out1)`` returns.
        classes: (s,) int64 classes of the queries, -1 where unknown.
        key_classes: (K,) int64 classes of the keys, -1 where unknown, such as the random keys that fill a queue first;
            (s, K) where they differ from query to query.
        own: (s,) int64, the column of each query's positive; None: query i has key i. (Without a queue rows and keys
            are the views one after the other, and ``own`` is ``torch.arange(2 * s).roll(s)``.)

    Returns:
        The :class:`LabelQuality`; not a number if no query has a class and a further key with a class, of which its
        ``reason`` tells.

    Raises:
        ValueError: shapes do not fit, or ``own`` is None and the labels show that it is not query i's key i.
        TypeError: a tensor has the wrong dtype.

    >>> labels = torch.tensor([[0.8, 0.2, 0.0, 0.0], [0.3, 0.6, 0.0, 0.1]])
    >>> label_quality(labels, torch.tensor([0, 0]), torch.tensor([0, 0, 1, 1]))
    LabelQuality
      label mass    70.0% own positive, 25.0% other keys of the own class, 5.0% other classes
      purity        83.3% of what lies on other keys is on the own class; chance is 33.3%
      nearest       100.0% of the largest other keys are of the own class
      distance      0.335 from the true labels; one-hot 0.707, blind 0.480
    """
    check_float_tensor("labels", labels)
    if labels.ndim != 2:
        raise ValueError(f"labels must have shape (queries, keys), got {tuple(labels.shape)}")
    rows, keys = labels.shape
    if own is None and rows == keys and not bool(labels.diagonal().any()) and bool(labels.any()):
        raise ValueError(
            "no label has weight on its own column: of labels of both views, row i has the own column i + s; pass "
            "own=torch.arange(2 * s).roll(s)"
        )
    own = torch.arange(rows, device=labels.device) if own is None else own
    shapes: dict[str, list[tuple[int, ...]]] = {
        "classes": [(rows,)],
        "key_classes": [(keys,), (rows, keys)],
        "own": [(rows,)],
    }
    for (name, allowed), value in zip(shapes.items(), (classes, key_classes, own), strict=True):
        check_index_tensor(name, value)
        if tuple(value.shape) not in allowed:
            wanted = " or ".join(str(shape) for shape in allowed)
            raise ValueError(f"{name} must have shape {wanted} beside labels {(rows, keys)}, got {tuple(value.shape)}")
    if rows and not bool(((own >= 0) & (own < keys)).all()):
        raise ValueError(f"own must name columns of labels {(rows, keys)}, one per row; pass own=")
    classes, key_classes, own = (x.to(labels.device, torch.int64) for x in (classes, key_classes, own))

    positive = torch.zeros_like(labels, dtype=torch.bool).scatter_(1, own[:, None], True)
    same = (classes[:, None] == key_classes) | positive
    known = (key_classes >= 0).expand_as(same) | positive
    elsewhere = known & ~positive
    counted = (classes >= 0) & elsewhere.any(1)

    def mean(values: Tensor) -> Tensor:
        return values[counted].mean()

    def mass(mask: Tensor) -> Tensor:
        return (labels * mask).sum(1)

    def distance(label: Tensor) -> Tensor:
        truth = same / same.sum(1, keepdim=True).to(labels)
        return mean(((label - truth) * known).norm(dim=1))

    others = elsewhere.sum(1).clamp(min=1).to(labels)
    one_hot = positive.to(labels)
    blind = mass(positive)[:, None] * one_hot + (mass(elsewhere) / others)[:, None] * elsewhere
    largest, heaviest = labels.masked_fill(~elsewhere, -1.0).max(1)
    measures = (
        mean(mass(positive)),
        mean(mass(same & ~positive)),
        mean(mass(known & ~same)),
        mean((same & elsewhere).sum(1) / others),
        mean(same.gather(1, heaviest[:, None])[:, 0] + 0 * largest),  # not a number where the labels are not
        distance(labels),
        distance(one_hot),
        distance(blind),
    )
    reason = None if bool(counted.any()) else NO_KEYS if bool((classes >= 0).any()) else NO_CLASSES
    return LabelQuality._of(measures, reason)


def summary(quality: LabelQuality, criterion: SLRLoss | None = None) -> str:
    """Say in words how good labels are.

    Args:
        quality: of some batches, as from ``monitor.mean()``.
        criterion: the loss they come from, whose settings are then named.

    >>> labels = torch.tensor([[0.8, 0.2, 0.0, 0.0], [0.3, 0.6, 0.0, 0.1]])
    >>> print(summary(label_quality(labels, torch.tensor([0, 0]), torch.tensor([0, 0, 1, 1]))))
    The labels give away 30.0%. Of that, 83.3% lies on the own class, where blind labels reach 33.3%.
    Whether accuracy follows, only an evaluation of the features tells.
    """
    if quality.reason not in (None, ONE_HOT):
        return f"Cannot tell: {quality.reason}."
    own, purity, chance = quality.own.item(), quality.purity.item(), quality.chance.item()
    settings = ""
    if criterion is not None and criterion.stats:
        settings = f" at confidence {criterion.stats['mu'].item():.3g} and sharpening {criterion.sharpening:.3g}"
    if own > 0.99:
        return f"Nearly one-hot: {own:.1%} of a label stays on the own positive{settings}."
    return (
        f"The labels give away {1 - own:.1%}{settings}. Of that, {purity:.1%} lies on the own class, where blind "
        f"labels reach {chance:.1%}.\nWhether accuracy follows, only an evaluation of the features tells."
    )
