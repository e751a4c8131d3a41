"""The streaming pass against the dense formulas it replaces."""

import math

import pytest
import torch
from _intra_op import intra_op_threads
from _pairwise import pairwise
from _streaming import HIDDEN, dense, parts

from slr_plugin.streaming import softmax_stats, tiled
from slr_plugin.streaming.op import resolve

BOUNDS = pytest.mark.parametrize("bound", [math.inf, 20.0])
CHUNK_SIZES = (None, 1, 5, 8, 100)  # of 14 and 11 keys; None chooses 6 here
THREADS = (1, 2, 5)


@pytest.fixture(params=THREADS)
def threads(request, monkeypatch):
    """How many threads share every pass, however small."""
    monkeypatch.setattr(tiled, "SHARED_PAIRS", 1)
    monkeypatch.setattr(tiled, "LEAST_WIDTH", 1)
    monkeypatch.setattr(tiled, "LEAST_PAIRS", 1)
    with intra_op_threads(request.param):
        yield request.param


def tensors(rows=9, keys=14, queue=11, dim=3):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, dim, dtype=torch.float64, generator=generator).requires_grad_() for n in (rows, keys, queue)]


def assert_same_gradients(outputs, expected, leaves):
    """Of one random combination of log-sum-exp and mean."""
    weights = [torch.randn_like(expected[0]), torch.randn_like(expected[2])]
    ours, theirs = (
        torch.autograd.grad((out[0] * weights[0]).sum() + (out[2] * weights[1]).sum(), leaves)
        for out in (outputs, expected)
    )
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("chunk_size", "bound", "scale"), pairwise(CHUNK_SIZES, (math.inf, 20.0), (1.0, 2.5, -2.0)))
def test_equals_the_dense_formulas_with_gradients(chunk_size, bound, scale, threads, monkeypatch):
    monkeypatch.setattr(tiled, "CPU_TILE", (4, 6))
    rows, keys, queue = tensors()
    stats = softmax_stats(rows, keys, queue, hidden=HIDDEN, scale=scale, bound=bound, chunk_size=chunk_size)
    expected = dense(rows, keys, queue, scale)
    for got, want in zip(parts(stats), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert_same_gradients(parts(stats), expected, (rows, keys))


@pytest.mark.parametrize(
    ("chunk_size", "bound", "width", "threads"),
    pairwise(CHUNK_SIZES, (math.inf, 20.0), (1, 3, 5), THREADS),
    indirect=["threads"],
)
def test_averages_values_that_are_not_the_keys(chunk_size, bound, width, threads, monkeypatch):
    monkeypatch.setattr(tiled, "CPU_TILE", (4, 6))
    rows, keys, queue = tensors()
    _, values, queue_values = tensors(dim=width)
    options = {"values": values, "queue_values": queue_values, "hidden": HIDDEN}
    stats = softmax_stats(rows, keys, queue, **options, bound=bound, chunk_size=chunk_size)
    expected = dense(rows, keys, queue, 1.0, values=values, queue_values=queue_values.detach())
    for got, want in zip(parts(stats), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert not stats.offset.requires_grad  # the weights are constants
    weight = torch.randn_like(expected[2])
    ours, theirs = (torch.autograd.grad((mean * weight).sum(), values)[0] for mean in (stats.mean, expected[2]))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


SYMMETRIC = [
    torch.stack([torch.arange(12), torch.arange(12).roll(6)], dim=1),
    None,
]


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("hidden", SYMMETRIC)
def test_rows_that_are_the_keys_say_the_same_by_half_the_logits(hidden, values, threads, monkeypatch):
    monkeypatch.setattr(tiled, "CPU_TILE", (4, 4))
    rows = tensors(rows=12)[0]
    averaged = tensors(rows=12, dim=5)[0] if values else None

    def results(symmetric):
        stats = softmax_stats(rows, rows, values=averaged, scale=2.5, bound=20.0, hidden=hidden, symmetric=symmetric)
        generator = torch.Generator().manual_seed(1)
        fields = parts(stats)
        total = sum(
            (field * torch.randn(field.shape, dtype=torch.float64, generator=generator)).sum() for field in fields
        )
        return [*fields, *torch.autograd.grad(total, rows if averaged is None else averaged)]

    for got, want in zip(results(True), results(False), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def logits_computed(profile, dim):
    """How many logits were computed: results of products of features, whose dimension nothing else has."""
    products = [event.input_shapes for event in profile.events() if event.name == "aten::addmm"]
    return sum(first[0] * second[1] for _, first, second, *_ in products if first[1] == dim)


@pytest.mark.parametrize(("symmetric", "share"), [(True, 6 / 9), (False, 1)])
def test_half_the_tiles_are_computed_where_they_are_enough(symmetric, share, monkeypatch):
    monkeypatch.setattr(tiled, "CPU_TILE", (4, 4))
    rows = tensors(rows=12)[0]
    with torch.profiler.profile(record_shapes=True) as forward:
        stats = softmax_stats(rows, rows, hidden=SYMMETRIC[0], bound=20.0, symmetric=symmetric)
    with torch.profiler.profile(record_shapes=True) as backward:
        stats.offset.sum().backward()
    assert logits_computed(forward, 3) == logits_computed(backward, 3) == share * 12 * 12


@BOUNDS
def test_gradcheck_of_the_log_sum_exp(bound):
    rows, keys, queue = tensors(rows=4, keys=5, queue=3)
    hidden = torch.tensor([[1], [2], [-1], [4]])

    def logsumexp(rows, keys):
        stats = softmax_stats(rows, keys, queue, hidden=hidden, bound=bound, chunk_size=2)
        return parts(stats)[0]

    assert torch.autograd.gradcheck(logsumexp, (rows, keys))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # raised and handled inside opcheck
@pytest.mark.parametrize("apart", [False, True])
def test_opcheck(apart):
    rows, keys, queue = tensors()
    _, values, queue_values = tensors(dim=5) if apart else (None, None, None)
    plan = {"hidden": HIDDEN, "row_groups": None, "key_groups": None, "scale": 1.0, "bound": math.inf}
    plan |= {"symmetric": False, "chunk": 4, "backend": "tiled"}
    constants = None if queue_values is None else queue_values.detach(), True
    leaves = (rows.detach(), keys.detach()) if apart else (rows, keys)
    operator = torch.ops.slr_plugin.softmax_stats.default
    torch.library.opcheck(operator, (*leaves, queue.detach(), values, *constants), plan)


@pytest.mark.parametrize("bound", [math.inf, 20.0])
def test_a_row_without_keys_is_empty_not_nan(bound, threads):
    rows = torch.randn(2, 3, requires_grad=True)
    keys = torch.randn(1, 3, requires_grad=True)
    stats = softmax_stats(rows, keys, bound=bound, hidden=torch.tensor([[0], [-1]]))
    assert stats.offset[0] == -torch.inf
    assert stats.max_weight[0] == 0
    assert torch.equal(stats.mean[0], torch.zeros(3))
    torch.logaddexp(stats.logsumexp_minus(torch.zeros(2)), torch.zeros(2)).sum().backward()
    assert torch.equal(rows.grad[0], torch.zeros(3))
    assert keys.grad.isfinite().all()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_extreme_logits_stay_finite_and_exact(scale):
    rows, keys, queue = (tensor.detach().float() * scale for tensor in tensors())
    stats = softmax_stats(rows, keys, queue, hidden=HIDDEN, chunk_size=3)
    expected = dense(rows.double(), keys.double(), queue.double(), 1.0)
    torch.testing.assert_close(parts(stats)[0].double(), expected[0], rtol=1e-5, atol=1e-5)
    assert stats.mean.isfinite().all()


def test_no_rows_by_keys_matrix_is_allocated():
    rows, keys, queue = torch.randn(64, 8), torch.randn(64, 8), torch.randn(20000, 8)
    with torch.profiler.profile(profile_memory=True) as profile:
        softmax_stats(rows, keys, queue)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 < largest <= queue.numel() * queue.element_size()


def test_the_backend_is_an_argument():
    rows, keys, queue = tensors()
    torch.testing.assert_close(softmax_stats(rows, keys, queue, backend="tiled"), softmax_stats(rows, keys, queue))
    with pytest.raises(ValueError, match="backend must be"):
        softmax_stats(rows, keys, queue, backend="cuda")
    assert resolve("triton", rows, 3, 1) == "triton"
