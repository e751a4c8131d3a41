"""The lightly adapter on the real lightly and the real Trainer."""

import dataclasses
import doctest
import importlib
import json
import os
import pickle
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from torch import nn

for package in ("lightly", "pytorch_lightning", "tensorboard", "timm"):
    pytest.importorskip(package, reason='pip install "slr-plugin[lightly]"')

import _lightly
from _lightly import CLASSES, PRESET, Losses, build, loaders, train
from lightly.loss import NTXentLoss
from lightly.utils.benchmarking import KNNClassifier
from pytorch_lightning import Trainer, seed_everything

from slr_plugin import CosineConfidence
from slr_plugin.adapters._require import require
from slr_plugin.adapters.lightly import MULTI, SANE, SINGLE, VARIANTS, SANETransform, register, transform
from slr_plugin.adapters.lightly import __main__ as launcher
from slr_plugin.presets import CIFAR10, FROM_FEATURES, IMAGENET

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
    pytest.mark.filterwarnings("ignore:The function `to_tensor:UserWarning"),  # lightly 1.6.0, on tensors
]


@pytest.fixture(autouse=True)
def _isolated(one_thread, unseeded, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def batch(count=2, size=8, side=16):
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(size, 3, side, side, generator=generator) for _ in range(count)]
    return [views, torch.arange(size) % CLASSES]


# --- the module in the Trainer


def test_logs_what_lightlys_newest_methods_log():
    model = build()
    trainer = train(model, epochs=1)
    logged = set(trainer.callback_metrics)
    names = {"train_loss", "val_online_cls_loss", "train_online_cls_loss"}
    names |= {f"{kind}_top{k}" for kind in ("val_knn", "val_online_cls", "train_online_cls") for k in (1, 5)}
    names |= {f"slr/{name}" for name in ("positive_weight", "alpha", "beta", "mu", "label_entropy")}
    assert logged == names
    assert all(value.isfinite() for value in trainer.callback_metrics.values())


def test_optimizer_groups_and_schedule():
    model = build()
    trainer = train(model, epochs=2)
    (optimizer,) = trainer.optimizers
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert list(groups) == ["sane", "sane_no_weight_decay", "online_classifier"]
    assert groups["sane"]["initial_lr"] == pytest.approx(0.03 * _lightly.BATCH / 256)
    assert [groups[name]["weight_decay"] for name in groups] == [1e-4, 0.0, 0.0]
    assert {parameter.ndim for parameter in groups["sane_no_weight_decay"]["params"]} == {1}
    trained = {id(parameter) for group in groups.values() for parameter in group["params"]}
    wanted = (model.backbone, model.projection_head, model.online_classifier)
    assert trained == {id(parameter) for module in wanted for parameter in module.parameters()}
    (scheduler,) = trainer.lr_scheduler_configs
    assert scheduler.interval == "step"
    assert groups["sane"]["lr"] == pytest.approx(1e-3 * groups["sane"]["initial_lr"])  # where lightly's schedule ends
    steps = trainer.global_step
    assert model.criterion.step == steps
    assert model.criterion.confidence == CosineConfidence(*PRESET.confidence, total_steps=steps)


def test_warmup_epochs():
    losses = Losses("lr")
    train(build(warmup_epochs=1), epochs=3, callbacks=[losses])
    steps = len(losses.values) // 3
    assert losses.values[steps - 1] == max(losses.values)
    assert losses.values[0] == pytest.approx(max(losses.values) / steps)


def test_a_run_without_end_is_refused():
    with pytest.raises(ValueError, match="set max_epochs or max_steps"):
        train(build(), epochs=-1)


# --- the schedule of the confidence


