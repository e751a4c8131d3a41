"""The solo-learn adapter where no clone of solo-learn is needed; test_solo_learn_clone.py has the rest."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

for package in ("hydra", "lightning", "torchvision"):
    pytest.importorskip(package, reason='pip install "slr-plugin[solo]"')

import _oracle
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

import slr_plugin.adapters.solo_learn as adapter
from slr_plugin import MomentumMixup
from slr_plugin.adapters.solo_learn import __main__ as launcher
from slr_plugin.adapters.solo_learn.settings import add_defaults, build, check_crops, confidence_of
from slr_plugin.adapters.solo_learn.symmetric import mix_views, symmetric_loss
from slr_plugin.presets import CIFAR10, IMAGENET

CONFIGS = Path(launcher.__file__).parent / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem != "sane-cpu")


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    pass


# --- the loss


@pytest.mark.parametrize("crops", [0, 1, 2])
def test_the_loss_is_equation_9_in_both_directions(crops):
    first, second = (_oracle.make_batch(6, 5, 9, crops, seed=seed) for seed in (0, 1))
    settings = {"temperature": 0.2, "sharpening": 0.7, "confidence": 2.0, "refined_weight": 0.4}
    criteria = [_oracle.make_criterion(batch, **settings) for batch in (first, second)]
    queries = [first.out0.requires_grad_(), second.out0.requires_grad_()]
    positives = [second.out1, first.out1]  # of view 1 - v
    interleaved = [value for pair in zip(first.mixed, second.mixed, strict=True) for value in pair]
    mixes = [value for pair in zip(first.mix, second.mix, strict=True) for value in pair]

    loss = symmetric_loss(criteria, queries, positives, interleaved, mixes)

    wanted = (_oracle.ask(first, **settings).loss + _oracle.ask(second, **settings).loss) / 2
    torch.testing.assert_close(loss, wanted, rtol=1e-10, atol=0)
    for ours, theirs in zip(torch.autograd.grad(loss, queries), torch.autograd.grad(wanted, queries), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    # Either queue takes its own direction's positives.
    for criterion, batch in zip(criteria, (first, second), strict=True):
        newest = torch.nn.functional.normalize(batch.out1, dim=1).float()
        torch.testing.assert_close(criterion.memory_bank.bank[:6], newest)


def views(*sizes):
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(4, 3, size, size, generator=generator) for size in sizes]


def mixup():
    return MomentumMixup(kappa=2.0, generator=torch.Generator().manual_seed(1))


def assert_mixed(images, mix, queries, positives):
    theta = mix.theta[:, None, None, None].to(queries)
    torch.testing.assert_close(images, theta * queries + (1 - theta) * positives[mix.partner])


def test_two_large_crops_are_mixed_with_each_other():
    large = views(8, 8)
    (first, first_mix), (second, second_mix) = mix_views(large, [], mixup(), strong=False)
    assert_mixed(first, first_mix, large[0], large[1])
    assert_mixed(second, second_mix, large[1], large[0])
    assert not torch.equal(first_mix.theta, second_mix.theta)
    assert mix_views(large, [], None, strong=False) == []


@pytest.mark.parametrize("strong", [False, True])
def test_small_crops_are_mixed_with_a_large_one(strong):
    large, small = views(8, 8), views(8, 4, 6)
    mixed = mix_views(large, small, mixup(), strong)
    assert [images.shape for images, _ in mixed] == [crop.shape for crop in small]
    for place, ((images, mix), crop) in enumerate(zip(mixed, small, strict=True)):
        view = place % 2  # its direction: the queries are large[view], the positives large[1 - view]
        other = torch.nn.functional.interpolate(
            large[view if strong else 1 - view], crop.shape[-2:], mode="bilinear", antialias=True
        )
        assert_mixed(images, mix, *((other, crop) if strong else (crop, other)))
    # A crop of full size meets the large one as it is.
    assert_mixed(*mixed[0], *((large[0], small[0]) if strong else (small[0], large[1])))


def test_without_mixup_small_crops_are_queries_of_their_own_label():
    small = views(4, 6)
    for (images, mix), crop in zip(mix_views(views(8, 8), small, None, strong=False), small, strict=True):
        assert images is crop
        assert mix.theta.tolist() == [1] * 4
        assert mix.partner.tolist() == [0, 1, 2, 3]
    batch = _oracle.make_batch(4, 5, 9)
    criterion = _oracle.make_criterion(batch, temperature=0.2, refined_weight=1.0)
    unmixed = criterion(batch.out0, batch.out1, batch.out0, mix, update=False)
    torch.testing.assert_close(unmixed, criterion(batch.out0, batch.out1, update=False))


# --- settings


def accept(settings, small_crops=0):
    check_crops(settings, num_large_crops=2, num_small_crops=small_crops)
    return build(settings)


@pytest.mark.parametrize(("dataset", "preset"), [("cifar10", CIFAR10), ("cifar100", CIFAR10), ("custom", IMAGENET)])
def test_defaults_are_the_papers(dataset, preset):
    settings = OmegaConf.create({})
    add_defaults(settings, dataset)
    names = ("temperature", "sharpening", "refined_weight", "kappa", "queue_size")
    assert {name: settings[name] for name in names} == {name: getattr(preset, name) for name in names}
    assert confidence_of(settings) == preset.confidence
    before = settings.copy()
    add_defaults(settings, dataset)
    assert settings == before
    losses, mixup = accept(settings)
    assert [len(loss.memory_bank) for loss in losses] == [preset.queue_size] * 2
    assert mixup.kappa == preset.kappa


def test_what_is_set_stays():
    settings = OmegaConf.create({"kappa": None, "confidence": 0.3})
    add_defaults(settings, "cifar10")
    assert settings.kappa is None
    assert confidence_of(settings) == 0.3
    settings = OmegaConf.create({"kappa": "None"})
    add_defaults(settings, "cifar10")
    assert settings.kappa is None


@pytest.mark.parametrize(
    ("settings", "small_crops", "error", "message"),
    [
        ({"queue_size": 0}, 0, ValueError, r"method_kwargs.queue_size must be >= 1, got 0"),
        ({"queue_size": None}, 0, TypeError, r"method_kwargs.queue_size must be an integer, got None"),
        ({"proj_output_dim": 0}, 0, ValueError, r"method_kwargs.proj_output_dim must be >= 1, got 0"),
        ({"temperature": 0}, 0, ValueError, r"method_kwargs.temperature"),
        ({"sharpening": 0}, 0, ValueError, r"method_kwargs.sharpening must be between 1e-08 and 1.0, got 0"),
        ({"kappa": 0}, 0, ValueError, r"method_kwargs.kappa must be between .*, got 0"),
        ({"kappa": True}, 0, TypeError, r"method_kwargs.kappa must be a number, got True"),
        ({"confidence": False}, 0, TypeError, r"method_kwargs.confidence must be a number, got False"),
        ({"proj_output_dim": "many"}, 0, TypeError, r"method_kwargs.proj_output_dim must be an integer"),
        ({"confidence": [0, 1, 2]}, 0, ValueError, r"confidence must be \[m1, m2\] or a number"),
        ({"confidence": [0, -1]}, 0, ValueError, r"method_kwargs.confidence must be between 0"),
        ({"confidence": "high"}, 0, TypeError, r"method_kwargs.confidence must be a number, got 'high'"),
        ({"same_group": "mine"}, 0, ValueError, r"method_kwargs.same_group must be"),
        ({"strong_crops": True}, 0, ValueError, r"needs small crops: .*pipelines after the first.*crop_size: \[224\]"),
        ({}, 1, ValueError, r"and no small one or several, got 2 and 1: set num_crops: 2"),
        ({"in_batch_keys": False}, 0, ValueError, r"add kappa: null"),
        ({"in_batch_keys": False, "kappa": None}, 2, ValueError, r"and no small crops"),
    ],
)
def test_bad_settings(settings, small_crops, error, message):
    settings = OmegaConf.create(settings)
    add_defaults(settings, "cifar10")
    with pytest.raises(error, match=message):
        accept(settings, small_crops)


# What of the odd values below is accepted.
FINE = {"in_batch_keys": [True], "temperature": [-1], "kappa": [False, None]}
ELSEWHERE = {"strong_crops", "groups", "estimator", "label_quality_every"}  # where they are used
KNOWN = OmegaConf.create({})
add_defaults(KNOWN, "cifar10")


@pytest.mark.parametrize("name", sorted(KNOWN.keys() - ELSEWHERE))
def test_an_odd_value_works_or_is_refused_by_its_settings_name(name):
    for value in [True, False, None, "text", "0.5", -1, [0.5], [[0, 1], 2], [], {"a": 1}, math.nan, math.inf]:
        settings = OmegaConf.create({name: value})
        add_defaults(settings, "cifar10")
        if value in FINE.get(name, []):
            build(settings)
            assert settings[name] == (None if value is False else value)  # off, as null
            continue
        with pytest.raises((TypeError, ValueError), match=rf"^method_kwargs\.{name}\b"):
            accept(settings, small_crops=2)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_another_number_of_large_crops_than_two_is_refused(count):
    with pytest.raises(
        ValueError, match=rf"two large crops, .*, got {count} and 0: set num_crops: 2 .*crop_size: \[224\]"
    ):
        check_crops(KNOWN, num_large_crops=count, num_small_crops=0)


@pytest.mark.parametrize("name", ["kapa", "queue", "mixup", "pred_hidden_dim"])
def test_an_unknown_name_is_refused_with_those_there_are(name):
    with pytest.raises(ValueError, match=rf"method_kwargs\.{name}: unknown to sane; it takes .*kappa, "):
        add_defaults(OmegaConf.create({name: 0.5}), "cifar10")


# --- configurations


def composed(name):
    with initialize_config_module("slr_plugin.adapters.solo_learn.configs", version_base="1.2"):
        return compose(name, return_hydra_config=True)


def test_there_is_a_configuration_for_every_data_set():
    datasets = ("cifar10", "cifar100", "imagenet-100", "imagenet")
    assert sorted(f"sane-{dataset}{kind}" for dataset in datasets for kind in ("", "-multi-strong")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_configurations(name):
    cfg = composed(name)
    preset = CIFAR10 if "cifar" in name else IMAGENET
    settings = cfg.method_kwargs
    assert (settings.temperature, settings.sharpening, settings.kappa) == (0.2, preset.sharpening, preset.kappa)
    assert confidence_of(settings) == preset.confidence
    assert (settings.queue_size, settings.refined_weight) == (preset.queue_size, preset.refined_weight)
    assert cfg.method == "sane"
    assert cfg.data.dataset == name.removeprefix("sane-").removesuffix("-multi-strong").replace("-", "")
    assert cfg.hydra.callbacks.slr._target_ == "slr_plugin.adapters.solo_learn.RegisterSANE"
    large = cfg.augmentations[0].crop_size
    small = sum(pipeline.num_crops for pipeline in cfg.augmentations if pipeline.crop_size != large)
    assert cfg.augmentations[0].num_crops == 2
    assert settings.strong_crops == (small > 0) == name.endswith("multi-strong")
    assert not cfg.wandb.enabled  # nobody needs an account to start


def test_names_of_configurations_differ():
    """solo-learn's automatic resumption compares names, not settings."""
    assert len({composed(name).name for name in NAMES}) == len(NAMES)


