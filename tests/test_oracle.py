"""SLRLoss against the paper's equations written out densely, and against lightly's NTXentLoss."""

from __future__ import annotations

import itertools
import math
import random
from contextlib import nullcontext
from typing import NamedTuple

import lightly.loss
import pytest
import torch
import torch.nn.functional as F
from _oracle import INPUTS, Answer, Batch, ask, call, dense_labels, gradients, make_batch, make_criterion
from _oracle import one_thread as one_thread
from _pairwise import pairwise

from slr_plugin import CosineConfidence, Mix, SLRLoss, dense

pytestmark = pytest.mark.filterwarnings("ignore:one sample and no queue")


class Mode(NamedTuple):
    queue: bool
    crops: int = 0  # of mixed queries
    in_batch_keys: bool = True
    symmetric: bool | None = None
    negatives: int = 0
    estimator_dim: int = 0


MODES = {
    "queue": Mode(True),
    "own_positive": Mode(True, in_batch_keys=False),
    "symmetric": Mode(False),
    "symmetric_mixed": Mode(False, 1),
    "queue_mixed": Mode(True, 1),
    "queue_crops": Mode(True, 3),
    "symmetric_crops": Mode(False, 2),
    "one_direction": Mode(False, symmetric=False),
    "one_direction_mixed": Mode(False, 1, symmetric=False, negatives=3),
    "queue_negatives": Mode(True, negatives=4),
    "queue_crops_negatives": Mode(True, 2, negatives=6),
    "own_positive_negatives": Mode(True, in_batch_keys=False, negatives=4),
    "negatives_alone": Mode(False, in_batch_keys=False, symmetric=False, negatives=3),
    "symmetric_negatives": Mode(False, symmetric=True, negatives=3),
    "symmetric_mixed_negatives": Mode(False, 1, negatives=4),
    "queue_estimator": Mode(True, estimator_dim=4),
    "queue_mixed_estimator": Mode(True, 1, estimator_dim=4),
    "own_positive_estimator": Mode(True, in_batch_keys=False, estimator_dim=4),
    "one_direction_estimator": Mode(False, symmetric=False, estimator_dim=4),
    "symmetric_estimator": Mode(False, estimator_dim=4),
    "symmetric_mixed_estimator": Mode(False, 1, estimator_dim=4),
}
QUEUE_MODES = [name for name, mode in MODES.items() if mode.queue]
LABEL_MODES = [name for name, mode in MODES.items() if not mode.crops]
ESTIMATOR_MODES = [name for name, mode in MODES.items() if mode.estimator_dim]
TEMPERATURES = (0.05, 0.2, 1.0, 10.0, -0.5)
SHARPENINGS = (0.1, 0.5, 1.0)
CONFIDENCES = (0.0, 0.5, 1.0, 100.0)
REFINED_WEIGHTS = (0.0, 0.5, 1.0)
SETTINGS = [
    {"temperature": temperature, "sharpening": sharpening, "confidence": confidence, "refined_weight": weight}
    for temperature, sharpening, confidence, weight in itertools.product(
        TEMPERATURES, SHARPENINGS, CONFIDENCES, REFINED_WEIGHTS
    )
]
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}
PRECISIONS = pytest.mark.parametrize("dtype", TOLERANCES, ids=["float64", "float32"])
SOFT = {"temperature": 0.5, "sharpening": 0.5, "confidence": 2.0, "refined_weight": 0.7}


def batch_of(mode: str, s: int, d: int, n: int = 7, **kwargs: object) -> Batch:
    has_queue, crops, _, _, negatives, estimator_dim = MODES[mode]
    kwargs = {"negatives": negatives, "estimator_dim": estimator_dim, **kwargs}
    return make_batch(s, d, n if has_queue else 0, crops, **kwargs)


def settings_of(mode: str, **settings: object) -> dict[str, object]:
    return {**settings, "in_batch_keys": MODES[mode].in_batch_keys, "symmetric": MODES[mode].symmetric}


def assert_close(got: torch.Tensor, expected: torch.Tensor, tolerance: float, what: object) -> None:
    difference = (got.double() - expected).abs().max().item()
    assert difference <= tolerance, f"{what}: off by {difference}, tolerance {tolerance}"


