"""What is known of images reaches the labels: groups and features, by SANE, by the recipe, by a script's loaders."""

import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset

for package in ("lightly", "matplotlib", "sklearn", "tensorboard"):
    pytest.importorskip(package, reason='pip install "slr-plugin[lightly]"')

import _lightly
from _digits import write_digits
from _lightly import BATCH, Losses, build, recipe_options, trainer
from lightly.data import LightlyDataset
from pytorch_lightning import Callback, seed_everything
from sklearn.datasets import load_digits
from torchvision.datasets import ImageFolder

from slr_plugin.adapters.knowledge import read
from slr_plugin.adapters.lightly import SANE, Indexed, compare, recipe, register, training

pytestmark = [
    pytest.mark.usefixtures("one_thread", "unseeded"),
    pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning", "ignore::UserWarning:torch"),
]

IMAGES = 24
# Two thirds of the images in pairs, far apart in the folder; the others alone.
PAIRS = torch.cat([torch.arange(8), torch.full((8,), -1), torch.arange(8)])


def two_views(image):
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)
    return [pixels, pixels.flip(-1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Noise, in classes whose files are not written in their order."""
    root, generator = tmp_path_factory.mktemp("noise"), np.random.default_rng(0)
    for number in reversed(range(IMAGES)):
        place = root / "train" / f"class-{number // 6}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(place / f"{number % 6}.png")
    return root


def data(kind, folder):
    if kind == "lightly":
        return LightlyDataset(str(folder / "train"), transform=two_views)
    return Indexed(ImageFolder(folder / "train", two_views))


class Calls(Callback):
    """The arguments of every call of the loss."""

    def __init__(self, model):
        self.calls = []
        model.criterion.register_forward_pre_hook(self.keep, with_kwargs=True)

    def keep(self, criterion, args, kwargs):
        with torch.no_grad():
            self.calls.append((args[:2], kwargs, criterion.labels(*args[:2], **kwargs)))


def fit(model, images, epochs=1, shuffle=True, callbacks=(), ckpt_path=None, checkpoints=None):
    loader = DataLoader(images, BATCH, shuffle=shuffle, drop_last=True)
    runner = trainer(epochs, checkpoints, callbacks)
    runner.fit(model, loader, ckpt_path=ckpt_path)
    return runner


@pytest.mark.parametrize("kind", ["lightly", "indexed", "a part"])
def test_the_labels_of_pairs_are_halves(kind, folder):
    """A queue as long as the folder holds the partner of every image from the second epoch on."""
    seed_everything(0)
    images = data("lightly" if kind == "lightly" else "indexed", folder)
    model = build(groups=PAIRS, queue_size=IMAGES, mixup=False, confidence=0.0, in_batch_keys=False)
    calls = Calls(model)
    order = torch.randperm(IMAGES).tolist()
    fit(model, Subset(images, order) if kind == "a part" else images, 2, kind != "a part", callbacks=[calls])
    if kind == "a part":
        wanted = PAIRS[order].split(BATCH)
        assert all(torch.equal(kwargs["groups"], wanted[place % 3]) for place, (_, kwargs, _) in enumerate(calls.calls))
    seen = torch.cat([kwargs["groups"] for _, kwargs, _ in calls.calls])
    assert torch.equal(seen[:IMAGES].sort().values, PAIRS.sort().values)
    queue = torch.full((IMAGES,), -1)
    for place, (_, kwargs, labels) in enumerate(calls.calls):
        groups = kwargs["groups"]
        same = (groups[:, None] == queue) & (groups[:, None] >= 0)
        known = torch.cat([torch.ones(BATCH, 1), same], 1)
        torch.testing.assert_close(labels, known / known.sum(1, keepdim=True))
        queue[place % 3 * BATCH :][:BATCH] = groups
    assert torch.equal(model.criterion.memory_bank.groups, queue)


def test_rows_of_features_reach_their_images(folder):
    seed_everything(0)
    features = torch.eye(IMAGES)
    model = build(estimator=features, queue_size=IMAGES)
    calls = Calls(model)
    names = data("lightly", folder).get_filenames()
    runner = fit(model, data("lightly", folder), callbacks=[calls])
    seen = torch.cat([kwargs["estimator"] for _, kwargs, _ in calls.calls])
    assert torch.equal(seen.sum(0), torch.ones(IMAGES))
    assert torch.equal(model.criterion.memory_bank.estimator_bank, seen)
    assert torch.equal(model.knowledge.of((names[5], names[2]))["estimator"], features[[5, 2]])
    assert names == sorted(names)
    assert runner.train_dataloader.dataset.dataset.samples == data("indexed", folder).dataset.samples


@pytest.mark.parametrize("known", ["groups", "estimator"])
def test_a_killed_run_goes_on_with_what_is_known(known, folder, tmp_path):
    generator = torch.Generator().manual_seed(0)
    tables = {"groups": PAIRS, "estimator": torch.randn(IMAGES, 5, generator=generator)}

    def model():
        seed_everything(0)
        return build(mixup=False, confidence=5.0, queue_size=20, **{known: tables[known]})

    whole, before, after = Losses(), Losses(stop_at=(2, 1)), Losses()
    straight = model()
    fit(straight, data("indexed", folder), 4, shuffle=False, callbacks=[whole])
    with pytest.raises(_lightly.KilledError):
        fit(model(), data("indexed", folder), 4, shuffle=False, callbacks=[before], checkpoints=tmp_path)
    resumed = model()
    path = tmp_path / "last.ckpt"
    fit(resumed, data("indexed", folder), 4, shuffle=False, callbacks=[after], ckpt_path=path)
    np.testing.assert_allclose(before.values + after.values[2:], whole.values, rtol=1e-4)
    ring = {"groups": "groups", "estimator": "estimator_bank"}[known]
    stored = torch.load(path, weights_only=True)
    assert not {"groups", "estimator"} & stored["hyper_parameters"].keys()
    for name in (f"criterion.memory_bank.{ring}", "criterion.memory_bank.bank"):
        assert name in stored["state_dict"]
        torch.testing.assert_close(resumed.state_dict()[name], straight.state_dict()[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"groups": PAIRS.float()}, TypeError, "groups must have dtype torch.int64"),
        ({"groups": PAIRS[:, None]}, ValueError, r"groups must have shape \(images,\)"),
        ({"estimator": PAIRS}, TypeError, "estimator must have a floating point dtype"),
        ({"estimator": torch.full((IMAGES, 2), torch.nan)}, ValueError, "finite values"),
    ],
)
def test_tables_of_another_kind_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        build(**change)


def test_tables_of_another_length_and_batches_without_names_are_refused(folder):
    with pytest.raises(ValueError, match="groups must have a row for each of the 24 training images, got 23"):
        fit(build(groups=PAIRS[1:]), data("indexed", folder))
    with pytest.raises(ValueError, match=r"with groups a batch must say which images it has.*Indexed"):
        fit(build(groups=PAIRS), ImageFolder(folder / "train", two_views))


def test_a_script_finds_the_arguments_that_it_asks_for():
    methods = {}
    register(methods, groups=PAIRS)
    assert {"knn_k", "knn_t"} <= inspect.signature(methods["sane"]["model"].__init__).parameters.keys()
    model = methods["sane"]["model"](batch_size_per_device=BATCH, num_classes=4, backbone=_lightly.backbone())
    assert isinstance(model, SANE)
    assert torch.equal(model.knowledge.tables["groups"], PAIRS)
    assert "groups" not in model.hparams


def test_files(tmp_path):
    np.save(tmp_path / "ids.npy", PAIRS.numpy().astype(np.int16))
    (tmp_path / "ids.txt").write_text("\n".join(map(str, PAIRS.tolist())) + "\n")
    np.save(tmp_path / "features.npy", np.eye(IMAGES, dtype=">f8"))
    for name in ("ids.npy", "ids.txt"):
        assert torch.equal(read("--", groups=tmp_path / name)["groups"], PAIRS)
    tables = read("--", tmp_path / "ids.npy", tmp_path / "features.npy")
    assert list(tables) == ["groups", "estimator"]
    assert torch.equal(tables["estimator"], torch.eye(IMAGES))


# --- the recipe


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Scans in class folders, pairs of two thirds of the training images, and their pixels as features."""
    root = write_digits(tmp_path_factory.mktemp("digits"), test=range(20), train=range(20, 68))
    ids = torch.arange(48) // 2
    (root / "pairs.txt").write_text("\n".join(map(str, ids.where(ids < 16, -1).tolist())))
    scans = load_digits().images.reshape(-1, 64)
    for part in ("train", "test"):
        names = [Path(path).stem for path, _ in ImageFolder(root / part).samples]
        np.save(root / f"{part}.npy", scans[[int(name) for name in names]])
    return root


def test_the_recipe_gives_every_image_its_row(digits, tmp_path, monkeypatch):
    """Every call's ids, features and labels are those of the folder's order, also in a chosen part of it."""
    watched, start = [], training.build

    def build_and_watch(args, data):
        model = start(args, data)
        watched.append(Calls(model))
        return model

    monkeypatch.setattr(training, "build", build_and_watch)
    options = ["--method", "mocov2", "--limit", 32, "--queue-size", 32, "--epochs", 2]
    tables = ["--groups", digits / "pairs.txt", "--estimator", digits / "train.npy"]
    recipe.main(recipe_options(digits, tmp_path / "both", *options, *tables))
    pixels = torch.from_numpy(np.load(digits / "train.npy")).float()
    for _, kwargs, _ in watched[0].calls:
        rows = (kwargs["estimator"][:, None] == pixels).all(2).int().argmax(1)
        assert torch.equal(kwargs["groups"], (rows // 2).where(rows < 32, -1))
    assert watched[0].calls[0][1]["estimator"].shape == (16, 64)

    recipe.main(recipe_options(digits, tmp_path / "pairs", *options, *tables[:2]))
    (_, kwargs, labels) = watched[1].calls[2]  # the first of the second epoch: all partners are in the queue
    own, groups = torch.cat([call[1]["groups"] for call in watched[1].calls[:2]]), kwargs["groups"]
    same = (groups[:, None] == own) & (groups[:, None] >= 0)
    known = torch.cat([torch.ones(16, 1), same], 1)
    assert set(known.sum(1).tolist()) >= {1.0, 3.0}  # a pair is in the queue whole, itself in the last epoch's view
    torch.testing.assert_close(labels, known / known.sum(1, keepdim=True))
    report = json.loads((tmp_path / "pairs" / "results.json").read_text())
    assert report["arguments"]["groups"] == str(digits / "pairs.txt")
    assert "one-hot, as the baseline" not in report["labels"]


def test_a_killed_run_of_the_recipe_goes_on_with_its_tables(digits, tmp_path, monkeypatch, capsys):
    start = training.Record.on_train_batch_start

    def interrupt(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (1, 1):
            raise _lightly.KilledError
        start(self, trainer, pl_module, batch, batch_idx)

    monkeypatch.setattr(training.Record, "on_train_batch_start", interrupt)
    tables = ["--groups", digits / "pairs.txt", "--estimator", digits / "train.npy"]
    with pytest.raises(_lightly.KilledError):
        recipe.main(recipe_options(digits, tmp_path, "--epochs", 2, *tables))
    monkeypatch.undo()
    half = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    results = recipe.main(["--resume", "--output", str(tmp_path)])
    whole = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    ids = (torch.arange(48) // 2).where(torch.arange(48) < 32, -1)
    assert torch.isin(whole["criterion.memory_bank.groups"], ids).all()
    kept = half["criterion.memory_bank.estimator_bank"][16:]  # 48 images a whole epoch: the last 32, and then 48 more
    assert whole["criterion.memory_bank.estimator_bank"].shape == half["criterion.memory_bank.estimator_bank"].shape
    assert len(kept) == 16
    assert [row["epoch"] for row in results["epochs"]] == [1, 2]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        recipe.main(["--resume", "--output", str(tmp_path), "--groups", str(digits / "other.txt")])
    assert "resume it without --groups" in capsys.readouterr().err


def bad_files(root):
    (root / "short.txt").write_text("1\n2\n")
    (root / "words.txt").write_text("1\ncat\n")
    np.save(root / "floats.npy", np.zeros(48))
    np.save(root / "flat.npy", np.zeros(48, dtype=np.float32))
    np.save(root / "infinite.npy", np.full((48, 2), np.inf))
    np.save(root / "objects.npy", np.array([None]))
    (root / "empty.npy").touch()


@pytest.mark.parametrize(
    ("option", "name", "message"),
    [
        ("groups", "none.npy", "none.npy: [Errno 2] No such file"),
        ("groups", "short.txt", "must have a row for each of the 48 training images, got 2"),
        ("groups", "words.txt", "could not convert string 'cat' to int64 at row 1"),
        ("groups", "floats.npy", "groups must have dtype torch.int64, got torch.float64"),
        ("estimator", "none.npy", "none.npy: [Errno 2] No such file"),
        ("estimator", "flat.npy", "must have shape (images, features) and finite values, got (48,)"),
        ("estimator", "infinite.npy", "must have shape (images, features) and finite values"),
        ("estimator", "objects.npy", "Python objects in dtype"),
        ("estimator", "empty.npy", "No data left"),
    ],
)
def test_files_that_do_not_fit_are_refused_in_one_line(option, name, message, digits, tmp_path, capsys):
    bad_files(tmp_path)
    for command in (recipe.main, compare.main):
        known = ["--batch-size", "16", f"--{option}", str(tmp_path / name)]
        with pytest.raises(SystemExit) as exit_:
            command(["--data", str(digits), "--output", str(tmp_path / "out"), *known])
        assert exit_.value.code == 2
        error = capsys.readouterr().err.partition("error: ")[2]
        assert error.startswith(option if name == "short.txt" else f"--{option}: ")
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


# --- compare


def compared(digits, output, *options):
    files = ["--groups", digits / "pairs.txt", "--estimator", digits / "train.npy", "--seeds", 2]
    short = ["--epochs", 1, "--linear-epochs", 1]
    return compare.main(recipe_options(digits, output, *short, *files, *options))


def test_a_comparison_goes_on_and_repeats_nothing(digits, tmp_path, monkeypatch, capsys):
    train, trained = training.run, []

    def run(args, data, model):
        """One real training; the others only leave what a training leaves."""
        trained.append((args.output.name, args.method, args.groups is not None))
        if len(trained) == 3:
            raise _lightly.KilledError
        if trained[-1][0] == "known-0":
            return train(args, data, model)
        (args.output / "last.ckpt").touch()
        return {"knn": 10.0 * len(trained), "linear": 5.0}

    monkeypatch.setattr(training, "run", run)
    with pytest.raises(_lightly.KilledError):
        compared(digits, tmp_path)
    assert [name for name, *_ in trained] == ["plain-0", "known-0", "plain-1"]
    records = compared(digits, tmp_path)
    plain_and_known = [("plain-1", "mocov2", False), ("known-1", "mocov2", True)]
    assert trained[3:] == plain_and_known
    assert torch.load(tmp_path / "known-0" / "last.ckpt", weights_only=True)["global_step"] == 3
    assert compared(digits, tmp_path, "--test-estimator", digits / "test.npy")[:4] == records[:4]
    assert len(trained) == 5
    assert [(r["arm"], r["seed"]) for r in records[:4]] == [
        (arm, seed) for seed in (0, 1) for arm in (compare.PLAIN, compare.KNOWN)
    ]
    assert [r["arm"] for r in records[4:]] == ["groups alone", "estimator alone"] * 2
    lines = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert lines[:4] == records[:4]
    assert (tmp_path / "table.md").read_text().strip() in capsys.readouterr().out
    assert (tmp_path / "compare.png").stat().st_size > 1000


def test_the_table_has_paired_intervals():
    stats = pytest.importorskip("scipy.stats")
    numbers = {compare.PLAIN: [50.0, 60.0, 55.0], compare.KNOWN: [52.0, 61.0, 58.0]}
    records = [
        {"arm": arm, "seed": seed, "knn": value, "linear": None}
        for arm, values in numbers.items()
        for seed, value in enumerate(values)
    ]
    low, high = stats.t.interval(0.95, 2, loc=2.0, scale=stats.sem([2.0, 1.0, 3.0]))
    assert compare.table(records).splitlines()[-1] == (
        f"| difference, paired by seed | 3 | +2.00 ({low:+.2f} to {high:+.2f}) | - |"
    )
    exact = [stats.t.ppf(0.975, degrees) for degrees in range(1, len(compare.QUANTILES) + 1)]
    np.testing.assert_allclose(compare.QUANTILES, exact, atol=6e-4)
    assert compare.interval([3.0]) == "3.00"


def test_groups_vote():
    groups, classes = torch.tensor([5, 5, 5, 7, -1]), torch.tensor([0, 2, 2, 1, 1])
    assert compare.vote_of_groups(groups, classes, torch.tensor([5, 7, 9, -1])).tolist() == [2, 1, 1, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give what you know: --groups FILE or --estimator FILE.npy"),
        (["--groups", "pairs.txt", "--test-estimator", "test.npy"], "must be of shape (20, None), got (20, 64)"),
        (["--estimator", "train.npy", "--test-estimator", "train.npy"], "must be of shape (20, 64), got (48, 64)"),
        (["--groups", "pairs.txt", "--data", "train"], "compare needs class folders in train/train and train/test"),
        (["--groups", "pairs.txt", "--sharpening", "3"], "unrecognized arguments: --sharpening 3"),
    ],
)
def test_a_comparison_that_cannot_be_made_is_refused(options, message, digits, capsys, monkeypatch):
    monkeypatch.chdir(digits)
    with pytest.raises(SystemExit):
        compare.main(["--data", ".", "--batch-size", "16", *options])
    error = capsys.readouterr().err.partition("error: ")[2]
    assert message in error
    assert error.count("\n") == 1
