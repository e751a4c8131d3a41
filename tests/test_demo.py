"""The demo on real images: scikit-learn's digits, from memory and as a folder."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

for package in ("matplotlib", "sklearn", "torchvision", "tqdm"):
    pytest.importorskip(package, reason='pip install "slr-plugin[demo]"')

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
compare = importlib.import_module("compare")
images = importlib.import_module("images")

SHORT = ["--epochs", "1", "--batch-size", "16"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def digits():
    return images.load_scans(limit=64)


def write_folder(root, pixels, classes):
    for number, (image, name) in enumerate(zip(pixels, classes, strict=True)):
        (root / str(int(name))).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(root / str(int(name)) / f"{number}.png")


def pretrain(method, data, seed=0):
    with compare.tqdm(disable=True) as progress:
        return compare.pretrain(method, data, epochs=2, batch_size=16, seed=seed, progress=progress)


def test_prints_a_table_and_draws_a_figure(tmp_path, capsys):
    figure = tmp_path / "new" / "demo.png"
    compare.main([*SHORT, "--seeds", "2", "--limit", "64", "--output", str(figure)])
    text = capsys.readouterr().out
    assert "64 training images, 64 held out\n1 epochs, 2 seeds" in text
    for start in (
        "untrained ",
        "MoCo ",
        "SANE ",
        "SANE - MoCo ",
        "kNN: ",
        "linear probe: ",
        "SANE's labels",
        "  purity ",
    ):
        assert f"\n{start}" in text
    with Image.open(figure) as drawn:
        assert drawn.size == (2100, 630)


@pytest.mark.parametrize("is_split", [True, False])
def test_reads_a_folder(is_split, digits, tmp_path, capsys):
    if is_split:
        write_folder(tmp_path / "images" / "train", *digits.train)
        write_folder(tmp_path / "images" / "test", *digits.test)
    else:
        write_folder(tmp_path / "images", *digits.train)
    figure = tmp_path / "demo.png"
    compare.main([*SHORT, "--seeds", "1", "--size", "8", "--data", str(tmp_path / "images"), "--output", str(figure)])
    text = capsys.readouterr().out
    assert ("64 training images, 64 held out" if is_split else "48 training images, 16 held out") in text
    assert "take --seeds 3 or more" in text
    assert figure.exists()


@pytest.mark.parametrize(
    ("parts", "options", "message"),
    [
        (None, [], "there is no folder"),
        ([], [], "arrange the images as"),
        (["0"], [], "one class folder only"),
        (["train/0", "train/1", "test/0"], [], "must have the same class folders"),
        (["0", "1"], [], "1 training images, fewer than a batch of 128; give more images or a smaller --batch-size"),
        (["0", "1"], ["--epochs", "0"], "--epochs: must be 1 or more, got 0"),
    ],
)
def test_says_what_is_wrong_with_the_folder(parts, options, message, digits, tmp_path, capsys):
    root = tmp_path / "images"
    for part in parts or ():
        write_folder(root / Path(part).parent, digits.train.pixels[:1], [int(Path(part).name)])
    if parts is not None:
        root.mkdir(exist_ok=True)
    with pytest.raises(SystemExit) as exit_:
        compare.main(["--data", str(root), *options])
    assert exit_.value.code == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert message in last


def test_same_seed_same_numbers(digits):
    first, again, other = (pretrain("SANE", digits, seed)[:-1] for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_both_methods_see_the_same_views(digits, monkeypatch):
    seen = {method: [] for method in compare.METHODS}

    def recorded(*args):
        for batch in images.minibatches(*args):
            seen[method].append(batch)
            yield batch

    monkeypatch.setattr(compare, "minibatches", recorded)
    untrained = []
    for method in compare.METHODS:
        run = pretrain(method, digits)
        untrained.append((run.knn[0], run.linear[0]))
    assert untrained[0] == untrained[1]
    for moco, sane in zip(seen["MoCo"], seen["SANE"], strict=True):
        torch.testing.assert_close(moco, sane, rtol=0, atol=0)


def test_views_are_drawn_per_image(digits):
    pixels = digits.train.pixels[:1].expand(4, -1, -1, -1)
    views = images.augment(pixels, digits.views, torch.Generator().manual_seed(0))
    assert views.shape == pixels.shape
    assert views.dtype == torch.float32
    assert len(views.unique(dim=0)) == 4


@pytest.mark.parametrize(
    ("differences", "finding"),
    [
        ([1.0, 1.1, 0.9], "SANE is ahead"),
        ([-1.0, -1.1, -0.9], "SANE is behind"),
        ([1.0, 0.1, -0.9], "no clear difference"),
        ([1.0], "on one seed"),
    ],
)
def test_verdict_follows_the_numbers(differences, finding):
    assert finding in compare.verdict("kNN", np.array(differences))
