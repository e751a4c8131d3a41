"""The command line that the simulations share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


def run(
    description: str | None,
    seeds: int,
    output: str,
    simulate: Callable[[int], Any],
    report: Callable[[Any], str],
    draw: Callable[[Any, Path], None],
    argv: Sequence[str] | None,
) -> None:
    """Simulate with so many seeds, print the table, draw the figure; ``seeds`` and ``output`` are defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=seeds, help="simulations per point (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path(output), help="the figure (default: %(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # small matrices
    args.output.parent.mkdir(parents=True, exist_ok=True)
    found = simulate(args.seeds)
    print(report(found))
    draw(found, args.output)
    print(f"figure: {args.output}")
