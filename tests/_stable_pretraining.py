"""A run through stable-pretraining's Manager, as a script that can be killed and in pieces that a YAML can name."""

import json
import os
import signal
import sys
from pathlib import Path

import stable_pretraining as spt
import torch
import torchmetrics
from lightning import Callback, Trainer
from omegaconf import OmegaConf
from stable_pretraining.config import recursive_instantiate
from torch import nn
from torch.utils.data import DataLoader, Dataset

from slr_plugin import CosineConfidence, SLRLoss
from slr_plugin.adapters.stable_pretraining import sane

SIZE, BATCH, EPOCHS = 24, 8, 4
STEPS = EPOCHS * SIZE // BATCH


class Views(Dataset):
    """Two views of each image, or the image itself."""

    column_names = ("views",)  # which their DataModule asks for

    def __init__(self, count=2, shape=(1, 4, 4), is_known=False):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(SIZE, count, *shape, generator=generator)
        self.labels = torch.arange(SIZE) % 3
        self.is_single = count == 1
        self.groups = torch.arange(SIZE) // 2 if is_known else None

    def __len__(self):
        return SIZE

    def __getitem__(self, index):
        views = [{"image": image, "label": self.labels[index]} for image in self.images[index]]
        if self.groups is not None:  # as MultiViewTransform repeats them
            known = {"groups": self.groups[index], "estimator": self.images[index, 0].flatten()[:3]}
            views = [view | known for view in views]
        return views[0] if self.is_single else {"views": views}


class Recorder(Callback):
    """Writes a line per batch; kills the process before a step, as a machine that goes away does."""

    def __init__(self, path, kill_at=-1):
        self.path, self.kill_at = Path(path), kill_at

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.before = pl_module.criterion.memory_bank.bank.double().sum().item()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        logged = {name: value.item() for name, value in trainer.callback_metrics.items()}
        state = {
            "step": trainer.global_step,
            "queue": self.before,
            "pointer": pl_module.criterion.memory_bank.bank_ptr.item(),
            "groups": pl_module.criterion.memory_bank.groups.tolist(),
            "mu": pl_module.criterion.stats["mu"].item(),
            "loss": logged["fit/loss_step"],
        }
        with self.path.open("a") as file:
            file.write(json.dumps(state) + "\n")

    def on_validation_epoch_end(self, trainer, pl_module):
        names = {name for name in trainer.callback_metrics if name.startswith("eval/")}
        self.path.with_suffix(".names").write_text(json.dumps(sorted(names)))


def encoder(dim=6):
    return nn.Sequential(nn.Flatten(), nn.Linear(16, dim), nn.ReLU())


def projector(dim=6):
    return nn.Linear(dim, 4)


def build(criterion, has_teacher=True, mixup=None, **kwargs):
    torch.manual_seed(0)
    wrap = spt.backbone.TeacherStudentWrapper if has_teacher else lambda network: network
    networks = {"backbone": wrap(encoder()), "projector": wrap(projector())}
    optim = {"optimizer": {"type": "SGD", "lr": 0.1, "momentum": 0.9}}
    return spt.Module(
        **({"forward": sane, "criterion": criterion, "mixup": mixup} | networks | {"optim": optim} | kwargs)
    )


def data(is_known=False):
    train, val = (DataLoader(Views(count, is_known=is_known), batch_size=BATCH) for count in (2, 1))
    return spt.data.DataModule(train=train, val=val)


def trainer(**kwargs):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return Trainer(
        max_epochs=EPOCHS, accelerator="cpu", num_sanity_val_steps=0, log_every_n_steps=1, **(quiet | kwargs)
    )


def main(record, kill_at, checkpoint=None):
    """Train by the Manager, with a linear probe and neighbours on the side."""
    torch.manual_seed(1)
    module = build(SLRLoss(0.2, (20, 4), confidence=CosineConfidence(0.0, 2.0, STEPS), estimator_dim=3))
    probe = spt.callbacks.OnlineProbe(
        module,
        name="probe",
        input="embedding",
        target="label",
        probe=nn.Linear(6, 3),
        loss=nn.CrossEntropyLoss(),
        metrics={"top1": torchmetrics.classification.MulticlassAccuracy(3)},
    )
    neighbours = spt.callbacks.OnlineKNN(
        name="knn",
        input="embedding",
        target="label",
        queue_length=16,
        metrics={"top1": torchmetrics.classification.MulticlassAccuracy(3)},
        input_dim=6,
        target_dim=1,
        num_classes=3,
        k=3,
    )
    callbacks = [probe, neighbours, Recorder(record, int(kill_at))]
    spt.Manager(
        trainer=trainer(callbacks=callbacks),
        module=module,
        data=data(is_known=True),
        seed=0,
        ckpt_path=checkpoint,
        weights_only=False,
    )()


def from_yaml(config, checkpoint=None):
    """What ``spt run`` is meant to do, as on the page of stable-pretraining."""
    config = OmegaConf.load(config)
    parts = recursive_instantiate({"module": config.module, "data": config.data})
    spt.Manager(trainer=config.trainer, **parts, seed=config.seed, ckpt_path=checkpoint, weights_only=False)()


if __name__ == "__main__":
    {"python": main, "yaml": from_yaml}[sys.argv[1]](*sys.argv[2:])
