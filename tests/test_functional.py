"""functional.slr_loss equals the equations, the dense form and the module, and keeps no state."""

from __future__ import annotations

import pytest
import torch
from _oracle import Batch, ask, call, gradients, make_criterion
from _oracle import one_thread as one_thread
from test_oracle import ESTIMATOR_MODES, MODES, SOFT, assert_close, batch_of, settings_of

from slr_plugin import Mix, SLRLoss, dense
from slr_plugin.functional import clip_loss, slr_loss

FUNCTIONAL_MODES = [mode for mode in MODES if mode not in ESTIMATOR_MODES]  # which need a second queue


def functional(batch: Batch, function=slr_loss, **settings: object) -> torch.Tensor:
    crops = (batch.mixed, batch.mix) if batch.mixed else ()
    return function(batch.out0, batch.out1, batch.bank, *crops, negatives=batch.negatives, **settings)


@pytest.mark.parametrize("mode", FUNCTIONAL_MODES)
def test_the_function_equals_the_equations_the_dense_form_and_the_module(mode):
    settings = settings_of(mode, **SOFT)
    batch = batch_of(mode, 5, 3)
    queue = None if batch.bank is None else batch.bank.clone()
    symmetric = batch.bank is None if settings["symmetric"] is None else settings["symmetric"]

    def dense_form(batch):
        return functional(batch, dense.slr_loss, **{**settings, "symmetric": symmetric})

    results = []
    for compute in (
        lambda batch: functional(batch, **settings),
        lambda batch: ask(batch, **settings).loss,
        dense_form,
        lambda batch: call(make_criterion(batch, **settings), batch),
    ):
        leaves = batch.leaves()
        loss = compute(leaves)
        results.append([loss.detach(), *gradients(loss, leaves)])
    for other in results[1:]:
        for got, expected in zip(results[0], other, strict=True):
            assert_close(got, expected, 1e-12 if other is results[-1] else 1e-10, mode)
    assert queue is None or torch.equal(queue, batch.bank)


@pytest.mark.parametrize("mode", FUNCTIONAL_MODES)
def test_a_learnable_temperature_has_its_gradient_with_the_labels_constant(mode):
    batch = batch_of(mode, 4, 3)
    settings = settings_of(mode, **{**SOFT, "sharpening": 1.0})
    temperature = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    for weight, confidence in ((0.0, 2.0), (0.7, 0.0)):  # one-hot labels do not move with the temperature
        fixed = {**settings, "refined_weight": weight, "confidence": confidence}
        assert torch.autograd.gradcheck(
            lambda t, fixed=fixed: functional(batch, **{**fixed, "temperature": t}), temperature
        )
    # Refined labels move with tau tau': kept equal by moving tau' against tau, they leave the true gradient.
    settings["sharpening"], step = 0.5, 1e-6

    def at(tau: float) -> torch.Tensor:
        return functional(batch, **{**settings, "temperature": tau, "sharpening": 0.25 / tau})

    (got,) = torch.autograd.grad(functional(batch, **{**settings, "temperature": temperature}), temperature)
    assert_close(got, (at(0.5 + step) - at(0.5 - step)) / (2 * step), 1e-7, mode)


BATCH = batch_of("queue_crops_negatives", 4, 3)


