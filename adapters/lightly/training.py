"""What the recipe does once its options are read: data, model, training, evaluation and figures."""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from lightly.models import ResNetGenerator
from lightly.transforms.utils import IMAGENET_NORMALIZE
from lightly.utils.benchmarking import LinearClassifier, MetricCallback
from lightly.utils.benchmarking.knn import knn_predict
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
from torchvision.utils import save_image

from slr_plugin import SLRLoss, presets
from slr_plugin.adapters.export import read_backbone
from slr_plugin.adapters.knowledge import Indexed, read
from slr_plugin.adapters.lightly.module import SANE
from slr_plugin.adapters.lightly.networks import cifar_stem
from slr_plugin.adapters.lightly.recipe import plain
from slr_plugin.adapters.lightly.transforms import CIFAR10_AUGMENTATION, SANETransform
from slr_plugin.adapters.lightning import LabelQualityCallback
from slr_plugin.diagnostics import LabelQuality

SMALL = 64  # pixels: up to here the stem, the views and the colours of CIFAR-10, above those of ImageNet
KNN_K, KNN_T = 50, 0.05
LAYOUT = "DIR/train/<class>/* with DIR/test/<class>/* to evaluate, or images without classes in DIR/train or DIR"
Features = tuple[Tensor, Tensor]  # of images (n, d), and their classes (n,)

for _name in ("pytorch_lightning", "lightning.pytorch"):  # Lightning's tips and devices, once per trainer
    logging.getLogger(_name).setLevel(logging.WARNING)


class Record(LabelQualityCallback):
    """Per epoch: the last loss, kNN accuracy, and how good the refined labels are. Saved in the checkpoints."""

    def __init__(self, every_n_steps: int, bar: Any = None) -> None:
        super().__init__(every_n_steps)
        self.epochs: list[dict[str, float]] = []
        self.bar = bar

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """One row per epoch; an accuracy only where it was measured."""
        super().on_train_epoch_end(trainer, pl_module)
        assert self.quality is not None
        row: dict[str, float] = {"epoch": trainer.current_epoch + 1}
        row |= {name: value.item() for name, value in self.quality._asdict().items() if math.isfinite(value)}
        metrics = trainer.callback_metrics
        row["loss"] = metrics["train_loss"].item()
        if "val_knn_top1" in metrics and row["epoch"] % (trainer.check_val_every_n_epoch or 1) == 0:
            row["knn"] = 100 * metrics["val_knn_top1"].item()
        self.epochs.append(row)
        if self.bar is not None:
            self.bar.update()
        elif trainer.progress_bar_callback is None:
            knn = f", kNN {row['knn']:.1f} %" if "knn" in row else ""
            print(f"epoch {row['epoch']}/{trainer.max_epochs}: loss {row['loss']:.3f}{knn}", flush=True)

    def summary(self, criterion: SLRLoss) -> str:
        """How good the labels of the last epoch were."""
        values = [torch.tensor(self.epochs[-1].get(name, math.nan)) for name in LabelQuality._fields]
        return str(LabelQuality.average([LabelQuality(*values)]))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return super().state_dict() | {"epochs": self.epochs}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        super().load_state_dict(state_dict)
        self.epochs = list(state_dict["epochs"])
        if self.bar is not None:
            self.bar.update(len(self.epochs))


class FlatFolder(ImageFolder):  # type: ignore[misc]  # torchvision is untyped
    """The images of a folder and of those in it, of no known class: their target is 0."""

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """One class, the folder itself."""
        return ["."], {".": 0}


class Data(NamedTuple):
    """The images of a run, in the parts that its options choose."""

    views: Subset[Any]
    judged: list[Any]  # as they are, those that vote and those that are tested; none without classes or a test
    classes: int
    has_classes: bool


