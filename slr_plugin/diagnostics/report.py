"""Puts the quality of labels into words and pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from slr_plugin.diagnostics.quality import ONE_HOT, LabelQuality
from slr_plugin.loss import SLRLoss

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def summary(quality: LabelQuality, criterion: SLRLoss | None = None) -> str:
    """Say in words how good labels are, and what to change.

    Args:
        quality: of some batches, as from ``monitor.mean()``.
        criterion: the loss they come from, whose settings are then named.

    >>> from slr_plugin.diagnostics import label_quality
    >>> labels = torch.tensor([[0.8, 0.2, 0.0, 0.0], [0.3, 0.6, 0.0, 0.1]])
    >>> print(summary(label_quality(labels, torch.tensor([0, 0]), torch.tensor([0, 0, 1, 1]))))
    Good: 83% of what the labels give away lies on the own class, 2.5 times chance (33%). They give away 30%.
    This compares labels with your classes; whether accuracy follows, only an evaluation of the features tells.
    """
    mu = "" if criterion is None or not criterion.stats else f" (now {criterion.stats['mu'].item():.3g})"
    sharpening = "" if criterion is None else f" (now {criterion.sharpening:.3g})"
    own, chance, purity = quality.own.item(), quality.chance.item(), quality.purity.item()
    if quality.reason and quality.reason != ONE_HOT:
        return f"Cannot tell: {quality.reason}."
    given = 1 - own  # also to keys without a class
    if given < 0.01:
        return (
            f"Nearly one-hot: the labels leave {own:.1%} on the own positive, so refinement does next to nothing, and "
            f"confidence=0 does the same. Early in training that is usual; a larger confidence{mu} gives more away."
        )
    found = f"{purity:.0%} of what the labels give away lies on the own class"
    if purity < 1.2 * chance:
        blind = f"Blind: {found}, where chance is {chance:.0%}: "
        if criterion is not None and criterion.stats and criterion.stats["label_entropy"].isnan():  # by an estimator
            return f"{blind}the features that estimate them do not know the classes. Take others, or none."
        return (
            f"{blind}they do not know the classes. Early in training that is usual: let the confidence{mu} grow from "
            "0, CosineConfidence(0, end, total_steps). If it stays so, take confidence=0, which is one-hot labels."
        )
    times = f"{purity / chance:.1f} times chance ({chance:.0%})" if chance else "where chance is 0%"
    amount = f"They give away {given:.0%}."
    caution = (
        "This compares labels with your classes; whether accuracy follows, only an evaluation of the features tells."
    )
    if purity < max(0.5, min(2 * chance, 0.9)):
        verdict = "more than half wrong" if purity < 0.5 else "not by much"
        return (
            f"Better than chance, but {verdict}: {found}, {times}. {amount} Lower the sharpening{sharpening} for purer "
            f"labels, or the confidence{mu} to give less away.\n{caution}"
        )
    advice = ""
    if given < 0.05:
        advice = f" That is little: a larger confidence{mu} gives more."
    elif given > 2 / 3:
        advice = f" That is most of a label: a lower sharpening{sharpening} leaves more on the own positive."
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
        ValueError: there is no run, or runs and x have different lengths.
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
