"""What the lightly examples share: their options, and minibatches of two views per image."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from torchvision.datasets import CIFAR10, ImageFolder


def options(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options of all examples."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR", help="images as DIR/<class>/*; without it, CIFAR-10 is downloaded")
    add("--epochs", type=int, default=10, help="default: %(default)s")
    add("--batch-size", type=int, default=256, help="per process (default: %(default)s)")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1), help="that load images (default: %(default)s)")
    return parser


def two_views(args: argparse.Namespace, transform: Callable[[Any], Any], processes: int = 1) -> DataLoader:
    """Minibatches as lightly's transforms make them: ``batch[0]`` is [view 0, view 1].

    Raises:
        SystemExit: there are no images at ``args.data``, or fewer than a batch for each process.
    """
    if args.data is None:
        dataset = CIFAR10("datasets/cifar10", download=True, transform=transform)
    elif args.data.is_dir():
        try:
            dataset = ImageFolder(args.data, transform)
        except FileNotFoundError as error:  # no class folder, or one without images
            reason = str(error).splitlines()[0].rstrip(".")
            raise SystemExit(f"{reason}; arrange the images as {args.data}/<class>/*") from None
    else:
        raise SystemExit(f"there is no folder {args.data}")
    if len(dataset) < processes * args.batch_size:
        need = f"{processes} x {args.batch_size}" if processes > 1 else args.batch_size
        raise SystemExit(f"{dataset.root}: {len(dataset)} images, a batch needs {need}; take a smaller --batch-size")
    return DataLoader(dataset, args.batch_size, shuffle=True, drop_last=True, num_workers=args.workers)
