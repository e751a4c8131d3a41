"""The streaming pass against the dense formulas it replaces."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from slr_plugin import SLRLoss
from slr_plugin import contrast as contrast_module
from slr_plugin.contrast import Hidden, contrast

HIDDEN = [Hidden(0, 2, 4), Hidden(3, 0, 3), Hidden(4, 9, 5)]


def tensors(rows=9, keys=8, queue=11, dim=3):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, dim, dtype=torch.float64, generator=generator).requires_grad_() for n in (rows, keys, queue)]


def dense(rows, keys, queue, scales, hidden=HIDDEN):
    """The definitions at the top of slr_plugin/contrast.py, with the weights of the mean as constants."""
    every = torch.cat([keys, queue.detach()])
    logits = torch.stack([scale * (rows @ every.T) for scale in scales])
    for row, key, length in hidden:
        for t in range(length):
            logits[:, row + t, key + t] = -torch.inf
    weights = logits.softmax(2).detach()
    return logits.logsumexp(2), weights.amax(2), weights @ every


def parts(met):
    """A Contrast as :func:`dense` returns it; the reference's own gradient is in excess."""
    return met.reference.detach() + met.excess, met.peak, met.mean


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 5, 8, 100])
@pytest.mark.parametrize("scales", [(1.0,), (1.0, 2.5)])
@pytest.mark.parametrize("bound", [math.inf, 20.0])
def test_equals_the_dense_formulas_with_gradients(bound, chunk_size, scales, monkeypatch):
    monkeypatch.setattr("slr_plugin.contrast._CPU_TILE", (4, 6))
    rows, keys, queue = tensors()
    streamed = parts(contrast(rows, keys, queue, hidden=HIDDEN, scales=scales, bound=bound, chunk_size=chunk_size))
    expected = dense(rows, keys, queue, scales)
    for got, want in zip(streamed, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    weights = [torch.randn_like(expected[0]), torch.randn_like(expected[2])]
    for outputs in (streamed, expected):
        total = (outputs[0] * weights[0]).sum() + (outputs[2] * weights[1]).sum()
        gradients = torch.autograd.grad(total, (rows, keys))
        if outputs is streamed:
            ours = gradients
    for got, want in zip(ours, gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scales", [(1.0,), (1.0, 2.5)])
@pytest.mark.parametrize(
    ("hidden", "needed"),
    [
        ([Hidden(0, 0, 6), Hidden(0, 6, 6), Hidden(6, 0, 6), Hidden(6, 6, 6)], 6),
        ([], 6),
        ([Hidden(0, 6, 6)], 9),  # row 0 does not see key 6, but row 6 sees key 0
    ],
)
def test_a_table_met_by_itself_takes_half_the_tiles_and_says_the_same(hidden, needed, scales, monkeypatch):
    monkeypatch.setattr("slr_plugin.contrast._CPU_TILE", (4, 4))
    tiles = []
    count = contrast_module._logits
    monkeypatch.setattr(contrast_module, "_logits", lambda *args: tiles.append(args[4:6]) or count(*args))
    rows = tensors(rows=12)[0]

    def results(keys):
        tiles.clear()
        fields = parts(contrast(rows, keys, scales=scales, bound=20.0, hidden=hidden))
        generator = torch.Generator().manual_seed(1)
        total = sum(
            (field * torch.randn(field.shape, dtype=torch.float64, generator=generator)).sum() for field in fields
        )
        return [*fields, *torch.autograd.grad(total, rows)], len(tiles)

    ours, half = results(rows)
    expected, whole = results(rows.clone())
    for got, want in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert (half, whole) == (2 * needed, 2 * 9)  # forward and backward


@pytest.mark.parametrize("scales", [(1.0,), (1.0, 2.5)])
def test_gradcheck_of_logsumexp(scales):
    rows, keys, queue = tensors(rows=4, keys=5, queue=3)

    def logsumexp(rows, keys):
        met = contrast(rows, keys, queue.detach(), hidden=[Hidden(0, 1, 4)], scales=scales, chunk_size=2)
        return met.reference.detach() + met.excess

    assert torch.autograd.gradcheck(logsumexp, (rows, keys))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # raised and handled inside opcheck
def test_opcheck():
    rows, keys, queue = tensors()
    flat = [number for diagonal in HIDDEN for number in diagonal]
    torch.library.opcheck(torch.ops.slr_plugin.contrast, (rows, keys, queue.detach(), [1.0, 2.0], math.inf, flat, 4))


@pytest.mark.parametrize("bound", [math.inf, 20.0])
def test_a_row_without_keys_is_empty_not_nan(bound):
    rows = torch.randn(2, 3, requires_grad=True)
    keys = torch.randn(1, 3, requires_grad=True)
    met = contrast(rows, keys, bound=bound, hidden=[Hidden(0, 0, 1)])
    assert met.excess[0, 0] == -torch.inf
    assert met.peak[0, 0] == 0
    assert torch.equal(met.mean[0, 0], torch.zeros(3))
    torch.logaddexp(met.reference[0] + met.excess[0], torch.zeros(2)).sum().backward()
    assert torch.equal(rows.grad[0], torch.zeros(3))
    assert keys.grad.isfinite().all()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_extreme_logits_stay_finite_and_exact(scale):
    rows, keys, queue = (tensor.detach().float() * scale for tensor in tensors())
    met = contrast(rows, keys, queue, hidden=HIDDEN, chunk_size=3)
    expected = dense(rows.double(), keys.double(), queue.double(), (1.0,))
    torch.testing.assert_close(parts(met)[0].double(), expected[0], rtol=1e-5, atol=1e-5)
    assert met.mean.isfinite().all()


def test_no_rows_by_keys_matrix_is_allocated():
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple) else (out,):
                if isinstance(tensor, torch.Tensor) and tensor._base is None:
                    self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
            return out

    rows, keys, queue = torch.randn(64, 8), torch.randn(64, 8), torch.randn(20000, 8)
    with Largest() as largest:
        contrast(rows, keys, queue)
    assert 0 < largest.numel <= max(queue.numel(), 64 * 512)


@pytest.mark.parametrize("bound", [math.inf, 5.0])
def test_medium_precision_meets_the_queue_in_bfloat16_more_exactly_than_dense_products(bound, monkeypatch):
    monkeypatch.setattr("slr_plugin.contrast._cpu_has_bfloat16", lambda: True)
    monkeypatch.setattr("torch.get_float32_matmul_precision", lambda: "medium")
    rows, keys, queue = (tensor.detach() for tensor in tensors(rows=32, keys=32, queue=400, dim=16))
    rows, queue = normalize(rows, dim=1), normalize(queue, dim=1)
    keys = normalize(normalize(keys, dim=1) + 3 * rows, dim=1)  # positives resemble their queries
    hidden = [Hidden(0, 1, 31)]
    single = [tensor.float() for tensor in (rows, keys, queue)]
    ours = parts(contrast(*single, hidden=hidden, scales=[5.0], bound=bound))
    every = torch.cat([keys, queue])
    logits = 5 * rows @ every.T
    logits[:31, 1:32].fill_diagonal_(-torch.inf)
    exact = logits.logsumexp(1), logits.softmax(1).amax(1), logits.softmax(1) @ every
    rough = (5 * rows.bfloat16() @ every.bfloat16().T).float()
    rough[:31, 1:32].fill_diagonal_(-torch.inf)
    weights = rough.softmax(1)
    dense_values = rough.logsumexp(1), weights.amax(1), weights.bfloat16() @ every.bfloat16()
    for got, dense_value, want in zip(ours, dense_values, exact, strict=True):
        error, dense_error = (got[0] - want).norm(), (dense_value - want).norm()
        assert 1e-6 < error <= dense_error  # bfloat16 was in use

    exactly = contrast(rows, keys, queue, scales=[5.0], bound=bound, hidden=hidden)  # float64 is left alone
    torch.testing.assert_close(exactly.mean[0], exact[2], rtol=0, atol=1e-12)
    batch_only = contrast(*single[:2], scales=[5.0], bound=bound)  # so are the keys of the batch
    torch.testing.assert_close(batch_only.mean[0].double(), (5 * rows @ keys.T).softmax(1) @ keys, rtol=0, atol=1e-6)


def test_the_loss_of_two_views_computes_half_its_logits(monkeypatch):
    met = []
    ask = contrast_module._is_mirrored
    monkeypatch.setattr(contrast_module, "_is_mirrored", lambda *args: met.append(ask(*args)) or met[-1])
    views = torch.randn(2, 5, 3, requires_grad=True)
    SLRLoss(0.2)(*views).backward()
    assert met == [True, True]  # forward and backward
    met.clear()
    chunked = SLRLoss(0.2)
    chunked.chunk_size = 2
    chunked(*views).backward()
    assert met == [False, False]
