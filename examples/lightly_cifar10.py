"""The paper's CIFAR-10 settings with lightly: pretrain, watch kNN accuracy, evaluate linearly, draw.

    python examples/lightly_cifar10.py                            torchvision's CIFAR-10, downloaded; ResNet-18
    python examples/lightly_cifar10.py --data DIR                 your images: DIR/train/<class>/*, DIR/test/<class>/*
    python examples/lightly_cifar10.py --resume                   go on after an interruption, with the run's options
    python examples/lightly_cifar10.py ... --method mocov2        the baseline: one-hot labels, no mixup

It writes into ``--output``: ``arguments.json``, ``views.png`` (rows: queries, positives, mixed images), ``last.ckpt``,
TensorBoard's logs, then ``curves.png``, ``labels.png`` (where the refined labels lie) and ``results.json``. The paper
trains ResNet-50 for 2,000 epochs: ``--backbone resnet50 --epochs 2000``.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightly.models import ResNetGenerator
from lightly.utils.benchmarking import LinearClassifier, MetricCallback
from matplotlib.figure import Figure
from pytorch_lightning import LightningModule, Trainer, seed_everything
from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torchvision.datasets import CIFAR10, ImageFolder
from torchvision.models import get_model
from torchvision.transforms import v2
from torchvision.utils import make_grid, save_image

from slr_plugin import presets
from slr_plugin.adapters.lightly import SANE, SANETransform, cifar_stem
from slr_plugin.adapters.lightly.transforms import CIFAR10_AUGMENTATION
from slr_plugin.adapters.lightning import LabelQualityCallback

NORMALIZE = CIFAR10_AUGMENTATION["normalize"]
FREE = {"resume", "output", "data", "workers", "accelerator"}  # options in which a run may go on differently


class Record(LabelQualityCallback):
    """Per epoch: the last loss, kNN accuracy, and how good the refined labels are. Saved in the checkpoints."""

    def __init__(self, every_n_steps: int) -> None:
        super().__init__(every_n_steps)
        self.epochs: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """One row per epoch; an accuracy only where it was measured."""
        super().on_train_epoch_end(trainer, pl_module)
        row = {"epoch": trainer.current_epoch + 1}
        row |= {name: value.item() for name, value in self.quality._asdict().items()}
        metrics = trainer.callback_metrics
        row["loss"] = metrics["train_loss"].item()
        if "val_knn_top1" in metrics and (trainer.current_epoch + 1) % trainer.check_val_every_n_epoch == 0:
            row["knn"] = 100 * metrics["val_knn_top1"].item()
        self.epochs.append(row)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return super().state_dict() | {"epochs": self.epochs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        super().load_state_dict(state)
        self.epochs = list(state["epochs"])


def load(args: argparse.Namespace) -> tuple[Dataset, Dataset, Dataset, int]:
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
    baseline = {"mixup": False, "confidence": 0.0, "in_batch_keys": False} if args.method == "mocov2" else {}
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


def draw_views(model: SANE, loader: DataLoader, path: Path, count: int = 10) -> None:
    """A sheet of queries, their positives, the strong positives if there are, and the mixed images, row by row."""
    views = next(iter(loader))[0]
    rows = [views[1][:count], views[0][:count]]
    if model.mixup is not None:
        positives, queries = views[-2][:count], views[-1][:count]
        rows += ([] if len(views) == 2 else [positives]) + [model.mixup(queries, positives)[0]]
    mean, std = (torch.tensor(NORMALIZE[name]).view(-1, 1, 1) for name in ("mean", "std"))
    grid = make_grid(torch.cat(rows) * std + mean, nrow=count, padding=1)
    save_image(torch.nn.functional.interpolate(grid[None], scale_factor=3), path)


def evaluate_linearly(model: SANE, train: DataLoader, test: DataLoader, epochs: int, args: argparse.Namespace) -> float:
    """Test accuracy in per cent of lightly's linear classifier on the frozen features of images as they are."""
    features = [extract(model, loader) for loader in (train, test)]
    loaders = [DataLoader(TensorDataset(*pair), args.batch_size, shuffle=pair is features[0]) for pair in features]
    feature_dim, num_classes = features[0][0].shape[1], model.hparams["num_classes"]
    classifier = LinearClassifier(
        nn.Identity(), args.batch_size, feature_dim=feature_dim, num_classes=num_classes, topk=(1,)
    )
    metrics = MetricCallback()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = Trainer(
        max_epochs=epochs,
        accelerator=args.accelerator,
        devices=1,
        callbacks=[metrics],
        check_val_every_n_epoch=epochs,
        **quiet,
    )
    trainer.fit(classifier, *loaders)
    return 100 * metrics.val_metrics["val_top1"][-1]


@torch.no_grad()
def extract(model: SANE, loader: DataLoader) -> tuple[Tensor, Tensor]:
    """Backbone features and classes of a whole data set."""
    model.eval()
    parts = [(model(images.to(model.device)).flatten(1).cpu(), targets) for images, targets in loader]
    features, targets = zip(*parts, strict=True)
    return torch.cat(features), torch.cat(targets)