def confidences(model, **options):
    """mu at every batch of a run."""
    mu = Losses("slr/mu")
    train(model, **{"epochs": 2, "limit_val_batches": 0} | options, callbacks=[mu])
    return mu.values


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, 10),
        ({"epochs": 4, "accumulate_grad_batches": 4}, 8),  # of the 5 batches of an epoch the last makes a step alone
        ({"accumulate_grad_batches": 2}, 6),
        ({"max_steps": 7}, 7),
        ({"epochs": -1, "max_steps": 7}, 7),
        ({"limit_train_batches": 3}, 6),
        ({"limit_train_batches": 0.4}, 4),
    ],
)
def test_the_confidence_ends_with_the_run_whatever_the_trainer_does(options, steps):
    model = build(confidence=(0.0, 1.0))
    values = confidences(model, count=5 * _lightly.BATCH, **options)
    schedule = CosineConfidence(0.0, 1.0, total_steps=steps)
    assert sorted(set(values)) == pytest.approx([schedule(step) for step in range(steps)])
    assert values == sorted(values)
    assert model.criterion.step == steps


SCHEDULES = {
    "pair": (0.0, 1.0),
    "cosine": CosineConfidence(0.0, 1.0, total_steps=8),
    "callable": lambda step: CosineConfidence(0.0, 1.0, total_steps=8)(step),
}


@pytest.mark.parametrize("confidence", SCHEDULES.values(), ids=SCHEDULES)
def test_the_confidence_begins_with_every_run(confidence):
    model = build(confidence=confidence)
    first = confidences(model)
    assert first == pytest.approx([CosineConfidence(0.0, 1.0, total_steps=8)(step) for step in range(8)])
    assert confidences(model) == first  # a second fit
    fresh = build(confidence=confidence)
    fresh.load_state_dict(model.state_dict())
    assert confidences(fresh) == first  # a new run with these weights


def test_a_second_fit_of_the_same_trainer_begins_both_schedules():
    mu, rates = Losses("slr/mu"), Losses("lr")
    model = build(confidence=(0.0, 1.0))
    runner = _lightly.trainer(2, callbacks=[mu, rates], limit_val_batches=0)
    runner.fit(model, *loaders())
    runner.fit_loop.max_epochs = 4
    runner.fit(model, *loaders())
    assert len(mu.values) == len(rates.values) == 16
    assert mu.values[8:] == mu.values[:8]
    assert rates.values[8:] == pytest.approx(rates.values[:8])


@pytest.mark.filterwarnings("ignore:batch_size_per_device=:UserWarning")
def test_a_run_that_goes_on_with_other_batches_takes_the_learning_rate_for_them(tmp_path):
    options = {"checkpoints": tmp_path, "limit_val_batches": 0}
    train(build(), 4, callbacks=[_lightly.StopAfter(2)], **options)
    same, twice = Losses("lr"), Losses("lr")
    train(build(), 4, callbacks=[same], ckpt_path=tmp_path / "last.ckpt", limit_val_batches=0)
    larger = SANE(2 * _lightly.BATCH, _lightly.CLASSES, backbone=_lightly.backbone(), preset=_lightly.PRESET, knn_k=5)
    train(larger, 4, callbacks=[twice], ckpt_path=tmp_path / "last.ckpt", limit_val_batches=0)
    assert twice.values == pytest.approx([2 * rate for rate in same.values])


def test_a_confidence_that_was_assigned_stays():
    model = build(confidence=(0.0, 1.0))
    model.criterion.confidence = 0.25
    train(model, 1, limit_val_batches=0)
    assert model.criterion.confidence == 0.25


def test_can_be_sent_to_the_processes_that_a_strategy_spawns():
    twin = pickle.loads(pickle.dumps(build()))
    assert twin.mixup(torch.zeros(4, 1), torch.zeros(4, 1))[1].theta.shape == (4,)


def test_a_checkpoint_goes_on_in_the_same_trainer_too(tmp_path):
    mu, rates, stop = Losses("slr/mu"), Losses("lr"), _lightly.StopAfter(2)
    model = build(confidence=(0.0, 1.0))
    runner = _lightly.trainer(4, callbacks=[mu, rates, stop], checkpoints=tmp_path, limit_val_batches=0)
    runner.fit(model, *loaders())
    stop.epochs = 4
    runner.fit(model, *loaders(), ckpt_path=tmp_path / "last.ckpt")
    schedule = CosineConfidence(0.0, 1.0, total_steps=16)
    assert mu.values == pytest.approx([schedule(step) for step in range(16)], abs=1e-6)
    assert rates.values == sorted(rates.values, reverse=True)


