"""What is known of images reaches the labels: groups and features, by SANE, by the recipe, by a script's loaders."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset

for package in ("lightly", "pytorch_lightning", "sklearn"):
    pytest.importorskip(package, reason='pip install "slr-plugin[lightly]"')

import _lightly
from _lightly import BATCH, Losses, build, trainer
from lightly.data import LightlyDataset
from pytorch_lightning import Callback, seed_everything
from torchvision.datasets import ImageFolder

from slr_plugin.adapters.lightly import SANE, Indexed, register
from slr_plugin.adapters.lightly.knowledge import read

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
    batch = [[torch.zeros(2, 3, 16, 16)] * 2, torch.zeros(2), (names[5], names[2])]
    assert torch.equal(model._look_up(batch)[2]["estimator"], features[[5, 2]])
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
    with pytest.raises(ValueError, match=r"a batch must be \(views, targets, names or indices\).*Indexed"):
        fit(build(groups=PAIRS), ImageFolder(folder / "train", two_views))


def test_a_script_finds_the_arguments_that_it_asks_for():
    import inspect

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
        assert torch.equal(read(groups=tmp_path / name, images=IMAGES)["groups"], PAIRS)
    tables = read(tmp_path / "features.npy", tmp_path / "ids.npy")
    assert list(tables) == ["estimator", "groups"]
    assert torch.equal(tables["estimator"], torch.eye(IMAGES))