def assert_equals_oracle(
    batch: Batch,
    settings: dict[str, object],
    tolerance: float,
    chunk_size: int | None = None,
    names: tuple[str, ...] = INPUTS,
    criterion: SLRLoss | None = None,
    update: bool | None = False,
) -> tuple[SLRLoss, Answer]:
    """The value, and the gradients with respect to the features named, against the float64 oracle's."""
    ours, reference = batch.leaves(names), batch.leaves(names, dtype=torch.float64)
    criterion = criterion or make_criterion(batch, chunk_size, **settings)
    loss = call(criterion, ours, update)
    answer = ask(reference, **settings)
    assert loss.shape == ()
    assert loss.dtype == batch.out0.dtype
    assert_close(loss, answer.loss, tolerance, ("loss", settings))
    pairs = zip(gradients(loss, ours), gradients(answer.loss, reference), strict=True)
    steep = max(1.0, 0.2 / abs(settings["temperature"]))  # a gradient is 1 / tau times a difference of unit vectors
    for number, (got, expected) in enumerate(pairs):
        assert_close(got, expected, tolerance * steep, (f"gradient {number} of {names}", settings))
    return criterion, answer


# ------------------------------------------------------------------------------------------------ against the equations


@pytest.mark.parametrize(("mode", "s", "d", "dtype"), pairwise(MODES, (1, 2, 5, 33), (1, 3, 64), TOLERANCES))
def test_value_and_gradients_equal_the_equations_at_every_shape(mode, s, d, dtype):
    for n in (1, 7, 40) if mode in QUEUE_MODES else (0,):
        batch = batch_of(mode, s, d, n, dtype=dtype)
        for settings in random.Random(f"{mode} {s} {d} {n}").sample(SETTINGS, 2):
            assert_equals_oracle(batch, settings_of(mode, **settings), TOLERANCES[dtype])


@PRECISIONS
@pytest.mark.parametrize("mode", MODES)
def test_value_gradients_and_stats_equal_the_equations_at_every_setting(mode, dtype):
    batch, tolerance = batch_of(mode, 5, 3, dtype=dtype), TOLERANCES[dtype]
    for values in pairwise(TEMPERATURES, SHARPENINGS, CONFIDENCES, REFINED_WEIGHTS):
        settings = dict(zip(SETTINGS[0], values, strict=True))
        criterion, answer = assert_equals_oracle(batch, settings_of(mode, **settings), tolerance)
        expected = answer.stats(settings["confidence"])
        assert criterion.stats.keys() == expected.keys()
        if batch.estimator is not None and settings["confidence"]:  # means of the keys do not tell the entropy
            expected["label_entropy"] = math.nan
        for name, value in criterion.stats.items():
            assert not value.requires_grad
            assert value.item() == pytest.approx(expected[name], abs=tolerance, nan_ok=True), (name, settings)


WHICH = [(), ("out0",), ("out1",), ("mixed",), ("negatives",), ("out0", "mixed"), ("out1", "mixed")]
WHICH += [("out0", "negatives")]


@pytest.mark.parametrize(
    ("mode", "names"),
    [
        (mode, names)
        for mode, names in itertools.product(MODES, WHICH)
        if (MODES[mode].crops or "mixed" not in names) and (MODES[mode].negatives or "negatives" not in names)
    ],
)
def test_gradients_do_not_depend_on_which_inputs_require_them(mode, names):
    assert_equals_oracle(batch_of(mode, 5, 3), settings_of(mode, **SOFT), 1e-10, names=names)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_scale_with_the_upstream_gradient(mode):
    batch = batch_of(mode, 5, 3).leaves()
    loss = call(make_criterion(batch, **settings_of(mode, **SOFT)), batch)
    answer = ask(batch, **settings_of(mode, **SOFT))
    for got, expected in zip(gradients(-2.5 * loss, batch), gradients(answer.loss, batch), strict=True):
        assert_close(got, -2.5 * expected, 1e-10, mode)


@pytest.mark.parametrize("chunk_size", [1, 4, 1000])
@pytest.mark.parametrize("mode", MODES)
def test_every_chunk_size_equals_the_equations(mode, chunk_size):
    for s, n in ((5, 7), (9, 4), (1, 3)):
        assert_equals_oracle(batch_of(mode, s, 3, n), settings_of(mode, **SOFT), 1e-10, chunk_size)