def test_the_confidence_is_scheduled_with_other_optimizers_too():
    class Other(SANE):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    model = Other(_lightly.BATCH, CLASSES, backbone=_lightly.backbone(), preset=PRESET, confidence=(0.0, 1.0))
    schedule = CosineConfidence(0.0, 1.0, total_steps=8)
    assert confidences(model) == pytest.approx([schedule(step) for step in range(8)])
    endless = Other(_lightly.BATCH, CLASSES, backbone=_lightly.backbone(), preset=PRESET, confidence=0.5)
    train(endless, epochs=-1, callbacks=[_lightly.StopAfter(1)], limit_val_batches=0)


# --- the networks


def test_other_parts_without_subclassing():
    head = nn.Linear(_lightly.WIDTH, 24)
    model = build(projection_head=head, queue_size=20, confidence=0.3, share_mix=True, ema_momentum=0.5)
    train(model, epochs=1, views=SANETransform(input_size=16, crops=(16, 12)))
    assert model.criterion.memory_bank.bank.shape == (20, 24)
    assert model.criterion.stats["mu"] == pytest.approx(0.3)


def test_default_parts_are_the_papers():
    model = SANE(256, 1000)
    assert model.online_classifier.feature_dim == 2048
    assert [layer.out_features for layer in model.projection_head.modules() if isinstance(layer, nn.Linear)] == [
        2048,
        2048,
        128,
    ]
    criterion = model.criterion
    assert criterion.memory_bank.bank.shape == (IMAGENET.queue_size, 128)
    assert (criterion.temperature, criterion.sharpening, criterion.refined_weight) == (0.2, 1.0, 0.5)
    assert criterion.gather_distributed
    assert model.mixup.kappa == 0.1
    assert model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 2048)


def test_momentum_network_and_shuffled_batch_norm():
    model = build(ema_momentum=0.75)
    before = [parameter.clone() for parameter in model.key_backbone.parameters()]
    online = [parameter.clone() for parameter in model.backbone.parameters()]
    train(model, epochs=1, limit_train_batches=1)
    for slow, old, fast in zip(model.key_backbone.parameters(), before, online, strict=True):
        torch.testing.assert_close(slow, 0.75 * old + 0.25 * fast)
        assert not slow.requires_grad
        assert slow.grad is None
    model.eval()  # batch norm by running statistics: then the shuffling must leave no trace
    views, _ = batch()
    torch.testing.assert_close(model.forward_keys(views[0]), model.key_projection_head(model.key_backbone(views[0])))


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_precision(precision):
    losses = Losses()
    train(build(), epochs=1, precision=precision, callbacks=[losses])
    assert np.isfinite(losses.values).all()


@pytest.mark.skipif(torch.__version__ < "2.5", reason="torch 2.4 fails on this module with NTXentLoss too")
def test_compiled():
    seed_everything(0)
    plain, compiled = Losses(), Losses()
    options = {"limit_train_batches": 2, "limit_val_batches": 0}
    train(build(), epochs=1, callbacks=[plain], **options)
    seed_everything(0)
    train(torch.compile(build(), backend="aot_eager"), epochs=1, callbacks=[compiled], **options)
    np.testing.assert_allclose(compiled.values, plain.values, rtol=1e-5)


# --- equal to MoCo v2


def test_without_confidence_and_mixup_it_is_moco_v2():
    """Step by step against lightly's NTXentLoss and the same momentum network, driven by hand."""
    size = 3 * _lightly.BATCH  # lightly's queue drops keys where a batch does not fit before its end
    model, reference = (
        build(mixup=False, confidence=0.0, in_batch_keys=False, queue_size=size, ema_momentum=0.5) for _ in range(2)
    )
    reference.load_state_dict(model.state_dict())
    criterion = NTXentLoss(PRESET.temperature, (size, 128))
    criterion.memory_bank.bank.copy_(model.criterion.memory_bank.bank)
    ours = Losses()
    seed_everything(0)
    train(model, epochs=2, callbacks=[ours], limit_val_batches=0)  # whose loaders draw random numbers, too
    seed_everything(0)
    theirs = _lightly.moco_v2_losses(reference, criterion, epochs=2)
    np.testing.assert_allclose(ours.values, theirs, rtol=1e-6)


