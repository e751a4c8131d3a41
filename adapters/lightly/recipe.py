"""The paper's CIFAR-10 settings with lightly: pretrain, watch kNN accuracy, evaluate linearly, draw.

    python -m slr_plugin.adapters.lightly cifar10                 torchvision's CIFAR-10, downloaded; ResNet-18
    python -m slr_plugin.adapters.lightly cifar10 --data DIR      your images: DIR/train/<class>/*, DIR/test/<class>/*
    ... --method mocov2 --output DIR                              the baseline: one-hot labels, no mixup
    ... --beside DIR                                              draw the curves of that run beside this one's
    ... --resume                                                  go on after an interruption, with the run's options
    ... --resume --epochs 400                                     train a finished run longer

On a CPU, minutes: --backbone resnet9 --width 0.25 --limit 5000 --epochs 60 --batch-size 128 --queue-size 2048

Without DIR/test, or without class folders in DIR/train (or DIR), it trains all the same and evaluates nothing.

``--groups FILE`` makes images that belong together each other's positives; ``--estimator FILE.npy`` takes the labels
from features that you have, with the confidence and sharpening of ``presets.FROM_FEATURES``. A line or row stands for
each training image, class by class and name by name, as ``sorted`` orders them: the order of torchvision's ImageFolder.

It writes into ``--output``: ``arguments.json``, ``views.png`` (what the network sees), ``last.ckpt``, TensorBoard's
logs, then ``curves.png`` and ``results.json``. The paper trains ResNet-50 for 2,000 epochs: ``--backbone resnet50
--epochs 2000``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from slr_plugin import presets
from slr_plugin.adapters._require import has_gpu
from slr_plugin.adapters.lightly.knowledge import read

# Nothing here imports a framework, so that help and mistakes answer at once; ``training.py`` does.
COMMAND = "python -m slr_plugin.adapters.lightly cifar10"
IMAGES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's ImageFolder's
WIDE = ("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2")
BACKBONES = ("resnet9", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", *WIDE)
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed", "64-true", "16-true", "bf16-true", "16", "bf16", "32", "64")
# Options in which a run may go on differently; --epochs may grow.
FREE = {"resume", "output", "data", "workers", "accelerator", "beside", "linear_epochs", "init"}
LAYOUT = "DIR/train/<class>/* with DIR/test/<class>/* to evaluate, or images without classes in DIR/train or DIR"


class Folders(NamedTuple):
    """Where the images of ``--data`` lie."""

    train: Path
    test: Path | None
    has_classes: bool
    images: int  # for training
    tested: int = 0  # images for testing


def number(kind: Callable[[str], Any], low: float, high: float = math.inf) -> Callable[[str], Any]:
    """A type of argparse: a number in [low, high], whole for ``kind=int``."""
    wanted = f"at least {low:g}" if math.isinf(high) else f"between {low:g} and {high:g}"

    def parse_number(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and low <= value <= high):
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {what} {wanted}, got {text!r}")
        return value

    return parse_number


def build_parser() -> argparse.ArgumentParser:
    """The options and their defaults."""
    parser = argparse.ArgumentParser(
        prog=COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    preset, count, positive = presets.CIFAR10, number(int, 1), number(float, 1e-6)

    def add(option: str, help: str = "", **settings: Any) -> None:  # noqa: A002  # argparse's word
        default = "" if settings.get("default") in (None, []) else "default: %(default)s"
        parser.add_argument(option, help=f"{help} ({default})" if help and default else help or default, **settings)

    add("--data", "image folders; without it, torchvision's CIFAR-10", type=Path, metavar="DIR")
    add("--groups", "ids of groups, .npy or a text file, negative: alone", type=Path, metavar="FILE")
    add("--estimator", "features (images, dimensions) that the labels follow", type=Path, metavar="FILE.npy")
    add("--method", "sane, or one-hot labels and no mixup", choices=["sane", "mocov2"], default="sane")
    add("--strong", "strong augmentation of the mixed positives (CLSA's)", action="store_true")
    add("--backbone", "resnet9 is lightly's, the others torchvision's", choices=BACKBONES, default="resnet18")
    add("--width", "of lightly's ResNet instead, e.g. 0.25 on a CPU", type=positive, default=1.0)
    add("--init", "start from the backbone in this checkpoint of SANE", type=Path, metavar="CHECKPOINT")
    add("--image-size", "pixels; above 64 with ImageNet's stem and views", type=number(int, 32), default=32)
    add("--epochs", type=count, default=200)
    add("--linear-epochs", type=count, default=100)
    add("--batch-size", type=count, default=preset.batch_size)
    add("--learning-rate", "for 256 images a batch", type=positive, default=preset.learning_rate)
    add("--temperature", type=positive, default=preset.temperature)
    add("--queue-size", type=count, default=preset.queue_size)
    add("--ema-momentum", "of the momentum network", type=number(float, 0, 1), default=0.99)
    add("--knn-every", "epochs between kNN evaluations", type=count, default=5)
    add("--limit", "use at most so many training images, and so many test images", type=count)
    add("--workers", "that load images", type=number(int, 0), default=min(8, os.cpu_count() or 1))
    add("--accelerator", choices=["auto", "cpu", "gpu", "cuda", "mps"], default="auto")
    add("--precision", "16-mixed or bf16-mixed on a GPU", choices=PRECISIONS, default="32-true")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0)
    add("--resume", "go on from the last checkpoint in --output; a larger --epochs extends it", action="store_true")
    add("--beside", "draw the runs in these --output folders too", type=Path, nargs="+", default=[], metavar="DIR")
    add("--output", type=Path, default=Path("outputs/cifar10"))
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; what cannot be run with ends the process with one line."""
    parser = build_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        hyphens = [name.replace("_", "-") for name in unknown if name.startswith("--") and "_" in name]
        parser.error(f"unknown: {' '.join(unknown)}" + f"; did you mean {' '.join(hyphens)}?" * bool(hyphens))
    if args.resume:
        args = _resumed(parser, args, argv)
    elif (args.output / "last.ckpt").is_file():
        parser.error(f"{args.output} holds a run already: continue it with --resume, or choose another --output")
    for folder in args.beside:
        if not (folder / "results.json").is_file():
            parser.error(f"--beside: there is no {folder / 'results.json'}; name the --output of a finished run")
    if args.width != 1 and args.backbone in WIDE:
        parser.error(f"--width is of lightly's ResNets, {', '.join(BACKBONES[:6])}; {args.backbone} has none")
    if is_lightlys(args) and args.image_size > 56:
        parser.error("lightly's ResNets, resnet9 or with --width, take --image-size 32 to 56; take torchvision's")
    if args.accelerator not in ("auto", "cpu") and not has_gpu(args.accelerator):
        parser.error(f"--accelerator {args.accelerator}: torch finds no such device here; take --accelerator cpu")
    if args.init is not None and not args.resume and not args.init.is_file():
        parser.error(f"--init: there is no file {args.init}")
    try:
        folders = find_images(args.data)
        read(args.estimator, args.groups, 50_000 if folders is None else folders.images)
        args.output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.output).close()
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"--output: {args.output} is no folder that can be written: {error}")
    return args


