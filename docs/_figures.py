"""Draws the site's figures when it is built, in colours for a light and for a dark page."""

import json
from collections.abc import Callable
from pathlib import Path

import matplotlib
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from slr_plugin import SLRLoss

RECORDS = Path(__file__).parent.parent / "results" / "representations"
HIDDEN, NEGATIVE, OWN, OTHER_OWN = range(4)
MEANING = [
    "not compared",
    "negative",
    "its own positive",
    "its partner's positive, of weight 1 - θ",
]
SIZE, QUEUE = 4, 3  # samples in the batch, keys in the queue
STYLES = {
    "light": {"ink": "#202020", "cells": ["#ffffff", "#e8a598", "#2f7d5b", "#8fc4a9"]},
    "dark": {"ink": "#d8d8d8", "cells": ["#16191c", "#7d4238", "#58b98c", "#2f6b51"]},
}


def matrix(*, queue: int = 0, negatives: int = 0, **settings: bool) -> torch.Tensor:
    """Who is whose negative, asked of the loss: with full confidence a label is 0 only on keys that a row is not
    compared with, and without any it is 1 on the own positive.
    """
    torch.manual_seed(0)
    criterion = SLRLoss(0.5, (queue, 8) if queue else 0, **settings)
    arguments = torch.randn(SIZE, 8), torch.randn(SIZE, 8)
    further = torch.randn(negatives, 8) if negatives else None
    criterion.confidence = 1e6
    cells = (criterion.labels(*arguments, negatives=further) > 0).long()
    criterion.confidence = 0.0
    return torch.where(criterion.labels(*arguments, negatives=further) > 0, OWN, cells)


def mixed(cells: torch.Tensor) -> torch.Tensor:
    """The rows of mixed queries, each mixed with the next sample's positive: two keys are positives."""
    rows = torch.arange(SIZE)
    cells = torch.full_like(cells, NEGATIVE)
    cells[rows, rows] = OWN
    cells[rows, (rows + 1) % SIZE] = OTHER_OWN
    return cells


def names(letter: str, count: int = SIZE) -> list[str]:
    """Names such as k₁ to k₄."""
    return [f"${letter}_{i + 1}$" for i in range(count)]


def key_sets() -> dict[str, Callable[[list[str]], Figure]]:
    """A figure per key set."""
    keys, queue = names("k"), names("b", QUEUE)
    own_and_queue = matrix(queue=QUEUE, in_batch_keys=False)
    spread = torch.full(
        (SIZE, SIZE), HIDDEN
    )  # every own positive in a column of its own name
    spread[torch.arange(SIZE), torch.arange(SIZE)] = own_and_queue[:, 0]
    batch_and_queue = matrix(queue=QUEUE)
    two_views = matrix()
    sets = {
        "moco": (torch.cat([spread, own_and_queue[:, 1:]], 1), names("q"), keys + queue),
        "batch-queue": (batch_and_queue, names("q"), keys + queue),
        "two-views": (two_views, names("a") + names("b"), names("a") + names("b")),
        "one-direction": (
            matrix(symmetric=False, negatives=2),
            names("q"),
            keys + names("n", 2),
        ),
        "mixed": (mixed(batch_and_queue), names("m"), keys + queue),
    }
    return {
        f"keys-{name}": lambda colours, what=what: grid(*what, colours)  # type: ignore[misc]
        for name, what in sets.items()
    }


def grid(
    cells: torch.Tensor, rows: list[str], columns: list[str], colours: list[str]
) -> Figure:
    """Rows are queries, columns keys."""
    meanings = sorted(set(cells.flatten().tolist()))
    figure = Figure(
        figsize=(4.8, 0.4 * len(rows) + 0.24 * len(meanings) + 0.4), layout="constrained"
    )
    axes = figure.subplots()
    axes.imshow(cells, cmap=ListedColormap(colours), vmin=-0.5, vmax=3.5, aspect="equal")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    for line in range(len(rows) + 1):
        axes.axhline(line - 0.5, linewidth=1)
    for line in range(len(columns) + 1):
        axes.axvline(line - 0.5, linewidth=1)
    handles = [
        Patch(facecolor=colours[i], edgecolor="grey", label=MEANING[i]) for i in meanings
    ]
    figure.legend(handles=handles, loc="outside lower left", frameon=False)
    return figure


