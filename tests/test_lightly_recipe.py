"""The CIFAR-10 recipe, whole and interrupted, on real images: scikit-learn's digits as a folder."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

for package in ("lightly", "matplotlib", "sklearn", "timm", "tensorboard"):
    pytest.importorskip(package, reason='pip install "slr-plugin[lightly]"')

from _digits import write_digits
from _lightly import recipe_options

from slr_plugin.adapters.lightly import compare, recipe, training

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning", "ignore::UserWarning:torch")


@pytest.fixture(autouse=True)
def _isolated(one_thread, unseeded):
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("digits"), test=range(60), train=range(60, 120))


def run(folder, output, *options):
    return recipe.main(recipe_options(folder, output, *options))


@pytest.mark.parametrize("options", [[], ["--strong"], ["--method", "mocov2"]])
def test_trains_evaluates_and_draws(options, folder, tmp_path, capsys):
    results = run(folder, tmp_path / "out", *options)
    printed = capsys.readouterr()
    assert f"kNN {results['knn']:.2f} %, linear {results['linear']:.2f} % of 60 test images" in printed.out
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    assert [row["epoch"] for row in results["epochs"]] == [1, 2]
    masses = [row["same"] + row["other"] for row in results["epochs"]]
    assert (masses[-1] == pytest.approx(0, abs=1e-3)) == ("mocov2" in options)
    for name in ("views", "curves"):
        with Image.open(tmp_path / "out" / f"{name}.png") as figure:
            assert min(figure.size) > 50
    assert list((tmp_path / "out" / "tensorboard").rglob("events.*"))

    # A line per epoch, and how good the labels are.
    lines = [line for line in (printed.out + printed.err).splitlines() if line.strip()]
    assert [line.split(":")[0] for line in lines if line.startswith("epoch ")] == ["epoch 1/2", "epoch 2/2"]
    assert len(lines) < 20
    assert "mocov2" in options or any(line.strip().startswith("label mass") for line in lines)
    assert f"slr_plugin.adapters.export {tmp_path / 'out' / 'last.ckpt'}" in printed.out


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--linear-epochs", "0"),
        ("--knn-every", "-1"),
        ("--epochs", "x"),
        ("--limit", "0"),
    ],
)
def test_numbers_out_of_range_are_refused_before_the_training(option, value, tmp_path, capsys):
    with pytest.raises(SystemExit):
        recipe.main(["--output", str(tmp_path), option, value])
    assert f"argument {option}: " in capsys.readouterr().err


def test_the_last_epoch_is_judged_whatever_the_interval(folder, tmp_path):
    results = run(folder, tmp_path, "--knn-every", "5")
    assert "knn" not in results["epochs"][0]
    assert results["epochs"][1]["knn"] == results["knn"]


def test_the_curves_have_points_whole_epochs_and_the_baseline_beside_them(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(training.Figure, "savefig", lambda figure, *args, **kwargs: seen.append(figure))
    rows = [{"epoch": 1, "loss": 3.0, "knn": 50.0}]
    runs = {Path(name): {"arguments": {"method": name}, "epochs": rows} for name in ("sane", "mocov2")}
    training.draw(runs, tmp_path / "curves.png")
    (curves,) = seen
    for axes in curves.axes:
        assert [line.get_marker() for line in axes.get_lines()] == ["."] * 2
        assert [text.get_text() for text in axes.get_legend().get_texts()] == ["sane: sane", "mocov2: mocov2"]


class InterruptionError(Exception):
    pass


def test_an_interrupted_run_says_how_to_go_on_and_goes_on_from_its_last_epoch(folder, tmp_path, monkeypatch, capsys):
    whole = run(folder, tmp_path / "whole")
    start = training.Record.on_train_batch_start

    def interrupt(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (1, 1):
            raise InterruptionError
        start(self, trainer, pl_module, batch, batch_idx)

    monkeypatch.setattr(training.Record, "on_train_batch_start", interrupt)
    with pytest.raises(InterruptionError):
        run(folder, tmp_path / "broken")
    monkeypatch.undo()
    assert f"{recipe.COMMAND} --resume --output {tmp_path / 'broken'}" in capsys.readouterr().out
    resumed = run(folder, tmp_path / "broken", "--resume")
    assert resumed["epochs"][0] == whole["epochs"][0]
    assert [row["epoch"] for row in resumed["epochs"]] == [1, 2]
    ends = [torch.load(tmp_path / name / "last.ckpt", weights_only=True) for name in ("whole", "broken")]
    assert ends[0]["global_step"] == ends[1]["global_step"]
    assert ends[0]["lr_schedulers"] == ends[1]["lr_schedulers"]
    assert ends[0]["state_dict"]["criterion.step"] == ends[1]["state_dict"]["criterion.step"] == ends[0]["global_step"]


def test_a_finished_run_is_told_and_changes_nothing(folder, tmp_path, capsys):
    first = run(folder, tmp_path, "--method", "mocov2", "--limit", "32")
    files = ("results.json", "arguments.json", "last.ckpt")
    before = [(tmp_path / name).read_bytes() for name in files]
    capsys.readouterr()
    assert recipe.main(["--resume", "--output", str(tmp_path), "--workers", "0"]) == first
    assert [(tmp_path / name).read_bytes() for name in files] == before
    printed = capsys.readouterr().out
    assert f"kNN {first['knn']:.2f} %" in printed
    assert "the run was finished already; extend it with --resume --epochs 4" in printed
    for options in (["--method", "sane"], ["--epochs", "1"]):
        with pytest.raises(SystemExit):
            recipe.main(["--resume", "--output", str(tmp_path), *options])
        stored = first["arguments"][options[0].strip("-")]
        assert f"has {options[0]} {stored}: resume it without {options[0]}" in capsys.readouterr().err


def test_a_finished_run_is_extended_by_more_epochs(folder, tmp_path):
    run(folder, tmp_path, "--epochs", "1", "--limit", "32")
    longer = recipe.main(["--resume", "--output", str(tmp_path), "--epochs", "2"])
    assert [row["epoch"] for row in longer["epochs"]] == [1, 2]
    assert longer["arguments"]["epochs"] == 2
    assert json.loads((tmp_path / "results-1-epochs.json").read_text())["arguments"]["epochs"] == 1
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    (scheduler,) = checkpoint["lr_schedulers"]
    assert scheduler["max_epochs"] == checkpoint["global_step"] == scheduler["last_epoch"]
    again = recipe.main(["--resume", "--output", str(tmp_path)])
    assert again == longer


def test_any_number_of_classes(tmp_path):
    for part in ("train", "test"):
        for number in range(12):
            (tmp_path / part / f"class-{number:02}").mkdir(parents=True)
            for copy in range(2):
                image = Image.new("RGB", (32, 32), (20 * number, 50 * copy, 90))
                image.save(tmp_path / part / f"class-{number:02}" / f"{copy}.png")
    results = run(tmp_path, tmp_path / "out", "--epochs", "1", "--limit", "24", "--queue-size", "8")
    assert 0 <= results["linear"] <= 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resume"], "out/arguments.json"),
        (["--batch-size", "64"], "60 training images are fewer than"),
    ],
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


# --- the first mistakes


def mistake(capsys, *options):
    """What the recipe says, in one line behind argparse's usage, with nothing written."""
    with pytest.raises(SystemExit) as exit_:
        recipe.main([str(option) for option in options])
    assert exit_.value.code == 2
    usage, _, message = capsys.readouterr().err.partition("error: ")
    assert usage.startswith("usage: ")
    assert message.count("\n") == 1
    return message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--backbone", "resnet19"], "invalid choice: 'resnet19' (choose from"),
        (["--epoch", "3"], "unrecognized arguments: --epoch 3"),
        (["--queue_size", "3"], "unrecognized arguments: --queue_size 3"),
        (["--data", "nowhere"], "The input directory nowhere does not exist"),
    ],
)
def test_a_wrong_option_is_told(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in mistake(capsys, *options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--backbone", "wide_resnet50_2", "--width", "0.5"], "Illegal name"),
        (["--init", "nowhere.ckpt"], "No such file or directory: 'nowhere.ckpt'"),
        (["--groups", "nowhere.txt"], "--groups: nowhere.txt: nowhere.txt not found"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_is_written(options, message, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in mistake(capsys, "--data", folder, "--batch-size", 16, *options)
    assert not list(tmp_path.iterdir())


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32)).save(path)


@pytest.mark.parametrize(
    ("images", "others", "message"),
    [
        (["train/cat/1.png"], ["train/dog/notes.txt"], "no valid file for the classes dog."),
        (["train/cat/1.png"], ["test/cat/notes.txt"], "Found no valid file for the classes cat."),
        (["train/cat/1.png", "test/cow/1.png"], [], "training and test images must have the same classes"),
        (["test/cat/1.png"], [], "training and test images must have the same classes"),
    ],
)
def test_folders_that_are_no_data_are_told(images, others, message, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    for name in images:
        picture(tmp_path / "data" / name)
    for name in others:
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).touch()
    told = mistake(capsys, "--data", tmp_path / "data", "--output", tmp_path / "out")
    assert message in told
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written_is_told(folder, tmp_path, capsys):
    (tmp_path / "file").touch()
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        assert str(output) in mistake(capsys, "--data", folder, "--output", output, "--batch-size", 16)


@pytest.mark.parametrize("command", [recipe.main, compare.main])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        command(["--help"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    assert "--knn-every KNN_EVERY" in shown
    assert "(default: 0.2)" in shown


# --- one's own images


@pytest.mark.parametrize("layout", ["classes alone", "flat train"])
def test_images_without_classes_or_test_images_are_trained_on(layout, folder, tmp_path, capsys):
    data = tmp_path / "data"
    if layout == "classes alone":
        shutil.copytree(folder / "train", data)
    else:
        target = data / "train"
        target.mkdir(parents=True)
        for number, path in enumerate(sorted((folder / "train").rglob("*.png"))):
            shutil.copy(path, target / f"{number}.png")
    results = run(data, tmp_path / "out", "--epochs", "1")
    assert results["knn"] is results["linear"] is None
    assert [row["epoch"] for row in results["epochs"]] == [1]
    has_classes = "flat" not in layout
    assert ("same" in results["epochs"][0]) == has_classes
    printed = capsys.readouterr().out
    assert f"no evaluation: --data has no {'test images' if has_classes else 'classes'}; the encoder" in printed
    assert "sane: not evaluated" in printed
    assert recipe.main(["--resume", "--output", str(tmp_path / "out")]) == results


@pytest.mark.parametrize(("size", "kernel"), [(36, 3), (96, 7)])
def test_images_of_another_size(size, kernel, folder, tmp_path):
    options = [
        "--image-size",
        str(size),
        "--width",
        "1",
        "--backbone",
        "resnet18",
        "--epochs",
        "1",
        "--batch-size",
        "8",
        "--limit",
        "8",
        "--queue-size",
        "8",
    ]
    run(folder, tmp_path, *options, "--learning-rate", "0.5", "--temperature", "0.3")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["state_dict"]["backbone.conv1.weight"].shape[-1] == kernel
    assert checkpoint["hyper_parameters"]["preset"]["temperature"] == 0.3
    (optimizer,) = checkpoint["optimizer_states"]
    assert optimizer["param_groups"][0]["initial_lr"] == pytest.approx(0.5 * 8 / 256)
    with Image.open(tmp_path / "views.png") as figure:
        assert min(figure.size) > 50


def test_lightlys_narrow_networks_take_images_of_another_size(folder, tmp_path):
    assert (
        run(folder, tmp_path, "--image-size", "56", "--epochs", "1", "--limit", "16", "--queue-size", "16")["epochs"][
            0
        ]["loss"]
        > 0
    )


def test_a_run_starts_from_the_backbone_of_another(folder, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    run(folder, first, "--epochs", "1", "--limit", "16", "--queue-size", "16")
    still = [
        "--epochs",
        "1",
        "--limit",
        "16",
        "--queue-size",
        "16",
        "--learning-rate",
        "1e-6",
        "--init",
        str(first / "last.ckpt"),
    ]
    run(folder, second, *still)
    start, end = (torch.load(place / "last.ckpt", weights_only=True)["state_dict"] for place in (first, second))
    for name in ("backbone.conv1.weight", "key_backbone.conv1.weight"):
        torch.testing.assert_close(end[name], start["backbone.conv1.weight"], rtol=0, atol=1e-4)
    with pytest.raises(RuntimeError, match="size mismatch"):
        run(folder, tmp_path / "third", *still, "--width", "0.25")


def test_a_resumed_run_keeps_its_options(folder, tmp_path, capsys):
    run(folder, tmp_path, "--epochs", "1", "--limit", "16", "--queue-size", "16", "--temperature", "0.3")
    with pytest.raises(SystemExit):
        recipe.main(["--resume", "--output", str(tmp_path), "--temperature", "0.2"])
    assert "has --temperature 0.3: resume it without --temperature" in capsys.readouterr().err
