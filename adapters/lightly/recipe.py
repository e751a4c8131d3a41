"""The paper's CIFAR-10 settings with lightly: pretrain, watch kNN accuracy, evaluate linearly, draw.

    python -m slr_plugin.adapters.lightly cifar10                 torchvision's CIFAR-10, downloaded; ResNet-18
    python -m slr_plugin.adapters.lightly cifar10 --data DIR      your images: DIR/train/<class>/*, DIR/test/<class>/*
    ... --method mocov2 --output RUN                              the baseline: one-hot labels, no mixup
    ... --beside RUN                                              draw the curves of that run beside this one's
    ... --resume                                                  go on after an interruption, with the run's options
    ... --resume --epochs 400                                     train a finished run longer

On a CPU, minutes: --backbone resnet9 --width 0.25 --limit 5000 --epochs 60 --batch-size 128 --queue-size 2048

Without DIR/test, or without class folders in DIR/train (or DIR), it trains all the same and evaluates nothing.

``--groups FILE`` makes images that belong together each other's positives; ``--estimator FILE.npy`` takes the labels
from features that you have, with the confidence and sharpening of ``presets.FROM_FEATURES``. A line or row stands for
each training image, class by class and name by name, as ``sorted`` orders them: the order of torchvision's ImageFolder.

It writes into ``--output``: ``arguments.json``, ``views.png`` (what the network sees: a row of queries, one of their
positives, with ``--strong`` both again as they are mixed, and the mixed queries), ``last.ckpt``, TensorBoard's logs,
then ``curves.png`` and ``results.json``. The paper trains ResNet-50 for 2,000 epochs: ``--backbone resnet50
--epochs 2000``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from slr_plugin import presets

# Nothing here imports a framework, so that help answers at once; ``training.py`` does.
COMMAND = "python -m slr_plugin.adapters.lightly cifar10"
WIDE = ("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2")
BACKBONES = ("resnet9", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", *WIDE)
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed", "64-true", "16-true", "bf16-true", "16", "bf16", "32", "64")
# Options in which a run may go on differently; --epochs may grow.
FREE = {"resume", "output", "data", "workers", "accelerator", "beside", "linear_epochs", "init"}


def number(kind: Callable[[str], Any], low: float, high: float = math.inf) -> Callable[[str], Any]:
    """A type of argparse: a number in [low, high], whole for ``kind=int``."""

    def parse_number(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be between {low:g} and {high:g}, got {text}")
        return value

    parse_number.__name__ = kind.__name__  # as argparse calls it where it is none
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
    add("--width", "of lightly's ResNet instead, for 32 to 56 pixels, e.g. 0.25 on a CPU", type=positive, default=1.0)
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
    add("--beside", "draw the runs in these --output folders too", type=Path, nargs="+", default=[], metavar="RUN")
    add("--output", type=Path, default=Path("outputs/cifar10"))
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; those of the run in ``--output``, if it is resumed, which only those in FREE may change."""
    parser = build_parser()
    args = parser.parse_args(argv)
    has_run = (args.output / "last.ckpt").is_file()
    if args.resume != has_run:
        parser.error(
            f"{args.output} holds a run already: continue it with --resume, or choose another --output"
            if has_run
            else f"--resume: there is no {args.output / 'last.ckpt'}; start without --resume"
        )
    for folder in args.beside:
        if not (folder / "results.json").is_file():
            parser.error(f"--beside: there is no {folder / 'results.json'}; name the --output of a finished run")
    if not args.resume:
        return args
    stored = json.loads((args.output / "arguments.json").read_text())
    parser.set_defaults(**{name: stored[name] for name in stored.keys() - {"resume", "output", "beside"}})
    args, before = parser.parse_args(argv), parser.parse_args([])
    for name, value in vars(before).items():
        is_extended = name == "epochs" and args.epochs > value
        if name not in FREE and getattr(args, name) != value and not is_extended:
            option = f"--{name.replace('_', '-')}"
            parser.error(
                f"the run in {args.output} has {option} {value}: resume it without {option} or choose another --output "
                "for a new run"
            )
    return args


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

    try:
        data = training.load(args)
        model = training.build(args, data)
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "arguments.json").write_text(json.dumps(plain(args), indent=1))
    except (OSError, ValueError) as error:
        build_parser().error(" ".join(str(error).split()))
    results = training.run(args, data, model, bar)
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