def labels(budget: str, method: str) -> Callable[[list[str]], Figure]:
    """Purity and label mass over the runs that the results report: the mean, and the range of the seeds."""

    def figure(colours: list[str]) -> Figure:
        lines = (RECORDS / budget / "records.jsonl").read_text().splitlines()
        runs = [
            record["labels"]
            for record in map(json.loads, lines)
            if record["method"] == method and not record.get("held_out")
        ]
        for row in (row for run in runs for row in run):
            row["purity"] = row["same"] / (row["same"] + row["other"])
        drawing = Figure(figsize=(5.2, 6), layout="constrained")
        upper, lower = drawing.subplots(2, 1)  # one above the other, for narrow screens
        upper.set(
            title="Purity of what labels give away", ylabel="on keys of the own class (%)"
        )
        lower.set(
            title="Label mass beyond the own positive", ylabel="share of the label (%)"
        )
        epochs = [row["epoch"] for row in runs[0]]
        for panel, name, label, colour, style in (
            (upper, "purity", "labels", "tab:blue", ".-"),
            (upper, "chance", "chance: blind labels", "tab:grey", ".--"),
            (lower, "same", "on keys of the own class", "tab:blue", ".-"),
            (lower, "other", "on keys of other classes", "tab:red", ".-"),
        ):
            values = 100 * torch.tensor([[row[name] for row in run] for run in runs])
            panel.plot(epochs, values.nanmean(0), style, color=colour, label=label)
            panel.fill_between(
                epochs, values.amin(0), values.amax(0), color=colour, alpha=0.2, linewidth=0
            )
        upper.set_ylim(0, 100)
        lower.set_ylim(bottom=0)
        for panel in (upper, lower):
            panel.set_xlabel("epoch")
            panel.spines[["top", "right"]].set_visible(False)
            panel.legend(frameon=False)
        return drawing

    return figure


def scaling(colours: list[str]) -> Figure:
    """Memory and time of the loss over the length of the queue."""
    records = json.loads((RECORDS.parent / "loss" / "scaling.json").read_text())["results"][
        "keys"
    ]
    figure = Figure(figsize=(5.2, 5.4), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    contenders = {
        "lightly NTXentLoss": ("NTXentLoss", "tab:orange"),
        "SLRLoss, refinement": ("SLRLoss", "tab:blue"),
        "SLRLoss, refinement and mixup": ("SLRLoss with mixed queries", "tab:green"),
    }
    for panel, unit, label in zip(
        panels,
        ("megabytes", "milliseconds"),
        ("peak memory (MB)", "time (ms)"),
        strict=True,
    ):
        for contender, (name, colour) in contenders.items():
            rows = [row for row in records if row["contender"] == contender]
            panel.loglog(
                [row["queue"] for row in rows],
                [row[unit] for row in rows],
                ".-",
                label=name,
                color=colour,
            )
        panel.set_ylabel(label)
        panel.spines[["top", "right"]].set_visible(False)
    keys = [row["queue"] for row in records if row["contender"] == "lightly NTXentLoss"]
    panels[1].set_xticks(keys, [f"{count:,}" for count in keys])
    panels[1].minorticks_off()
    panels[1].set_xlabel("keys in the queue")
    panels[0].legend(frameon=False)
    return figure


def draw(folder: Path) -> None:
    """Write every figure as NAME-light.svg and NAME-dark.svg."""
    folder.mkdir(exist_ok=True)
    figures = key_sets() | {
        "scaling": scaling,
        "labels-sane": labels("cpu", "sane"),
        "labels-gradients": labels("fashion", "sharp-gradients"),
    }
    for style, look in STYLES.items():
        ink = dict.fromkeys(
            (
                "text.color",
                "axes.labelcolor",
                "axes.edgecolor",
                "xtick.color",
                "ytick.color",
            ),
            look["ink"],
        )
        settings = ink | {
            "figure.facecolor": "none",
            "axes.facecolor": "none",
            "lines.color": look["ink"],
            "svg.hashsalt": "slr-plugin",
            "savefig.facecolor": "none",
        }
        with matplotlib.rc_context(settings):
            for name, figure in figures.items():
                path = folder / f"{name}-{style}.svg"
                figure(look["cells"]).savefig(path, metadata={"Date": None})
