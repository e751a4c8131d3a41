"""The paper's CIFAR-10 settings with lightly: pretrain, watch kNN accuracy, evaluate linearly, draw.

    python -m slr_plugin.adapters.lightly cifar10                 torchvision's CIFAR-10, downloaded; ResNet-18
    python -m slr_plugin.adapters.lightly cifar10 --data DIR      your images: DIR/train/<class>/*, DIR/test/<class>/*
    ... --method mocov2 --output DIR                              the baseline: one-hot labels, no mixup
    ... --beside DIR                                              draw the curves of that run beside this one's
    ... --resume                                                  go on after an interruption, with the run's options
    ... --resume --epochs 400                                     train a finished run longer

On a CPU, minutes: --backbone resnet9 --width 0.25 --limit 5000 --epochs 60 --batch-size 128 --queue-size 2048

It writes into ``--output``: ``arguments.json``, ``views.png`` (what the network sees), ``last.ckpt``, TensorBoard's
logs, then ``curves.png``, ``labels.png`` (where the refined labels lie) and ``results.json``. The paper trains
ResNet-50 for 2,000 epochs: ``--backbone resnet50 --epochs 2000``.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightly.models import ResNetGenerator
from lightly.utils.benchmarking import LinearClassifier, MetricCallback
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from pytorch_lightning import LightningModule, Trainer, seed_everything
from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchvision.datasets import CIFAR10, ImageFolder
from torchvision.models import get_model
from torchvision.transforms import v2
from torchvision.utils import make_grid

from slr_plugin import SLRLoss, presets
from slr_plugin.adapters.lightly.module import SANE
from slr_plugin.adapters.lightly.networks import cifar_stem
from slr_plugin.adapters.lightly.transforms import CIFAR10_AUGMENTATION, SANETransform
from slr_plugin.adapters.lightning import LabelQualityCallback
from slr_plugin.diagnostics import LabelQuality, plot, summary

NORMALIZE = CIFAR10_AUGMENTATION["normalize"]
# Options in which a run may go on differently; --epochs may grow.
FREE = {"resume", "output", "data", "workers", "accelerator", "beside", "linear_epochs"}
COMMAND = "python -m slr_plugin.adapters.lightly cifar10"


class Record(LabelQualityCallback):
    """Per epoch: the last loss, kNN accuracy, and how good the refined labels are. Saved in the checkpoints."""

    def __init__(self, every_n_steps: int) -> None:
        super().__init__(every_n_steps)
        self.epochs: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """One row per epoch; an accuracy only where it was measured."""
        super().on_train_epoch_end(trainer, pl_module)
        assert self.quality is not None
        row: dict[str, float] = {"epoch": trainer.current_epoch + 1}
        row |= {name: value.item() for name, value in self.quality._asdict().items() if math.isfinite(value)}
        metrics = trainer.callback_metrics
        row["loss"] = metrics["train_loss"].item()
        if "val_knn_top1" in metrics and (trainer.current_epoch + 1) % (trainer.check_val_every_n_epoch or 1) == 0:
            row["knn"] = 100 * metrics["val_knn_top1"].item()
        self.epochs.append(row)
        if trainer.progress_bar_callback is None:
            knn = f", kNN {row['knn']:.1f} %" if "knn" in row else ""
            print(f"epoch {row['epoch']}/{trainer.max_epochs}: loss {row['loss']:.3f}{knn}", flush=True)

    def summary(self, criterion: SLRLoss) -> str:
        """How good the labels of the last epoch were."""
        values = [torch.tensor(self.epochs[-1].get(name, math.nan)) for name in LabelQuality._fields]
        return summary(LabelQuality.average([LabelQuality(*values)]), criterion)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return super().state_dict() | {"epochs": self.epochs}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        super().load_state_dict(state_dict)
        self.epochs = list(state_dict["epochs"])


def load(args: argparse.Namespace) -> tuple[Any, Any, Any, int]:
    """Training images as views, then training and test images as they are, and the number of classes."""
    plain = v2.Compose(
        [
            v2.Resize(32),
            v2.CenterCrop(32),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(**NORMALIZE),
        ]
    )
    sources = []
    for is_train, transform in ((True, SANETransform.cifar10(args.strong)), (True, plain), (False, plain)):
        if args.data is None:
            data = CIFAR10("datasets/cifar10", train=is_train, download=True, transform=transform)
        else:
            data = ImageFolder(args.data / ("train" if is_train else "test"), transform=transform)
        classes = len(data.classes)
        if args.limit is not None:  # the same images for every seed and method
            order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
            data = Subset(data, order[: args.limit].tolist())
        sources.append(data)
    return *sources, classes


def build(args: argparse.Namespace, num_classes: int) -> SANE:
    """The method; the baseline is the same module with one-hot labels, MoCo's keys and no mixup."""
    if args.width == 1:
        backbone, feature_dim = cifar_stem(get_model(args.backbone)), None
    else:  # narrower ones for the CPU, from lightly; these do not have torchvision's names
        backbone = ResNetGenerator(args.backbone.replace("resnet", "resnet-"), width=args.width)
        feature_dim = backbone.linear.in_features
        backbone.linear = nn.Identity()
    baseline: dict[str, Any] = (
        {"mixup": False, "confidence": 0.0, "in_batch_keys": False} if args.method == "mocov2" else {}
    )
    model = SANE(
        args.batch_size,
        num_classes=num_classes,
        knn_k=50,
        knn_t=0.05,
        backbone=backbone,
        feature_dim=feature_dim,
        preset=presets.CIFAR10,
        queue_size=args.queue_size,
        ema_momentum=args.ema_momentum,
        **baseline,
    )
    return model.to(memory_format=torch.channels_last)