def draw(record: Record, output: Path) -> None:
    """The run's curves, and how good its labels are."""
    epochs = [row["epoch"] for row in record.epochs]
    measured = [row for row in record.epochs if "knn" in row]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(epochs, [row["loss"] for row in record.epochs], color="tab:grey")
    left.set(title="Training", xlabel="epoch", ylabel="loss of the last batch")
    right.plot([row["epoch"] for row in measured], [row["knn"] for row in measured], marker=".", color="tab:blue")
    right.set(title="Test images", xlabel="epoch", ylabel="kNN accuracy (%)")
    figure.savefig(output / "curves.png", dpi=150)

    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, keys, colour in (("same", "own class", "tab:blue"), ("other", "other classes", "tab:red")):
        axes.plot(epochs, [100 * row[name] for row in record.epochs], label=f"keys of the {keys}", color=colour)
    axes.set(title="Label mass beyond the own positive", xlabel="epoch", ylabel="share of the label (%)")
    axes.legend(frameon=False)
    figure.savefig(output / "labels.png", dpi=150)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR", help="image folders; without it, torchvision's CIFAR-10")
    add("--method", choices=["sane", "mocov2"], default="sane", help="default: %(default)s")
    add("--strong", action="store_true", help="strong augmentation of the mixed positives (CLSA's)")
    add("--backbone", default="resnet18", help="a ResNet of torchvision (default: %(default)s)")
    add("--width", type=float, default=1, help="of lightly's ResNet instead, e.g. 0.25 on a CPU (default: %(default)s)")
    add("--epochs", type=int, default=200, help="default: %(default)s")
    add("--linear-epochs", type=int, default=100, help="default: %(default)s")
    add("--batch-size", type=int, default=256, help="default: %(default)s")
    add("--queue-size", type=int, default=presets.CIFAR10.queue_size, help="default: %(default)s")
    add("--ema-momentum", type=float, default=0.99, help="of the momentum network (default: %(default)s)")
    add("--knn-every", type=int, default=5, help="epochs between kNN evaluations (default: %(default)s)")
    add("--limit", type=int, help="use at most so many training images, and so many test images")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1), help="that load images (default: %(default)s)")
    add("--accelerator", default="auto", help="default: %(default)s")
    add("--precision", default="32-true", help="e.g. 16-mixed on a GPU, bf16-mixed (default: %(default)s)")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--resume", action="store_true", help="go on from the last checkpoint in --output")
    add("--output", type=Path, default=Path("outputs/cifar10"), help="default: %(default)s")
    args = parser.parse_args(argv)
    if args.resume:
        for needed in (args.output / "last.ckpt", args.output / "arguments.json"):
            if not needed.is_file():
                parser.error(f"--resume: there is no {needed}; start without --resume")
        stored = json.loads((args.output / "arguments.json").read_text())
        parser.set_defaults(**{name: value for name, value in stored.items() if name not in {"resume", "output"}})
        args = parser.parse_args(argv)
        now = plain(args)
        for name in stored:
            if name not in FREE and now[name] != stored[name]:
                option = f"--{name.replace('_', '-')}"
                parser.error(
                    f"the run in {args.output} has {option} {stored[name]}: resume it without {option}, or choose "
                    "another --output for a new run"
                )
    elif (args.output / "last.ckpt").is_file():
        parser.error(f"{args.output} holds a run already: continue it with --resume, or choose another --output")
    return args


def plain(args: argparse.Namespace) -> dict[str, Any]:
    """The options, for JSON."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, evaluate, draw; returns what results.json holds."""
    args = parse(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    seed_everything(args.seed, workers=True)
    views, train, test, num_classes = load(args)
    if len(views) < args.batch_size:
        raise SystemExit(f"{len(views)} training images are fewer than --batch-size {args.batch_size}")

    model = build(args, num_classes)
    workers = {"num_workers": args.workers, "persistent_workers": args.workers > 0}
    loader = DataLoader(views, args.batch_size, shuffle=True, drop_last=True, **workers)
    judges = [DataLoader(data, args.batch_size, num_workers=args.workers) for data in (train, test)]
    if not args.resume:
        (args.output / "arguments.json").write_text(json.dumps(plain(args), indent=1))
        draw_views(model, DataLoader(views, 10, shuffle=True), args.output / "views.png")

    record = Record(every_n_steps=max(1, len(loader) // 4))  # its labels are dense
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
    )
    trainer.fit(model, loader, judges, ckpt_path=args.output / "last.ckpt" if args.resume else None)

    trainer.validate(model, judges, verbose=False)  # the last epoch need not have been one with kNN
    knn = 100 * trainer.callback_metrics["val_knn_top1"].item()
    results = {
        "arguments": plain(args),
        "knn": knn,
        "linear": evaluate_linearly(model, *judges, args.linear_epochs, args),
        "epochs": record.epochs,
    }
    (args.output / "results.json").write_text(json.dumps(results, indent=1))
    draw(record, args.output)
    print(f"{args.method}: kNN {results['knn']:.2f} %, linear {results['linear']:.2f} % of {len(test):,} test images")
    print(f"figures, logs and checkpoint: {args.output}")
    return results


if __name__ == "__main__":
    main()