@pytest.mark.parametrize(
    ("mode", "s", "n", "dtype"),
    [
        ("symmetric", 600, 0, torch.float64),
        ("symmetric", 600, 0, torch.float32),
        ("queue", 1100, 7, torch.float64),
        ("own_positive", 700, 9, torch.float64),
        ("queue_mixed", 400, 300, torch.float64),
        ("symmetric_mixed", 600, 0, torch.float64),
        ("queue", 3, 9001, torch.float64),
        ("queue", 3, 9001, torch.float32),
        ("own_positive", 3, 9001, torch.float64),
        ("symmetric_negatives", 600, 0, torch.float64),
        ("queue_estimator", 1100, 7, torch.float64),
        ("queue_estimator", 3, 9001, torch.float32),
        ("symmetric_estimator", 600, 0, torch.float64),
    ],
)
def test_more_rows_or_keys_than_one_tile_equal_the_equations(mode, s, n, dtype):
    assert_equals_oracle(batch_of(mode, s, 3, n, dtype=dtype), settings_of(mode, **SOFT), TOLERANCES[dtype])


@pytest.mark.parametrize("in_batch_keys", [True, False])
def test_without_queue_in_batch_keys_changes_nothing(in_batch_keys):
    batch = make_batch(5, 3)
    assert_equals_oracle(batch, {**SOFT, "in_batch_keys": in_batch_keys}, 1e-10)


@pytest.mark.parametrize(
    ("mode", "s", "n"),
    [*((mode, 5, 7) for mode in QUEUE_MODES), *itertools.product(["queue", "queue_estimator"], [7, 4], [3, 4])],
)
def test_negatives_are_the_queue_as_it_was_before_the_call(mode, s, n):
    batch = batch_of(mode, s, 3, n)
    criterion = make_criterion(batch, **settings_of(mode, **SOFT))
    rings = [(list(batch.bank), "out1", "bank")]
    if batch.estimator is not None:
        rings.append((list(batch.estimator_bank), "estimator", "estimator_bank"))
    for seed in range(4):  # the gradients are taken after the queue has moved on
        batch = batch_of(mode, s, 3, n, seed=seed).with_queue_of(criterion)
        assert_equals_oracle(batch, settings_of(mode, **SOFT), 1e-10, criterion=criterion, update=True)
        for queue, entering, name in rings:
            queue[:] = [*queue, *F.normalize(getattr(batch, entering), dim=1).float()][-n:]
            ring = getattr(criterion.memory_bank, name).roll(-int(criterion.memory_bank.bank_ptr), 0)
            assert torch.equal(ring, torch.stack(queue)), name


@pytest.mark.parametrize("mode", MODES)
def test_a_schedule_sets_the_confidence_of_each_step(mode):
    start, end, steps = 0.5, 3.0, 3
    batch = batch_of(mode, 5, 3)
    for schedule in (CosineConfidence(start, end, steps), lambda t: float(t) + 0.25):
        criterion = make_criterion(batch, **settings_of(mode, **{**SOFT, "confidence": schedule}))
        for t in range(5):
            now = batch.with_queue_of(criterion)
            cosine = math.cos(math.pi * min(t / steps, 1))
            mu = end - (end - start) * (cosine + 1) / 2 if isinstance(schedule, CosineConfidence) else t + 0.25
            settings = settings_of(mode, **{**SOFT, "confidence": mu})
            assert_equals_oracle(now, settings, 1e-10, criterion=criterion, update=True)
            assert criterion.stats["mu"].item() == pytest.approx(mu)
            assert criterion.step == t + 1


@pytest.mark.parametrize(
    ("mode", "shape", "dtype"), pairwise(LABEL_MODES, [(1, 3, 1), (2, 1, 7), (5, 3, 40), (33, 64, 7)], TOLERANCES)
)
def test_labels_equal_equation_5(mode, shape, dtype):
    s, d, n = shape
    batch = batch_of(mode, s, d, n, dtype=dtype)
    reference = batch.leaves((), dtype=torch.float64)
    for settings in random.Random(f"{mode} {s}").sample(SETTINGS, 8):
        settings_ = settings_of(mode, **settings)
        criterion = make_criterion(batch, **settings_)
        got = criterion.labels(batch.out0, batch.out1, negatives=batch.negatives, estimator=batch.estimator)
        expected = dense_labels(ask(reference, **settings_), MODES[mode].in_batch_keys)
        assert got.shape == expected.shape
        assert got.dtype == dtype
        assert_close(got, expected, TOLERANCES[dtype], settings)


