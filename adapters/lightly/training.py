"""What the recipe does once its options are read: data, model, training, evaluation and figures."""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightly.data import LightlyDataset
from lightly.models import ResNetGenerator
from lightly.transforms.utils import IMAGENET_NORMALIZE
from lightly.utils.benchmarking import LinearClassifier
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from pytorch_lightning import LightningModule, Trainer, seed_everything
from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchvision.datasets import CIFAR10
from torchvision.models import get_model
from torchvision.transforms import v2
from torchvision.utils import save_image

from slr_plugin import presets
from slr_plugin.adapters.export import read_backbone
from slr_plugin.adapters.knowledge import Indexed, read
from slr_plugin.adapters.lightly.module import SANE, cifar_stem
from slr_plugin.adapters.lightly.transforms import CIFAR10_AUGMENTATION, SANETransform
from slr_plugin.adapters.lightning import LabelQualityCallback

SMALL = 64  # pixels: up to here the stem, the views and the colours of CIFAR-10, above those of ImageNet
KNN_K, KNN_T = 50, 0.05
QUIET: dict[str, Any] = {"devices": 1, "enable_progress_bar": False, "enable_model_summary": False}  # of trainers
Features = tuple[Tensor, Tensor]  # of images (n, d), and their classes (n,)

logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # else every trainer tells its devices and tips


class Data(NamedTuple):
    """The images of a run, in the parts that its options choose."""

    views: Subset[Any]
    judged: list[Any]  # as they are, those that vote and those that are tested; none without classes or a test
    classes: list[str]  # none where the images lie in no class folders


def load(args: argparse.Namespace) -> Data:
    """The images for training and testing; ValueError where there are none, or training and testing do not fit."""
    augmentation = CIFAR10_AUGMENTATION if args.image_size <= SMALL else {"normalize": IMAGENET_NORMALIZE}
    steps = [v2.Resize(args.image_size), v2.CenterCrop(args.image_size), v2.ToImage()]
    as_they_are = v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(**augmentation["normalize"])])
    train = part(args, "train", SANETransform(args.image_size, strong=args.strong, **augmentation))
    classes = getattr(train.dataset, "classes", [])
    judged = []
    if classes and (args.data is None or (args.data / "test").is_dir()):
        judged = [part(args, place, as_they_are) for place in ("train", "test")]
        if getattr(judged[1].dataset, "classes", []) != classes:
            raise ValueError(
                "training and test images must have the same classes: DIR/train/<class>/*, DIR/test/<class>/*"
            )
    if len(train) < args.batch_size:
        raise ValueError(f"{len(train)} training images are fewer than --batch-size {args.batch_size}")
    train.dataset = Indexed(train.dataset)
    return Data(train, judged, classes)


def part(args: argparse.Namespace, place: str, transform: Any) -> Any:
    """The images for training or testing that the options choose, the same for every seed and method."""
    if args.data is None:
        data = CIFAR10("datasets/cifar10", train=place == "train", download=True, transform=transform)
    else:
        folder = args.data / place
        data = LightlyDataset(str(folder if folder.is_dir() else args.data), transform).dataset
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
    return Subset(data, order[: args.limit] if args.limit else range(len(data)))


def build(args: argparse.Namespace, data: Data) -> SANE:
    """The method; the baseline is the same module with one-hot labels, MoCo's keys and no mixup."""
    seed_everything(args.seed, workers=True)
    if args.width != 1 or args.backbone == "resnet9":  # lightly's: these do not have torchvision's names
        backbone = ResNetGenerator(args.backbone.replace("resnet", "resnet-"), width=args.width)
        backbone.linear, feature_dim = nn.Identity(), backbone.linear.in_features
    else:
        backbone = get_model(args.backbone)
        backbone.fc, feature_dim = nn.Identity(), backbone.fc.in_features
        backbone = cifar_stem(backbone) if args.image_size <= SMALL else backbone
    if args.init is not None and not args.resume:
        backbone.load_state_dict(read_backbone(args.init))
    options: dict[str, Any] = read("--", args.groups, args.estimator)
    if args.method == "mocov2":
        options |= {"mixup": False, "in_batch_keys": False}
    chosen = {name: getattr(args, name) for name in ("temperature", "learning_rate", "queue_size")}
    if args.estimator is not None:  # labels that follow it
        ours = presets.FROM_FEATURES
        chosen |= {name: getattr(ours, name) for name in ("sharpening", "confidence", "refined_weight")}
    elif args.method == "mocov2":
        options["confidence"] = 0.0
    options |= {"backbone": backbone, "feature_dim": feature_dim, "ema_momentum": args.ema_momentum}
    preset = replace(presets.CIFAR10, **chosen)
    model = SANE(args.batch_size, max(1, len(data.classes)), KNN_K, KNN_T, preset=preset, **options)
    model.knowledge.attach(data.views)
    return model.to(memory_format=torch.channels_last)