def draw_views(model: SANE, loader: DataLoader[Any], path: Path, count: int = 10) -> None:
    """A sheet of queries, their positives, the strong positives if there are, and the mixed images, row by row."""
    views = next(iter(loader))[0]
    rows = {"query": views[1][:count], "positive": views[0][:count]}
    marks = [str(number) for number in range(1, 1 + len(views[0][:count]))]
    if model.mixup is not None:
        positives, queries = views[-2][:count], views[-1][:count]
        if len(views) > 2:
            rows |= {"mixed query": queries, "strong positive": positives}
        mixed, mix = model.mixup(queries, positives)
        rows["mixed"] = mixed
        marks = [
            f"{theta:.0%} query {number}\n{1 - theta:.0%} positive {partner + 1}"
            for number, (theta, partner) in enumerate(zip(*(part.tolist() for part in mix), strict=True), start=1)
        ]
    figure = Figure(figsize=(1.0 + 1.1 * len(marks), 0.8 + 1.1 * len(rows)), layout="constrained")
    mean, std = (torch.tensor(NORMALIZE[name]).view(-1, 1, 1) for name in ("mean", "std"))
    for axes, (name, images) in zip(figure.subplots(len(rows), 1), rows.items(), strict=True):
        grid = make_grid(images * std + mean, nrow=len(marks), padding=1)
        axes.imshow(grid.permute(1, 2, 0).clamp(0, 1))
        axes.set_ylabel(name, rotation=0, ha="right", va="center")
        side = images.shape[-1] + 1
        axes.set_xticks([side * (place + 0.5) for place in range(len(marks))], marks, fontsize=6)
        axes.tick_params(length=0, labelbottom=axes.get_subplotspec().is_last_row())
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
    what = "Each column is one image in two random views"
    more = "" if model.mixup is None else "; the network also sees each query mixed with another image's positive"
    figure.suptitle(what + more, fontsize="medium")
    figure.savefig(path, dpi=150)


def evaluate_linearly(model: SANE, train: DataLoader[Any], test: DataLoader[Any], args: argparse.Namespace) -> float:
    """Test accuracy in per cent of lightly's linear classifier on the frozen features of images as they are."""
    features = [extract(model, loader) for loader in (train, test)]
    loaders = [DataLoader(TensorDataset(*pair), args.batch_size, shuffle=pair is features[0]) for pair in features]
    feature_dim, num_classes = features[0][0].shape[1], model.hparams["num_classes"]
    classifier = LinearClassifier(
        nn.Identity(), args.batch_size, feature_dim=feature_dim, num_classes=num_classes, topk=(1,)
    )
    metrics = MetricCallback()
    quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary"), False)
    trainer = Trainer(
        max_epochs=args.linear_epochs,
        accelerator=args.accelerator,
        devices=1,
        callbacks=[metrics],
        check_val_every_n_epoch=args.linear_epochs,
        enable_progress_bar=sys.stderr.isatty(),
        **quiet,
    )
    trainer.fit(classifier, loaders[0], loaders[1])
    return float(100 * metrics.val_metrics["val_top1"][-1])


