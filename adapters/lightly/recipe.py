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
then ``curves.png`` and ``results.json``. The paper trains ResNet-50 for 2,000 epochs.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slr_plugin import presets
from slr_plugin.adapters.lightly import training

COMMAND = "python -m slr_plugin.adapters.lightly cifar10"
WIDE = ("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2")
BACKBONES = ("resnet9", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", *WIDE)
# Options in which a run may go on differently, the last two of compare; --epochs may grow.
FREE = {
    *("resume", "output", "data", "workers", "accelerator", "beside", "linear_epochs", "init"),
    "seeds",
    "test_estimator",
}


def count(text: str) -> int:
    """A type of argparse: a whole number from 1 on."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def build_parser(command: str = COMMAND, description: str | None = __doc__) -> argparse.ArgumentParser:
    """The options and their defaults."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(command, None, description, formatter_class=formatter, allow_abbrev=False)
    preset = presets.CIFAR10

    def add(option: str, help: str, default: Any = None, **settings: Any) -> None:  # noqa: A002  # argparse's word
        text = f"{help} (default: %(default)s)" if default else help
        parser.add_argument(option, help=text, default=default, **settings)

    add("--data", "image folders; without it, torchvision's CIFAR-10", type=Path, metavar="DIR")
    add("--groups", "ids of groups, .npy or a text file, negative: alone", type=Path, metavar="FILE")
    add("--estimator", "features (images, dimensions) that the labels follow", type=Path, metavar="FILE.npy")
    add("--method", "sane, or one-hot labels and no mixup", "sane", choices=["sane", "mocov2"])
    add("--strong", "strong augmentation of the mixed positives (CLSA's)", False, action="store_true")
    add("--backbone", "resnet9 is lightly's, the others torchvision's", "resnet18", choices=BACKBONES)
    add("--width", "of lightly's ResNet instead, for 32 to 56 pixels, e.g. 0.25 on a CPU", 1.0, type=float)
    add("--init", "start from the backbone in this checkpoint of SANE", type=Path, metavar="CHECKPOINT")
    add("--image-size", "pixels; above 64 with ImageNet's stem and views", 32, type=count)
    add("--epochs", "of pretraining", 200, type=count)
    add("--linear-epochs", "of the linear classifier", 100, type=count)
    add("--batch-size", "images", preset.batch_size, type=count)
    add("--learning-rate", "for 256 images a batch", preset.learning_rate, type=float)
    add("--temperature", "of the loss", preset.temperature, type=float)
    add("--queue-size", "keys", preset.queue_size, type=count)
    add("--ema-momentum", "of the momentum network", 0.99, type=float)
    add("--knn-every", "epochs between kNN evaluations", 5, type=count)
    add("--limit", "use at most so many training images, and so many test images", type=count)
    add("--workers", "that load images", min(8, os.cpu_count() or 1), type=int)
    add("--accelerator", "cpu, gpu, or another of Lightning's", "auto")
    add("--precision", "16-mixed or bf16-mixed on a GPU, or another of Lightning's", "32-true")
    add("--seed", "of weights, views and mixing, 0 unless given", 0, type=int)
    add("--resume", "go on from --output's last checkpoint; a larger --epochs extends it", False, action="store_true")
    add("--beside", "draw the runs in these --output folders too", (), type=Path, nargs="+", metavar="RUN")
    add("--output", "where the run is kept", Path("outputs/cifar10"), type=Path)
    return parser


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, evaluate, draw; returns what results.json holds."""
    parser = build_parser()
    args = parser.parse_args(argv)
    stored = args.output / "arguments.json"
    if args.resume and stored.is_file():
        before = json.loads(stored.read_text())
        parser.set_defaults(**{name: before[name] for name in before.keys() - {"resume", "output", "beside"}})
        args = parser.parse_args(argv)
    others = {folder: json.loads((folder / "results.json").read_text()) for folder in args.beside}
    results = run(args)
    training.draw({args.output: results} | others, args.output / "curves.png")
    found = "not evaluated, since that takes class folders in train and in test"
    if results["tested"]:
        found = f"kNN {results['knn']:.2f} %, linear {results['linear']:.2f} % of {results['tested']:,} test images"
    print(f"{args.method}: {found}\n{results['labels']}\nfigures, logs and checkpoint: {args.output}")
    paths = f"{args.output / 'last.ckpt'} {args.output / 'backbone.safetensors'}"
    print(f"the encoder alone: python -m slr_plugin.adapters.export {paths}")
    return results


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate, unless the run has reached its epochs; returns what results.json then holds."""
    arguments = json.loads(json.dumps(vars(args), default=str))
    stored, path = args.output / "arguments.json", args.output / "results.json"
    try:
        if args.resume:
            check(arguments, json.loads(stored.read_text()))
        elif (args.output / "last.ckpt").is_file():
            raise ValueError(f"{args.output} holds a run: continue it with --resume, or choose another --output")
        if args.resume and path.is_file():
            results: dict[str, Any] = json.loads(path.read_text())
            epochs = results["arguments"]["epochs"]
            if epochs == args.epochs:
                print(f"the run was finished already; extend it with --resume --epochs {2 * epochs}")
                return results
            path.replace(args.output / f"results-{epochs}-epochs.json")
        data = training.load(args)
        model = training.build(args, data)
        args.output.mkdir(parents=True, exist_ok=True)
        stored.write_text(json.dumps(arguments, indent=1))
    except (OSError, ValueError) as error:
        build_parser().error(" ".join(str(error).split()))
    print(f"after an interruption, go on with: {COMMAND} --resume --output {args.output}", flush=True)
    results = {"arguments": arguments} | training.run(args, data, model)
    path.write_text(json.dumps(results, indent=1))
    return results


def check(arguments: dict[str, Any], before: dict[str, Any]) -> None:
    """Raise ValueError where a run that is resumed had other options."""
    for name in before.keys() - FREE:
        old, new = before[name], arguments[name]
        if new != old and not (name == "epochs" and new > old):
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"the run has {option} {old}: resume it without {option} or choose another --output")
