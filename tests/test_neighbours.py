"""The page of neighbours: its snippets run where their framework is installed, and its recipes are what they say."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _oracle import slr

from slr_plugin import SLRLoss

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "examples" / "neighbours.md"
ADAPTERS = {
    "lightly": ("lightly", "lightly"),
    "lightning": ("lightly", "lightning"),
    "solo_learn": ("solo", "hydra"),
    "pytorch_metric_learning": ("metric-learning", "pytorch_metric_learning"),
    "stable_pretraining": ("stable-pretraining", "stable_pretraining"),
    "sentence_transformers": ("sentence-transformers", "sentence_transformers"),
}

if not PAGE.is_file():
    pytest.skip("installed without the repository", allow_module_level=True)
SHARED, *REST = PAGE.read_text(encoding="utf-8").split("\n## ")
SECTIONS = {text.partition("\n")[0]: text for text in REST}


def blocks(text, language="python"):
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def require(code):
    """Skip where what a snippet imports is not installed, and only there."""
    for module in re.findall(r"^(?:from|import) ([\w.]+)", code, flags=re.MULTILINE):
        package = module if module.startswith("slr_plugin.adapters.") else module.partition(".")[0]
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


def run(code, names):
    require(code)
    exec(compile(code, PAGE.name, "exec"), names)
    return names


@pytest.mark.parametrize("name", [name for name, text in SECTIONS.items() if blocks(text)])
@pytest.mark.filterwarnings("ignore")  # the frameworks'
def test_snippets_run(name, tmp_path, monkeypatch, one_thread):
    monkeypatch.chdir(tmp_path)
    text = SECTIONS[name]
    require("\n".join(blocks(text)))
    if name == "stable-pretraining":
        monkeypatch.setenv("SPT_CACHE_DIR", str(tmp_path / "cache"))
        Path("config.yaml").write_text(blocks(text, "yaml")[0] + RUN)
    names = {}
    run(*blocks(SHARED), names)
    for block in blocks(text):
        run(block, names)
    if "loss" in names:
        assert names["loss"].isfinite()
    criterion = names.get("criterion")
    if isinstance(criterion, SLRLoss):
        assert (
            criterion.step == len(names["loader"]) * (2 if name in ("lightly", "open_clip") else 1) or name == "selfEEG"
        )


RUN = """
seed: 0
trainer:
  _target_: lightning.Trainer
  accelerator: cpu
  max_steps: 2
  limit_val_batches: 0
  enable_progress_bar: false
data:
  _target_: stable_pretraining.data.DataModule
  train: {batch_size: 8, dataset: {_target_: _stable_pretraining.Views, shape: [3, 32, 32]}}
  val: {batch_size: 8, dataset: {_target_: _stable_pretraining.Views, count: 1, shape: [3, 32, 32]}}
"""


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_adapter_without_its_framework_names_the_command(adapter):
    extra, framework = ADAPTERS[adapter]
    if importlib.util.find_spec(f"slr_plugin.adapters.{adapter}") is None:
        pytest.skip("no such adapter here")
    missing = [framework] + (["pytorch_lightning"] if adapter == "lightning" else [])
    code = f"import sys; sys.modules.update(dict.fromkeys({missing})); import slr_plugin.adapters.{adapter}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert f'pip install "slr-plugin[{extra}]"' in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("extra", {extra for extra, _ in ADAPTERS.values()})
def test_the_page_shows_every_adapter(extra):
    assert f"`.[{extra}]`" in SHARED


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(#([^)]+)\)", SHARED))))
def test_its_links_lead_to_sections(link):
    assert link in {name.lower().replace(" ", "-") for name in SECTIONS}


def leaves(*shapes):
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]


def close(ours, theirs, inputs, atol=1e-12):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)
    gradients = [torch.autograd.grad(loss, inputs, retain_graph=True) for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=0, atol=atol)


def test_without_refinement_the_recipe_of_open_clip_is_its_loss():
    open_clip = pytest.importorskip("open_clip")
    image, text, exponent = leaves((6, 5), (6, 5), ())
    scale = (exponent + 2).exp()
    criterion = SLRLoss(symmetric=False, confidence=0.0)
    criterion.temperature = 1 / scale
    ours = (criterion(image, text) + criterion(text, image)) / 2
    unit = [torch.nn.functional.normalize(features, dim=1) for features in (image, text)]
    close(ours, open_clip.ClipLoss()(*unit, scale), [image, text, exponent])


def test_the_recipe_of_open_clip_trains_the_temperature_with_refined_labels():
    image, text, exponent = leaves((6, 5), (6, 5), ())
    scale = (exponent + 2).exp()
    criterion = SLRLoss(symmetric=False)
    criterion.temperature = 1 / scale
    ours = criterion(image, text) + criterion(text, image)
    settings = {"temperature": 1 / scale, "symmetric": False}
    close(ours, slr(image, text, **settings).loss + slr(text, image, **settings).loss, [image, text, exponent])


def test_without_refinement_the_recipe_of_selfeeg_is_its_loss():
    losses = pytest.importorskip("selfeeg.losses")
    (projections,) = leaves((12, 5))
    criterion = SLRLoss(temperature=0.15, confidence=0.0)
    close(2 * criterion(*projections.chunk(2)), losses.simclr_loss(projections), [projections], atol=1e-6)


def test_without_refinement_lightlys_examples_have_their_loss():
    lightly = pytest.importorskip("lightly.loss")
    predictions, neighbours = leaves((6, 5), (6, 5))
    neighbours = neighbours.detach()
    ours, theirs = SLRLoss(confidence=0.0), lightly.NTXentLoss()
    close(ours(predictions, neighbours), theirs(neighbours, predictions), [predictions])
