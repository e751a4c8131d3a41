"""lightly's own benchmark code, from a clone of its repository, which no wheel holds: make test-lightly CLONE=DIR."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

if "LIGHTLY_DIR" not in os.environ:
    pytest.skip("set LIGHTLY_DIR to a clone of github.com/lightly-ai/lightly", allow_module_level=True)

from _digits import write_digits
from _lightly import Losses, trainer
from lightly.transforms import MoCoV2Transform
from pytorch_lightning import seed_everything
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from slr_plugin.adapters.lightly import SANE

BENCHMARK = Path(os.environ["LIGHTLY_DIR"]).resolve() / "benchmarks" / "imagenet" / "resnet50"

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture
def folder(tmp_path):
    """Two scans of every digit to train on, one to be judged."""
    return write_digits(tmp_path, size=256, val=range(10), train=range(10, 30))


def test_without_confidence_and_mixup_its_loss_is_that_of_lightlys_moco_v2(folder, monkeypatch):
    """lightly's MoCoV2 itself, ResNet-50, both in the real Trainer; same weights, queue, images and seed.

    In float64: in float32 the first steps of so small batches magnify the last bit about a thousandfold per step.
    """
    monkeypatch.syspath_prepend(BENCHMARK)
    torch.manual_seed(0)
    theirs = importlib.import_module("mocov2").MoCoV2(batch_size_per_device=8, num_classes=10)
    ours = SANE(8, 10, projection_head=type(theirs.projection_head)(), mixup=False, confidence=0.0, in_batch_keys=False)
    state = theirs.state_dict() | {"criterion.memory_bank.bank": theirs.criterion.memory_bank.bank}
    missing = ours.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    curves = []
    for model in (theirs, ours):
        seed_everything(1)
        images = ImageFolder(folder / "train", MoCoV2Transform(input_size=64))
        losses = Losses()
        loader = DataLoader(images, batch_size=8, shuffle=True, drop_last=True)
        trainer(epochs=2, callbacks=[losses], limit_val_batches=0, precision="64-true").fit(model, loader)
        curves.append(losses.values)
    assert len(curves[0]) == 4
    np.testing.assert_allclose(*curves, rtol=1e-6)


def run(folder, *arguments):
    """lightly's script with SANE, on the CPU."""
    fixed = {"--batch-size-per-device": 4, "--num-workers": 1, "--accelerator": "cpu", "--precision": 32, "--seed": 0}
    fixed |= {"--num-classes": 10, "--knn-k": 5, "--train-dir": folder / "train", "--val-dir": folder / "val"}
    options = [str(part) for pair in fixed.items() for part in pair] + ["--skip-linear-eval", "--skip-finetune-eval"]
    command = [sys.executable, "-W", "ignore", "-m", "slr_plugin.adapters.lightly", str(BENCHMARK / "main.py")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *options, *map(str, arguments)], capture_output=True, text=True, check=False, env=environment
    )


def test_two_processes_train_and_vote(folder):
    (folder / "groups.txt").write_text("\n".join(str(number // 2) for number in range(20)))
    options = ["--groups", folder / "groups.txt", "--log-dir", folder / "logs"]
    result = run(folder, "--methods", "sane", "--devices", 2, "--epochs", 1, *options)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "val_knn_top1" in result.stdout
    assert "max val_online_cls_top1: -1" not in result.stdout  # what the script prints for a metric it does not find
