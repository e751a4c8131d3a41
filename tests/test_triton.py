"""The Triton kernels against the dense formulas: on a GPU where there is one, else in Triton's interpreter."""

import json
import os
import random
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from _pairwise import pairwise
from _streaming import dense, hidden_for, parts
from test_oracle import MODES, SETTINGS, assert_equals_oracle, batch_of, settings_of

from slr_plugin.streaming import Pass, keys_gradient, op, softmax_stats, tiled
from slr_plugin.streaming.op import resolve

pytest.importorskip("triton")
from _kernels import recorded_launches

from slr_plugin.streaming import triton as kernels

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# The interpreter multiplies in float32 where it is let, a GPU in TF32 with 10 bits.
TOLERANCE = 1e-2 if GPU else 2e-5


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    monkeypatch.setattr("torch.get_float32_matmul_precision", lambda: "high")
    if not GPU:
        monkeypatch.setattr(kernels, "BATCH_NUMBERS", "float32")
        monkeypatch.setattr(kernels, "QUEUE_NUMBERS_AT_MEDIUM", "float32")


def tensors(rows, keys, queue, dim):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, dim, generator=generator).to(DEVICE) / dim**0.5 for n in (rows, keys, queue)]


# The last has three blocks of rows, three of keys, and three splits of the queue.
@pytest.mark.parametrize(
    ("sizes", "scale", "width"),
    pairwise([(9, 14, 11, 3), (9, 14, 0, 64), (33, 40, 1, 200), (260, 90, 300, 20)], [3.0, -2.0], [None, 5, 40]),
)
def test_equals_the_dense_formulas_with_the_gradient_of_the_keys(sizes, scale, width):
    rows, keys, queue, dim = sizes
    inputs, hidden = tensors(rows, keys, queue, dim), hidden_for(rows).to(DEVICE)
    apart = [] if width is None else tensors(rows, keys, queue, width)[1:]
    given = Pass(*inputs, *apart, hidden=hidden, scale=scale)
    stats = softmax_stats(given, "triton")
    exact = dense(*(x.double() for x in inputs), scale, hidden, *(x.double() for x in apart))
    for got, want in zip(parts(stats), exact[:3], strict=True):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=TOLERANCE)
    row_values = torch.randn(rows, dim, device=DEVICE)
    want = exact[3][:, :keys].T @ row_values.double()
    got = keys_gradient(given, stats, row_values, "triton").double()
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE * max(1.0, want.abs().max().item()))


@pytest.mark.skipif(GPU, reason="the oracle's tolerance is that of float32 products")
@pytest.mark.parametrize("mode", MODES)
def test_value_and_gradients_of_the_loss_equal_the_equations(mode, monkeypatch):
    def choose(backend, given):
        needs_means = given.values is None or given.values.shape[1] > 0
        return "triton" if given.rows.dtype == torch.float32 and needs_means else "tiled"

    monkeypatch.setattr(op, "resolve", choose)
    batch = batch_of(mode, 5, 3, dtype=torch.float32)
    for settings in random.Random(mode).sample(SETTINGS, 6):
        assert_equals_oracle(batch, settings_of(mode, **settings), 1e-5)


def test_a_row_without_keys_is_empty_not_nan():
    rows, keys, _ = tensors(2, 1, 0, 3)
    given = Pass(rows, keys, hidden=torch.tensor([[0], [-1]], device=DEVICE))
    stats = softmax_stats(given, "triton")
    assert stats.offset[0] == -torch.inf
    assert stats.max_weight[0] == 0
    assert torch.equal(stats.mean[0], torch.zeros_like(rows[0]))
    values = torch.tensor([[0.0], [1.0]], device=DEVICE)
    assert keys_gradient(given, stats, values, "triton").isfinite().all()