def load(args: argparse.Namespace) -> Data:
    """The images for training and testing; ValueError where there are none, or training and testing do not fit."""
    small = args.image_size <= SMALL
    views = SANETransform(args.image_size, strong=args.strong, **(CIFAR10_AUGMENTATION if small else {}))
    steps = [v2.Resize(args.image_size), v2.CenterCrop(args.image_size), v2.ToImage()]
    as_they_are = v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(**colours(args))])
    train = part(args, "train", views)
    has_classes = not isinstance(train.dataset, FlatFolder)
    judged = []
    if has_classes and (args.data is None or (args.data / "test").is_dir()):
        judged = [part(args, place, as_they_are) for place in ("train", "test")]
        if judged[1].dataset.classes != train.dataset.classes:
            raise ValueError(f"--data: training and test images must have the same classes; expected {LAYOUT}")
    if len(train) < args.batch_size:
        raise ValueError(f"{len(train)} training images are fewer than --batch-size {args.batch_size}")
    classes = len(train.dataset.classes)
    train.dataset = Indexed(train.dataset)
    return Data(train, judged, classes, has_classes)


def part(args: argparse.Namespace, place: str, transform: Any = None) -> Any:
    """The images for training or testing that the options choose, the same for every seed and method."""
    if args.data is None:
        data = CIFAR10("datasets/cifar10", train=place == "train", download=True, transform=transform)
    else:
        folder = args.data / place
        folder = args.data if place == "train" and not folder.is_dir() else folder
        try:
            has_classes = any(entry.is_dir() for entry in folder.iterdir())
            data = (ImageFolder if has_classes else FlatFolder)(folder, transform)
        except OSError as error:
            raise ValueError(f"--data: {folder}: {error}; expected {LAYOUT}") from error
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
    return Subset(data, order[: args.limit] if args.limit else range(len(data)))


def colours(args: argparse.Namespace) -> dict[str, Any]:
    """Mean and standard deviation of the colours."""
    result: dict[str, Any] = CIFAR10_AUGMENTATION["normalize"] if args.image_size <= SMALL else IMAGENET_NORMALIZE
    return result


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
        try:
            backbone.load_state_dict(read_backbone(args.init))
        except RuntimeError as error:
            network = f"--backbone {args.backbone} --width {args.width:g} --image-size {args.image_size}"
            raise ValueError(f"--init: {args.init} does not fit {network}") from error
    preset = replace(presets.CIFAR10, temperature=args.temperature, learning_rate=args.learning_rate)
    baseline: dict[str, Any] = {"mixup": False, "confidence": 0.0, "in_batch_keys": False}
    if args.estimator is not None:  # labels that follow it
        names = ("sharpening", "confidence", "refined_weight")
        preset = replace(preset, **{name: getattr(presets.FROM_FEATURES, name) for name in names})
        del baseline["confidence"]
    model = SANE(
        args.batch_size,
        num_classes=data.classes,
        knn_k=KNN_K,
        knn_t=KNN_T,
        backbone=backbone,
        feature_dim=feature_dim,
        preset=preset,
        queue_size=args.queue_size,
        ema_momentum=args.ema_momentum,
        **(baseline if args.method == "mocov2" else {}) | read("--", args.groups, args.estimator),
    )
    model.queue_setting = "--queue-size"  # in the warning of a long queue
    model.knowledge.attach(data.views)
    return model.to(memory_format=torch.channels_last)


