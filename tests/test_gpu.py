"""On a real GPU: the numbers of the CPU, and steps that a CUDA graph repeats. Skipped where there is none."""

import copy

import pytest
import torch

from slr_plugin import CosineConfidence, Mix, SLRLoss

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICE = "cuda"
SIZES = [(300, 16), 0]


def build(size):
    """A criterion whose every buffer changes."""
    return SLRLoss(0.2, size, sharpening=0.7, confidence=CosineConfidence(0.5, 2.0, total_steps=8))


def leaves(device):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 16, generator=generator).to(device).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_loss_gradients_and_buffers_equal_the_cpus(size, mixed):
    criterion, found = build(size), []
    theta, partner = torch.rand(8), torch.randperm(8)
    for device in ("cpu", DEVICE):
        twin = copy.deepcopy(criterion).to(device)
        queries, keys, crop = leaves(device)
        mix = Mix(theta.to(device), partner.to(device))
        loss = twin(queries, keys, crop, mix) if mixed else twin(queries, keys)
        loss.backward()
        found.append([loss.detach(), queries.grad, keys.grad, *twin.state_dict().values()])
    for ours, theirs in zip(*found, strict=True):
        if theirs is not None:
            torch.testing.assert_close(theirs.cpu(), ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_a_graph_repeats_steps(size):
    criterion = build(size).to(DEVICE)
    eager = copy.deepcopy(criterion)
    queries, keys, _ = leaves(DEVICE)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # before a capture every library must have run once
        for _ in range(3):
            criterion(queries, keys).backward()
    torch.cuda.current_stream().wait_stream(side)
    queries.grad = keys.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # records, runs nothing
        loss = criterion(queries, keys)
        loss.backward()
    for _ in range(2):
        queries.grad.zero_()
        graph.replay()
    twin, other, _ = leaves(DEVICE)
    for _ in range(5):
        twin.grad = None
        expected = eager(twin, other)
        expected.backward()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(queries.grad, twin.grad, rtol=0, atol=1e-5)
    assert criterion.step == 5
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(criterion.state_dict()[name], value)
