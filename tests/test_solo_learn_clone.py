"""SANE in the real solo-learn, which no wheel holds: make test-solo SOLO_LEARN_DIR=a clone of its repository."""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

if "SOLO_LEARN_DIR" not in os.environ:
    found = importlib.util.find_spec("solo.methods") if importlib.util.find_spec("solo") else None
    if found is None:
        pytest.skip(
            "git clone https://github.com/vturrisi/solo-learn, then make test-solo SOLO_LEARN_DIR=solo-learn",
            allow_module_level=True,
        )
    os.environ["SOLO_LEARN_DIR"] = str(Path(found.origin).parents[2])

import _solo_learn
from _digits import write_digits
from _solo_learn import BATCH, CLASSES, CLONE, Record, build, config, loader, mocov2plus_beside_ours, train
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from solo.args.pretrain import parse_cfg
from solo.methods import METHODS
from torch.utils.data import DataLoader, IterableDataset

from slr_plugin import CosineConfidence
from slr_plugin.adapters.solo_learn import SANE, register
from slr_plugin.adapters.solo_learn.symmetric import mix_views
from slr_plugin.diagnostics import LabelQuality

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore:Using scheduler_interval")


@pytest.fixture(autouse=True)
def _isolated(one_thread, unseeded, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four scans of every digit to train on, one to be judged."""
    return write_digits(tmp_path_factory.mktemp("digits"), train=range(40), val=range(40, 50))


# --- the contract, as solo-learn's tests/methods check it


def test_register_is_idempotent():
    register()
    register()
    assert METHODS["sane"] is SANE
    assert list(METHODS).count("sane") == 1


def test_outputs_and_parameters():
    model = build()
    assert [group["name"] for group in model.learnable_params] == ["backbone", "classifier", "projector"]
    images = torch.randn(4, 3, 32, 32)
    for out in (model(images), model.momentum_forward(images), model.multicrop_forward(images)):
        assert out["feats"].shape == (4, 512)
        assert out["z"].shape == (4, 12)
        torch.testing.assert_close(out["z"].norm(dim=1), torch.ones(4))
    assert model(images)["logits"].shape == (4, CLASSES)
    before = model.cfg.copy()
    assert SANE.add_and_assert_specific_cfg(model.cfg) == before
    pairs = model.momentum_pairs
    assert pairs[-1] == (model.projector, model.momentum_projector)
    for online, slow in pairs:
        for ours, theirs in zip(online.parameters(), slow.parameters(), strict=True):
            assert torch.equal(ours, theirs)
            assert not theirs.requires_grad


def test_only_the_backbones_are_called_so():
    """main_linear.py renames every entry with such a word in its name."""
    names = [name for name, _ in build().named_modules() if "backbone" in name or "encoder" in name]
    assert {name.split(".")[0] for name in names} == {"backbone", "momentum_backbone"}


def test_bad_settings_are_refused_when_the_method_is_built():
    with pytest.raises(ValueError, match="confidence must be"):
        build(method_kwargs={"confidence": [0, 1, 2]})
    with pytest.raises(ValueError, match="needs small crops: "):
        build(method_kwargs={"strong_crops": True})
    with pytest.raises(ValueError, match=r"method_kwargs\.kappa must be between"):
        build(method_kwargs={"kappa": 0})
    with pytest.raises(ValueError, match=r"unknown to sane; it takes .*sharpening"):
        build(method_kwargs={"sharpning": 0.5})
    with pytest.raises(ValueError, match=r"two large crops, .*, got 3 and 0"):
        build(data={"num_large_crops": 3})


def test_settings_may_be_left_empty():
    expected = build(method_kwargs={"queue_size": 64}).cfg.method_kwargs
    for kwargs in (None, "None", {}):  # "None": solo-learn's other way to write null
        cfg = config()
        cfg.method_kwargs = kwargs
        got = SANE.add_and_assert_specific_cfg(cfg).method_kwargs
        assert got.keys() == expected.keys()
        assert got.queue_size == 65536


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "imagenet-100", "imagenet"])
@pytest.mark.parametrize("kind", ["", "-multi-strong"])
def test_every_configuration_builds_the_method(name, kind):
    with initialize_config_module("slr_plugin.adapters.solo_learn.configs", version_base="1.2"):
        cfg = compose(f"sane-{name}{kind}")
    OmegaConf.set_struct(cfg, False)
    cfg = parse_cfg(cfg)
    assert cfg.data.num_large_crops == 2  # main_pretrain.py insists
    model = SANE(cfg)
    assert model.strong_crops == bool(kind)
    assert model.num_small_crops == ({"c": 4, "i": 5}[name[0]] if kind else 0)
    assert model.criteria[0].memory_bank.bank.shape == (cfg.method_kwargs.queue_size, 256)


# --- training


def test_it_is_mocov2plus_without_confidence_and_mixup(folder):
    curves = []
    for model, name in zip(mocov2plus_beside_ours(), ("train_nce_loss", "train_slr_loss"), strict=True):
        record = Record(name)
        train(model, loader(model.cfg, folder / "train"), [record], precision="64-true")
        curves.append(record.values)
    assert len(curves[0]) == 10
    np.testing.assert_allclose(*curves, rtol=1e-6)  # solo-learn's loss in float64; the queues hold float32


@pytest.mark.parametrize(
    ("small", "settings"),
    [
        ([], {}),
        ([], {"kappa": False}),
        ([(24, 2), (16, 1)], {}),
        ([(24, 2)], {"kappa": None}),
        ([([32], 1), (16, 1)], {"strong_crops": True}),
    ],
    ids=["two views", "no mixup", "small crops", "small crops, no mixup", "strong crops"],
)
def test_trains(folder, small, settings, monkeypatch):
    model = build(small=small, method_kwargs=settings)
    encoded, mixed, strong = [], [], []
    spy = lambda *views: strong.append(views[-1]) or mix_views(*views)  # noqa: E731
    monkeypatch.setattr("slr_plugin.adapters.solo_learn.method.mix_views", spy)
    model.backbone.register_forward_hook(lambda module, inputs, output: encoded.append(inputs[0]))
    if mixup := model.mixup:
        model.mixup = lambda *pair: mixed.append(mixup(*pair)) or mixed[-1]
    record = Record("train_slr_loss", "train_slr_mu", "train_slr_positive_weight")
    train(model, loader(model.cfg, folder / "train"), [record], max_epochs=1)
    assert np.isfinite(record.values).all()
    assert len(record.values) == 5
    assert strong == ["strong_crops" in settings] * 5
    sizes = [side[0] if isinstance(side, list) else side for side, count in small for _ in range(count)]
    without = [] if "kappa" in settings else [32, 32]
    each = [32, 32, *(sizes or without)]
    assert [images.shape[-1] for images in encoded] == each * 5  # every crop once, no more
    further = [images for place, images in enumerate(encoded) if place % len(each) >= 2]
    for images, (wanted, _) in zip(further, mixed, strict=bool(mixup)):
        assert torch.equal(images, wanted)  # mixed, not as the loader gave them
    for view, criterion in enumerate(model.criteria):
        assert criterion.step == 5
        assert criterion.memory_bank.bank_ptr == 40 % 24
        assert not torch.equal(criterion.memory_bank.bank, model.criteria[1 - view].memory_bank.bank)


@pytest.mark.parametrize(
    ("accumulate", "steps"),
    [(1, range(10)), (2, [0, 0, 1, 1, 2, 3, 3, 4, 4, 5]), (4, [0, 0, 0, 0, 1, 2, 2, 2, 2, 3])],
)
def test_confidence_follows_the_optimizer_steps(folder, accumulate, steps):
    """Of 5 batches the last steps by itself; the schedule ends with the run all the same."""
    model = build(method_kwargs={"confidence": [0.5, 3.0]})
    record = Record("train_slr_mu")
    trainer = train(model, loader(model.cfg, folder / "train"), [record], accumulate_grad_batches=accumulate)
    assert trainer.global_step == steps[-1] + 1
    schedule = CosineConfidence(0.5, 3.0, trainer.global_step)
    assert [mu for (mu,) in record.values] == pytest.approx([schedule(step) for step in steps])
    assert {criterion.confidence for criterion in model.criteria} == {schedule}


def test_confidence_begins_with_the_run_and_goes_on_from_a_checkpoint_alone(folder, tmp_path):
    def new():
        return build(method_kwargs={"confidence": [0.5, 3.0]})

    def confidences(model, **options):
        record = Record("train_slr_mu")
        train(model, batches, [record], **options)
        return [mu for (mu,) in record.values]

    batches = loader(config(), folder / "train")
    model, loaded = new(), new()
    train(model, batches, max_epochs=1).save_checkpoint(tmp_path / "half.ckpt")
    loaded.load_state_dict(model.state_dict())
    anew, goes_on = (CosineConfidence(0.5, 3.0, steps) for steps in (5, 10))
    for begins in (model, loaded):
        assert confidences(begins, max_epochs=1) == pytest.approx([anew(step) for step in range(5)])
        assert begins.criteria[1].step == 5
    resumed = confidences(new(), max_epochs=2, ckpt_path=tmp_path / "half.ckpt")
    assert resumed == pytest.approx([goes_on(step) for step in range(5, 10)])


def test_a_compiled_loss_is_not_compiled_anew_while_the_confidence_grows(folder):
    graphs, counts = [], []

    class Count(_solo_learn.Callback):
        def on_train_batch_end(self, *args):
            counts.append(len(graphs))

    model = build(method_kwargs={"confidence": [0.5, 3.0]})
    for criterion in model.criteria:
        criterion.compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    train(model, loader(model.cfg, folder / "train"), [Count()], max_epochs=1)
    assert 0 < counts[0] == counts[-1]


class Stream(IterableDataset):
    """Batches without a length."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def test_a_run_without_a_known_end_needs_a_constant_confidence(folder):
    batches = loader(config(), folder / "train")
    unending = build(scheduler={"name": "none"})
    with pytest.raises(ValueError, match="set max_epochs or max_steps"):
        train(unending, batches, max_epochs=-1, limit_train_batches=1)
    with pytest.raises(ValueError, match="max_steps where the data have no length"):
        train(unending, DataLoader(Stream(batches), batch_size=None))
    constant = build(scheduler={"name": "none"}, method_kwargs={"confidence": 0.5})
    assert train(constant, DataLoader(Stream(batches), batch_size=None), max_epochs=1).global_step == 5


def test_images_without_classes(folder, tmp_path):
    """solo-learn's class loss is NaN then; it must reach neither the loss nor the classifier."""
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, path in enumerate(sorted((folder / "train").rglob("*.png"))):
        (flat / f"{number}.png").symlink_to(path)
    model = build()
    before = model.classifier.weight.clone()
    record = Record("train_slr_loss")
    train(model, loader(model.cfg, flat, no_labels=True), [record], max_epochs=1)
    assert record.totals == pytest.approx([loss for (loss,) in record.values])
    assert torch.equal(model.classifier.weight, before)


def test_classes_train_the_online_classifier(folder):
    model = build()
    before = model.classifier.weight.clone()
    record = Record("train_slr_loss", "train_class_loss")
    train(model, loader(model.cfg, folder / "train"), [record], max_epochs=1)
    assert record.totals == pytest.approx([slr + classes for slr, classes in record.values])
    assert not torch.equal(model.classifier.weight, before)


def test_label_quality_is_logged_at_a_setting(folder, tmp_path):
    model = build(method_kwargs={"label_quality_every": 2})
    trainer = train(model, loader(model.cfg, folder / "train"))
    logged = {name for name in trainer.callback_metrics if name.startswith("labels/")}
    assert logged == {f"labels/{name}" for name in LabelQuality._fields}
    assert 0 < trainer.callback_metrics["labels/own"] < 1
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    callbacks = torch.load(tmp_path / "last.ckpt", weights_only=False)["callbacks"]
    (state,) = (state for name, state in callbacks.items() if "LabelQuality" in name)
    assert [int((monitor["queue_classes"] >= 0).sum()) for monitor in state["monitors"]] == [24, 24]  # all keys known
    unwatched = train(build(), loader(model.cfg, folder / "train"), max_epochs=1)
    assert not [name for name in unwatched.callback_metrics if name.startswith("labels/")]


def test_a_continued_run_mixes_anew_and_has_its_queue(folder, tmp_path):
    model = build()
    trainer = train(model, loader(model.cfg, folder / "train"), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    seeded = model.mixup.generator.initial_seed()
    resumed = build()
    seen = []

    class Look(_solo_learn.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if not seen:
                seen.extend(criterion.memory_bank.bank.clone() for criterion in pl_module.criteria)

    train(resumed, loader(model.cfg, folder / "train"), [Look()], ckpt_path=tmp_path / "half.ckpt")
    assert all(
        torch.equal(bank, criterion.memory_bank.bank) for bank, criterion in zip(seen, model.criteria, strict=True)
    )
    assert resumed.criteria[0].step == 10
    assert resumed.mixup.generator.initial_seed() != seeded


def test_the_momentum_of_a_continued_run_goes_on(folder, tmp_path):
    class Momentum(_solo_learn.Callback):
        def on_train_start(self, trainer, pl_module):
            self.values = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.values.append(pl_module.momentum_updater.cur_tau)

    batches, whole, resumed = loader(build().cfg, folder / "train"), Momentum(), Momentum()
    train(build(), batches, [whole])
    train(build(), batches, max_epochs=1).save_checkpoint(tmp_path / "half.ckpt")
    train(build(), batches, [resumed], ckpt_path=tmp_path / "half.ckpt")
    assert resumed.values == whole.values[5:]
    assert whole.values[0] == 0.9 < resumed.values[0]


# --- what is known of the images


def write_knowledge(paths):
    """By the scans' numbers: the first two thirds of them are pairs. Returns the settings."""
    numbers = np.array([int(path.stem) for path in paths])
    np.savetxt("groups.txt", np.where(numbers < 2 * len(numbers) // 3, numbers // 2, -1), fmt="%d")
    np.save("estimator.npy", np.stack([numbers, np.ones_like(numbers)], 1).astype(np.float16))
    return {"groups": "groups.txt", "estimator": "estimator.npy"}


class Watch(_solo_learn.Callback):
    """What the first direction's loss is given, the labels that it makes of it, and its queue at the start."""

    def on_train_start(self, trainer, pl_module):
        criterion = pl_module.criteria[0]
        self.queue = {name: value.clone() for name, value in criterion.memory_bank.state_dict().items()}
        self.numbers, self.groups, self.labels = [], [], []

        def look(module, args, kwargs):
            self.numbers.append(kwargs["estimator"][:, 0].long())
            self.groups.append((kwargs["groups"], module.memory_bank.groups.clone()))
            self.labels.append(module.labels(*args[:2], groups=kwargs["groups"], estimator=kwargs["estimator"]))

        criterion.register_forward_pre_hook(look, with_kwargs=True)


@pytest.mark.parametrize("has_classes", [True, False])
def test_a_toy_two_thirds_of_which_are_in_pairs(folder, tmp_path, has_classes):
    """Every batch has the rows of its own images, and labels that are uniform over a pair; a run goes on so."""
    images, paths = folder / "train", sorted((folder / "train").rglob("*.png"))
    if not has_classes:  # solo-learn lists such a folder in any order
        images = tmp_path / "flat"
        images.mkdir()
        for path in sorted(paths, key=lambda path: int(path.stem) * 7 % 40):
            (images / path.name).symlink_to(path)
        paths = sorted(images.iterdir())
    settings = write_knowledge(paths) | {"confidence": 0, "kappa": None}
    model, watch, indexes = build(method_kwargs=settings), Watch(), []
    batches = loader(model.cfg, images, no_labels=not has_classes)
    look_up = model.knowledge.of
    model.knowledge.of = lambda of: indexes.append(of) or look_up(of)
    trainer = train(model, batches, [watch], max_epochs=1)

    files = [path for path, _ in batches.dataset.samples] if has_classes else batches.dataset.images
    assert len(indexes) == len(watch.numbers) == 5
    for index, numbers in zip(indexes, watch.numbers, strict=True):
        assert [int(Path(files[i]).stem) for i in index] == numbers.tolist()
    for numbers, (groups, queue), labels in zip(watch.numbers, watch.groups, watch.labels, strict=True):
        assert torch.equal(groups, (numbers // 2).where(numbers < 26, -1))
        same = (groups[:, None] == torch.cat([groups, queue])) & (groups[:, None] >= 0)
        expected = (same | torch.eye(*same.shape, dtype=torch.bool)).float()
        torch.testing.assert_close(labels, expected / expected.sum(1, keepdim=True))
    assert any((labels == 0.5).any() for labels in watch.labels)
    trainer.save_checkpoint("half.ckpt")
    resumed, again = build(method_kwargs=settings), Watch()
    train(resumed, batches, [again], ckpt_path="half.ckpt", limit_train_batches=1)
    torch.testing.assert_close(again.queue, dict(model.criteria[0].memory_bank.state_dict()), rtol=0, atol=0)
    assert (again.queue["groups"] >= 0).any()


def test_what_is_known_of_other_images_is_refused(folder):
    settings = write_knowledge(sorted((folder / "train").rglob("*.png"))[:-1])
    model = build(method_kwargs=settings)
    with pytest.raises(ValueError, match="groups must have a row for each of the 40 training images, got 39"):
        train(model, loader(model.cfg, folder / "train"))
    assert model.criteria[0].step == 0
    np.save("flat.npy", np.ones(40))
    for name, path in (("groups", "flat.npy"), ("estimator", "flat.npy"), ("estimator", "groups.txt")):
        with pytest.raises(ValueError, match=rf"method_kwargs.{name}: {path}: {name} must have"):
            build(method_kwargs={name: path})
    with pytest.raises(ValueError, match=r"method_kwargs.groups: nowhere.txt: nowhere.txt not found"):
        build(method_kwargs={"groups": "nowhere.txt"})
    with pytest.raises(ValueError, match="need the numbers of images, which DALI does not give"):
        build(method_kwargs=settings, data={"format": "dali"})


def test_a_run_that_goes_on_with_other_settings_says_so(folder, tmp_path, recwarn):
    """solo-learn resumes by name: an ablation under the same name would go on with what it was to be compared with."""
    trainer = train(build(), loader(config(), folder / "train"), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    checkpoint = torch.load(tmp_path / "half.ckpt", weights_only=False)
    build().on_load_checkpoint(checkpoint)
    build().on_load_checkpoint({})  # of an earlier version
    assert "other method_kwargs" not in str([warning.message for warning in recwarn])
    build(method_kwargs={"label_quality_every": 5}).on_load_checkpoint(checkpoint)
    assert "other method_kwargs" not in str([warning.message for warning in recwarn])
    with pytest.warns(UserWarning, match=r"method_kwargs \(kappa from 0.1 to None\).*give it another name"):
        build(method_kwargs={"kappa": None}).on_load_checkpoint(checkpoint)


def test_two_processes(folder, tmp_path):
    """One queue, one network, but each its own theta and partners."""
    (tmp_path / "train").symlink_to(folder / "train")
    command = [sys.executable, "-W", "ignore", _solo_learn.__file__, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    assert result.returncode == 0, result.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    for name in ("queues", "weights"):
        assert first[name] == second[name]
    assert first["theta"] != second["theta"]
    assert first["partner"] != second["partner"]
    assert first["finite"]
    assert second["finite"]
    assert first["steps"] == 2


# --- solo-learn's scripts, unmodified


def environment():
    names = {name: value for name, value in os.environ.items() if not name.startswith(("PL_", "SLR_PLUGIN"))}
    return names | {"OMP_NUM_THREADS": "1"}


def pretrain(folder, *overrides, config="sane-cifar10", epochs=1, devices=1):
    """Arguments of main_pretrain.py with a configuration of ours, shrunk."""
    settings = {
        "data.dataset": "custom",
        "data.train_path": folder / "train",
        "data.val_path": folder / "val",
        "data.num_workers": 0,
        "method_kwargs.queue_size": 50,
        "optimizer.batch_size": BATCH,
        "max_epochs": epochs,
        "accelerator": "cpu",
        "devices": f"'{devices}'",
        "strategy": "ddp" if devices > 1 else "auto",
        "sync_batchnorm": False,
        "precision": 32,
        "auto_resume.enabled": False,
    }
    package = ["--config-path", "pkg://slr_plugin.adapters.solo_learn.configs", "--config-name", config]
    return [*package, *(f"{name}={value}" for name, value in settings.items()), *overrides]


def start(script, arguments, how=()):
    command = [sys.executable, "-W", "ignore", *how, str(CLONE / script), *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), start_new_session=True
    )


def finish(process):
    out, err = process.communicate()
    assert process.returncode == 0, err[-3000:]
    return out


def checkpoint():
    """The newest one in the working directory."""
    (path,) = sorted(Path("trained_models/sane").glob("*/*.ckpt"), key=lambda path: path.stat().st_mtime)[-1:]
    return path, torch.load(path, weights_only=False)


LAUNCHER = ("-m", "slr_plugin.adapters.solo_learn")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.mark.parametrize(
    ("how", "devices", "overrides"),
    [
        ((), 1, ["--config-dir", ".", "--config-name", "mine"]),
        ((), 2, ["+method_kwargs.label_quality_every=1"]),
        (LAUNCHER, 2, ["~hydra.callbacks.slr"]),
        (TORCHRUN, 2, []),
        ((*TORCHRUN, *LAUNCHER), 2, ["~hydra.callbacks.slr"]),
    ],
    ids=[
        "one process, own configuration",
        "two, callback",
        "two, launcher",
        "torchrun, callback",
        "torchrun, launcher",
    ],
)
def test_main_pretrain(folder, how, devices, overrides):
    Path("mine.yaml").write_text("defaults: [sane-cifar10, _self_]\nmethod_kwargs: {kappa: 0.5}")
    finish(start("main_pretrain.py", pretrain(folder, *overrides, devices=devices), how))
    saved = checkpoint()[1]
    state = saved["state_dict"]
    assert saved["slr_plugin_method_kwargs"]["kappa"] == (0.5 if "mine" in overrides else 2.0)
    watched = [name for name in saved["callbacks"] if "LabelQuality" in name]
    assert len(watched) == any("label_quality" in setting for setting in overrides)
    steps = 40 // (BATCH * devices)
    for view in (0, 1):
        assert state[f"criteria.{view}.step"] == steps
        assert state[f"criteria.{view}.memory_bank.bank_ptr"] == steps * BATCH * devices  # keys of all processes


def test_there_is_a_configuration_for_a_first_run_on_a_cpu(folder):
    arguments = ["--config-path", "pkg://slr_plugin.adapters.solo_learn.configs", "--config-name", "sane-cpu"]
    settings = {
        "data.dataset": "custom",
        "data.train_path": folder / "train",
        "data.val_path": folder / "val",
        "optimizer.batch_size": BATCH,
        "method_kwargs.queue_size": 16,
        "data.num_workers": 0,
        "max_epochs": 1,
    }
    finish(start("main_pretrain.py", arguments + [f"{name}={value}" for name, value in settings.items()]))
    assert checkpoint()[1]["state_dict"]["criteria.0.step"] == 40 // BATCH


def test_killed_and_resumed_by_itself(folder):
    """kill -9 in the middle of an epoch; the same command goes on from the last checkpoint, queue included."""
    arguments = pretrain(folder, "auto_resume.enabled=True", epochs=8)
    process = start("main_pretrain.py", arguments)
    # Once a checkpoint is written, whole, solo-learn removes the one before.
    while len(found := list(Path("trained_models/sane").glob("*/*.ckpt"))) != 1 or "ep=1" not in found[0].name:
        with contextlib.suppress(subprocess.TimeoutExpired):
            pytest.fail(f"ended too early: {process.communicate(timeout=0.05)[1][-3000:]}")
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    out = finish(start("main_pretrain.py", arguments))
    assert "Resuming from previous checkpoint" in out
    assert str(found[0].parent) in out
    path, stored = checkpoint()
    assert path.name.endswith("-ep=7.ckpt")
    assert stored["global_step"] == stored["state_dict"]["criteria.0.step"] == 40
    assert stored["state_dict"]["criteria.1.memory_bank.bank_ptr"] == 40 * BATCH % 50


def test_linear_evaluation_finds_the_whole_backbone(folder):
    finish(start("main_pretrain.py", pretrain(folder)))
    path, stored = checkpoint()
    settings = {
        "pretrained_feature_extractor": f"'{path}'",  # in quotes: solo-learn's file names hold an equals sign
        "data.dataset": "custom",
        "data.train_path": folder / "train",
        "data.val_path": folder / "val",
        "data.format": "image_folder",
        "data.num_workers": 0,
        "optimizer.batch_size": BATCH,
        "optimizer.lr": 0,
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": "'1'",
        "strategy": "auto",
        "sync_batchnorm": False,
        "precision": 32,
        "wandb.enabled": False,
        "auto_resume.enabled": False,
    }
    package = ["--config-path", "scripts/linear/imagenet-100", "--config-name", "mocov2plus.yaml"]
    finish(start("main_linear.py", [*package, *(f"{name}={value}" for name, value in settings.items())]))
    (linear,) = Path("trained_models/linear").glob("*/*.ckpt")
    evaluated = torch.load(linear, weights_only=False)["state_dict"]
    pretrained = {name: value for name, value in stored["state_dict"].items() if name.startswith("backbone.")}
    assert len(pretrained) > 100
    for name, value in pretrained.items():
        assert torch.equal(evaluated[name], value), name


def test_offline_knn_reaches_the_gpu(folder):
    """main_knn.py looks the method up, too, and is no Hydra application: only the launcher helps."""
    finish(start("main_pretrain.py", pretrain(folder)))
    run = checkpoint()[0].parent
    options = {
        "--dataset": "custom",
        "--train_data_path": folder / "train",
        "--val_data_path": folder / "val",
        "--batch_size": BATCH,
        "--num_workers": 0,
        "--pretrained_checkpoint_dir": run,
        "--k": 5,
        "--temperature": 0.1,
        "--feature_type": "backbone",
        "--distance_function": "cosine",
    }
    arguments = [part for pair in options.items() for part in pair]
    plain = start("main_knn.py", arguments)
    assert "KeyError: 'sane'" in plain.communicate()[1]
    out, err = (process := start("main_knn.py", arguments, LAUNCHER)).communicate()
    if torch.cuda.is_available():
        assert process.returncode == 0, err[-3000:]
        assert "Result: acc@1" in out
    else:
        assert "im.cuda(non_blocking=True)" in err  # solo-learn's script demands one
        assert "KeyError" not in err
