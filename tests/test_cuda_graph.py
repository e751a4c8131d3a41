"""A CUDA graph can record a step: nothing is read from the GPU or sent to it, and no buffer moves. No GPU is needed."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from slr_plugin import CosineConfidence, Mix, MomentumMixup, SLRLoss
from slr_plugin.streaming import Pass, tiled

aten = torch.ops.aten
SETTINGS = {"sharpening": 0.7, "confidence": CosineConfidence(0.5, 2.0, total_steps=4)}
SIZES = {"queue": (300, 16), "no queue": 0}


class OnTheDevice(TorchDispatchMode):
    """Raises where a capture would fail: values read back, or copied from the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        assert func is not aten._local_scalar_dense.default
        devices = {leaf.device.type for leaf in torch.utils._pytree.tree_leaves(args) if isinstance(leaf, torch.Tensor)}
        if func in (aten._to_copy.default, aten.copy_.default):
            assert "cpu" not in devices or out.device.type == "cpu", func
        return out


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("confidence", [SETTINGS["confidence"], 1.0])
def test_a_step_stays_on_the_device(confidence, size, mixed, pretended_gpu):
    with pretended_gpu:
        criterion = SLRLoss(0.2, SIZES[size], sharpening=0.7, confidence=confidence).to("cuda")
        queries, keys, crop = (torch.empty(8, 16, device="cuda", requires_grad=True) for _ in range(3))
        mix = Mix(torch.empty(8, device="cuda"), torch.empty(8, device="cuda", dtype=torch.long))
        with OnTheDevice():
            criterion(queries, keys, *((crop, mix) if mixed else ()))  # autograd's engine itself asks for a GPU
        assert {value.device.type for value in criterion.stats.values()} == {"cuda"}


@pytest.mark.parametrize("bound", [5.0, 100.0])
@pytest.mark.parametrize("size", [300, 0])
def test_so_does_the_pass(size, bound, pretended_gpu):
    with pretended_gpu, torch.no_grad():
        rows, keys, queue = (torch.empty(n, 16, device="cuda") for n in (24, 8, size))
        hidden = torch.empty(24, 1, dtype=torch.long, device="cuda")
        given = Pass(rows, keys, queue, hidden=hidden, scale=5.0, bound=bound)
        with OnTheDevice():
            stats = tiled.softmax_stats(given)
            gradient = tiled.keys_gradient(given, stats.reference_bits, stats.offset, stats.mean)
    assert gradient.device.type == "cuda"


@pytest.mark.parametrize("mode", ["elem", "batch"])
@pytest.mark.parametrize("theta", [None, 0.3])
def test_so_does_mixing(theta, mode, pretended_gpu):
    with pretended_gpu:
        images, others = torch.empty(2, 8, 3, 16, 16, device="cuda")
        with OnTheDevice():
            mixed, mix = MomentumMixup(2.0, mode)(images, others, theta=theta)
    assert {mixed.device.type, mix.theta.device.type, mix.partner.device.type} == {"cuda"}


@pytest.mark.parametrize("size", SIZES)
def test_buffers_change_in_place(size):
    criterion = SLRLoss(0.2, SIZES[size], **SETTINGS)
    before = {name: (value.data_ptr(), value.clone()) for name, value in criterion.named_buffers() if value.numel()}
    for _ in range(2):
        criterion(torch.randn(8, 16, requires_grad=True), torch.randn(8, 16)).backward()
    buffers = dict(criterion.named_buffers())
    assert "step" in before
    for name, (address, _) in before.items():
        assert buffers[name].data_ptr() == address, name
    changed = {name for name, (_, value) in before.items() if not torch.equal(buffers[name], value)}
    assert changed == ({"step", "memory_bank.bank", "memory_bank.bank_ptr"} if SIZES[size] else {"step"})
