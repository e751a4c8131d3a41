"""The losses in upstream/*.patch, written for other projects, equal ours in value and gradient."""

import typing
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from slr_plugin.functional import slr_loss

PATCHES = Path(__file__).parent.parent / "upstream"
SETTINGS = {"temperature": 0.3, "sharpening": 0.7, "refined_weight": 0.4}
CONFIDENCE = 1.5

if not PATCHES.is_dir():
    pytest.skip("installed without the repository", allow_module_level=True)


def added(project, path):
    """What the lines that a patch adds to a file define."""
    patch = (PATCHES / f"{project}.patch").read_text()
    part = next(part for part in patch.split("diff --git ") if part.startswith(f"a/{path} "))
    lines = part[part.index("\n@@") + 1 :].splitlines()
    names = {"torch": torch, "F": F, "Optional": typing.Optional, "__name__": path}
    exec("\n".join(line[1:] for line in lines if line.startswith("+")), names)
    return names


def lightly_loss(query, key, queue, *mix):
    pytest.importorskip("lightly")
    loss = added("lightly", "lightly/loss/sane_loss.py")["SANELoss"]
    criterion = loss(**SETTINGS, confidence=CONFIDENCE, memory_bank_size=tuple(queue.shape))
    criterion.memory_bank.bank = queue.clone()
    return criterion(query, key, *mix)


def solo_learn_loss(query, key, queue, *mix):
    function = added("solo-learn", "solo/losses/sane.py")["sane_loss_func"]
    mix = [F.normalize(features) for features in mix[:1]] + list(mix[1:])
    return function(F.normalize(query), F.normalize(key), queue.T, *mix, **SETTINGS, confidence=CONFIDENCE)


def stable_pretraining_loss(query, key, queue, *mix):
    loss = added("stable-pretraining", "stable_pretraining/losses/joint_embedding.py")["SANELoss"]
    return loss(**SETTINGS)(query, key, queue, *mix, confidence=CONFIDENCE)


@pytest.mark.parametrize("theirs", [lightly_loss, solo_learn_loss, stable_pretraining_loss])
@pytest.mark.parametrize("mixes", [False, True])
def test_equals_ours(theirs, mixes):
    generator = torch.Generator().manual_seed(0)
    query, key, mixed = torch.randn(3, 5, 8, generator=generator, dtype=torch.float64).unbind()
    queue = F.normalize(torch.randn(11, 8, generator=generator, dtype=torch.float64))
    mix = (torch.rand(5, generator=generator, dtype=torch.float64), torch.randperm(5, generator=generator))
    rows = [row.requires_grad_() for row in ([query, key, mixed] if mixes else [query, key])]

    expected = slr_loss(query, key, queue, *((mixed, mix) if mixes else ()), **SETTINGS, confidence=CONFIDENCE)
    loss = theirs(query, key, queue, *((mixed, *mix) if mixes else ()))
    torch.testing.assert_close(loss, expected)
    for gradient, ours in zip(torch.autograd.grad(loss, rows), torch.autograd.grad(expected, rows), strict=True):
        torch.testing.assert_close(gradient, ours)