def is_lightlys(args: argparse.Namespace) -> bool:
    """Whether the network is lightly's, for small images, and not torchvision's."""
    return bool(args.width != 1 or args.backbone == "resnet9")


def _resumed(parser: argparse.ArgumentParser, args: argparse.Namespace, argv: Any) -> argparse.Namespace:
    """The options of the run in ``--output``, which only those in FREE may change."""
    for needed in (args.output / "last.ckpt", args.output / "arguments.json"):
        if not needed.is_file():
            parser.error(f"--resume: there is no {needed}; start without --resume")
    stored = json.loads((args.output / "arguments.json").read_text())
    parser.set_defaults(**{name: stored[name] for name in stored.keys() - {"resume", "output", "beside"}})
    args, before = parser.parse_args(argv), parser.parse_args([])
    for name, value in vars(before).items():
        now = getattr(args, name)
        if name in FREE or now == value or (name == "epochs" and now > value):
            continue
        option = f"--{name.replace('_', '-')}"
        more = ", give more epochs to extend it," if name == "epochs" else ","
        parser.error(
            f"the run in {args.output} has {option} {value}: resume it without {option}{more} or choose another "
            "--output for a new run"
        )
    return args


def find_images(data: Path | None) -> Folders | None:
    """Where training and test images lie; None for CIFAR-10.

    Raises:
        ValueError: the folders hold no images, or training and test images of different classes.
    """
    if data is None:
        return None
    if not data.is_dir():
        raise ValueError(f"--data: there is no folder {data}; expected {LAYOUT}")
    train, test = data / "train" if (data / "train").is_dir() else data, data / "test"
    classes = _classes(train)
    images = sum(classes.values()) or _count(train)
    if not images:
        raise ValueError(f"--data: {train} holds no images ({' '.join(IMAGES)}); expected {LAYOUT}")
    if train == data and "test" in classes:
        raise ValueError(f"--data: {data} has a folder test but no folder train; expected {LAYOUT}")
    if not classes or not test.is_dir():
        return Folders(train, None, bool(classes), images)
    tested = _classes(test)
    if different := ", ".join(sorted(tested.keys() ^ classes.keys())[:5]):
        raise ValueError(f"--data: {train} and {test} must hold the same classes; in one of them alone: {different}")
    return Folders(train, test, True, images, sum(tested.values()))