# --- kNN and validation


def test_knn_is_lightlys():
    model = build(knn_k=7, knn_t=0.2)
    trainer = train(model, epochs=1)
    _, plain = loaders()
    classifier = KNNClassifier(model, CLASSES, 7, 0.2, 0, 1)
    judge = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    (_, result) = judge.validate(classifier, plain, verbose=False)
    for k in (1, 5):
        assert trainer.callback_metrics[f"val_knn_top{k}"].item() == pytest.approx(
            result[f"val_knn_top{k}/dataloader_idx_1"]
        )


def test_few_images_all_vote():
    trainer = train(build(knn_k=10_000), epochs=1)
    assert 0 <= trainer.callback_metrics["val_knn_top1"] <= 1


def test_one_validation_loader_or_none():
    views, plain = loaders()
    model = build()
    trainer = _lightly.trainer(epochs=1)
    trainer.fit(model, views, plain[1])
    assert "val_online_cls_top1" in trainer.callback_metrics
    assert "val_knn_top1" not in trainer.callback_metrics
    _lightly.trainer(epochs=1).fit(build(), views)


def test_few_classes_have_no_top_5():
    model = SANE(8, 3, backbone=_lightly.backbone(), preset=PRESET)
    assert model.online_classifier.topk == model.knn_classifier.topk == (1,)


# --- checkpoints


def two_fixed_views(image):
    return [image / 255, image.flip(-1) / 255]


def test_a_checkpoint_restores_all_that_a_run_needs(tmp_path):
    """Without random order, views and mixing the resumed run repeats the uninterrupted one, to rounding.

    (What stays random is the order in which the momentum network's batch norm adds up.)
    """
    options = {"epochs": 4, "views": two_fixed_views, "shuffle": False, "limit_val_batches": 0}
    whole, before = Losses(), Losses(stop_at=(2, 1))
    after, rates, mu = Losses(), Losses("lr"), Losses("slr/mu")
    seed_everything(0)
    model = build(mixup=False)
    train(model, callbacks=[whole], **options)
    seed_everything(0)
    with pytest.raises(_lightly.KilledError):
        train(build(mixup=False), callbacks=[before], checkpoints=tmp_path, **options)
    seed_everything(1)
    resumed = build(mixup=False)
    train(resumed, callbacks=[after, rates, mu], ckpt_path=tmp_path / "last.ckpt", **options)
    steps = len(whole.values) // 4
    np.testing.assert_allclose(before.values, whole.values[: 2 * steps + 2], rtol=1e-4)
    np.testing.assert_allclose(after.values, whole.values[2 * steps :], rtol=1e-4)
    assert rates.values == sorted(rates.values, reverse=True)
    assert rates.values[0] < 0.6 * 0.03 * _lightly.BATCH / 256
    schedule = CosineConfidence(*PRESET.confidence, total_steps=4 * steps)
    assert mu.values == pytest.approx([schedule(step) for step in range(2 * steps, 4 * steps)])
    state = model.state_dict()
    assert any("memory_bank.bank" in name for name in state)
    for name, value in resumed.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=1e-3, atol=1e-5, msg=name)


def test_checkpoints_hold_plain_values(tmp_path):
    train(build(), epochs=1, checkpoints=tmp_path)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert "criterion.memory_bank.bank" in checkpoint["state_dict"]
    loaded = SANE.load_from_checkpoint(tmp_path / "last.ckpt", backbone=_lightly.backbone(), weights_only=True)
    assert loaded.preset == PRESET
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, checkpoint["state_dict"][name]), name


# --- two processes