def run(args: argparse.Namespace, data: Data, model: SANE) -> dict[str, Any]:
    """Train and evaluate; returns what results.json holds beside the options."""
    if not data.judged:
        lacking = "test images" if data.classes else "classes"
        print(f"no evaluation: --data has no {lacking}; the encoder is trained all the same", flush=True)
    workers: dict[str, Any] = {"num_workers": args.workers, "persistent_workers": args.workers > 0}
    loader = DataLoader(data.views, args.batch_size, shuffle=True, drop_last=True, **workers)
    judges = [DataLoader(images, args.batch_size, num_workers=args.workers) for images in data.judged] or None
    if not args.resume:
        draw_views(model, DataLoader(data.views, 10, shuffle=True), args.output / "views.png")

    record = Record(max(1, len(loader) // 4))  # its labels are dense
    if not data.classes:
        record.classes = lambda batch: torch.full_like(batch[1], -1)
    last = ModelCheckpoint(args.output, filename="last", enable_version_counter=False, save_on_train_epoch_end=True)
    trainer = Trainer(
        max_epochs=args.epochs,
        accelerator=args.accelerator,
        precision=args.precision,
        logger=TensorBoardLogger(args.output, name="tensorboard"),
        callbacks=[record, LearningRateMonitor(), last],
        check_val_every_n_epoch=args.knn_every,
        num_sanity_val_steps=0,
        log_every_n_steps=min(50, len(loader)),
        **QUIET,
    )
    trainer.fit(model, loader, judges, ckpt_path=args.output / "last.ckpt" if args.resume else None)

    labels = "No epoch was left to train." if record.quality is None else str(record.quality)
    results: dict[str, Any] = {"knn": None, "linear": None, "tested": 0, "labels": labels, "epochs": record.epochs}
    if judges is not None:
        trainer.validate(model, judges, verbose=False)  # the last epoch need not have been one with kNN
        results["knn"] = 100 * trainer.callback_metrics["val_knn_top1"].item()
        record.epochs[-1].setdefault("knn", results["knn"])
        voting, tested = (extract(model, judge) for judge in judges)
        results |= {"linear": judge_linearly(voting, tested, len(data.classes), args), "tested": len(tested[1])}
    return results


class Record(LabelQualityCallback):
    """Per epoch: the last loss, kNN accuracy, and how good the refined labels are. Saved in the checkpoints."""

    def __init__(self, every_n_steps: int) -> None:
        super().__init__(every_n_steps)
        self.epochs: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """One row per epoch; an accuracy only where it was measured."""
        super().on_train_epoch_end(trainer, pl_module)
        assert self.quality is not None
        metrics = trainer.callback_metrics
        row: dict[str, float] = {"epoch": trainer.current_epoch + 1}
        row |= {name: value.item() for name, value in self.quality._asdict().items() if math.isfinite(value)}
        row["loss"] = metrics["train_loss"].item()
        line = f"epoch {row['epoch']}/{trainer.max_epochs}: loss {row['loss']:.3f}"
        if "val_knn_top1" in metrics and row["epoch"] % (trainer.check_val_every_n_epoch or 1) == 0:
            row["knn"] = 100 * metrics["val_knn_top1"].item()
            line += f", kNN {row['knn']:.1f} %"
        self.epochs.append(row)
        print(line, flush=True)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return super().state_dict() | {"epochs": self.epochs}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        super().load_state_dict(state_dict)
        self.epochs = list(state_dict["epochs"])


@torch.no_grad()
def extract(model: SANE, loader: DataLoader[Any]) -> Features:
    """Backbone features and classes of a whole data set."""
    model.eval()
    parts = [(model(images.to(model.device, model.dtype)).flatten(1), targets) for images, targets in loader]
    features, targets = zip(*parts, strict=True)
    return torch.cat(features).float().cpu(), torch.cat(targets)


def judge_linearly(train: Features, test: Features, num_classes: int, args: argparse.Namespace) -> float:
    """Test accuracy in per cent of lightly's linear classifier on frozen features of images as they are."""
    width, epochs = train[0].shape[1], args.linear_epochs
    classifier = LinearClassifier(nn.Identity(), args.batch_size, feature_dim=width, num_classes=num_classes, topk=(1,))
    options = QUIET | {"accelerator": args.accelerator, "logger": False, "enable_checkpointing": False}
    trainer = Trainer(max_epochs=epochs, check_val_every_n_epoch=epochs, **options)
    loader = DataLoader(TensorDataset(*train), args.batch_size, shuffle=True)
    trainer.fit(classifier, loader, DataLoader(TensorDataset(*test), args.batch_size))
    return float(100 * trainer.callback_metrics["val_top1"])


def draw_views(model: SANE, loader: DataLoader[Any], path: Path) -> None:
    """Rows of queries, their positives, what is mixed if that is another crop, and the mixed queries."""
    views = next(iter(loader))[0]
    rows = [views[1], views[0], *views[:1:-1]]
    if model.mixup is not None:
        rows.append(model.mixup(views[-1], views[-2])[0])
    save_image(torch.cat(rows), path, nrow=len(views[0]), normalize=True)


def draw(runs: Mapping[Path, Mapping[str, Any]], path: Path) -> None:
    """The curves of runs, by the folders that hold them."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    labels = {"loss": "loss of the last batch", "knn": "kNN accuracy (%)"}
    for axes, (name, label) in zip(figure.subplots(1, 2), labels.items(), strict=True):
        for folder, run in runs.items():
            points = [(row["epoch"], row[name]) for row in run["epochs"] if name in row]  # where it was measured
            if points:
                axes.plot(*zip(*points, strict=True), ".-", label=f"{run['arguments']['method']}: {folder.name}")
                axes.legend(frameon=False)
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path, dpi=150)
