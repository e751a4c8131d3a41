"""Where a measurement ran and what it left: the device in words, waiting for it, the files of a page."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch


def machine(device: str) -> str:
    """The device's name; of a CPU also the number of threads."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


def wait(device: str) -> None:
    """Let the device finish what was asked of it, before a clock is read."""
    if device != "cpu":
        torch.cuda.synchronize()


def publish(output: Path, name: str, table: str, caption: str, results: dict[str, Any]) -> None:
    """Print the table and its caption; write both as NAME.md, and the numbers as NAME.json."""
    text = f"{table}\n\n{caption}\n"
    print(text)
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{name}.md").write_text(text)
    (output / f"{name}.json").write_text(json.dumps({"caption": caption, "results": results}, indent=2) + "\n")
