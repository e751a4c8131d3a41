"""The CIFAR-10 recipe, whole and interrupted, on real images: scikit-learn's digits as a folder."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

for package in ("lightly", "matplotlib", "sklearn", "timm", "tensorboard"):
    pytest.importorskip(package, reason='pip install "slr-plugin[lightly]"')

from _digits import write_digits

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
recipe = importlib.import_module("lightly_cifar10")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning", "ignore::UserWarning:torch")


@pytest.fixture(autouse=True)
def _isolated(one_thread, unseeded):
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("digits"), test=range(60), train=range(60, 120))


def run(folder, output, *options):
    small = "--backbone resnet9 --width 0.0625 --batch-size 16 --queue-size 32 --accelerator cpu --workers 0"
    short = "--epochs 3 --linear-epochs 5 --knn-every 1"
    fixed = [*small.split(), *short.split(), "--data", str(folder), "--output", str(output)]
    return recipe.main([*fixed, *options])


@pytest.mark.parametrize("options", [[], ["--strong"], ["--method", "mocov2"]])
def test_trains_evaluates_and_draws(options, folder, tmp_path, capsys):
    results = run(folder, tmp_path / "out", *options)
    assert f"kNN {results['knn']:.2f} %, linear {results['linear']:.2f} % of 60 test images" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    assert [row["epoch"] for row in results["epochs"]] == [1, 2, 3]
    masses = [row["same"] + row["other"] for row in results["epochs"]]
    assert (masses[-1] == pytest.approx(0, abs=1e-3)) == ("mocov2" in options)
    for name in ("views", "curves", "labels"):
        with Image.open(tmp_path / "out" / f"{name}.png") as figure:
            assert min(figure.size) > 50
    assert list((tmp_path / "out" / "tensorboard").rglob("events.*"))


def test_a_run_shorter_than_the_interval_is_judged_too(folder, tmp_path):
    results = run(folder, tmp_path, "--knn-every", "5", "--epochs", "1")
    assert 0 <= results["knn"] <= 100
    assert "knn" not in results["epochs"][0]


class InterruptionError(Exception):
    pass


def test_an_interrupted_run_goes_on_from_its_last_epoch(folder, tmp_path, monkeypatch):
    whole = run(folder, tmp_path / "whole")
    start = recipe.Record.on_train_batch_start

    def interrupt(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (2, 1):
            raise InterruptionError
        start(self, trainer, pl_module, batch, batch_idx)

    monkeypatch.setattr(recipe.Record, "on_train_batch_start", interrupt)
    with pytest.raises(InterruptionError):
        run(folder, tmp_path / "broken")
    monkeypatch.undo()
    resumed = run(folder, tmp_path / "broken", "--resume")
    assert resumed["epochs"][:2] == whole["epochs"][:2]
    assert [row["epoch"] for row in resumed["epochs"]] == [1, 2, 3]
    ends = [torch.load(tmp_path / name / "last.ckpt", weights_only=True) for name in ("whole", "broken")]
    assert ends[0]["global_step"] == ends[1]["global_step"]
    assert ends[0]["lr_schedulers"] == ends[1]["lr_schedulers"]
    assert ends[0]["state_dict"]["criterion.step"] == ends[1]["state_dict"]["criterion.step"] == ends[0]["global_step"]


def test_a_run_goes_on_with_its_own_options_or_says_so(folder, tmp_path, capsys):
    first = run(folder, tmp_path, "--method", "mocov2", "--epochs", "1", "--limit", "32")
    again = recipe.main(["--resume", "--output", str(tmp_path), "--workers", "0"])
    assert again["arguments"] == first["arguments"] | {"resume": True}
    for options in (["--method", "sane"], ["--epochs", "2"]):
        with pytest.raises(SystemExit):
            recipe.main(["--resume", "--output", str(tmp_path), *options])
        stored = first["arguments"][options[0].strip("-")]
        assert f"has {options[0]} {stored}: resume it without {options[0]}" in capsys.readouterr().err


def test_any_number_of_classes(tmp_path):
    for part in ("train", "test"):
        for number in range(12):
            (tmp_path / part / f"class-{number:02}").mkdir(parents=True)
            for copy in range(2):
                image = Image.new("RGB", (32, 32), (20 * number, 50 * copy, 90))
                image.save(tmp_path / part / f"class-{number:02}" / f"{copy}.png")
    results = run(tmp_path, tmp_path / "out", "--epochs", "1", "--limit", "24")
    assert 0 <= results["linear"] <= 100


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--resume"], "start without --resume"), (["--batch-size", "64"], "60 training images are fewer than")],
)
def test_says_what_is_wrong(options, message, folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        run(folder, tmp_path / "out", *options)
    assert message in capsys.readouterr().err + str(exit_.value)


def test_a_finished_run_is_not_overwritten(folder, tmp_path, capsys):
    (tmp_path / "last.ckpt").touch()
    with pytest.raises(SystemExit):
        run(folder, tmp_path)
    assert "continue it with --resume, or choose another --output" in capsys.readouterr().err