@torch.no_grad()
def extract(model: SANE, loader: DataLoader[Any]) -> tuple[Tensor, Tensor]:
    """Backbone features and classes of a whole data set."""
    model.eval()
    parts = [(model(images.to(model.device)).flatten(1).cpu(), targets) for images, targets in loader]
    features, targets = zip(*parts, strict=True)
    return torch.cat(features), torch.cat(targets)


def draw(results: Mapping[str, Any], output: Path, beside: Sequence[Path] = ()) -> None:
    """The run's curves, those of other runs beside them, and how good its labels are."""
    runs = [(output, results)]
    runs += [(folder, json.loads((folder / "results.json").read_text())) for folder in beside]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True)
    for folder, run in runs:
        method = run["arguments"]["method"]
        label = method if sum(other["arguments"]["method"] == method for _, other in runs) == 1 else str(folder)
        _curve(left, run["epochs"], "loss", label)
        _curve(right, run["epochs"], "knn", label)
    left.set(title="Training", ylabel="loss of the last batch")
    right.set(title="Test images", ylabel="kNN accuracy (%)")
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(output / "curves.png", dpi=150)
    plot(results["epochs"], [row["epoch"] for row in results["epochs"]]).savefig(output / "labels.png", dpi=150)


def _curve(axes: Axes, rows: Sequence[Mapping[str, float]], name: str, label: str) -> None:
    """One value per epoch, where it was measured; single points are to be seen too."""
    points = [(row["epoch"], row[name]) for row in rows if name in row]
    axes.plot(*zip(*points, strict=True), label=label, marker="." if len(points) <= 30 else None)


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def fraction(text: str) -> float:
    """A number in [0, 1]."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"must be a number between 0 and 1, got {text!r}")
    return number


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        prog=COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR", help="image folders; without it, torchvision's CIFAR-10")
    add("--method", choices=["sane", "mocov2"], default="sane", help="default: %(default)s")
    add("--strong", action="store_true", help="strong augmentation of the mixed positives (CLSA's)")
    add("--backbone", default="resnet18", help="a ResNet of torchvision (default: %(default)s)")
    add("--width", type=float, default=1, help="of lightly's ResNet instead, e.g. 0.25 on a CPU (default: %(default)s)")
    add("--epochs", type=count, default=200, help="default: %(default)s")
    add("--linear-epochs", type=count, default=100, help="default: %(default)s")
    add("--batch-size", type=count, default=256, help="default: %(default)s")
    add("--queue-size", type=count, default=presets.CIFAR10.queue_size, help="default: %(default)s")
    add("--ema-momentum", type=fraction, default=0.99, help="of the momentum network (default: %(default)s)")
    add("--knn-every", type=count, default=5, help="epochs between kNN evaluations (default: %(default)s)")
    add("--limit", type=count, help="use at most so many training images, and so many test images")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1), help="that load images (default: %(default)s)")
    add("--accelerator", default="auto", help="default: %(default)s")
    add("--precision", default="32-true", help="e.g. 16-mixed on a GPU, bf16-mixed (default: %(default)s)")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add(
        "--resume", action="store_true", help="go on from the last checkpoint in --output; a larger --epochs extends it"
    )
    add("--beside", type=Path, nargs="+", default=[], metavar="DIR", help="draw the runs in these --output folders too")
    add("--output", type=Path, default=Path("outputs/cifar10"), help="default: %(default)s")
    args = parser.parse_args(argv)
    if args.resume:
        for needed in (args.output / "last.ckpt", args.output / "arguments.json"):
            if not needed.is_file():
                parser.error(f"--resume: there is no {needed}; start without --resume")
        stored = json.loads((args.output / "arguments.json").read_text())
        restored = {name: value for name, value in stored.items() if name not in {"resume", "output", "beside"}}
        parser.set_defaults(**restored)
        args = parser.parse_args(argv)
        now = plain(args)
        for name in stored:
            if name == "epochs" and args.epochs > stored["epochs"]:
                continue
            if name not in FREE and now[name] != stored[name]:
                option = f"--{name.replace('_', '-')}"
                more = ", give more epochs to extend it," if name == "epochs" else ","
                parser.error(
                    f"the run in {args.output} has {option} {stored[name]}: resume it without {option}{more} or choose "
                    "another --output for a new run"
                )
    elif (args.output / "last.ckpt").is_file():
        parser.error(f"{args.output} holds a run already: continue it with --resume, or choose another --output")
    for folder in args.beside:
        if not (folder / "results.json").is_file():
            parser.error(f"--beside: there is no {folder / 'results.json'}; name the --output of a finished run")
    return args


def plain(args: argparse.Namespace) -> dict[str, Any]:
    """The options, for JSON."""

    def text(value: Any) -> Any:
        if isinstance(value, list):
            return [text(one) for one in value]
        return str(value) if isinstance(value, Path) else value

    return {name: text(value) for name, value in vars(args).items()}


def finished(output: Path) -> dict[str, Any] | None:
    """The results of a run that has ended, or None."""
    path = output / "results.json"
    return json.loads(path.read_text()) if path.is_file() else None


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, evaluate, draw; returns what results.json holds."""
    args = parse(argv)
    before = finished(args.output) if args.resume else None
    if before is not None and before["arguments"]["epochs"] == args.epochs:
        draw(before, args.output, args.beside)
        report(before, args.output)
        print(f"the run was finished already; extend it with --resume --epochs {2 * args.epochs}")
        return before
    args.output.mkdir(parents=True, exist_ok=True)
    if before is not None:
        (args.output / "results.json").replace(args.output / f"results-{before['arguments']['epochs']}-epochs.json")
    try:
        results = run(args)
    except BaseException:  # Lightning turns Ctrl-C into SystemExit
        if (args.output / "last.ckpt").is_file():
            print(
                f"stopped; go on from the last whole epoch: {COMMAND} --resume --output {args.output}", file=sys.stderr
            )
        raise
    (args.output / "results.json").write_text(json.dumps(results, indent=1))
    draw(results, args.output, args.beside)
    report(results, args.output)
    return results


