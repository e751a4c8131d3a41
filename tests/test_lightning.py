"""The callback in real trainers of both Lightning packages, and with lightly's SANE on real images."""

import importlib
import math

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

for package in ("lightly", "pytorch_lightning", "lightning"):
    pytest.importorskip(package, reason='pip install "slr-plugin[dev]"')

from slr_plugin import SLRLoss
from slr_plugin.adapters.lightning import LabelQualityCallback, targets
from slr_plugin.diagnostics import LabelMonitor, LabelQuality

pytestmark = [
    pytest.mark.usefixtures("one_thread", "unseeded"),
    pytest.mark.filterwarnings("ignore::UserWarning:(pytorch_lightning|lightning)", "ignore::UserWarning:torch"),
]
NAMES = {f"labels/{name}" for name in LabelQuality._fields}
FRAMEWORKS = ["pytorch_lightning", "lightning.pytorch"]


def build(framework, losses=1):
    """A small module of the framework, whose steps are (features, classes)."""
    base = importlib.import_module(framework).LightningModule

    class Module(base):
        def __init__(self):
            super().__init__()
            self.encoder = torch.nn.Linear(4, 3)
            self.criteria = torch.nn.ModuleList(SLRLoss(0.2, (16, 3)) for _ in range(losses))

        def training_step(self, batch, batch_idx):
            features = self.encoder(batch[0])
            return sum(criterion(features, features.detach() + 0.1) for criterion in self.criteria)

        def validation_step(self, batch, batch_idx):
            self.log("seen", 1.0)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    torch.manual_seed(0)
    return Module()


def loader():
    generator = torch.Generator().manual_seed(0)
    classes = torch.randint(3, (32,), generator=generator)
    return DataLoader(TensorDataset(torch.randn(32, 4, generator=generator), classes), batch_size=8)


def trainer(framework, callback, folder, epochs):
    return importlib.import_module(framework).Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        default_root_dir=folder,
    )


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("losses", [1, 2])
def test_logs_what_a_monitor_measures(framework, losses, tmp_path):
    callback = LabelQualityCallback(every_n_steps=2)
    fit = trainer(framework, callback, tmp_path, 2)
    module = build(framework, losses)
    fit.fit(module, loader())

    by_hand = build(framework, losses)
    monitors = [LabelMonitor(criterion) for criterion in by_hand.criteria]
    optimizer = by_hand.configure_optimizers()
    for _ in range(2):
        for step, batch in enumerate(loader()):
            for monitor in monitors:
                monitor.announce(batch[1], measure=step % 2 == 0)
            optimizer.zero_grad()
            by_hand.training_step(batch, step).backward()
            optimizer.step()
        means = [monitor.mean() for monitor in monitors]
    for name in LabelQuality._fields:
        expected = sum(getattr(mean, name) for mean in means) / losses
        torch.testing.assert_close(fit.callback_metrics[f"labels/{name}"], expected)
    assert set(fit.callback_metrics) >= NAMES


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_goes_on_where_the_checkpoint_was(framework, tmp_path):
    whole, first, second = (LabelQualityCallback(every_n_steps=1) for _ in range(3))
    trainer(framework, whole, tmp_path, 2).fit(build(framework), loader())
    half = trainer(framework, first, tmp_path, 1)
    half.fit(build(framework), loader())
    half.save_checkpoint(tmp_path / "half.ckpt")
    trainer(framework, second, tmp_path, 2).fit(build(framework), loader(), ckpt_path=tmp_path / "half.ckpt")
    torch.testing.assert_close(second.quality, whole.quality, rtol=0, atol=0)
    assert whole.quality.own < 1
    assert not math.isnan(whole.quality.nearest)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_checkpoint_with_its_state_can_be_validated(framework, tmp_path):
    fit = trainer(framework, LabelQualityCallback(), tmp_path, 1)
    fit.fit(build(framework), loader())
    fit.save_checkpoint(tmp_path / "last.ckpt")
    judge = trainer(framework, LabelQualityCallback(), tmp_path, 1)
    (metrics,) = judge.validate(build(framework), loader(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert metrics == {"seen": 1.0}


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_checkpoint_that_was_saved_outside_of_training_can_be_trained_on(framework, tmp_path):
    judge = trainer(framework, LabelQualityCallback(), tmp_path, 1)
    judge.validate(build(framework), loader(), verbose=False)
    judge.save_checkpoint(tmp_path / "validated.ckpt")
    callback = LabelQualityCallback()
    fit = trainer(framework, callback, tmp_path, 1)
    fit.fit(build(framework), loader(), loader(), ckpt_path=tmp_path / "validated.ckpt")
    assert callback.quality.own < 1


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_an_epoch_that_goes_on_in_its_middle_is_measured(framework, tmp_path):
    callback = LabelQualityCallback(every_n_steps=50)
    module = build(framework)
    callback.setup(None, module, "fit")
    callback.on_train_start(None, module)
    for number, batch in enumerate(loader()):
        callback.on_train_batch_start(None, module, batch, number + 2)
        module.training_step(batch, number + 2)
    (monitor,) = callback._monitors
    assert len(monitor.measured) == 1


def test_after_training_the_loss_is_let_go(tmp_path):
    module = build("pytorch_lightning")
    trainer("pytorch_lightning", LabelQualityCallback(), tmp_path, 1).fit(module, loader())
    assert not module.criteria[0]._forward_hooks
    assert not module.criteria[0]._forward_pre_hooks


def test_finds_the_classes_in_the_batches_of_both():
    classes, views = torch.tensor([1, 2]), [torch.zeros(2, 3), torch.zeros(2, 3)]
    assert targets((views, classes, ["a.png", "b.png"])) is classes
    assert targets([torch.tensor([7, 8]), views, classes]) is classes


def test_says_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="every_n_steps must be >= 1"):
        LabelQualityCallback(every_n_steps=0)
    with pytest.raises(ValueError, match=r"Module has no slr_plugin\.SLRLoss"):
        trainer("pytorch_lightning", LabelQualityCallback(), tmp_path, 1).fit(
            build("pytorch_lightning", losses=0), loader()
        )