def _classes(folder: Path) -> dict[str, int]:
    """The folders in it, and how many images each has; none has none."""
    counts = {entry.name: _count(entry) for entry in sorted(folder.iterdir()) if entry.is_dir()}
    if empty := [name for name, images in counts.items() if not images]:
        raise ValueError(f"--data: no images ({' '.join(IMAGES)}) in {folder / empty[0]}; expected {LAYOUT}")
    return counts


def _count(folder: Path) -> int:
    """How many images torchvision finds in a folder and those below."""
    return sum(name.lower().endswith(IMAGES) for _, _, names in os.walk(folder, followlinks=True) for name in names)


def plain(args: argparse.Namespace) -> dict[str, Any]:
    """The options, for JSON."""
    result: dict[str, Any] = json.loads(json.dumps(vars(args), default=str))
    return result


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, evaluate, draw; returns what results.json holds."""
    args = parse(argv)
    from slr_plugin.adapters.lightly import training

    results = finished(args)
    if is_new := results is None:
        try:
            results = train(args)
        except BaseException:  # Lightning turns Ctrl-C into SystemExit
            if (args.output / "last.ckpt").is_file():
                again = f"{COMMAND} --resume --output {args.output}"
                print(f"stopped; go on from the last whole epoch: {again}", file=sys.stderr)
            raise
    training.draw(results, args.output, args.beside)
    report(results, args.output)
    if not is_new:
        print(f"the run was finished already; extend it with --resume --epochs {2 * args.epochs}")
    return results


def finished(args: argparse.Namespace) -> dict[str, Any] | None:
    """What results.json holds of a run that has reached its epochs; that of a shorter run is put aside."""
    path = args.output / "results.json"
    if not args.resume or not path.is_file():
        return None
    results: dict[str, Any] = json.loads(path.read_text())
    if results["arguments"]["epochs"] == args.epochs:
        return results
    path.replace(args.output / f"results-{results['arguments']['epochs']}-epochs.json")
    return None


def train(args: argparse.Namespace, bar: Any = None) -> dict[str, Any]:
    """Train and evaluate, in place of lines with a bar of tqdm that counts epochs; writes results.json."""
    from slr_plugin.adapters.lightly import training

    results = training.run(args, find_images(args.data), bar)
    (args.output / "results.json").write_text(json.dumps(results, indent=1))
    return results


def report(results: Mapping[str, Any], output: Path) -> None:
    """What came out, in words."""
    method, knn, linear = results["arguments"]["method"], results["knn"], results["linear"]
    if knn is None:
        print(f"{method}: not evaluated, since that takes class folders in train and in test")
    else:
        print(f"{method}: kNN {knn:.2f} %, linear {linear:.2f} % of {results['tested']:,} test images")
    print(f"{results['labels']}\nfigures, logs and checkpoint: {output}")
    paths = f"{output / 'last.ckpt'} {output / 'backbone.safetensors'}"
    print(f"the encoder alone: python -m slr_plugin.adapters.export {paths}")


if __name__ == "__main__":
    main()