def test_settings_of_the_configurations_are_known():
    for name in NAMES:
        assert set(composed(name).method_kwargs) <= set(KNOWN)


# --- the launcher, with a stand-in that has solo-learn's names; the real one: test_solo_learn_clone.py

STAND_IN = {
    "solo/__init__.py": "",
    "solo/methods/__init__.py": "METHODS = {}",
    "solo/methods/base.py": "class BaseMomentumMethod: pass",
    "solo/utils/__init__.py": "",
    "solo/utils/misc.py": "def omegaconf_select(): pass",
    "solo/utils/momentum.py": "def initialize_momentum_params(): pass",
}

SCRIPT = """
import json, os, sys
from pathlib import Path
import hydra, torch
from lightning.pytorch import LightningModule, Trainer
from solo.methods import METHODS
from torch.utils.data import DataLoader

class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
    def training_step(self, batch, index):
        seen = {"methods": sorted(METHODS), "file": __file__, "name": __name__}
        Path(f"rank-{self.global_rank}-of-{self.trainer.world_size}.json").write_text(json.dumps(seen))
        return self.layer(batch).sum()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

@hydra.main(version_base="1.2", config_path="conf", config_name="two")
def main(cfg):
    trainer = Trainer(
        accelerator="cpu", devices=cfg.devices, strategy="ddp", max_steps=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )
    trainer.fit(Model(), DataLoader(torch.ones(4, 1)))

if __name__ == "__main__":
    main()
"""


