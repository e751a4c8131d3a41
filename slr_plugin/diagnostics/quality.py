r"""Compares labels with classes.

The theory's measure is the distance of the labels from the true soft labels: the generalisation error grows with
:math:`\mathbb E \|\bar y - y^*\|_2` (theorem 1), :math:`y^*` uniform over the keys of the query's own class.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from slr_plugin.checks import check_float_tensor, check_index_tensor


class LabelQuality(NamedTuple):
    """Means over the labelled queries, as scalar tensors; ``print`` says what each means.

    All are not a number where no query has a class and another key with one, and where the labels are not numbers;
    purity alone where labels are one-hot.
    """

    own: Tensor  #: label mass on the own positive; the three masses sum to 1 where all keys have a class
    same: Tensor  #: label mass on other keys of the own class
    other: Tensor  #: label mass on keys of other classes
    chance: Tensor  #: the share of the own class among the other keys, which is the purity of a blind estimator
    nearest: Tensor  #: how often the other key with the largest label is of the own class
    distance: Tensor  #: E ||label - true label||, where the true label is uniform over the keys of the own class
    one_hot_distance: Tensor  #: that of the label that stays on the own positive
    blind_distance: Tensor  #: that of the label that keeps its mass on the own positive and spreads the rest evenly
    purity: Tensor  #: same / (same + other), the share of the own class in what the label gives away

    def __str__(self) -> str:
        v = {name: value.item() for name, value in self._asdict().items()}
        if v["own"] != v["own"]:
            return "LabelQuality: not a number, as where no query has a class and another key with one"
        purity = "none" if v["purity"] != v["purity"] else f"{v['purity']:.1%}"  # of one-hot labels
        unknown = 1 - v["own"] - v["same"] - v["other"]
        lines = [
            "LabelQuality",
            f"  label mass    {v['own']:.1%} own positive, {v['same']:.1%} other keys of the own class, "
            f"{v['other']:.1%} other classes" + (f", {unknown:.1%} unknown ones" if unknown > 5e-4 else ""),
            f"  purity        {purity} of what lies on other keys is on the own class; chance is {v['chance']:.1%}",
            f"  nearest       {v['nearest']:.1%} of the largest other keys are of the own class",
            f"  distance      {v['distance']:.3f} from the true labels; one-hot {v['one_hot_distance']:.3f}, blind "
            f"{v['blind_distance']:.3f}",
        ]
        return "\n".join(lines)

    @classmethod
    def average(cls, qualities: Iterable[LabelQuality]) -> LabelQuality:
        """The mean of several, without those that are not a number; its purity is that of the mean masses."""
        columns = zip(*qualities, strict=True)
        means = [torch.stack(column).nanmean() for column in columns] or [torch.tensor(torch.nan)] * len(cls._fields)
        return _with_purity(means[:-1])


def _with_purity(values: Sequence[Tensor]) -> LabelQuality:
    _, same, other, *_ = values
    return LabelQuality._make([*values, same / (same + other)])


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
        The :class:`LabelQuality`.

    Raises:
        ValueError: shapes do not fit, or ``own`` is None and the labels show that it is not query i's key i.
        TypeError: a tensor has the wrong dtype.

    >>> labels = torch.tensor([[0.8, 0.2, 0.0, 0.0], [0.3, 0.6, 0.0, 0.1]])
    >>> print(label_quality(labels, torch.tensor([0, 0]), torch.tensor([0, 0, 1, 1])))
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
    return _with_purity(
        [
            mean(mass(positive)),
            mean(mass(same & ~positive)),
            mean(mass(known & ~same)),
            mean((same & elsewhere).sum(1) / others),
            mean(same.gather(1, heaviest[:, None])[:, 0] + 0 * largest),  # not a number where the labels are not
            distance(labels),
            distance(one_hot),
            distance(blind),
        ]
    )
