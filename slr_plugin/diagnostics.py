r"""How good refined labels are, told by classes that training never sees.

The theory's measure is the distance of the labels from the true soft labels: the generalisation error grows with
:math:`\mathbb E \|\bar y - y^*\|_2` (theorem 1), :math:`y^*` uniform over the keys of the query's own class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from slr_plugin.checks import check_float_tensor, check_index_tensor
from slr_plugin.distributed import gather
from slr_plugin.key_sets import KeySet
from slr_plugin.loss import SLRLoss
from slr_plugin.queue import Enqueued


class LabelQuality(NamedTuple):
    """Means over the labelled queries, as scalar tensors. The three masses sum to 1 where all keys have a class."""

    own: Tensor  # label mass on the own positive
    same: Tensor  # on other keys of the own class
    other: Tensor  # on keys of other classes
    chance: Tensor  # the share of the own class among the other keys: same / (same + other) of a blind estimator
    nearest: Tensor  # how often the other key with the largest label is of the own class
    distance: Tensor  # E ||ybar - y*||
    one_hot_distance: Tensor  # of the label that stays on the positive
    blind_distance: Tensor  # of the label that keeps the same mass and spreads the rest evenly


@torch.no_grad()
def label_quality(labels: Tensor, classes: Tensor, key_classes: Tensor, own: Tensor | None = None) -> LabelQuality:
    r"""Compare labels with classes.

    .. math:: y^*_{ik} = [\mathrm{class}_k = \mathrm{class}_i] / |\{j : \mathrm{class}_j = \mathrm{class}_i\}|

    Keys without a class (-1) and queries without one are left out: a labelled part of the data will do.

    Args:
        labels: (s, K) labels, what ``criterion.labels(out0, out1)`` returns.
        classes: (s,) int64 classes of the queries, -1 where unknown.
        key_classes: (K,) int64 classes of the keys, -1 where unknown, such as the random keys that fill a queue first;
            (s, K) where they differ from query to query.
        own: (s,) int64, the column of each query's positive; None: query i has key i. (Without a queue rows and keys
            are the views one after the other, and ``own`` is ``torch.arange(2 * s).roll(s)``.)

    Returns:
        The :class:`LabelQuality`; not a number if no query has a class and a further key with a class.

    Raises:
        ValueError: shapes do not fit.
        TypeError: a tensor has the wrong dtype.

    >>> labels = torch.tensor([[0.8, 0.2, 0.0, 0.0], [0.3, 0.6, 0.0, 0.1]])
    >>> quality = label_quality(labels, torch.tensor([0, 0]), torch.tensor([0, 0, 1, 1]))
    >>> {name: round(value.item(), 3) for name, value in quality._asdict().items()}  # doctest: +NORMALIZE_WHITESPACE
    {'own': 0.7, 'same': 0.25, 'other': 0.05, 'chance': 0.333, 'nearest': 1.0, 'distance': 0.335,
     'one_hot_distance': 0.707, 'blind_distance': 0.48}
    """
    check_float_tensor("labels", labels)
    if labels.ndim != 2:
        raise ValueError(f"labels must have shape (queries, keys), got {tuple(labels.shape)}")
    rows, keys = labels.shape
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
    return LabelQuality(
        own=mean(mass(positive)),
        same=mean(mass(same & ~positive)),
        other=mean(mass(known & ~same)),
        chance=mean((same & elsewhere).sum(1) / others),
        nearest=mean(same.gather(1, heaviest[:, None])[:, 0] + 0 * largest),  # not a number where the labels are not
        distance=distance(labels),
        one_hot_distance=distance(one_hot),
        blind_distance=distance(blind),
    )


class Observer(Protocol):
    """Follows every call of a loss; :class:`LabelMonitor` is one."""

    def begin(self) -> None:
        """A call begins, which may still raise."""

    def compare(self, key_set: KeySet, labels: Callable[[], Tensor]) -> None:
        """The loss is computed, the queue not advanced yet; ``labels()`` gives the dense labels over the key set."""

    def enqueue(self, enqueued: Enqueued) -> None:
        """The batch's keys entered the queue."""


