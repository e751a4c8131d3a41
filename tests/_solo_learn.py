"""solo-learn's own classes on real images, small; run, it is one of two processes."""

import json
import os
import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from omegaconf import OmegaConf

CLONE = Path(os.environ["SOLO_LEARN_DIR"]).resolve()
sys.path.insert(0, str(CLONE))

with warnings.catch_warnings():  # solo-learn's imports have many
    warnings.simplefilter("ignore")
    from solo.data.pretrain_dataloader import (
        FullTransformPipeline,
        NCropAugmentation,
        build_transform_pipeline,
        prepare_dataloader,
        prepare_datasets,
    )
    from solo.methods import MoCoV2Plus

from slr_plugin.adapters.solo_learn import SANE  # noqa: E402

BATCH, CLASSES = 8, 10
PLAIN = {"prob": 0.0}
JITTER = {"prob": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}


def pipeline(crop_size, num_crops):
    """One entry of ``augmentations``."""
    crop = {"enabled": True, "crop_min_scale": 0.2, "crop_max_scale": 1.0}
    others = dict.fromkeys(("grayscale", "gaussian_blur", "solarization", "equalization", "horizontal_flip"), PLAIN)
    return {"rrc": crop, "color_jitter": JITTER, "crop_size": crop_size, "num_crops": num_crops, **others}


def config(method="sane", small=(), **changes):
    """What main_pretrain.py gives a method: ``small`` are further pipelines, (crop_size, num_crops) each."""
    cfg = {
        "name": "test",
        "method": method,
        "backbone": {"name": "resnet18"},
        "data": {
            "dataset": "custom",
            "num_large_crops": 2,
            "num_small_crops": sum(count for _, count in small),
            "num_classes": CLASSES,
        },
        "augmentations": [pipeline(32, 2), *(pipeline(*crop) for crop in small)],
        "optimizer": {"name": "sgd", "batch_size": BATCH, "lr": 0.01, "classifier_lr": 0.01, "weight_decay": 1e-4},
        "scheduler": {"name": "warmup_cosine", "warmup_epochs": 0},
        "momentum": {"base_tau": 0.9, "final_tau": 1.0},
        "max_epochs": 2,
        "method_kwargs": {"proj_hidden_dim": 16, "proj_output_dim": 12, "temperature": 0.2, "queue_size": 24},
    }
    cfg = OmegaConf.merge(cfg, OmegaConf.create(changes))
    OmegaConf.set_struct(cfg, False)
    return cfg


def build(**changes):
    """The method under test."""
    torch.manual_seed(0)
    return SANE(config(**changes))


def loader(cfg, folder, no_labels=False):
    """solo-learn's own loader of an image folder."""
    steps = [NCropAugmentation(build_transform_pipeline("custom", part), part.num_crops) for part in cfg.augmentations]
    images = prepare_datasets("custom", FullTransformPipeline(steps), train_data_path=folder, no_labels=no_labels)
    return prepare_dataloader(images, batch_size=BATCH, num_workers=0)


class Record(Callback):
    """What was logged at every step."""

    def __init__(self, *names):
        self.names, self.values, self.totals = names, [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append([trainer.callback_metrics[name].item() for name in self.names])
        self.totals.append(outputs["loss"].item())


def train(model, batches, callbacks=(), ckpt_path=None, **options):
    """Fit with a quiet Trainer on the CPU; returns it."""
    seed_everything(0)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        enable_checkpointing=False,
        **quiet | {"max_epochs": 2, "devices": 1} | options,
    )
    trainer.fit(model, batches, ckpt_path=ckpt_path)
    return trainer


def mocov2plus_beside_ours():
    """solo-learn's MoCo v2+ and the same by SANE: same weights, queues and settings."""
    torch.manual_seed(0)
    theirs = MoCoV2Plus(config("mocov2plus"))
    ours = build(method_kwargs={"confidence": [0, 0], "kappa": None, "in_batch_keys": False})
    same = {name: value for name, value in theirs.state_dict().items() if not name.startswith("queue")}
    for view in (0, 1):  # its queue 1 holds the keys of view 1, the negatives of view 0
        same[f"criteria.{view}.memory_bank.bank"] = theirs.queue[1 - view].T
    lacking = ours.load_state_dict(same, strict=False)
    assert set(lacking.missing_keys) <= {f"criteria.{v}.{n}" for v in (0, 1) for n in ("step", "memory_bank.bank_ptr")}
    return theirs, ours


def main(folder):
    """Train in two processes; each writes what it saw."""
    torch.set_num_threads(1)
    model = build(small=[(24, 2)])
    record = Record("train_slr_loss")
    trainer = train(model, loader(model.cfg, folder / "train"), [record], max_epochs=1, devices=2, strategy="ddp")
    theta, partner = model.mixup(torch.zeros(BATCH, 1), torch.zeros(BATCH, 1))[1]
    seen = {
        "queues": [criterion.memory_bank.bank.tolist() for criterion in model.criteria],
        "weights": [parameter.sum().item() for parameter in model.parameters()],
        "theta": theta.tolist(),
        "partner": partner.tolist(),
        "steps": trainer.global_step,
        "finite": bool(torch.tensor(record.values).isfinite().all()),
    }
    (folder / f"rank-{trainer.global_rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