def test_labels_of_one_query_worked_by_hand():
    # tau tau' = 1. The estimator (1, 0) has cosines 1, 0 and -1 with its own key and with the two keys of the queue.
    criterion = SLRLoss(temperature=2.0, memory_bank_size=(2, 2), sharpening=0.5, confidence=3.0)
    criterion.memory_bank.bank.copy_(torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))
    total, rest = math.e + 1 + 1 / math.e, 1 + 1 / math.e
    p = torch.tensor([math.e, 1, 1 / math.e]) / total
    q = torch.tensor([0, 1, 1 / math.e]) / rest
    z = 1 + 3 * math.e / total + 3 / rest
    expected = torch.tensor([1.0, 0, 0]) / z + 3 * math.e / total / z * p + 3 / rest / z * q
    got = criterion.labels(torch.tensor([[0.3, 0.4]]), torch.tensor([[5.0, 0.0]]))
    torch.testing.assert_close(got, expected[None])


# --------------------------------------------------------------------------------------------------- finite differences


@pytest.mark.parametrize(
    ("mode", "weight"), [*((mode, 0.4) for mode in MODES), ("queue_mixed", 0.0), ("queue_mixed", 1.0)]
)
def test_gradcheck_of_all_inputs_with_one_hot_labels(mode, weight):
    gradcheck(mode, INPUTS, confidence=0.0, refined_weight=weight)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in ("symmetric", "symmetric_negatives")])
def test_gradcheck_of_queries_with_refined_labels(mode):
    # Labels move with out0 where both views are compared with both, unless mixed queries or other features estimate.
    gradcheck(mode, ("out0", "mixed"), confidence=2.0, refined_weight=0.4)


@pytest.mark.parametrize("mode", ESTIMATOR_MODES)
def test_gradcheck_of_all_inputs_where_other_features_estimate_the_labels(mode):
    gradcheck(mode, INPUTS, confidence=2.0, refined_weight=0.4)


def gradcheck(mode: str, names: tuple[str, ...], **settings: float) -> None:
    batch = batch_of(mode, 3, 2, 4, seed=3).leaves(names)
    criterion = make_criterion(batch, **settings_of(mode, temperature=0.7, sharpening=0.6, **settings))

    def loss_of(out0, out1, *others):
        crops = len(batch.mixed)
        negatives = others[crops] if len(others) > crops else None
        return call(criterion, batch._replace(out0=out0, out1=out1, mixed=list(others[:crops]), negatives=negatives))

    assert torch.autograd.gradcheck(loss_of, batch.features())


# ------------------------------------------------------------------------------------------------------ against lightly


