"""Faults that were met in use, one test for each kind of them, in every public entry point that it concerns."""

import copy
import math

import pytest
import torch
from _oracle import one_thread  # noqa: F401
from torch.nn.functional import normalize

from slr_plugin import Mix, MomentumMixup, SLRLoss, dense
from slr_plugin.diagnostics import LabelMonitor
from slr_plugin.functional import slr_loss

SIZES = pytest.mark.parametrize("size", [0, (16, 8)])


def views(size=6, dim=8, dtype=torch.float32, seed=0):
    first, second = torch.randn(2, size, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return first.to(dtype).requires_grad_(), (first + 0.5 * second).detach().to(dtype).requires_grad_()


# ------------------------------------------------------------------------------------------- state that programs copy


def test_copies_of_a_watched_loss_and_of_a_mixup_go_their_own_way():
    criterion = SLRLoss(0.2, (8, 8))
    monitor = LabelMonitor(criterion)
    twin = copy.deepcopy(criterion)
    monitor.announce(torch.arange(6))
    twin(*views())
    criterion(*views())
    assert monitor.queue_classes.tolist() == [0, 1, 2, 3, 4, 5, -1, -1]
    assert (criterion.step, twin.step) == (1, 1)
    mixup = copy.deepcopy(MomentumMixup(generator=torch.Generator().manual_seed(0)))
    assert mixup(*views())[0].shape == (6, 8)


# -------------------------------------------------------------------------------------------------- the temperature


@pytest.mark.parametrize("argument", ["out0", "out1", "temperature"])
def test_sharded_tensors_are_refused(argument, tmp_path):
    from torch import distributed as dist

    if not hasattr(torch.distributed, "tensor"):
        pytest.skip("this torch has no public DTensor")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        values = dict(zip(("out0", "out1"), views(), strict=True)) | {"temperature": torch.tensor([0.2])}
        values[argument] = distribute_tensor(values[argument].detach(), mesh)
        criterion = SLRLoss()
        criterion.temperature = values["temperature"]
        with pytest.raises(RuntimeError, match="DTensor"):
            criterion(values["out0"], values["out1"])
    finally:
        dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------- devices


def test_autocast_is_not_entered_where_a_device_has_none(monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("User specified an unsupported autocast device_type")

    monkeypatch.setattr("torch.amp.is_autocast_available", lambda device: False)
    monkeypatch.setattr("torch.autocast", refuse)
    criterion = SLRLoss(0.2, (16, 8))
    criterion(*views())
    criterion.labels(*views())
    slr_loss(*views())


@SIZES
def test_features_without_values_give_a_loss_without_a_value_or_say_where_to_go(size):
    criterion = SLRLoss(0.2, size)
    out0, out1 = (torch.empty(6, 8, device="meta", requires_grad=True) for _ in range(2))
    for call in (criterion, criterion.labels):
        with pytest.raises(RuntimeError, match=r"criterion\.to\('meta'\)"):
            call(out0, out1)
    criterion.to("meta")
    mix = Mix(torch.empty(6, device="meta"), torch.empty(6, device="meta", dtype=torch.long))
    for further in ((), (torch.empty(6, 8, device="meta"), mix)):
        loss = criterion(out0, out1, *further)
        loss.backward()
        assert loss.is_meta
        assert out0.grad.shape == (6, 8)
    queue = torch.empty(size, device="meta") if size else None
    assert slr_loss(out0, out1, queue).is_meta


# ----------------------------------------------------------------------------------------------------------- digits


@pytest.mark.parametrize("sharpening", [0.25, 1e-3, 1e-5])
def test_float32_keeps_the_digits_of_the_gradient_that_dense_products_keep(sharpening):
    def gradient(form, dtype):
        pair = views(64, 16, dtype)
        return torch.cat(torch.autograd.grad(form(*pair, temperature=0.1, sharpening=sharpening), pair)).double()

    exact = gradient(slr_loss, torch.float64)
    ours, other = ((gradient(form, torch.float32) - exact).norm() for form in (slr_loss, dense.symmetric_slr_loss))
    assert ours <= 4 * other  # dense float32 errs by chance too


@SIZES
def test_the_entropy_of_a_label_is_at_most_that_of_a_uniform_one(size):
    keys = 11 if not size else 22
    for temperature, sharpening in ((1e-2, 1.0), (0.05, 0.1), (1e3, 1.0)):
        criterion = SLRLoss(temperature, size, sharpening=sharpening, confidence=10.0)
        criterion(*views())
        assert 0 <= criterion.stats["label_entropy"] <= math.log(keys) + 1e-5


# --------------------------------------------------------------------------------------------------------- programs


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("length", [49.0, 0.5, 0.0, math.nan])
def test_a_queue_that_is_not_of_unit_length_is_refused(length):
    queue = normalize(torch.randn(400, 8), dim=1)
    slr_loss(*views(), queue)
    queue[300] *= length
    with pytest.raises(ValueError, match=r"normalize\(queue, dim=1\)"):
        slr_loss(*views(), queue)


def test_ids_in_the_place_of_an_estimator_are_told_of_groups():
    with pytest.raises(TypeError, match="groups="):
        SLRLoss(0.2)(*views(), estimator=torch.arange(6))


@pytest.mark.filterwarnings("error")
def test_finite_losses_do_not_warn():
    SLRLoss(0.2)(*views())
