"""The streaming pass against the dense formulas it replaces."""

import math

import pytest
import torch
from _intra_op import intra_op_threads
from _streaming import HIDDEN, dense, parts
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from slr_plugin.streaming import Diagonal, softmax_stats, tiled
from slr_plugin.streaming.op import resolve
from slr_plugin.streaming.stats import Plan, Source

BOUNDS = pytest.mark.parametrize("bound", [math.inf, 20.0])
CHUNKS = pytest.mark.parametrize("chunk_size", [None, 1, 2, 5, 8, 100])


@pytest.fixture(params=[1, 2, 5])
def threads(request, monkeypatch):
    """How many threads share every pass, however small."""
    monkeypatch.setattr(tiled, "SHARED_PAIRS", 1)
    monkeypatch.setattr(tiled, "LEAST_HEIGHT", 1)
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


@CHUNKS
@pytest.mark.parametrize("scale", [1.0, 2.5, -2.0])
@BOUNDS
def test_equals_the_dense_formulas_with_gradients(bound, chunk_size, scale, threads, monkeypatch):
    monkeypatch.setattr(tiled, "CPU_TILE", (4, 6))
    rows, keys, queue = tensors()
    stats = softmax_stats(rows, keys, queue, hidden=HIDDEN, scale=scale, bound=bound, chunk_size=chunk_size)
    expected = dense(rows, keys, queue, scale)
    for got, want in zip(parts(stats), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert_same_gradients(parts(stats), expected, (rows, keys))


@CHUNKS
@pytest.mark.parametrize("width", [1, 3, 5])
@BOUNDS
def test_averages_values_that_are_not_the_keys(bound, width, chunk_size, threads, monkeypatch):
    monkeypatch.setattr(tiled, "CPU_TILE", (4, 6))
    rows, keys, queue = tensors()
    _, values, queue_values = tensors(dim=width)
    stats = softmax_stats(
        rows,
        keys,
        queue,
        values=values,
        queue_values=queue_values,
        hidden=HIDDEN,
        bound=bound,
        chunk_size=chunk_size,
    )
    expected = dense(rows, keys, queue, 1.0, values=values, queue_values=queue_values.detach())
    for got, want in zip(parts(stats), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert not stats.offset.requires_grad  # the weights are constants
    weight = torch.randn_like(expected[2])
    ours, theirs = (torch.autograd.grad((mean * weight).sum(), values)[0] for mean in (stats.mean, expected[2]))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


SYMMETRIC = [
    [Diagonal(0, 0, 6), Diagonal(0, 6, 6), Diagonal(6, 0, 6), Diagonal(6, 6, 6)],
    [],
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


class Products(TorchDispatchMode):
    """Counts the logits that products compute into the memory of a tile."""

    logits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.addmm.out:
            self.logits += out.numel()
        return out


@pytest.mark.parametrize(("symmetric", "bound", "chunk", "share"), [(True, 20.0, 0, 6 / 9), (False, 20.0, 0, 1)])
def test_half_the_tiles_are_computed_where_they_are_enough(symmetric, bound, chunk, share, monkeypatch):
    monkeypatch.setattr(tiled, "CPU_TILE", (4, 4))
    rows = tensors(rows=12)[0].detach()
    plan = Plan(1.0, bound, SYMMETRIC[0], symmetric, chunk)
    with Products() as forward:
        stats = tiled.forward(rows, [Source(rows, rows)], plan)
    with Products() as backward:
        tiled.keys_backward(rows, rows, stats.reference + stats.offset, rows, plan)
    assert forward.logits == backward.logits == share * 12 * 12


@BOUNDS
def test_gradcheck_of_the_log_sum_exp(bound):
    rows, keys, queue = tensors(rows=4, keys=5, queue=3)

    def logsumexp(rows, keys):
        stats = softmax_stats(rows, keys, queue, hidden=[Diagonal(0, 1, 4)], bound=bound, chunk_size=2)
        return stats.reference + stats.offset

    assert torch.autograd.gradcheck(logsumexp, (rows, keys))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # raised and handled inside opcheck
@pytest.mark.parametrize("apart", [False, True])
def test_opcheck(apart):
    rows, keys, queue = tensors()
    _, values, queue_values = tensors(dim=5) if apart else (None, None, None)
    flat = [number for diagonal in HIDDEN for number in diagonal]
    constants = (
        None if queue_values is None else queue_values.detach(),
        False,
        False,
        1.0,
        math.inf,
        flat,
        False,
        4,
        "tiled",
    )
    leaves = (rows.detach(), keys.detach()) if apart else (rows, keys)
    torch.library.opcheck(torch.ops.slr_plugin.softmax_stats.default, (*leaves, queue.detach(), values, *constants))


@pytest.mark.parametrize("bound", [math.inf, 20.0])
def test_a_row_without_keys_is_empty_not_nan(bound, threads):
    rows = torch.randn(2, 3, requires_grad=True)
    keys = torch.randn(1, 3, requires_grad=True)
    stats = softmax_stats(rows, keys, bound=bound, hidden=[Diagonal(0, 0, 1)])
    assert stats.offset[0] == -torch.inf
    assert stats.peak[0] == 0
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
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple) else (out,):
                if isinstance(tensor, torch.Tensor) and tensor._base is None:
                    self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
            return out

    rows, keys, queue = torch.randn(64, 8), torch.randn(64, 8), torch.randn(20000, 8)
    with Largest() as largest:
        tiled.forward(rows, [Source(keys, keys), Source(queue, queue)], Plan(1.0, math.inf, [], False, 0))
    assert 0 < largest.numel <= max(queue.numel(), 64 * 1024)


@BOUNDS
def test_medium_precision_meets_the_queue_in_bfloat16_more_exactly_than_dense_products(bound, threads, monkeypatch):
    monkeypatch.setattr(tiled, "cpu_has_bfloat16", lambda: True)
    monkeypatch.setattr("torch.get_float32_matmul_precision", lambda: "medium")
    rows, keys, queue = (tensor.detach() for tensor in tensors(rows=32, keys=32, queue=1200, dim=16))
    rows, queue = normalize(rows, dim=1), normalize(queue, dim=1)
    keys = normalize(normalize(keys, dim=1) + 3 * rows, dim=1)  # positives resemble their queries
    hidden = [Diagonal(0, 1, 31)]
    single = [tensor.float() for tensor in (rows, keys, queue)]
    ours = parts(softmax_stats(*single, hidden=hidden, scale=5.0, bound=bound))
    every = torch.cat([keys, queue])
    exact = dense(rows, keys, queue, 5.0, hidden)
    rough = (5 * rows.bfloat16() @ every.bfloat16().T).float()
    rough[:31, 1:32].fill_diagonal_(-torch.inf)
    weights = rough.softmax(1)
    dense_values = rough.logsumexp(1), weights.amax(1), weights.bfloat16() @ every.bfloat16()
    for got, dense_value, want in zip(ours, dense_values, exact, strict=True):
        error, dense_error = (got - want).norm(), (dense_value - want).norm()
        assert 1e-6 < error <= dense_error  # bfloat16 was in use

    exactly = softmax_stats(rows, keys, queue, scale=5.0, bound=bound, hidden=hidden)  # float64 is left alone
    torch.testing.assert_close(exactly.mean, exact[2], rtol=0, atol=1e-12)
    batch_only = softmax_stats(*single[:2], scale=5.0, bound=bound)  # so are the keys of the batch
    torch.testing.assert_close(batch_only.mean.double(), (5 * rows @ keys.T).softmax(1) @ keys, rtol=0, atol=1e-6)


def test_the_backend_is_an_argument():
    rows, keys, queue = tensors()
    torch.testing.assert_close(softmax_stats(rows, keys, queue, backend="tiled"), softmax_stats(rows, keys, queue))
    with pytest.raises(ValueError, match="backend must be"):
        softmax_stats(rows, keys, queue, backend="cuda")
    assert resolve("triton", rows, 3, 1) == "triton"
