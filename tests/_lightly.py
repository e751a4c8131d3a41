"""A small encoder, real images and a Trainer for the tests of the lightly adapter; run, it is one of two processes."""

import dataclasses
import json
import math
import sys
from pathlib import Path

import torch
from lightly.models.utils import update_momentum
from pytorch_lightning import Callback, Trainer, seed_everything
from pytorch_lightning.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2.functional import resize

from slr_plugin.adapters.lightly import SANE, Indexed, SANETransform
from slr_plugin.presets import CIFAR10

CLASSES, BATCH, WIDTH = 10, 8, 12
PRESET = dataclasses.replace(CIFAR10, queue_size=20)


class KilledError(Exception):
    """Where a run was stopped."""


class Digits(Dataset):
    """scikit-learn's scans as 16 x 16 images in three channels."""

    def __init__(self, transform=None, count=32):
        digits = load_digits()
        pixels = torch.from_numpy(digits.images[:count] * (255 / 16)).to(torch.uint8)
        self.images = resize(pixels[:, None].expand(-1, 3, -1, -1), [16, 16])
        self.targets = digits.target[:count].tolist()
        self.transform = transform

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        image = self.images[index]
        return (self.transform(image) if self.transform else image / 255), self.targets[index]


class Losses(Callback):
    """A metric of every batch, the training loss or another, or the learning rate; stops the run at (epoch, batch)."""

    def __init__(self, what="train_loss", stop_at=None):
        self.values, self.what, self.stop_at = [], what, stop_at

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.what == "lr":
            self.values.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.what != "lr":
            self.values.append(trainer.callback_metrics[self.what].item())
        if (trainer.current_epoch, batch_idx) == self.stop_at:
            raise KilledError


def backbone():
    """12 features, with batch norm."""
    convolution = nn.Conv2d(3, WIDTH, 3, stride=2, padding=1, bias=False)
    network = nn.Sequential(convolution, nn.BatchNorm2d(WIDTH), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network.num_features = WIDTH
    return network


def build(**arguments):
    """The module under test, small."""
    return SANE(BATCH, CLASSES, **{"backbone": backbone(), "preset": PRESET, "knn_k": 5} | arguments)


def loaders(views=None, count=32, shuffle=True):
    """Batches of views, and of images to vote and to be judged."""
    images = Digits(views or SANETransform(input_size=16), count)
    return (
        DataLoader(images, BATCH, shuffle=shuffle, drop_last=True),
        [DataLoader(Digits(), BATCH), DataLoader(Digits(count=16), BATCH)],
    )


def trainer(epochs, checkpoints=None, callbacks=(), **options):
    """A quiet Trainer on the CPU."""
    callbacks = list(callbacks)
    if checkpoints:
        callbacks.append(ModelCheckpoint(checkpoints, filename="last", enable_version_counter=False))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=callbacks,
        enable_checkpointing=bool(checkpoints),
        **quiet | {"devices": 1} | options,
    )


def train(model, epochs, views=None, count=32, shuffle=True, ckpt_path=None, **options):
    """Fit the model; returns the Trainer."""
    runner = trainer(epochs, **options)
    runner.fit(model, *loaders(views, count, shuffle), ckpt_path=ckpt_path)
    return runner


def recipe_options(folder, output, *options):
    """Arguments of the recipe for a short run of a small network."""
    small = "--backbone resnet9 --width 0.125 --batch-size 16 --queue-size 32 --accelerator cpu --workers 0"
    short = "--epochs 2 --linear-epochs 1 --knn-every 1"
    return [*small.split(), *short.split(), "--data", str(folder), "--output", str(output), *map(str, options)]


def moco_v2_losses(model, criterion, epochs):
    """MoCo v2 with lightly's loss, in a plain loop: query from the second view, then the average, then the key."""
    views, _ = loaders()
    steps = epochs * len(views)
    parameters = [*model.backbone.parameters(), *model.projection_head.parameters()]
    decayed = [parameter for parameter in parameters if parameter.ndim > 1]
    free = [parameter for parameter in parameters if parameter.ndim == 1]
    groups = [{"params": decayed}, {"params": free, "weight_decay": 0.0}]
    peak = 0.03 * BATCH / 256
    optimizer = torch.optim.SGD(groups, peak, momentum=0.9, weight_decay=1e-4)
    losses = []
    for _ in range(epochs):
        for (key_view, query_view), _ in views:
            for group in optimizer.param_groups:
                # lightly's schedule: a cosine from 1 to 0.001 at the last step.
                cosine = (1 + math.cos(math.pi * len(losses) / (steps - 1))) / 2
                group["lr"] = peak * (0.001 + 0.999 * cosine)
            queries = model.projection_head(model.backbone(query_view))
            update_momentum(model.backbone, model.key_backbone, m=model.ema_momentum)
            update_momentum(model.projection_head, model.key_projection_head, m=model.ema_momentum)
            with torch.no_grad():
                shuffle = torch.randperm(len(key_view))
                keys = model.key_projection_head(model.key_backbone(key_view[shuffle]))[shuffle.argsort()]
            loss = criterion(queries, keys)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def main(folder):
    """Train in two processes, whole and resumed; each writes what it saw."""
    torch.set_num_threads(1)
    seed_everything(0)
    options = {"devices": 2, "strategy": "ddp", "limit_val_batches": 0}
    whole, resumed = Losses("slr/mu"), Losses("slr/mu")
    model = build()
    runner = train(model, 2, callbacks=[whole], **options)
    thetas = model.mixup(torch.zeros(4, 1), torch.zeros(4, 1))[1].theta.tolist()
    train(build(), 2, callbacks=[StopAfter(1)], checkpoints=folder / "half", **options)
    train(build(), 2, callbacks=[resumed], ckpt_path=folder / "half" / "last.ckpt", **options)
    known = build(groups=torch.arange(32) // 2)
    images = Indexed(Digits(SANETransform(input_size=16)))
    trainer(1, **options).fit(known, DataLoader(images, BATCH, shuffle=True, drop_last=True))
    seen = {
        "groups": known.criterion.memory_bank.groups.tolist(),
        "queue": model.criterion.memory_bank.bank.tolist(),
        "weights": [parameter.tolist() for parameter in model.parameters()],
        "theta": thetas,
        "whole": whole.values,
        "resumed": resumed.values,
    }
    (folder / f"rank-{runner.global_rank}.json").write_text(json.dumps(seen))


class StopAfter(Callback):
    """Ends a run after an epoch, its schedules unchanged."""

    def __init__(self, epochs):
        self.epochs = epochs

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


if __name__ == "__main__":
    main(Path(sys.argv[1]))
