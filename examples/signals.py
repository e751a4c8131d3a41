"""Windows of signals: exercises from a smartwatch, judged on people that were not trained on.

Ten people did seven exercises with a watch that measures acceleration and rotation, 50 times a second. Windows of two
seconds that overlap, or lie in one recording, are negatives of each other in NT-Xent although they show the same
movement. What is known beside the trained views enters as ``estimator=``: which recording a window is from and where it
lies there, or simple statistics of the window as it is. The data lie in a package:

    pip download seglearn==1.2.5 --no-deps && unzip -q seglearn-*.whl -d seglearn
    python examples/signals.py --data seglearn/seglearn/data/watch_dataset.npy

Without ``--data``: the rows of scikit-learn's digits, as signals of eight channels and eight steps.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from comparison import Task, main, standardised
from sklearn.datasets import load_digits
from torch import Tensor, nn

LENGTH, OVERLAPS = 100, (0, 50, 75)  # steps of a window, and per cent


class Convolutions(nn.Sequential):
    """Three convolutions over time."""

    def __init__(self, channels: int) -> None:
        def layer(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
            return [nn.Conv1d(inputs, outputs, 5, stride, padding=2), nn.BatchNorm1d(outputs), nn.ReLU()]

        layers = [*layer(channels, 32, 3), *layer(32, 64, 2), *layer(64, 128, 2)]
        super().__init__(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten())


def augment(windows: Tensor, pool: Tensor) -> Tensor:
    """Scale channels, add noise, and hide a part of the time (Um and others, 2017)."""
    count, channels, length = windows.shape
    scaled = windows * (1 + 0.2 * torch.randn(count, channels, 1)) + 0.1 * torch.randn_like(windows)
    start = torch.randint(length, (count, 1, 1))
    time = torch.arange(length)
    return scaled.masked_fill((time >= start) & (time < start + length // 4), 0.0)


def statistics(windows: Tensor) -> Tensor:
    """Mean, deviation, extremes and mean step of every channel."""
    step = windows.diff(dim=2).abs().mean(2)
    parts = windows.mean(2), windows.std(2), windows.amin(2), windows.amax(2), step
    return standardised(torch.cat(parts, dim=1))


def places(recordings: Tensor, times: Tensor) -> Tensor:
    """Features of a window that resemble those of its recording, the more the nearer in time."""
    own = F.one_hot(recordings).float()
    return torch.cat([own, own * torch.cos(times)[:, None], own * torch.sin(times)[:, None]], dim=1)


def tasks(data: Path | None) -> dict[str, Task]:
    """The windows at every overlap."""

    def task(windows: Tensor, classes: Tensor, groups: Tensor | None = None, **estimators: Tensor) -> Task:
        channels, known = windows.shape[1], {"statistics": statistics(windows), **estimators}
        raw = standardised(windows.flatten(1))
        return Task(windows, classes, lambda: Convolutions(channels), augment, raw, groups, known, batch=128)

    if data is None:
        digits = load_digits()
        return {"digits' rows": task(torch.from_numpy(digits.images).float() / 16, torch.from_numpy(digits.target))}
    stored = np.load(data, allow_pickle=True).item()
    every = {}
    for overlap in OVERLAPS:
        windows, recordings, times = [], [], []
        for number, recording in enumerate(stored["X"]):
            signal = torch.from_numpy(np.asarray(recording, dtype=np.float32))
            parts = signal.unfold(0, LENGTH, LENGTH * (100 - overlap) // 100)  # (windows, channels, time)
            windows.append(parts)
            recordings += [number] * len(parts)
            times.append(torch.linspace(0, torch.pi, len(parts)))
        of = torch.tensor(recordings)
        signals = torch.cat(windows)
        signals = (signals - signals.mean((0, 2), keepdim=True)) / signals.std((0, 2), keepdim=True)
        classes, people = (torch.tensor(stored[name].astype(int))[of] for name in ("y", "subject"))
        known = {"the recording": F.one_hot(of).float(), "recording and time": places(of, torch.cat(times))}
        every[f"watch, {overlap} % overlap"] = task(signals, classes, people, **known)
    return every


if __name__ == "__main__":
    main(__doc__, tasks, steps=300)
