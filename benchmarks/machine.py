"""Where a measurement ran, in words."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def machine(device: str) -> str:
    """The device's name; of a CPU also the number of threads."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"