def write_tree(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def run(*arguments, cwd, module="slr_plugin.adapters.solo_learn"):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PL_", "SLR_PLUGIN"))}
    environment |= {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", module, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=environment)


@pytest.mark.parametrize(("way", "count"), [("lightning", 2), ("torchrun", 1)])
def test_every_process_of_ddp_knows_the_method(tmp_path, way, count):
    """The script is found from another folder, reads its own configuration, and Lightning starts its second process."""
    clone = tmp_path / "clone"
    write_tree(clone, STAND_IN | {"train.py": SCRIPT, "conf/two.yaml": "devices: 3"})
    script = os.path.relpath(clone / "train.py", tmp_path)
    arguments = [script, f"devices={count}", "hydra.run.dir=."]
    if way == "torchrun":
        each = ["--standalone", "--nproc-per-node", count, "-m", "slr_plugin.adapters.solo_learn"]
        result = run(*each, *arguments, cwd=tmp_path, module="torch.distributed.run")
    else:
        result = run(*arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    for rank in range(count):
        seen = json.loads((tmp_path / f"rank-{rank}-of-{count}.json").read_text())
        assert seen == {"methods": ["sane"], "file": str(clone / "train.py"), "name": "__main__"}


def test_the_callback_registers_without_the_launcher(tmp_path):
    """As a configuration names it, in a plain python SCRIPT.py, in both processes."""
    callback = "devices: 2\nhydra: {callbacks: {slr: {_target_: slr_plugin.adapters.solo_learn.RegisterSANE}}}"
    write_tree(tmp_path, STAND_IN | {"train.py": SCRIPT, "conf/two.yaml": callback})
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "train.py", "hydra.run.dir=."]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    assert [json.loads((tmp_path / f"rank-{r}-of-2.json").read_text())["methods"] for r in (0, 1)] == [["sane"]] * 2


@pytest.fixture
def in_a_folder(tmp_path, monkeypatch):
    """This process there, without a clone that other tests have imported; the launcher leaves no trace in it."""

    def imported():
        return [name for name in sys.modules if name.partition(".")[0] == "solo"]

    for name in imported():
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if not (Path(place) / "solo").is_dir()])
    monkeypatch.setenv(launcher._SCRIPT, "")
    monkeypatch.delenv(launcher._SCRIPT)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in imported():
        del sys.modules[name]


