"""Windows of recorded prompts, of which the language is told apart, judged on prompts that were not trained on.

A window is a second of 40 bands of frequencies. Views are those of signals.py and lose a range of bands too
(SpecAugment, Park and others, 2019). Every language has one speaker, so that the classes are as much speakers as
languages. Debian has the prompts of Asterisk, some 550 in each of five languages; ``pip install torchaudio`` makes the
bands:

    apt-get download asterisk-core-sounds-{en,es,fr,it,ru}-wav
    for package in asterisk-core-sounds-*.deb; do dpkg-deb -x $package prompts; done
    python examples/speech.py --data prompts/usr/share/asterisk/sounds

``--data`` may be any folder of LANGUAGE/PROMPT.wav at 8 kHz. Without it: tones of two instruments, made here.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import signals
import torch
import torch.nn.functional as F
from comparison import Task, main
from scipy.io import wavfile
from torch import Tensor

RATE, HOP, BANDS, LENGTH = 8000, 160, 40, 50  # a window is 50 hops of 160 samples
HIDDEN_BANDS = 10


def augment(windows: Tensor, pool: Tensor) -> Tensor:
    """A signal's view, and a range of bands at their mean."""
    hidden = signals.stretch(len(windows), BANDS, HIDDEN_BANDS, BANDS - HIDDEN_BANDS + 1)
    return signals.augment(windows, pool).masked_fill(hidden.transpose(1, 2), 0.0)


def tones() -> list[tuple[str, str, np.ndarray]]:
    """Two instruments that play ten tones."""
    time = np.arange(RATE + HOP) / RATE
    weights = {"flute": [1.0, 0.1], "oboe": [0.3, 1.0]}
    return [
        (name, str(tone), sum(w * np.sin(2 * np.pi * n * 200 * 1.1**tone * time) for n, w in enumerate(parts, start=1)))
        for name, parts in weights.items()
        for tone in range(10)
    ]


def prompts(data: Path) -> list[tuple[str, str, np.ndarray]]:
    """Language, prompt and wave of every file; pauses and what is shorter than a window are left out."""
    found = []
    for path in sorted(data.glob("*/**/*.wav")):
        language, *name = path.relative_to(data).parts
        if "silence" not in name:
            rate, wave = wavfile.read(path)
            if rate != RATE:
                raise SystemExit(f"{path} has {rate} samples a second; resample it to {RATE}")
            found.append((language, "/".join(name), wave / 32768))
    if not found:
        raise SystemExit(f"{data} holds no LANGUAGE/PROMPT.wav; give the folder that holds the languages' folders")
    return [one for one in found if len(one[2]) >= LENGTH * HOP]


def tasks(data: Path | None) -> dict[str, Task]:
    """Windows without overlap."""
    from torchaudio.transforms import MelSpectrogram

    languages, names, waves = zip(*(prompts(data) if data else tones()), strict=True)
    mel = MelSpectrogram(RATE, n_fft=2 * HOP, hop_length=HOP, n_mels=BANDS)
    windows = signals.cut([mel(torch.from_numpy(wave).float()).add(1e-6).log().T for wave in waves], LENGTH, overlap=0)
    classes, groups = (
        torch.from_numpy(np.unique(column, return_inverse=True)[1])[windows.recordings] for column in (languages, names)
    )
    known = {"the recording": F.one_hot(windows.recordings).float()}
    raw = signals.statistics(windows.samples)
    return {"speech": signals.task(windows.samples, classes, groups, raw, **known)._replace(augment=augment)}


if __name__ == "__main__":
    main(__doc__, tasks, steps=300)