@pytest.mark.parametrize(
    ("argument", "error", "options"),
    [
        ("queries", TypeError, {"queries": None}),
        ("positives", ValueError, {"positives": BATCH.out1[0]}),
        ("queue", TypeError, {"queue": [1.0]}),
        ("queue", ValueError, {"queue": BATCH.bank[:, 1:]}),
        ("mix", ValueError, {"mixed": BATCH.mixed}),
        ("negatives", TypeError, {"negatives": BATCH.mix[0].partner[:, None]}),
        ("negatives", ValueError, {"negatives": BATCH.out1[:, 1:]}),
        ("temperature", ValueError, {"temperature": 0.0}),
        ("sharpening", ValueError, {"sharpening": 1.5}),
        ("confidence", ValueError, {"confidence": -1.0}),
        ("refined_weight", ValueError, {"refined_weight": 2.0}),
        ("in_batch_keys", TypeError, {"in_batch_keys": 1}),
        ("symmetric", ValueError, {"symmetric": True, "queue": BATCH.bank}),
        ("symmetric", TypeError, {"symmetric": "no"}),
        ("confidence", TypeError, {"confidence": lambda step: 1.0}),
        ("in_batch_keys", ValueError, {"in_batch_keys": False, "symmetric": False}),
    ],
)
def test_the_function_names_the_bad_argument(argument, error, options):
    with pytest.raises(error, match=rf"\b{argument}\b"):
        slr_loss(**{"queries": BATCH.out0, "positives": BATCH.out1, **options})


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_temperature_is_a_tensor_of_one_value_whatever_its_shape_and_dtype(mixed, dtype, shape):
    torch.manual_seed(0)
    queries, positives, crop, queue = torch.randn(4, 6, 5)
    mix = (crop, Mix(torch.rand(6), torch.randperm(6))) if mixed else ()
    temperature = torch.full(shape, 0.25, dtype=dtype, requires_grad=True)
    queue = torch.nn.functional.normalize(queue, dim=1)
    loss = slr_loss(queries, positives, queue, *mix, temperature=temperature)
    torch.testing.assert_close(loss, slr_loss(queries, positives, queue, *mix, temperature=0.25))
    loss.backward()
    assert temperature.grad.shape == shape
    assert temperature.grad.abs() > 0


def test_an_empty_queue_is_none():
    queries, positives = torch.randn(2, 3, 4)
    with pytest.raises(ValueError, match="pass negatives"):
        slr_loss(queries, positives, torch.empty(0, 4), in_batch_keys=False)


def dense_clip_loss(images, texts, temperature, groups):
    """Both cross-entropies with the labels of the groups, written out."""
    images, texts = (torch.nn.functional.normalize(x, dim=1) for x in (images, texts))
    logits = images @ texts.T / temperature
    same = (groups[:, None] == groups) & (groups >= 0) | torch.eye(len(groups), dtype=torch.bool)
    labels = same.double() / same.sum(1, keepdim=True)
    return sum(-(labels * table.log_softmax(1)).sum(1).mean() for table in (logits, logits.T)) / 2


@pytest.mark.parametrize("temperature", [0.5, 0.01])  # logits with and without a running maximum
@pytest.mark.parametrize("groups", [None, [0, 3, -1, 3, -1, 3, 0]])
def test_the_clip_loss_equals_its_dense_form_with_all_gradients(groups, temperature):
    ids = torch.full((7,), -1) if groups is None else torch.tensor(groups)
    images, texts = (torch.randn(7, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    leaves = images, texts, torch.tensor(temperature, dtype=torch.float64, requires_grad=True)
    ours = clip_loss(images, texts, temperature=leaves[2], groups=None if groups is None else ids)
    theirs = dense_clip_loss(*leaves, ids)
    torch.testing.assert_close(ours, theirs)
    for got, want in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        torch.testing.assert_close(got, want)


def test_the_clip_loss_compiles_without_a_break():
    views = [torch.randn(6, 4, requires_grad=True) for _ in range(2)]
    compiled = torch.compile(clip_loss, fullgraph=True, backend="aot_eager")
    got, want = (torch.autograd.grad(f(*views, groups=torch.arange(6) % 2), views)[0] for f in (compiled, clip_loss))
    torch.testing.assert_close(got, want)


def test_a_chunk_size_changes_neither_value_nor_gradient_of_one_hot_labels():
    views = [torch.randn(9, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    results = []
    for chunk_size in (None, 4, 18):
        criterion = SLRLoss(0.2, confidence=0.0)
        criterion.chunk_size = chunk_size
        loss = criterion(*views)
        results.append([loss, *torch.autograd.grad(loss, views)])
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])