def test_without_any_key():
    rows, keys, _ = tensors(2, 0, 0, 3)
    stats = softmax_stats(Pass(rows, keys), "triton")
    assert (stats.offset == -torch.inf).all()
    assert (stats.max_weight == 0).all()
    assert (stats.mean == 0).all()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_extreme_logits_stay_finite_and_exact(scale):
    rows, keys, queue = (tensor * scale for tensor in tensors(9, 14, 40, 4))
    stats = softmax_stats(Pass(rows, keys, queue, hidden=hidden_for(9).to(DEVICE)), "triton")
    expected = dense(rows.double(), keys.double(), queue.double(), 1.0)
    torch.testing.assert_close(parts(stats)[0].double(), expected[0], rtol=TOLERANCE, atol=TOLERANCE)
    assert stats.mean.isfinite().all()


def test_not_a_number_is_seen():
    rows, keys, queue = tensors(3, 4, 5, 4)
    queue[2, 1] = torch.nan
    given = Pass(rows, keys, queue)
    stats = softmax_stats(given, "triton")
    assert stats.offset.isnan().all()
    assert stats.mean.isnan().all()
    assert keys_gradient(given, stats, rows, "triton").isnan().all()


def rounded(x, bits):
    """The nearest numbers with so many bits after the leading one: 10 in TF32, 7 in bfloat16."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.round(mantissa * 2 ** (bits + 1)) / 2 ** (bits + 1), exponent).astype(x.dtype)


def rough(tensor, bits):
    return torch.from_numpy(rounded(tensor.numpy(), bits))


def multiply_as_a_gpu(monkeypatch, precision):
    """In the interpreter, drop what TF32 has no bits for: the kernels have to round by themselves.

    bfloat16 numbers the interpreter cannot multiply (Triton's issue 11584); float32 ones are rounded in their place.
    """
    from triton.runtime.interpreter import InterpreterBuilder

    exactly = InterpreterBuilder.create_dot

    def factor(x):
        if precision == "medium":
            return type(x)(rounded(x.data, 7), x.dtype)
        return type(x)((x.data.view(np.uint32) & ~np.uint32(0x1FFF)).view(np.float32), x.dtype)

    monkeypatch.setattr(
        InterpreterBuilder, "create_dot", lambda self, a, b, *rest: exactly(self, factor(a), factor(b), *rest)
    )
    monkeypatch.setattr("torch.get_float32_matmul_precision", lambda: precision)
    monkeypatch.setattr(kernels, "BATCH_NUMBERS", "tf32")


@pytest.mark.skipif(GPU, reason="rounds as a GPU would")
@pytest.mark.parametrize(("precision", "bits"), [("high", 10), ("medium", 7)])
def test_rounding_costs_no_more_than_in_dense_products(precision, bits, monkeypatch):
    multiply_as_a_gpu(monkeypatch, precision)
    rows, keys, queue = (torch.nn.functional.normalize(tensor, dim=1) for tensor in tensors(64, 0, 2000, 128))
    ours = parts(softmax_stats(Pass(rows, keys, queue, scale=5.0), "triton"))
    exact = dense(rows.double(), keys.double(), queue.double(), 5.0, hidden=None)[:3]
    logits = rough(5 * rows, bits) @ rough(queue, bits).T
    weights = logits.softmax(1)
    products = logits.logsumexp(1), weights.amax(1), rough(weights, bits) @ rough(queue, bits)
    for got, dense_value, want in zip(ours, products, exact, strict=True):
        error, dense_error = (got - want).norm(), (dense_value - want).norm()
        assert 1e-6 < error <= 1.25 * dense_error  # the rounding was seen; the rest is chance


@pytest.mark.skipif(GPU, reason="rounds as a GPU would")
def test_nor_in_the_gradient_of_the_keys(monkeypatch):
    multiply_as_a_gpu(monkeypatch, "high")
    rows, keys, _ = (torch.nn.functional.normalize(tensor.abs(), dim=1) for tensor in tensors(2000, 64, 0, 128))
    given = Pass(rows, keys, scale=5.0)
    ours = keys_gradient(given, softmax_stats(given, "triton"), 5 * rows, "triton")
    exact = (5 * rows.double() @ keys.double().T).softmax(1).T @ (5 * rows.double())
    logits = rough(5 * rows, 10) @ rough(keys, 10).T
    product = rough(logits.softmax(1), 10).T @ rough(5 * rows, 10)
    error, dense_error = (ours - exact).norm(), (product - exact).norm()
    assert 1e-6 < error <= 1.25 * dense_error


def test_only_the_queue_is_met_in_half_precision(monkeypatch):
    monkeypatch.undo()
    rows, keys, queue = tensors(4, 4, 40, 16)
    with recorded_launches() as launches:
        for precision in ("high", "medium"):
            monkeypatch.setattr("torch.get_float32_matmul_precision", lambda precision=precision: precision)
            kernels.forward(Pass(rows, keys, queue, bound=5.0))
    assert [launch.constants["NUMBERS"] for launch in launches] == ["tf32", "tf32", "tf32", "bf16"]


@pytest.mark.skipif(
    tuple(map(int, kernels.triton.__version__.split(".")[:2])) < (3, 3),
    reason="an older Triton's compiler is called otherwise",
)
def test_kernels_compile_for_gpus_without_spilling_registers():
    """For tensor cores, within their shared memory: 99 KB on consumer cards, which get sm_80's code; 227 on sm_90."""
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("_kernels.py"))]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    kernels = json.loads(result.stdout)
    assert len(kernels) == 16
    for kernel in kernels:
        assert kernel["stack"] == 0, kernel
        assert kernel["shared"] <= {80: 99, 90: 227}[kernel["capability"]] * 1024, kernel
        assert kernel["products"], kernel