def run(args: argparse.Namespace, data: Data, model: SANE, bar: Any = None) -> dict[str, Any]:
    """Train and evaluate; returns what results.json holds."""
    if not data.judged:
        lacking = "test images" if data.has_classes else "classes"
        print(f"no evaluation: --data has no {lacking}; the encoder is trained all the same", flush=True)
    workers: dict[str, Any] = {"num_workers": args.workers, "persistent_workers": args.workers > 0}
    loader = DataLoader(data.views, args.batch_size, shuffle=True, drop_last=True, **workers)
    judges = [DataLoader(images, args.batch_size, num_workers=args.workers) for images in data.judged] or None
    if not args.resume:
        draw_views(model, DataLoader(data.views, 10, shuffle=True), colours(args), args.output / "views.png")

    record = Record(max(1, len(loader) // 4), bar)  # its labels are dense
    if not data.has_classes:
        record.classes = lambda batch: torch.full_like(batch[1], -1)
    terminal = sys.stderr.isatty() and bar is None
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

    results: dict[str, Any] = {"arguments": plain(args), "knn": None, "linear": None, "tested": 0}
    if judges is not None:
        trainer.validate(model, judges, verbose=False)  # the last epoch need not have been one with kNN
        results["knn"] = 100 * trainer.callback_metrics["val_knn_top1"].item()
        record.epochs[-1].setdefault("knn", results["knn"])
        voting, tested = (extract(model, judge) for judge in judges)
        results |= {"linear": judge_linearly(voting, tested, data.classes, args, terminal), "tested": len(tested[1])}
    is_one_hot = args.method == "mocov2" and args.estimator is args.groups is None
    labels = "Labels: one-hot, as the baseline's are." if is_one_hot else record.summary(model.criterion)
    return results | {"labels": labels, "epochs": record.epochs}


@torch.no_grad()
def extract(model: SANE, loader: DataLoader[Any]) -> Features:
    """Backbone features and classes of a whole data set."""
    model.eval()
    parts = [(model(images.to(model.device)).flatten(1).cpu(), targets) for images, targets in loader]
    features, targets = zip(*parts, strict=True)
    return torch.cat(features), torch.cat(targets)


def judge_linearly(
    train: Features, test: Features, num_classes: int, args: argparse.Namespace, shows_bar: bool = False
) -> float:
    """Test accuracy in per cent of lightly's linear classifier on frozen features of images as they are."""
    loader = DataLoader(TensorDataset(*train), args.batch_size, shuffle=True)
    width = train[0].shape[1]
    classifier = LinearClassifier(nn.Identity(), args.batch_size, feature_dim=width, num_classes=num_classes, topk=(1,))
    metrics = MetricCallback()
    quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary"), False)
    trainer = Trainer(
        max_epochs=args.linear_epochs,
        accelerator=args.accelerator,
        devices=1,
        callbacks=[metrics],
        check_val_every_n_epoch=args.linear_epochs,
        enable_progress_bar=shows_bar,
        **quiet,
    )
    trainer.fit(classifier, loader, DataLoader(TensorDataset(*test), args.batch_size))
    return float(100 * metrics.val_metrics["val_top1"][-1])


def vote(train: Features, test: Features, num_classes: int) -> float:
    """Test accuracy in per cent of lightly's kNN vote, as during training."""
    bank, classes = F.normalize(train[0]).T, train[1]
    k, parts = min(KNN_K, len(classes)), torch.split(F.normalize(test[0]), 500)
    votes = [knn_predict(part, bank, classes, num_classes, k, KNN_T)[:, 0] for part in parts]
    return 100 * (torch.cat(votes) == test[1]).float().mean().item()


def draw_views(model: SANE, loader: DataLoader[Any], normalize: Mapping[str, Any], path: Path) -> None:
    """Rows of queries, their positives, what is mixed if that is another crop, and the mixed queries."""
    views = next(iter(loader))[0]
    rows = [views[1], views[0], *views[:1:-1]]
    if model.mixup is not None:
        rows.append(model.mixup(views[-1], views[-2])[0])
    mean, std = (torch.tensor(normalize[name]).view(-1, 1, 1) for name in ("mean", "std"))
    save_image((torch.cat(rows) * std + mean).clamp(0, 1), path, nrow=len(views[0]))


def draw(results: Mapping[str, Any], output: Path, beside: Sequence[Path] = ()) -> None:
    """The run's curves, and those of other runs beside them."""
    runs = [(output, results), *((folder, json.loads((folder / "results.json").read_text())) for folder in beside)]
    methods = [run["arguments"]["method"] for _, run in runs]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("loss", "knn"), strict=True):
        for (folder, run), method in zip(runs, methods, strict=True):
            points = [(row["epoch"], row[name]) for row in run["epochs"] if name in row]  # where it was measured
            if points:
                axes.plot(*zip(*points, strict=True), ".-", label=method if methods.count(method) == 1 else str(folder))
        axes.set(xlabel="epoch", ylabel={"loss": "loss of the last batch", "knn": "kNN accuracy (%)"}[name])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if axes.lines:
            axes.legend(frameon=False)
    figure.savefig(output / "curves.png", dpi=150)