def test_the_scripts_arguments_and_help_are_its_own(in_a_folder, monkeypatch):
    seen = []
    monkeypatch.setattr(launcher, "run", lambda *call: seen.append(call))
    launcher.main(["main_knn.py", "--help", "x=1"])
    assert seen == [(Path("main_knn.py"), ["--help", "x=1"])]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "SCRIPT.py"),
        (["--help"], 0, "SCRIPT.py"),
        (
            ["nowhere/main_pretrain.py"],
            1,
            "there is no script nowhere/main_pretrain.py; get solo-learn's with: git clone",
        ),
        (["alone.py"], 1, "solo-learn is not importable (No module named 'solo'): get it with git clone"),
    ],
)
def test_messages(in_a_folder, capsys, arguments, code, message):
    (in_a_folder / "alone.py").write_text("print('ran')")
    with pytest.raises(SystemExit) as exit_:
        launcher.main(arguments)
    assert exit_.value.code == code or (code == 1 and isinstance(exit_.value.code, str))  # which Python prints
    assert message in capsys.readouterr().out + str(exit_.value)


@pytest.mark.parametrize("fault", ["import einops_of_another_name", "from solo.utils import gone"])
def test_why_solo_learn_cannot_be_imported_is_told_with_what_to_do(fault, in_a_folder, capsys):
    """It lacks a package; or, as in PyPI's release of 2021, the packages that there are have changed."""
    write_tree(in_a_folder, STAND_IN | {"solo/methods/__init__.py": fault, "main_knn.py": "print('ran')"})
    with pytest.raises(SystemExit) as exit_:
        launcher.main(["main_knn.py"])
    message = str(exit_.value)
    assert fault.split()[-1] in message
    assert "PyPI's release of 2021 is too old" in message
    assert 'pip install "slr-plugin[solo]"' in message
    assert "ran" not in capsys.readouterr().out


def test_the_adapter_can_be_imported_without_solo_learn(in_a_folder):
    with pytest.raises(ImportError, match="git clone"):
        adapter.SANE  # noqa: B018
    assert not hasattr(adapter, "another")