@pytest.mark.parametrize(
    ("s", "n", "temperature"),
    [(8, 24, 0.07), (8, 8, 0.5), (4, 16, 0.07), (6, 0, 0.07), (2, 0, 0.5), (8, 24, -1.0), (6, 0, -1.0)],
)
def test_without_confidence_equals_ntxentloss(s, n, temperature):
    torch.manual_seed(0)
    theirs = lightly.loss.NTXentLoss(temperature, (n, 16) if n else 0)
    ours = SLRLoss(temperature, (n, 16) if n else 0, confidence=0, in_batch_keys=False)
    if n:
        ours.memory_bank.bank.copy_(theirs.memory_bank.bank)
    for step in range(2 + (n // s if n else 0)):  # once round the ring and on
        batch = make_batch(s, 16, dtype=torch.float32, seed=step)
        runs = []
        for criterion in (ours, theirs):
            leaves = batch.leaves()
            loss = criterion(leaves.out0, leaves.out1)
            runs.append((loss.detach(), *gradients(loss, leaves)))
        for name, got, expected in zip(("loss", "out0", "out1"), *runs, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
        if n:
            torch.testing.assert_close(ours.memory_bank.bank, theirs.memory_bank.bank, atol=1e-7, rtol=0)
            assert torch.equal(ours.memory_bank.bank_ptr, theirs.memory_bank.bank_ptr)


# -------------------------------------------------------------------------------------------------------- low precision

LOW = {
    "bfloat16": (torch.bfloat16, nullcontext),
    "float16": (torch.float16, nullcontext),
    "autocast": (torch.float32, lambda: torch.autocast("cpu", torch.bfloat16)),
    "bfloat16_in_autocast": (torch.bfloat16, lambda: torch.autocast("cpu", torch.bfloat16)),
}


@pytest.mark.parametrize(
    ("low", "mode", "temperature"), pairwise(LOW, ["queue", "symmetric", "queue_mixed"], [0.07, 0.2, 1.0])
)
def test_low_precision_errs_no_more_than_the_dense_form_in_that_precision(low, mode, temperature):
    dtype, context = LOW[low]
    settings = {**SOFT, "temperature": temperature}
    for seed in range(3):
        batch = batch_of(mode, 16, 24, 64, dtype=dtype, seed=seed)
        reference = batch.leaves(dtype=torch.float64)
        exact = ask(reference, **settings).loss
        truth = [exact.detach(), *gradients(exact, reference)]
        errors = []
        for run in (ours_of, dense_of):
            leaves = batch.leaves()
            with context():
                loss = run(leaves, settings)
            results = [loss.detach(), *gradients(loss, leaves)]
            assert all(value.isfinite().all() for value in results)
            errors.append([(got.double() - want).norm().item() for got, want in zip(results, truth, strict=True)])
            if run is ours_of:
                assert loss.dtype == torch.float32
        for ours, dense_form in zip(*errors, strict=True):
            assert ours <= 1.01 * dense_form + 1e-6, (seed, errors)


@pytest.mark.parametrize(
    ("mode", "low"),
    [*itertools.product(MODES, ["float16", "bfloat16_in_autocast"]), ("queue", "bfloat16"), ("queue", "autocast")],
)
def test_low_precision_is_computed_in_float32_in_every_mode(mode, low):
    dtype, context = LOW[low]
    batch = batch_of(mode, 6, 8, dtype=dtype)
    leaves, reference = batch.leaves(), batch.leaves(dtype=torch.float64)
    settings = settings_of(mode, **SOFT)
    criterion = make_criterion(batch, **settings)
    with context():
        loss = call(criterion, leaves)
    assert loss.dtype == torch.float32
    answer = ask(reference, **settings)
    assert_close(loss, answer.loss, 1e-5, "loss")
    rounding = max(1e-5, torch.finfo(dtype).eps)  # a gradient has its input's dtype
    for got, expected in zip(gradients(loss, leaves), gradients(answer.loss, reference), strict=True):
        assert got.dtype == dtype
        assert_close(got, expected, rounding, "gradient")
    assert all(value.dtype == torch.float32 for value in criterion.stats.values())


@pytest.mark.parametrize("mode", MODES)
def test_inputs_of_several_dtypes_meet_in_the_widest_of_the_two_views(mode):
    batch = batch_of(mode, 6, 8, dtype=torch.bfloat16)
    for views in itertools.permutations((torch.bfloat16, torch.float32, torch.float64), 2):
        leaves = batch._replace(out0=batch.out0.to(views[0]), out1=batch.out1.to(views[1])).leaves()
        loss = call(make_criterion(batch, **settings_of(mode, **SOFT)), leaves)
        widest = max(views, key=lambda dtype: dtype.itemsize)
        assert loss.dtype == widest
        reference = ask(leaves.leaves((), dtype=torch.float64), **settings_of(mode, **SOFT)).loss
        assert_close(loss, reference, 1e-10 if widest == torch.float64 else 1e-5, views)
        assert all(g.dtype == leaf.dtype for g, leaf in zip(gradients(loss, leaves), leaves.features(), strict=True))


def ours_of(batch: Batch, settings: dict[str, float]) -> torch.Tensor:
    return call(make_criterion(batch, **settings), batch)


def dense_of(batch: Batch, settings: dict[str, float]) -> torch.Tensor:
    if batch.bank is None:
        return dense.symmetric_slr_loss(batch.out0, batch.out1, **settings)
    mixed = [Mix(theta.to(batch.out0), partner) for theta, partner in batch.mix]
    return dense.slr_loss(batch.out0, batch.out1, batch.bank, *batch.mixed, *mixed, **settings)


# -------------------------------------------------------------------------------------------------- degenerate features

KINDS = ("all_equal", "positives_in_queue", "duplicate_positives", "opposite")
SCALES = {"scale_1e4": 1e4, "scale_1e-5": 1e-5, "scale_1e-8": 1e-8}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def degenerate(batch: Batch, kind: str) -> Batch:
    """A batch with the features of ``kind`` in place of its own."""
    out0, out1, mixed, _, bank, negatives, estimator, estimator_bank, *_ = batch
    features = batch.features()

    def replaced(values: list[torch.Tensor], **others: object) -> Batch:
        """The batch with these in place of what may be trained."""
        crops, rest = values[2 : 2 + len(mixed)], values[2 + len(mixed) :]
        return batch._replace(
            out0=values[0], out1=values[1], mixed=crops, negatives=rest[0] if rest else negatives, **others
        )

    def like(table: torch.Tensor | None, row: torch.Tensor) -> torch.Tensor | None:
        """The row, of unit length, in place of all rows."""
        return None if table is None else F.normalize(row.double(), dim=1).to(table).expand_as(table)

    if kind == "all_equal":
        same = {"bank": like(bank, out0[:1])}
        if estimator is not None:
            same |= {"estimator": like(estimator, estimator[:1]), "estimator_bank": like(estimator_bank, estimator[:1])}
        return replaced([like(value, out0[:1]) for value in features], **same)
    if kind == "positives_in_queue":
        keys = None if bank is None else F.normalize(out1.float(), dim=1).repeat(len(bank), 1)[: len(bank)]
        return batch._replace(bank=keys, negatives=None if negatives is None else out1[: len(negatives)])
    if kind == "duplicate_positives":
        return batch._replace(out1=out1[:1].expand_as(out1))
    if kind == "opposite":
        opposite = [out0, *(-out0[: len(value)] for value in features[1:])]
        return replaced(opposite, bank=None if bank is None else -bank)
    unit = [(F.normalize(value.double(), dim=1) * SCALES[kind]).to(value) for value in features]
    scaled = None if estimator is None else (F.normalize(estimator.double(), dim=1) * SCALES[kind]).to(estimator)
    return replaced(unit, estimator=scaled)


def known_stats(criterion: SLRLoss, batch: Batch) -> list[torch.Tensor]:
    """All but the entropy that means of the keys do not tell where other features estimate."""
    return [v for name, v in criterion.stats.items() if batch.estimator is None or name != "label_entropy"]


@pytest.mark.parametrize(
    ("mode", "kind", "dtype"),
    pairwise(
        MODES,
        (*KINDS, *SCALES),
        DTYPES,
        # Below float16's smallest number, or with gradients beyond its largest.
        allowed=lambda mode, kind, dtype: not (dtype == torch.float16 and SCALES.get(kind, 1) < 1),
    ),
)
@pytest.mark.filterwarnings("ignore:the features given as estimator")
def test_degenerate_features_give_the_equations_value_and_finite_gradients(mode, kind, dtype):
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    batch = degenerate(batch_of(mode, 6, 8, dtype=dtype), kind)
    for temperature in (0.05, 1.0):
        settings = settings_of(mode, **{**SOFT, "temperature": temperature})
        leaves = batch.leaves()
        criterion = make_criterion(batch, **settings)
        loss = call(criterion, leaves)
        assert_close(loss.detach(), ask(batch.leaves((), dtype=torch.float64), **settings).loss, tolerance, settings)
        assert all(value.isfinite().all() for value in [*gradients(loss, leaves), *known_stats(criterion, batch)])


@pytest.mark.parametrize("count", [1, 4], ids=["one", "all"])
@pytest.mark.parametrize("mode", MODES)
def test_zero_features_give_the_equations_value_and_finite_gradients(mode, count):
    batch = batch_of(mode, 4, 3, dtype=torch.float32)
    for value in batch.features():
        value[:count] = 0
    leaves, settings = batch.leaves(), settings_of(mode, **SOFT)
    loss = call(make_criterion(batch, **settings), leaves)
    assert_close(loss, ask(batch.leaves((), dtype=torch.float64), **settings).loss, 1e-5, count)
    assert all(gradient.isfinite().all() for gradient in gradients(loss, leaves))
