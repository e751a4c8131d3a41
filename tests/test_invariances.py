"""What must not change the loss, for any batch that hypothesis draws; gradients follow along."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from _oracle import Batch, ask, call, gradients, make_batch, make_criterion
from _oracle import one_thread as one_thread
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slr_plugin import Mix

pytestmark = pytest.mark.filterwarnings("ignore:one sample and no queue")

repeat = settings(derandomize=True, deadline=None, max_examples=25)
seeds = st.integers(0, 9999)
# No subnormal numbers: torch 2.4's compiler, which other tests run, switches them off for the whole process.
floats = functools.partial(st.floats, allow_subnormal=False)
unit_interval = floats(0, 1)


def powers_of_ten(low: float, high: float) -> st.SearchStrategy[float]:
    """Numbers between 10 ** low and 10 ** high, evenly on a logarithmic scale."""
    return floats(low, high).map(lambda exponent: 10.0**exponent)


MILD_TEMPERATURES, MILD_SHARPENINGS, MILD_CONFIDENCES = powers_of_ten(-1, 1), floats(0.2, 1), floats(0, 10)
EXTREME = {
    "temperatures": powers_of_ten(-4, 3),
    "sharpenings": powers_of_ten(-2, 0),
    "confidences": powers_of_ten(-3, 6),
}


@st.composite
def problems(
    draw: st.DrawFn,
    queue: bool | None = None,
    mixed: bool | None = None,
    temperatures: st.SearchStrategy[float] = MILD_TEMPERATURES,
    sharpenings: st.SearchStrategy[float] = MILD_SHARPENINGS,
    confidences: st.SearchStrategy[float] = MILD_CONFIDENCES,
    dtype: torch.dtype = torch.float64,
) -> tuple[Batch, dict[str, object]]:
    """A batch and the settings of a loss; ``queue`` and ``mixed`` say whether it has them, None leaves them open."""
    queue = draw(st.booleans()) if queue is None else queue
    mixed = draw(st.booleans()) if mixed is None else mixed
    n, crops = queue * draw(st.integers(1, 9)), mixed * draw(st.integers(1, 3))
    batch = make_batch(draw(st.integers(1, 7)), draw(st.integers(1, 6)), n, crops, dtype=dtype, seed=draw(seeds))
    return batch, {
        "temperature": draw(temperatures) * draw(st.sampled_from([1, 1, -1])),
        "sharpening": draw(sharpenings),
        "confidence": draw(confidences),
        "refined_weight": draw(unit_interval),
        "in_batch_keys": mixed or draw(st.booleans()),
    }


def evaluate(batch: Batch, options: dict[str, object], chunk_size: int | None = None) -> list[Tensor]:
    """The loss, its gradients with respect to out0, out1 and every crop, and the stats."""
    leaves = batch.leaves()
    criterion = make_criterion(batch, chunk_size, **options)
    criterion.double()  # the queue too: rotated rows stay what they are
    if batch.bank is not None:
        criterion.memory_bank.bank.copy_(batch.bank)
    loss = call(criterion, leaves)
    return [loss.detach(), *gradients(loss, leaves), torch.stack(list(criterion.stats.values()))]


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)


def labels_of(batch: Batch, options: dict[str, object]) -> Tensor:
    return make_criterion(batch, **options).labels(batch.out0, batch.out1)


def permutation(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def on_features(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """The batch with ``change`` applied to out0, out1 and every crop."""
    return batch._replace(out0=change(batch.out0), out1=change(batch.out1), mixed=[change(c) for c in batch.mixed])


# ----------------------------------------------------------------------------------------------------- order and layout


@repeat
@given(problems(queue=True), seeds)
def test_the_order_of_the_queue_does_not_matter(problem, seed):
    batch, options = problem
    order = permutation(len(batch.bank), seed)
    moved = batch._replace(bank=batch.bank[order])
    assert_same(evaluate(moved, options), evaluate(batch, options))
    ours, theirs = labels_of(moved, options), labels_of(batch, options)
    first = len(batch.out0) if options["in_batch_keys"] else 1
    torch.testing.assert_close(ours[:, first:], theirs[:, first:][:, order])


@repeat
@given(problems(), seeds)
def test_the_order_of_the_batch_does_not_matter(problem, seed):
    batch, options = problem
    order = permutation(len(batch.out0), seed)
    place = order.argsort()
    moved = on_features(batch, lambda value: value[order])
    moved = moved._replace(mix=[Mix(theta[order], place[partner[order]]) for theta, partner in batch.mix])
    loss, *grads, stats = evaluate(batch, options)
    assert_same(evaluate(moved, options), [loss, *(gradient[order] for gradient in grads), stats])


@repeat
@given(problems(queue=False, mixed=False))
def test_without_queue_the_two_views_may_swap(problem):
    batch, options = problem
    loss, gradient0, gradient1, stats = evaluate(batch, options)
    swapped = batch._replace(out0=batch.out1, out1=batch.out0)
    assert_same(evaluate(swapped, options), [loss, gradient1, gradient0, stats])


@repeat
@given(problems(), st.integers(1, 20))
def test_the_chunk_size_does_not_matter(problem, chunk_size):
    assert_same(evaluate(*problem, chunk_size), evaluate(*problem))


@repeat
@given(problems())
def test_the_memory_layout_does_not_matter(problem):
    batch, options = problem
    loss, *grads, _ = evaluate(batch, options)
    strided = on_features(batch, lambda value: value.repeat_interleave(3, 0).repeat_interleave(2, 1)[::3, ::2])
    assert strided.out0.stride() == (6 * batch.out0.shape[1], 2)
    criterion = make_criterion(batch, **options)
    features = [value.requires_grad_() for value in strided.features()]
    value = call(criterion, strided)
    assert_same([value.detach(), *torch.autograd.grad(value, features)], [loss, *grads])


# ------------------------------------------------------------------------------------------------------------- geometry


@repeat
@given(problems(), seeds)
def test_positive_lengths_of_the_rows_do_not_matter(problem, seed):
    batch, options = problem
    rng = torch.Generator().manual_seed(seed)
    loss, *grads, stats = evaluate(batch, options)
    lengths = [10 ** (4 * torch.rand(len(value), 1, generator=rng).double() - 2) for value in batch.features()]
    out0, out1, *mixed = [value * length for value, length in zip(batch.features(), lengths, strict=True)]
    grads = [gradient / length for gradient, length in zip(grads, lengths, strict=True)]
    assert_same(evaluate(batch._replace(out0=out0, out1=out1, mixed=mixed), options), [loss, *grads, stats])


@repeat
@given(problems(), seeds)
def test_a_rotation_of_all_features_does_not_matter(problem, seed):
    batch, options = problem
    d = batch.out0.shape[1]
    rotation = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed)).double())[0]
    rotated = on_features(batch, lambda value: value @ rotation)
    rotated = rotated._replace(bank=None if batch.bank is None else batch.bank.double() @ rotation)
    loss, *grads, stats = evaluate(batch, options)
    assert_same(evaluate(rotated, options), [loss, *(gradient @ rotation for gradient in grads), stats])


@repeat
@given(problems())
def test_gradients_are_tangent_to_the_sphere(problem):
    batch, options = problem
    _, *grads, _ = evaluate(batch, options)
    for value, gradient in zip(batch.features(), grads, strict=True):
        torch.testing.assert_close((value * gradient).sum(1), torch.zeros(len(value)).double(), atol=1e-9, rtol=0)


# ------------------------------------------------------------------------------------------- one setting equals another


@repeat
@given(problems(mixed=False, confidences=st.just(0)))
def test_zero_confidence_is_ntxent_whatever_the_refined_weight(problem):
    batch, options = problem
    out0, out1, *_ = leaves = batch.leaves()
    q, k, s = F.normalize(out0, dim=1), F.normalize(out1, dim=1), len(out0)
    if batch.bank is None:
        views = torch.cat([q, k])
        itself = torch.eye(2 * s, dtype=torch.bool)
        logits = (views @ views.T).masked_fill(itself, -torch.inf * options["temperature"])
        own = torch.arange(2 * s).roll(s)
    elif options["in_batch_keys"]:
        logits, own = q @ torch.cat([k, batch.bank.double()]).T, torch.arange(s)
    else:
        logits, own = torch.cat([(q * k).sum(1, keepdim=True), q @ batch.bank.double().T], 1), torch.zeros(s).long()
    loss = F.cross_entropy(logits / options["temperature"], own)
    *got, stats = evaluate(batch, options)
    assert_same(got, [loss.detach(), *gradients(loss, leaves)])
    assert stats.tolist() == [1, 0, 0, 0, 0]  # positive_weight, alpha, beta, mu, label_entropy


@repeat
@given(problems(), unit_interval)
def test_the_loss_is_linear_in_the_refined_weight(problem, weight):
    batch, options = problem
    at = [evaluate(batch, {**options, "refined_weight": value})[:-1] for value in (0, 1, weight)]
    assert_same(at[2], [(1 - weight) * zero + weight * one for zero, one in zip(*at[:2], strict=True)])


@repeat
@given(problems(queue=True, mixed=False), st.sampled_from(["theta_1", "partner_self"]), seeds)
def test_a_mix_that_changes_nothing_is_the_unmixed_loss(problem, kind, seed):
    batch, options = problem
    options = {**options, "in_batch_keys": True}
    s, rng = len(batch.out0), torch.Generator().manual_seed(seed)
    mix = {
        "theta_1": Mix(torch.ones(s), torch.randint(s, (s,), generator=rng)),
        "partner_self": Mix(torch.rand(s, generator=rng), torch.arange(s)),
    }[kind]
    loss, gradient0, gradient1, mixed_gradient, stats = evaluate(batch._replace(mixed=[batch.out0], mix=[mix]), options)
    assert_same([loss, gradient0 + mixed_gradient, gradient1, stats], evaluate(batch, options))


@repeat
@given(problems(mixed=True))
def test_theta_0_takes_the_label_of_the_partner(problem):
    batch, options = problem
    s = len(batch.out0)
    orders = [permutation(s, number) for number in range(len(batch.mixed))]
    by_partner = batch._replace(mix=[Mix(torch.zeros(s), order) for order in orders])
    # The same rows, put where their partner was, under the label of that place.
    by_place = batch._replace(
        mixed=[crop[order.argsort()] for crop, order in zip(batch.mixed, orders, strict=True)],
        mix=[Mix(torch.ones(s), torch.zeros(s, dtype=torch.long)) for _ in orders],
    )
    assert_same(evaluate(by_partner, options)[:3], evaluate(by_place, options)[:3])


@repeat
@given(problems(mixed=True))
def test_crops_count_by_their_mean(problem):
    batch, options = problem
    alone = [
        evaluate(batch._replace(mixed=[crop], mix=[mix]), options)
        for crop, mix in zip(batch.mixed, batch.mix, strict=True)
    ]
    count = len(alone)
    loss, gradient0, gradient1, *crop_gradients, stats = evaluate(batch, options)
    means = [sum(one[i] for one in alone) / count for i in (0, 1, 2)]
    assert_same([loss, gradient0, gradient1, stats], [*means, alone[0][-1]])
    assert_same(crop_gradients, [one[3] / count for one in alone])


@repeat
@given(problems(mixed=True))
def test_two_equal_crops_are_one_crop_and_a_list_of_one_is_its_tensor(problem):
    batch, options = problem
    one = batch._replace(mixed=batch.mixed[:1], mix=batch.mix[:1])
    loss, gradient0, gradient1, crop_gradient, stats = evaluate(one, options)
    twice = evaluate(batch._replace(mixed=one.mixed * 2, mix=one.mix * 2), options)
    assert_same(twice, [loss, gradient0, gradient1, crop_gradient / 2, crop_gradient / 2, stats])
    (crop,), (mix,) = one.mixed, one.mix
    criterion = make_criterion(one, **options)
    for mixed, its_mix in ((crop, mix), (crop, tuple(mix)), ((crop,), (mix,)), ([crop, crop], [tuple(mix), mix])):
        assert_same([criterion(one.out0, one.out1, mixed, its_mix, update=False)], [loss])


# --------------------------------------------------------------------------------------------------------------- ranges


@repeat
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@given(data=st.data())
def test_labels_are_distributions_over_the_keys(data, dtype):
    batch, options = data.draw(problems(mixed=False, dtype=dtype, **EXTREME))
    labels = labels_of(batch, options)
    assert (labels >= 0).all()
    torch.testing.assert_close(labels.sum(1), torch.ones(len(labels), dtype=dtype), atol=1e-5, rtol=0)
    if batch.bank is None:
        assert (labels.diagonal() == 0).all()


@repeat
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@given(data=st.data())
def test_extreme_logits_give_the_equations_value_and_gradients(data, dtype):
    batch, options = data.draw(problems(dtype=dtype, **EXTREME))
    leaves, reference = batch.leaves(), batch.leaves(dtype=torch.float64)
    criterion = make_criterion(batch, **options)
    loss, exact = call(criterion, leaves), ask(reference, **options).loss
    # Cosines are off by some eps; a label moves with its logit, loss and gradient with the label times 1 / tau.
    steep = max(1, 1 / abs(options["temperature"]))
    noise = 20 * torch.finfo(dtype).eps * steep / options["sharpening"]
    for got, expected in zip([loss, *gradients(loss, leaves)], [exact, *gradients(exact, reference)], strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got.double(), expected, atol=noise * steep, rtol=0)
    assert loss.item() >= -noise
    stats = {name: value.item() for name, value in criterion.stats.items()}
    keys = len(batch.out0) * 2 + (0 if batch.bank is None else len(batch.bank))
    assert -noise <= stats["label_entropy"] <= math.log(keys) + noise
    assert all(0 <= stats[name] <= 1 + 1e-6 for name in ("positive_weight", "alpha", "beta"))
