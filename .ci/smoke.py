"""Run against an installed wheel, away from the repository, with nothing but its dependencies there."""

import importlib
import importlib.metadata
import importlib.util
import pathlib
import pkgutil
import subprocess
import sys

import torch

import slr_plugin
import slr_plugin.adapters

here = pathlib.Path(slr_plugin.__file__).parent
assert "site-packages" in here.parts, here
assert (here / "py.typed").is_file()
assert importlib.util.find_spec("adapters") is None, "the wheel must not own a top-level package named adapters"
assert importlib.metadata.version("slr-plugin") == slr_plugin.__version__
assert not {"lightly", "solo", "torchvision"} & set(sys.modules)

extras = {
    "lightly": "lightly",
    "lightning": "lightly",
    "solo_learn": "solo",
    "pytorch_metric_learning": "metric-learning",
    "stable_pretraining": "stable-pretraining",
    "sentence_transformers": "sentence-transformers",
    "export": None,  # works with what slr-plugin itself needs
    "open_clip": None,
    "knowledge": None,
}
adapters = {found.name for found in pkgutil.iter_modules(slr_plugin.adapters.__path__) if found.name[0] != "_"}
assert adapters == set(extras), adapters
for adapter, extra in extras.items():
    try:
        importlib.import_module(f"slr_plugin.adapters.{adapter}")
        said = None
    except ImportError as error:
        said = str(error)
    assert said is None if extra is None else f'pip install "slr-plugin[{extra}]"' in (said or ""), (adapter, said)
for command in ("lightly", "solo-learn", "export"):
    shown = subprocess.run(
        [pathlib.Path(sys.executable).with_name("slr-plugin"), command, "--help"], capture_output=True, text=True
    )
    needs = extras[command.replace("-", "_")]
    assert f"slr-plugin[{needs}]" in shown.stderr if needs else shown.returncode == 0, (command, shown)
configs = here / "adapters" / "solo_learn" / "configs"
assert len(list(configs.glob("sane-*.yaml"))) == 9, configs
assert (configs / "augmentations" / "cifar.yaml").is_file()

encoder = torch.nn.Linear(8, 4)
criterion = slr_plugin.presets.CIFAR10.loss(dim=4, total_steps=10, memory_bank_size=(32, 4))
x0, x1 = torch.randn(2, 16, 8)
mixed, mix = slr_plugin.presets.CIFAR10.mixup()(x0, x1)
loss = criterion(encoder(x0), encoder(x1).detach(), encoder(mixed), mix)
loss.backward()
assert loss.isfinite()
assert encoder.weight.grad.isfinite().all()
assert criterion.memory_bank.bank_ptr == 16
from slr_plugin.adapters.open_clip import SLRClipLoss  # noqa: E402

assert SLRClipLoss()(*torch.randn(2, 8, 4), torch.tensor(10.0)).isfinite()
print(f"slr-plugin {slr_plugin.__version__} works from {here}: loss {loss.item():.3f}")
