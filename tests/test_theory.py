"""The theorems' simulations, small."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib", reason='pip install "slr-plugin[demo]"')

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "theory"))
recovery = importlib.import_module("label_recovery")
generalization = importlib.import_module("generalization")

pytestmark = pytest.mark.usefixtures("one_thread")


def test_inside_the_theorems_region_every_corrupted_label_is_recovered():
    rho, radius, seed = 1 / 32, 0.05, 0
    assert rho <= recovery.DELTA / 32
    assert recovery.ALPHA >= 1 - 3 * recovery.DELTA / 4
    refined = recovery.simulate(rho, radius, recovery.ALPHA, seed, steps=200)
    assert refined == (1.0, 1.0, 1.0)
    assert recovery.simulate(rho, radius, 0.0, seed, steps=200).labels == 0


def test_far_outside_they_are_not():
    assert recovery.simulate(12 / 32, 0.8, recovery.ALPHA, 0, steps=300).labels < 0.9


def test_the_data_are_the_theorems():
    images = recovery.draw_images(4 / 32, 0.2, seed=0)
    corrupted = (images.true != images.given).view(recovery.CLUSTERS, recovery.IMAGES)
    assert corrupted.sum(1).tolist() == [4] * recovery.CLUSTERS
    for crops in (images.queries, images.positives, images.unseen):
        torch.testing.assert_close(crops.norm(dim=1), torch.ones(len(crops)))
        centres = crops.view(recovery.CLUSTERS, recovery.IMAGES, -1)
        assert torch.cdist(centres, centres).max() <= 2 * 0.2 + 0.05
    assert not torch.equal(images.queries, images.positives)


def test_gradient_descent_follows_the_gradient(monkeypatch):
    """One step by hand against autograd."""
    monkeypatch.setattr(recovery, "WIDTH", 8)
    images = recovery.draw_images(1 / 32, 0.2, seed=3)
    weights = torch.randn(8, recovery.DIM, generator=torch.Generator().manual_seed(4)).requires_grad_()
    signs = torch.tensor([-1.0, 1.0] * 4) / 8**0.5
    output = torch.nn.functional.softplus(images.queries @ weights.T) @ signs
    (output - images.given).square().mean().div(2).backward()
    moved = weights - recovery.CLUSTERS * weights.grad
    predicted = torch.nn.functional.softplus(images.unseen @ moved.T) @ signs
    nearest = recovery.GAMMAS[(predicted[:, None] - recovery.GAMMAS).abs().argmin(1)]
    expected = (nearest == images.true).float().mean().item()
    assert recovery.simulate(1 / 32, 0.2, 0.0, seed=3, steps=1).test == expected


@pytest.mark.parametrize("wrong", generalization.WRONG)
def test_the_generalisation_error_grows_linearly_with_the_distance(wrong):
    points = np.array([generalization.simulate(wrong, share, seed=0) for share in (0.0, 0.5, 1.0)])
    assert points[0, 0] == 0
    assert abs(points[0, 1]) < 0.01
    assert (np.diff(points, axis=0) > 0).all()
    slope, explained = generalization.fit(points)
    assert slope > 1
    assert explained > 0.95


@pytest.mark.parametrize("module", [recovery, generalization])
def test_the_commands_print_and_draw(module, monkeypatch, tmp_path, capsys):
    if module is recovery:
        monkeypatch.setattr(recovery, "RHOS", (1 / 32, 1 / 8))
        monkeypatch.setattr(recovery, "RADII", (0.05,))
        monkeypatch.setattr(recovery, "STEPS", 3)
        monkeypatch.setattr(recovery.study, "__defaults__", (3,))
        rows = 4
    else:
        monkeypatch.setattr(generalization, "SHARES", (0.0, 0.5, 1.0))
        monkeypatch.setattr(generalization.simulate, "__defaults__", (3,))
        rows = 6
    module.main(["--seeds", "2", "--output", str(tmp_path / "new" / "figure.png")])
    printed = capsys.readouterr().out
    assert printed.count("\n| ") >= rows
    assert (tmp_path / "new" / "figure.png").stat().st_size > 1000