class LabelMonitor:
    """Watches a criterion's labels during training; knows the classes of the keys in its queue.

    Announce the classes of every batch; a batch that was not announced enters the queue with unknown ones. Labels are
    measured on the calls announced with ``measure``, before the loss of the same call, and cost one dense (s, K)
    matrix; the other calls cost next to nothing. Classes become unknown when a checkpoint or a reset replaces the
    queue. Where the criterion gathers over processes, build a monitor in all of them, since it gathers the classes at
    every call; on one process alone it would wait for the others.

    Args:
        criterion: a :class:`slr_plugin.SLRLoss`.

    Raises:
        TypeError: ``criterion`` is no SLRLoss.

    >>> from slr_plugin import SLRLoss
    >>> criterion = SLRLoss(0.2, memory_bank_size=(16, 8))
    >>> monitor = LabelMonitor(criterion)
    >>> for step in range(4):
    ...     queries, keys, classes = torch.randn(8, 8), torch.randn(8, 8), torch.randint(2, (8,))
    ...     monitor.announce(classes, measure=step % 2 == 1)
    ...     loss = criterion(queries.requires_grad_(), keys)
    >>> len(monitor.measured), bool(0 <= monitor.mean().same <= 1)
    (2, True)
    """

    def __init__(self, criterion: SLRLoss) -> None:
        if not hasattr(criterion, "observers"):
            raise TypeError(f"criterion must be a slr_plugin.SLRLoss, got {type(criterion).__name__}")
        self.criterion = criterion
        self.measured: list[LabelQuality] = []
        self._announced: Tensor | None = None  # of the next call
        self._classes: Tensor | None = None  # of the call under way
        self._measures = False
        self._queue_classes, self._generation = self._unknown()
        criterion.observers.append(self)

    @property
    def queue_classes(self) -> Tensor:
        """The classes (n,) of the keys in the queue, -1 where unknown."""
        if self._generation != self.criterion.memory_bank.generation:
            self._queue_classes, self._generation = self._unknown()
        return self._queue_classes

    def announce(self, classes: Tensor, measure: bool = True) -> None:
        """Tell the classes (s,) of the criterion's next call, -1 where unknown; whether to measure its labels.

        Raises:
            TypeError: ``classes`` is no integer tensor.
        """
        check_index_tensor("classes", classes)
        self._announced, self._measures = classes, measure

    def mean(self) -> LabelQuality:
        """The mean of what was measured since the last call of this method; not a number if nothing was."""
        measured, self.measured = self.measured, []
        if not measured:
            return LabelQuality(*[torch.tensor(torch.nan)] * len(LabelQuality._fields))
        return LabelQuality(*(torch.stack(values).nanmean() for values in zip(*measured, strict=True)))

    def remove(self) -> None:
        """Let go of the criterion; a second time does nothing."""
        if self in self.criterion.observers:
            self.criterion.observers.remove(self)

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint needs beside the criterion's."""
        return {"queue_classes": self.queue_classes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, after the criterion did.

        Raises:
            ValueError: it comes from a queue of another length.
        """
        stored = state["queue_classes"]
        if stored.shape != self.queue_classes.shape:
            raise ValueError(
                f"the checkpoint's queue_classes has {len(stored)} entries, the queue {len(self.queue_classes)} keys; "
                "build the loss with the memory_bank_size of the checkpoint's run, or start a new monitor"
            )
        self._queue_classes = stored.to(self.queue_classes)

    # ---------------------------------------------------------- what the criterion calls, see Observer

    def begin(self) -> None:
        """Take the announcement, which belongs to this call even if it raises."""
        self._classes, self._announced = self._announced, None

    @torch.no_grad()
    def compare(self, key_set: KeySet, labels: Callable[[], Tensor]) -> None:
        """Measure the labels, if announced, while the queue still holds the keys that they spread over."""
        size = len(key_set.positives)
        device = key_set.positives.device
        if self._classes is None:  # nobody told
            self._classes, self._measures = torch.full((size,), -1, device=device), False
        if self._classes.shape != (size,):
            raise ValueError(
                f"the classes announced have shape {tuple(self._classes.shape)}, the criterion's batch {size} "
                "rows; announce one class per query, -1 where it is unknown"
            )
        local = self._classes.to(device, torch.int64)
        self._classes = gather(local) if self.criterion.gather_distributed else local
        if self._measures:
            rows, columns = key_set.column_classes(local, self._classes, self.queue_classes.to(device))
            self.measured.append(label_quality(labels(), rows, columns, key_set.own_columns()))

    def enqueue(self, enqueued: Enqueued) -> None:
        """Record the classes of the keys that were just enqueued."""
        places, accepted = enqueued
        assert self._classes is not None
        classes = self.queue_classes
        newest = self._classes[-len(places) :].to(classes.device)
        places, accepted = places.to(classes.device), accepted.to(classes.device)
        # Without reading back whether the keys were finite.
        self._queue_classes = classes.index_copy(0, places, torch.where(accepted, newest, classes[places]))

    def _unknown(self) -> tuple[Tensor, int]:
        bank = self.criterion.memory_bank
        return torch.full((len(bank),), -1, device=bank.bank.device), bank.generation
