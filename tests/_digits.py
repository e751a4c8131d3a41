"""scikit-learn's scanned digits as a folder of images."""

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits


def write_digits(root: Path, size: int = 32, **parts: range) -> Path:
    """``root/<part>/<class>/<number>.png`` for the scans of every part, of ``size`` pixels; returns ``root``.

    Without ``parts``, the first 40 scans as ``root/<class>/<number>.png``.
    """
    digits = load_digits()
    for part, numbers in (parts or {"": range(40)}).items():
        for number in numbers:
            place = root / part / str(digits.target[number])
            place.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray((digits.images[number] * (255 / 16)).astype(np.uint8)).convert("RGB")
            image.resize((size, size)).save(place / f"{number}.png")
    return root