def test_two_processes(tmp_path):
    """Queues are equal, mixing is not, and a run that two processes resume goes on in the schedule."""
    command = [sys.executable, "-W", "ignore", _lightly.__file__, str(tmp_path)]
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 0, result.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert first["queue"] == second["queue"]
    assert first["groups"] == second["groups"]
    assert set(first["groups"]) <= set(range(16))  # pairs, of 32 images that both processes share
    assert max(map(first["groups"].count, range(16))) == 2
    assert first["weights"] == second["weights"]
    assert first["theta"] != second["theta"]
    assert first["resumed"] == first["whole"][len(first["whole"]) // 2 :]
    assert second["resumed"] == second["whole"][len(second["whole"]) // 2 :]


# --- wrong use


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"queue_size": 0}, ValueError, "queue_size must be >= 1"),
        ({"preset": FROM_FEATURES}, ValueError, "queue_size must be >= 1"),
        ({"confidence": -1.0}, ValueError, "confidence must be between 0"),
        ({"preset": {"tau": 1}}, TypeError, "tau"),
    ],
)
def test_wrong_arguments(change, error, message):
    with pytest.raises(error, match=message):
        build(**change)


@pytest.mark.parametrize(
    "change",
    [
        lambda views, targets: [views[0], targets],
        lambda views, targets: [views[:1], targets],
        lambda views, targets: [views + views[:1], targets],
    ],
)
def test_wrong_batches(change):
    model = build()
    before = model.criterion.memory_bank.bank.clone()
    with pytest.raises(ValueError, match=r"give the data set transform=SANETransform"):
        model.training_step(change(*batch()), 0)
    assert torch.equal(model.criterion.memory_bank.bank, before)
    assert model.criterion.step == 0


def test_a_batch_of_another_size_warns():
    model = SANE(256, CLASSES, backbone=_lightly.backbone(), preset=PRESET)
    with pytest.warns(match=r"batch_size_per_device=256 but the batch has 8 images"):
        train(model, epochs=1, limit_train_batches=1)


def test_a_queue_longer_than_the_training_set_warns():
    with pytest.warns(
        UserWarning, match=r"queue of 33 keys is longer than the training set of 32 images.*set queue_size"
    ):
        train(build(queue_size=33), epochs=1)


def test_an_extended_run_goes_on_in_the_learning_rate_of_its_new_length(tmp_path):
    train(build(), epochs=1, checkpoints=tmp_path)
    whole, extended = Losses("lr"), Losses("lr")
    train(build(), epochs=3, callbacks=[whole])
    train(build(), epochs=3, callbacks=[extended], ckpt_path=tmp_path / "last.ckpt")
    assert extended.values == pytest.approx(whole.values[4:])


def test_the_launcher_runs_the_recipe(capsys):
    with pytest.raises(SystemExit) as exit_:
        launcher.main(["cifar10", "--help"])
    assert exit_.value.code == 0
    assert "--knn-every" in capsys.readouterr().out


def test_a_missing_framework_names_the_command(monkeypatch):
    with pytest.raises(ImportError, match=r'nothing_here is not installed: pip install "slr-plugin\[lightly\]"'):
        require("lightly", "torch", "nothing_here")
    monkeypatch.setattr("slr_plugin.adapters._require.find_spec", lambda name: name != "lightly" or None)
    with pytest.raises(ImportError, match=r'lightly is not installed: pip install "slr-plugin\[lightly\]"'):
        importlib.reload(sys.modules["slr_plugin.adapters.lightly"])


# --- crops


def test_crops_are_mixed_in_pairs_with_their_own_or_a_shared_mix():
    for share in (False, True):
        model = build(share_mix=share)
        views, _ = batch(6)
        mixed, mixes = model._mixed_queries(views)
        assert len(mixed) == len(mixes) == 2
        assert torch.equal(mixes[0].theta, mixes[1].theta) == share
        assert torch.equal(mixes[0].partner, mixes[1].partner) == share
    model.mixup = lambda queries, positives, *_: (seen.append((queries, positives)), model_mix(queries, positives))[1]
    model_mix, seen = build().mixup, []
    model._mixed_queries(views)
    assert [tuple(map(id, pair)) for pair in seen] == [(id(views[3]), id(views[2])), (id(views[5]), id(views[4]))]
    seen.clear()
    model._mixed_queries(views[:2])
    assert [tuple(map(id, pair)) for pair in seen] == [(id(views[1]), id(views[0]))]


