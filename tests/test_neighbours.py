"""The adapters without their frameworks, and the recipes of docs/ for frameworks that have no adapter."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from slr_plugin import SLRLoss

ROOT = Path(__file__).parent.parent
ADAPTERS = {
    "lightly": ("lightly", "lightly"),
    "lightning": ("lightly", "lightning"),
    "solo_learn": ("solo", "hydra"),
    "pytorch_metric_learning": ("metric-learning", "pytorch_metric_learning"),
    "stable_pretraining": ("stable-pretraining", "stable_pretraining"),
    "sentence_transformers": ("sentence-transformers", "sentence_transformers"),
}


def test_an_adapter_without_its_framework_names_the_command():
    """All in one process, as starting one takes seconds."""
    frameworks = [framework for _, framework in ADAPTERS.values()] + ["pytorch_lightning", "open_clip"]
    code = f"""if True:
        import importlib, json, sys
        sys.modules.update(dict.fromkeys({frameworks}))
        said = {{}}
        for name in {[*ADAPTERS, "open_clip"]}:
            try:
                importlib.import_module("slr_plugin.adapters." + name)
            except ImportError as error:
                said[name] = str(error)
        from slr_plugin.adapters.open_clip import SLRClipLoss
        SLRClipLoss()
        print(json.dumps(said))
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    assert said.keys() == ADAPTERS.keys()  # the loss for open_clip needs none
    for adapter, (extra, _) in ADAPTERS.items():
        assert f'pip install "slr-plugin[{extra}]"' in said[adapter]


@pytest.mark.parametrize("extra", sorted({extra for extra, _ in ADAPTERS.values()} | {"open-clip"}))
def test_the_overview_shows_every_adapter(extra):
    page = ROOT / "docs" / "frameworks.md"
    if not page.is_file():
        pytest.skip("installed without the repository")
    assert f'`".[{extra}]"`' in page.read_text(encoding="utf-8")


def leaves(*shapes):
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]


def close(ours, theirs, inputs, atol=1e-12):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)
    gradients = [torch.autograd.grad(loss, inputs, retain_graph=True) for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=0, atol=atol)


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
