"""The examples of the swap run, on real images: scikit-learn's digits as a folder."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

for package in ("lightly", "pytorch_lightning", "sklearn"):
    pytest.importorskip(package, reason='pip install "slr-plugin[lightly]"')

from _digits import write_digits

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning", "ignore::UserWarning:torch")


@pytest.fixture(autouse=True)
def _isolated(one_thread, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("digits"))


def options(folder, epochs=2):
    return ["--data", str(folder), "--epochs", str(epochs), "--batch-size", "16", "--workers", "0"]


@pytest.mark.parametrize("name", ["lightly_moco", "lightly_simclr", "lightly_byol"])
def test_plain_pytorch(name, folder, capsys):
    importlib.import_module(name).main(options(folder))
    losses = re.findall(r"epoch (\d): mean loss (\S+)", capsys.readouterr().out)
    assert [epoch for epoch, _ in losses] == ["0", "1"]
    assert all(np.isfinite(float(loss)) for _, loss in losses)


def read_losses(folder):
    (log,) = folder.rglob("metrics.csv")
    header, *rows = (line.split(",") for line in log.read_text().splitlines())
    return [float(row[header.index("train_loss")]) for row in rows]


def test_lightning(folder, tmp_path):
    importlib.import_module("lightly_lightning").main(options(folder))
    losses = read_losses(tmp_path / "outputs")
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    (checkpoint,) = (tmp_path / "outputs").rglob("*.ckpt")
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert state["criterion.memory_bank.bank_ptr"] == state["criterion.step"] * 16 == 64


def test_two_processes(folder, tmp_path):
    command = [sys.executable, "-W", "ignore", str(EXAMPLES / "lightly_distributed.py"), *options(folder, epochs=1)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [*command, "--devices", "2"], capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert np.isfinite(read_losses(tmp_path / "outputs")).all()
    (checkpoint,) = (tmp_path / "outputs").rglob("*.ckpt")
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert state["criterion.memory_bank.bank_ptr"] == 2 * 16  # the keys of both processes


@pytest.mark.parametrize(
    ("data", "message"),
    [("nowhere", "there is no folder"), (".", "arrange the images as"), (None, "a batch needs 64; take a smaller")],
)
def test_says_what_is_wrong(data, message, folder, tmp_path):
    arguments = ["--data", str(tmp_path / data if data else folder), "--batch-size", "64"]
    with pytest.raises(SystemExit, match=message):
        importlib.import_module("lightly_simclr").main(arguments)
