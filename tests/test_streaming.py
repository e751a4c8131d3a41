"""The streaming pass against the dense formulas it replaces."""

import math

import pytest
import torch
from _intra_op import intra_op_threads
from _pairwise import pairwise
from _streaming import HIDDEN, dense, parts

from slr_plugin.streaming import Pass, keys_gradient, softmax_stats, symmetric_gradient, tiled

CHUNK_SIZES = (0, 1, 5, 8, 100)  # of 14 and 11 keys; 0 chooses 6 here
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
    return [torch.randn(n, dim, dtype=torch.float64, generator=generator) for n in (rows, keys, queue)]


def assert_equals(given, expected):
    """Statistics, and the gradient of the keys for random values of the rows."""
    stats = softmax_stats(given)
    for got, want in zip(parts(stats), expected[:3], strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    row_values = torch.randn(len(given.rows), 4, dtype=torch.float64)
    gradient = expected[3][:, : len(given.keys)].T @ row_values
    torch.testing.assert_close(keys_gradient(given, stats, row_values), gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("chunk", "bound", "scale"), pairwise(CHUNK_SIZES, (math.inf, 20.0), (1.0, 2.5, -2.0)))
def test_equals_the_dense_formulas(chunk, bound, scale, threads, monkeypatch):
    monkeypatch.setattr(tiled, "CPU_TILE", (4, 6))
    rows, keys, queue = tensors()
    given = Pass(rows, keys, queue, hidden=HIDDEN, scale=scale, bound=bound, chunk=chunk)
    assert_equals(given, dense(rows, keys, queue, scale))


@pytest.mark.parametrize(
    ("chunk", "bound", "width", "threads"),
    pairwise(CHUNK_SIZES, (math.inf, 20.0), (1, 3, 5), THREADS),
    indirect=["threads"],
)
def test_averages_values_that_are_not_the_keys(chunk, bound, width, threads, monkeypatch):
    monkeypatch.setattr(tiled, "CPU_TILE", (4, 6))
    rows, keys, queue = tensors()
    _, values, queue_values = tensors(dim=width)
    given = Pass(rows, keys, queue, values, queue_values, hidden=HIDDEN, bound=bound, chunk=chunk)
    assert_equals(given, dense(rows, keys, queue, 1.0, values=values, queue_values=queue_values))


def other_half(rows):
    """For each row those of its own half, which a pass across does not see."""
    half = torch.arange(rows // 2)
    return torch.cat([half.expand(rows // 2, -1), (half + rows // 2).expand(rows // 2, -1)])


@pytest.mark.parametrize(
    ("kind", "values", "bound", "threads"),
    pairwise(["hidden", "all", "cross"], [None, 0, 5], [20.0, math.inf], THREADS),
    indirect=["threads"],
)
def test_rows_that_are_the_keys_say_the_same_by_half_the_logits(kind, values, bound, threads, monkeypatch):
    monkeypatch.setattr(tiled, "CPU_TILE", (4, 4))
    rows = tensors(rows=12)[0]
    averaged = None if values is None else torch.randn(12, values, dtype=torch.float64)
    hidden = torch.stack([torch.arange(12), torch.arange(12).roll(6)], dim=1) if kind == "hidden" else None
    given = Pass(rows, rows, values=averaged, scale=2.5, bound=bound, hidden=hidden, symmetric=True)
    given = given._replace(cross=kind == "cross")
    unseen = other_half(12) if kind == "cross" else hidden
    expected = dense(rows, rows, rows[:0], 2.5, unseen, averaged, None if averaged is None else averaged[:0])
    if kind != "cross":
        assert_equals(given, expected)
    stats, weights = softmax_stats(given), torch.randn(12, dtype=torch.float64)
    for got, want in zip(parts(stats), expected[:3], strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    pairs = weights[:, None] * expected[3]
    torch.testing.assert_close(symmetric_gradient(given, stats, weights), (pairs + pairs.T) @ rows)


def logits_computed(profile, dim):
    """How many logits were computed: results of products of features, whose dimension nothing else has."""
    products = [event.input_shapes for event in profile.events() if event.name == "aten::addmm"]
    return sum(first[0] * second[1] for _, first, second, *_ in products if first[1] == dim)


@pytest.mark.parametrize(("kind", "share"), [({}, 1), ({"symmetric": True}, 6 / 9), ({"cross": True}, 1 / 4)])
def test_half_the_tiles_are_computed_where_they_are_enough(kind, share, monkeypatch):
    monkeypatch.setattr(tiled, "CPU_TILE", (4, 4))
    rows = tensors(rows=12)[0]
    given = Pass(rows, rows, bound=20.0, symmetric=bool(kind), cross="cross" in kind)
    with torch.profiler.profile(record_shapes=True) as forward:
        stats = softmax_stats(given)
    with torch.profiler.profile(record_shapes=True) as backward:
        if kind:
            symmetric_gradient(given, stats, stats.offset)
        else:
            keys_gradient(given, stats, rows)
    assert logits_computed(forward, 3) == logits_computed(backward, 3) == pytest.approx(share * 12 * 12)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # raised and handled inside opcheck
@pytest.mark.parametrize("apart", [False, True])
def test_opcheck(apart):
    rows, keys, queue = tensors()
    _, values, queue_values = tensors(dim=5) if apart else (None, None, None)
    given = Pass(rows, keys, queue, values, queue_values, hidden=HIDDEN, chunk=4)
    torch.library.opcheck(torch.ops.slr_plugin.softmax_stats.default, tuple(given))
    stats = softmax_stats(given)
    rest = stats.reference_bits, stats.offset, stats.mean
    torch.library.opcheck(torch.ops.slr_plugin.keys_gradient.default, (*given, *rest))
    square = Pass(rows, rows, symmetric=True)
    rest = softmax_stats(square)[:2]
    torch.library.opcheck(torch.ops.slr_plugin.symmetric_gradient.default, (*square, *rest, rest[0]))


@pytest.mark.parametrize("bound", [math.inf, 20.0])
def test_a_row_without_keys_is_empty_not_nan(bound, threads):
    rows, keys = torch.randn(2, 3), torch.randn(1, 3)
    given = Pass(rows, keys, bound=bound, hidden=torch.tensor([[0], [-1]]))
    stats = softmax_stats(given)
    assert stats.offset[0] == -torch.inf
    assert stats.max_weight[0] == 0
    assert torch.equal(stats.mean[0], torch.zeros(3))
    assert keys_gradient(given, stats, torch.tensor([[0.0], [1.0]])).isfinite().all()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_extreme_logits_stay_finite_and_exact(scale):
    rows, keys, queue = (tensor.float() * scale for tensor in tensors())
    stats = softmax_stats(Pass(rows, keys, queue, hidden=HIDDEN, chunk=3))
    expected = dense(rows.double(), keys.double(), queue.double(), 1.0)
    torch.testing.assert_close(parts(stats)[0].double(), expected[0], rtol=1e-5, atol=1e-5)
    assert stats.mean.isfinite().all()


def test_no_rows_by_keys_matrix_is_allocated():
    rows, keys, queue = torch.randn(64, 8), torch.randn(64, 8), torch.randn(20000, 8)
    with torch.profiler.profile(profile_memory=True) as profile:
        softmax_stats(Pass(rows, keys, queue))
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 < largest <= queue.numel() * queue.element_size()
