r"""How good refined labels are, told by classes that training never sees: measure, print, plot, put into words.

The theory's measure is the distance of the labels from the true soft labels: the generalisation error grows with
:math:`\mathbb E \|\bar y - y^*\|_2` (theorem 1), :math:`y^*` uniform over the keys of the query's own class.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from slr_plugin.checks import check_float_tensor, check_index_tensor
from slr_plugin.distributed import gather
from slr_plugin.key_sets import KeySet
from slr_plugin.loss import SLRLoss
from slr_plugin.queue import Enqueued

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NOTHING_MEASURED = "nothing was measured: call announce(classes) before the criterion"
NO_CLASSES = "no query has a class: all of them are -1"
NO_KEYS = "no key besides the own positives has a class; a queue holds random keys until the first batches filled it"
NOT_NUMBERS = "the labels are not numbers themselves: the run has diverged"
ONE_HOT = "nothing lies on other keys: the labels are one-hot"


class _Measures(NamedTuple):
    own: Tensor  # label mass on the own positive
    same: Tensor  # on other keys of the own class
    other: Tensor  # on keys of other classes
    chance: Tensor  # the share of the own class among the other keys: the purity of a blind estimator
    nearest: Tensor  # how often the other key with the largest label is of the own class
    distance: Tensor  # E ||ybar - y*||
    one_hot_distance: Tensor  # of the label that stays on the positive
    blind_distance: Tensor  # of the label that keeps the same mass and spreads the rest evenly
    purity: Tensor  # same / (same + other): how much of the mass beyond the own positive is on the own class


class LabelQuality(_Measures):
    """Means over the labelled queries, as scalar tensors; ``print`` shows what each says.

    Attributes:
        own: label mass on the own positive. The three masses sum to 1 where all keys have a class.
        same: label mass on other keys of the own class.
        other: label mass on keys of other classes.
        chance: the share of the own class among the other keys, which is the purity of a blind estimator.
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
        lines = [
            f"LabelQuality{f' ({self.reason})' if self.reason else ''}",
            f"  label mass    {v['own']:.1%} own positive, {v['same']:.1%} other keys of the own class, "
            f"{v['other']:.1%} other classes",
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
        ValueError: shapes do not fit.
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
        return LabelQuality.average(measured)

    def summary(self) -> str:
        """Say in words how good the labels measured since the last :meth:`mean` are, and what to change."""
        return summary(LabelQuality.average(self.measured), self.criterion)

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


def summary(quality: LabelQuality, criterion: SLRLoss | None = None) -> str:
    """Say in words how good labels are, and what to change.

    Args:
        quality: of some batches, as from ``monitor.mean()``.
        criterion: the loss they come from, whose settings are then named.

    >>> labels = torch.tensor([[0.8, 0.2, 0.0, 0.0], [0.3, 0.6, 0.0, 0.1]])
    >>> print(summary(label_quality(labels, torch.tensor([0, 0]), torch.tensor([0, 0, 1, 1]))))
    Good: 83% of what the labels give away lies on the own class, 2.5 times chance (33%). They give away 30%.
    This compares labels with your classes; whether accuracy follows, only an evaluation of the features tells.
    """
    mu = "" if criterion is None or not criterion.stats else f" (now {criterion.stats['mu'].item():.3g})"
    tau = "" if criterion is None else f" (now {criterion.sharpening:.3g})"
    own, same, other, chance, *_, purity = (value.item() for value in quality)
    if quality.reason and quality.reason != ONE_HOT:
        return f"Cannot tell: {quality.reason}."
    given = same + other
    if given < 0.01:
        return (
            f"Nearly one-hot: the labels leave {own:.1%} on the own positive, so refinement does next to nothing. "
            f"Early in training that is usual; later, raise the confidence{mu} to give more away."
        )
    found = f"{purity:.0%} of what the labels give away lies on the own class"
    if purity < 1.2 * chance:
        return (
            f"Blind: {found}, where chance is {chance:.0%}: they do not know the classes. Early in training that is "
            f"usual: let the confidence{mu} grow from 0, CosineConfidence(0, end, total_steps). If it stays so, take "
            "confidence=0, which is one-hot labels."
        )
    times = f"{purity / chance:.1f} times chance ({chance:.0%})" if chance else "where chance is 0%"
    amount = f"They give away {given:.0%}."
    caution = (
        "This compares labels with your classes; whether accuracy follows, only an evaluation of the features tells."
    )
    if purity < 0.5:
        return (
            f"Better than chance, but more than half wrong: {found}, {times}. {amount} Lower the sharpening{tau} for "
            f"purer labels, or the confidence{mu} to give less away.\n{caution}"
        )
    advice = "" if given >= 0.05 else f" That is little: raise the confidence{mu} for more."
    return f"Good: {found}, {times}. {amount}{advice}\n{caution}"


Run = Sequence[LabelQuality | Mapping[str, float]]


def plot(
    runs: Run | Sequence[Run],
    x: Sequence[float] | None = None,
    xlabel: str = "epoch",
    axes: Sequence[Axes] | None = None,
) -> Figure:
    """Draw purity against chance, and where the labels lie, over training. Needs matplotlib.

    Args:
        runs: what ``monitor.mean()`` gave at each epoch, or rows of its numbers by name, where some may be missing; or
            several such runs, of which the mean and the range are drawn.
        x: the epochs; None counts from 1.
        xlabel: what x is.
        axes: two of a figure to draw into; None makes a new figure.

    Returns:
        The figure, to be saved by ``figure.savefig(path)``.

    Raises:
        ImportError: there is no matplotlib.
        ValueError: there is nothing to draw, or runs and x have different lengths.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError("matplotlib is not installed: pip install matplotlib", name="matplotlib") from error
    several: Sequence[Run] = [runs] if _is_row(next(iter(runs), None)) else runs  # type: ignore[assignment, list-item]
    rows = [[row if isinstance(row, Mapping) else row._asdict() for row in run] for run in several]
    lengths = {len(run) for run in rows}
    if not rows or lengths == {0}:
        raise ValueError("runs must hold at least one LabelQuality")
    x = list(range(1, 1 + max(lengths))) if x is None else list(x)
    if lengths != {len(x)}:
        raise ValueError(f"runs and x must have one length, got runs of {sorted(lengths)} and x of {len(x)}")
    if axes is None:
        axes = Figure(figsize=(9, 3.6), layout="constrained").subplots(1, 2)
    left, right = axes

    def draw(panel: Axes, name: str, label: str, colour: str, **style: Any) -> None:
        values = torch.tensor(
            [[100 * float(row.get(name, math.nan)) for row in run] for run in rows], dtype=torch.float64
        )
        # Of short runs, single points too.
        marker = "." if len(x) <= 30 else None
        panel.plot(x, values.nanmean(0), label=label, color=colour, marker=marker, **style)
        if len(values) > 1:
            panel.fill_between(x, values.amin(0), values.amax(0), color=colour, alpha=0.2, linewidth=0)

    draw(left, "purity", "labels", "tab:blue")
    draw(left, "chance", "chance: blind labels", "tab:grey", linestyle="--")
    left.set(title="Purity of what labels give away", ylabel="on keys of the own class (%)", ylim=(0, 100))
    draw(right, "same", "on keys of the own class", "tab:blue")
    draw(right, "other", "on keys of other classes", "tab:red")
    right.set(title="Label mass beyond the own positive", ylabel="share of the label (%)")
    right.set_ylim(bottom=0)
    for panel in axes:
        panel.set_xlabel(xlabel)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False)
    return left.figure  # type: ignore[return-value]


def _is_row(value: Any) -> bool:
    return isinstance(value, LabelQuality | Mapping)