# --- no value of the device is read: a CUDA graph can record a pass


@pytest.fixture
def many_processors(monkeypatch, pretended_gpu):
    """A GPU of 132 processors that records launches in place of running them."""
    if GPU:
        pytest.skip("pretends that there is a GPU")
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr("torch.cuda.device_of", lambda tensor: nullcontext())
    with pretended_gpu, torch.no_grad(), recorded_launches() as launches:
        yield launches


@pytest.mark.parametrize("queue", [300, 0])
@pytest.mark.parametrize("backend", [kernels, tiled])
def test_a_pass_does_not_wait_for_the_gpu(backend, queue, many_processors):
    rows, keys, table = (torch.empty(n, 128, device="cuda") for n in (768, 256, queue))
    hidden = torch.empty(768, 1, dtype=torch.long, device="cuda")
    given = Pass(rows, keys, table if queue else None, hidden=hidden, scale=5.0, bound=5.0)
    stats = backend.forward(given)
    gradient = backend.keys_backward(given, stats.reference, stats.offset, stats.mean)
    assert gradient.shape == keys.shape
    assert gradient.device.type == "cuda"
    grids = [(6, 8), *([(6, 10)] if queue else []), (8,)] if backend is kernels else []
    assert [launch.grid for launch in many_processors] == grids


@pytest.mark.parametrize(
    ("blocks", "splits"),
    # 67 and 133 tasks would leave half of 132 processors idle.
    [(1, 132), (6, 22), (67, 3), (132, 1), (133, 4), (1000, 1)],
)
def test_keys_are_split_until_the_processors_are_busy(blocks, splits, many_processors):
    tile = kernels.FORWARD[128]
    rows, keys = (torch.empty(n, 128, device="cuda") for n in (blocks * tile.rows, 132 * tile.keys))
    kernels.forward(Pass(rows, keys))
    assert [launch.grid for launch in many_processors] == [(blocks, splits)]


# --- when the kernels are used


GROUPS = {"row_groups": torch.zeros(2, dtype=torch.long), "key_groups": torch.zeros(2, dtype=torch.long)}


def test_the_tiled_pass_stays_the_rule(monkeypatch, pretended_gpu):
    def asked(dtype=torch.float32, dim=128, device="cuda", precision="high", **options):
        monkeypatch.setattr("torch.get_float32_matmul_precision", lambda: precision)
        with pretended_gpu:
            rows = torch.empty(2, dim, dtype=dtype, device=device)
            return resolve(None, Pass(rows, rows, **options))

    assert asked() == "tiled"
    monkeypatch.setattr(op, "DEFAULT_BACKEND", "triton")
    assert asked() == asked(precision="medium") == "triton"
    for odd in (
        {"dtype": torch.float64},
        {"dim": 257},
        {"chunk": 1024},
        {"device": "cpu"},
        {"precision": "highest"},
        GROUPS,
    ):
        assert asked(**odd) == "tiled", odd