def report(results: Mapping[str, Any], output: Path) -> None:
    """What came out, in words."""
    knn, linear = results["knn"], results["linear"]
    print(
        f"{results['arguments']['method']}: kNN {knn:.2f} %, linear {linear:.2f} % of {results['tested']:,} test images"
    )
    print(results["labels"])
    print(f"figures, logs and checkpoint: {output}")
    paths = f"{output / 'last.ckpt'} {output / 'backbone.safetensors'}"
    print(f"the encoder alone: python -m slr_plugin.adapters.export {paths}")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate; returns what results.json holds."""
    for name in ("pytorch_lightning", "lightning.pytorch"):  # its tips and devices, once per trainer
        logging.getLogger(name).setLevel(logging.WARNING)
    seed_everything(args.seed, workers=True)
    views, train, test, num_classes = load(args)
    if len(views) < args.batch_size:
        raise SystemExit(f"{len(views)} training images are fewer than --batch-size {args.batch_size}")

    model = build(args, num_classes)
    workers: dict[str, Any] = {"num_workers": args.workers, "persistent_workers": args.workers > 0}
    loader = DataLoader(views, args.batch_size, shuffle=True, drop_last=True, **workers)
    judges = [DataLoader(data, args.batch_size, num_workers=args.workers) for data in (train, test)]
    (args.output / "arguments.json").write_text(json.dumps(plain(args), indent=1))
    if not args.resume:
        draw_views(model, DataLoader(views, 10, shuffle=True), args.output / "views.png")

    record = Record(every_n_steps=max(1, len(loader) // 4))  # its labels are dense
    terminal = sys.stderr.isatty()
    trainer = Trainer(
        max_epochs=args.epochs,
        accelerator=args.accelerator,
        devices=1,
        precision=args.precision,
        logger=TensorBoardLogger(args.output, name="tensorboard"),
        callbacks=[
            record,
            LearningRateMonitor(),
            ModelCheckpoint(args.output, filename="last", enable_version_counter=False, save_on_train_epoch_end=True),
        ],
        check_val_every_n_epoch=args.knn_every,
        num_sanity_val_steps=0,
        log_every_n_steps=min(50, len(loader)),
        enable_progress_bar=terminal,  # a log of a bar has a line per batch
        enable_model_summary=terminal,
    )
    trainer.fit(model, loader, judges, ckpt_path=args.output / "last.ckpt" if args.resume else None)

    trainer.validate(model, judges, verbose=False)  # the last epoch need not have been one with kNN
    knn = 100 * trainer.callback_metrics["val_knn_top1"].item()
    record.epochs[-1].setdefault("knn", knn)
    return {
        "arguments": plain(args),
        "knn": knn,
        "linear": evaluate_linearly(model, judges[0], judges[1], args),
        "tested": len(test),
        "labels": record.summary(model.criterion)
        if args.method == "sane"
        else "Labels: one-hot, as the baseline's are.",
        "epochs": record.epochs,
    }


if __name__ == "__main__":
    main()