@pytest.mark.parametrize("name", ["methods", "transforms"])
def test_docstrings(name):
    result = doctest.testmod(importlib.import_module(f"slr_plugin.adapters.lightly.{name}"))
    assert result.failed == 0
    assert result.attempted > 0


# --- lightly's script


def test_register():
    methods = {"mocov2": {}}
    register(methods)
    assert methods == {"mocov2": {}, "sane": {"model": SANE, "transform": transform}}
    register(methods, VARIANTS)
    assert methods["sane_multi"]["transform"].crops == MULTI
    assert methods["sane_single_strong"]["transform"].crops == SINGLE
    assert methods["sane_single_strong"]["transform"].strong
    assert methods["sane_strong"]["transform"].crops == (224,)
    with pytest.raises(ValueError, match="names must be among sane, "):
        register(methods, ["sane_tiny"])


def launch(*arguments, **options):
    command = [sys.executable, "-W", "ignore", "-m", "slr_plugin.adapters.lightly", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


SCRIPT = """
    import argparse, os
    import neighbour, torch
    from pytorch_lightning import LightningModule, Trainer

    METHODS = {"other": {}}
    parser = argparse.ArgumentParser()
    parser.add_argument("--methods", nargs="+")

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def on_fit_start(self):
            line = f"rank {self.global_rank} of {self.trainer.world_size}: {' '.join(METHODS)}\\n"
            os.write(1, line.encode())  # whole: print's parts can mix with the other process's

        def training_step(self, batch, batch_idx):
            return self.weight * batch

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters())

    def main(methods):
        print("methods", methods, flush=True)
        Trainer(devices=2, accelerator="cpu", strategy="ddp", max_epochs=1, logger=False, enable_progress_bar=False,
                enable_checkpointing=False, enable_model_summary=False).fit(Module(), [0, 1])

    if __name__ == "__main__":
        raise AssertionError("the launcher calls main itself")
"""


def test_the_launcher_adds_the_method_in_ddp_children_too(tmp_path):
    (tmp_path / "neighbour.py").write_text("")
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    result = launch(tmp_path / "script.py", "--methods", "sane", "sane_single", cwd=tmp_path)
    for rank in (0, 1):
        assert f"rank {rank} of 2: other sane sane_single\n" in result.stdout, result.stderr[-3000:]
    assert result.stdout.count("methods ['sane', 'sane_single']") == 2
    assert result.returncode == 0, result.stderr[-3000:]


TABLE = """
    import argparse

    METHODS = {"other": {}}
    parser = argparse.ArgumentParser()
    parser.add_argument("--methods", nargs="+")

    def main(methods):
        print("trains", *(name for name in methods or METHODS if METHODS[name] is not None))
"""


@pytest.mark.parametrize(
    ("options", "trained"),
    [
        ([], "other sane"),
        (["--methods", "sane", "other"], "sane other"),
        (["--methods=sane_single"], "sane_single"),
        (["--method", "sane_multi_strong"], "sane_multi_strong"),
        (["--meth=sane_strong"], "sane_strong"),
    ],
)
def test_the_launcher_reads_options_as_the_script_does(options, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "table", raising=False)
    (tmp_path / "table.py").write_text(textwrap.dedent(TABLE))
    launcher.main([str(tmp_path / "table.py"), *options])
    assert capsys.readouterr().out == f"trains {trained}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "main.py --methods sane"),
        (["--help"], "main.py --methods sane"),
        (["--methods", "sane", "main.py"], "main.py --methods sane"),
        (["nowhere/main.py"], "git clone https://github.com/lightly-ai/lightly"),
        (["text.txt"], "there is no script text.txt"),
    ],
)
def test_the_launcher_says_what_is_wrong(arguments, message, tmp_path, capsys):
    (tmp_path / "text.txt").touch()
    with pytest.raises(SystemExit) as exit_:
        launcher.main(arguments)
    assert message in capsys.readouterr().out + str(exit_.value)
    assert (exit_.value.code == 0) == (arguments == ["--help"])


def test_presets_can_be_changed():
    model = build(preset=dataclasses.replace(CIFAR10, queue_size=16, learning_rate=0.5))
    assert len(model.criterion.memory_bank) == 16
