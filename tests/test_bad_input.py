"""Bad input raises an error that names the argument, and leaves queue and step as they were."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from _oracle import make_batch, make_criterion
from _oracle import one_thread as one_thread
from _pairwise import pairwise
from torch.autograd import forward_ad

from slr_plugin import CosineConfidence, Mix, MomentumMixup, SLRLoss

S, D, N = 4, 3, 5
NAN, INF = float("nan"), float("inf")
GOOD = make_batch(S, D, N, 2, dtype=torch.float32)
OUT0, OUT1, (CROP, CROP2), (MIX, MIX2), *_ = GOOD


def names(argument: str) -> str:
    """A pattern for a message that names the argument."""
    return rf"(?<![\w.]){re.escape(argument)}(?!\w)"


def case(name: str, error: type[Exception], argument: str, *values: Any, **options: Any) -> Any:
    return pytest.param(error, names(argument), values, options, id=name)


def raises_and_keeps_state(criterion: SLRLoss, error: Any, match: str, call: Callable[[], object]) -> None:
    before = {name: value.clone() for name, value in criterion.state_dict().items()}
    with pytest.raises(error, match=match):
        call()
    after = criterion.state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert after[name].dtype == value.dtype
        assert torch.equal(after[name], value), f"{name} has changed"


def used(kind: str, **settings: Any) -> SLRLoss:
    """A loss that has advanced once: its pointer and its step are not 0."""
    settings = {"in_batch_keys": kind != "own_positive", **settings}
    criterion = make_criterion(GOOD if kind != "no_queue" else GOOD._replace(bank=None), **settings)
    criterion(OUT0[:3], OUT1[:3], update=True)
    assert criterion.step == 1
    return criterion


# --------------------------------------------------------------------------------------------------------- constructors

CONSTRUCTOR = [
    case("temperature_0", ValueError, "temperature", temperature=0),
    case("temperature_too_small", ValueError, "temperature", temperature=-1e-9),
    case("temperature_nan", ValueError, "temperature", temperature=NAN),
    case("temperature_inf", ValueError, "temperature", temperature=INF),
    case("temperature_str", TypeError, "temperature", temperature="0.2"),
    case("temperature_none", TypeError, "temperature", temperature=None),
    case("sharpening_0", ValueError, "sharpening", sharpening=0),
    case("sharpening_above_1", ValueError, "sharpening", sharpening=1.5),
    case("sharpening_negative", ValueError, "sharpening", sharpening=-1),
    case("sharpening_nan", ValueError, "sharpening", sharpening=NAN),
    case("sharpening_list", TypeError, "sharpening", sharpening=[0.5]),
    case("confidence_negative", ValueError, "confidence", confidence=-0.5),
    case("confidence_nan", ValueError, "confidence", confidence=NAN),
    case("confidence_inf", ValueError, "confidence", confidence=INF),
    case("confidence_str", TypeError, "confidence", confidence="cosine"),
    case("confidence_none", TypeError, "confidence", confidence=None),
    case("refined_weight_above_1", ValueError, "refined_weight", refined_weight=2),
    case("refined_weight_negative", ValueError, "refined_weight", refined_weight=-0.1),
    case("refined_weight_nan", ValueError, "refined_weight", refined_weight=NAN),
    case("refined_weight_str", TypeError, "refined_weight", refined_weight="half"),
    case("queue_negative", ValueError, "memory_bank_size", memory_bank_size=-1),
    case("queue_negative_length", ValueError, "memory_bank_size", memory_bank_size=(-4, 8)),
    case("queue_negative_dim", ValueError, "memory_bank_size", memory_bank_size=(4, -8)),
    case("queue_without_dim", ValueError, "memory_bank_size", memory_bank_size=(4,)),
    case("queue_of_dim_0", ValueError, "memory_bank_size", memory_bank_size=(4, 0)),
    case("queue_3d", ValueError, "memory_bank_size", memory_bank_size=(4, 5, 6)),
    case("queue_empty_tuple", ValueError, "memory_bank_size", memory_bank_size=()),
    case("queue_float", TypeError, "memory_bank_size", memory_bank_size=4.0),
    case("queue_float_dim", TypeError, "memory_bank_size", memory_bank_size=(4, 8.0)),
    case("queue_bool", TypeError, "memory_bank_size", memory_bank_size=True),
    case("queue_str", TypeError, "memory_bank_size", memory_bank_size="4096"),
    case("queue_none", TypeError, "memory_bank_size", memory_bank_size=None),
    case("gather_int", TypeError, "gather_distributed", gather_distributed=1),
    case("gather_str", TypeError, "gather_distributed", gather_distributed="no"),
    case("in_batch_keys_int", TypeError, "in_batch_keys", in_batch_keys=0),
    case("in_batch_keys_none", TypeError, "in_batch_keys", in_batch_keys=None),
]


@pytest.mark.parametrize(("error", "match", "values", "options"), CONSTRUCTOR)
def test_the_loss_refuses_bad_settings(error, match, values, options):
    with pytest.raises(error, match=match):
        SLRLoss(*values, **options)


@pytest.mark.parametrize(
    ("error", "match", "values", "options"),
    [
        case("kappa_0", ValueError, "kappa", 0),
        case("kappa_negative", ValueError, "kappa", -1.0),
        case("kappa_nan", ValueError, "kappa", NAN),
        case("kappa_inf", ValueError, "kappa", INF),
        case("kappa_str", TypeError, "kappa", "2"),
        case("mode_unknown", ValueError, "mode", mode="x"),
        case("mode_none", ValueError, "mode", mode=None),
        case("generator_int", TypeError, "generator", generator=3),
    ],
)
def test_the_mixup_refuses_bad_settings(error, match, values, options):
    with pytest.raises(error, match=match):
        MomentumMixup(*values, **options)


@pytest.mark.parametrize(
    ("error", "match", "values", "options"),
    [
        case("start_negative", ValueError, "start", -1, 1, 10),
        case("start_nan", ValueError, "start", NAN, 1, 10),
        case("start_str", TypeError, "start", "0", 1, 10),
        case("end_negative", ValueError, "end", 0, -1, 10),
        case("end_inf", ValueError, "end", 0, INF, 10),
        case("total_steps_0", ValueError, "total_steps", 0, 1, 0),
        case("total_steps_negative", ValueError, "total_steps", 0, 1, -3),
        case("total_steps_float", TypeError, "total_steps", 0, 1, 1.5),
        case("total_steps_bool", TypeError, "total_steps", 0, 1, True),
    ],
)
def test_the_schedule_refuses_bad_settings(error, match, values, options):
    with pytest.raises(error, match=match):
        CosineConfidence(*values, **options)


def test_the_schedule_refuses_a_negative_step():
    with pytest.raises(ValueError, match=names("step")):
        CosineConfidence(0, 1, 10)(-1)


# -------------------------------------------------------------------------------------------------- the loss's features

NOT_FEATURES = {
    "1d": (ValueError, OUT0[0]),
    "3d": (ValueError, OUT0[None]),
    "0d": (ValueError, torch.tensor(1.0)),
    "empty_batch": (ValueError, OUT0[:0]),
    "dimension_0": (ValueError, OUT0[:, :0]),
    "int": (TypeError, OUT0.long()),
    "bool": (TypeError, OUT0 > 0),
    "complex": (TypeError, OUT0.to(torch.complex64)),
    "none": (TypeError, None),
    "numpy": (TypeError, OUT0.numpy()),
    "list": (TypeError, OUT0.tolist()),
}
PAIRS = [
    *(case(f"out0_{name}", error, "out0", value, OUT1) for name, (error, value) in NOT_FEATURES.items()),
    *(case(f"out1_{name}", error, "out1", OUT0, value) for name, (error, value) in NOT_FEATURES.items()),
    *(case(f"both_{name}", error, "out0", value, value) for name, (error, value) in NOT_FEATURES.items()),
    case("batches_differ", ValueError, "out1", OUT0, OUT1[1:]),
    case("dimensions_differ", ValueError, "out1", OUT0, OUT1[:, 1:]),
    case("broadcastable", ValueError, "out1", OUT0, OUT1[:1]),
    case("device_of_out0", ValueError, "out0", OUT0.to("meta"), OUT1),
    case("device_of_out1", ValueError, "out1", OUT0, OUT1.to("meta")),
]
ALL_KINDS = ("queue", "own_positive", "no_queue")
KINDS = pytest.mark.parametrize("kind", ALL_KINDS)


@pytest.mark.parametrize("method", ["forward", "labels"])
@pytest.mark.parametrize(("error", "match", "values", "options"), PAIRS)
def test_the_loss_and_its_labels_refuse_bad_features(method, error, match, values, options):
    criterion = used("queue")
    options = {**options, "update": True} if method == "forward" else options
    raises_and_keeps_state(criterion, error, match, lambda: getattr(criterion, method)(*values, **options))


@pytest.mark.parametrize(
    ("kind", "method", "dim"), pairwise(["queue", "own_positive"], ["forward", "labels"], [D - 1, 2 * D])
)
def test_a_dimension_other_than_the_queues_is_refused_with_both_shapes(kind, method, dim):
    criterion = used(kind)
    out = torch.ones(S, dim)
    shapes = rf"out0.*\({S}, {dim}\).*\({N}, {D}\).*memory_bank_size=\({N}, {dim}\)"
    raises_and_keeps_state(criterion, ValueError, shapes, lambda: getattr(criterion, method)(out, out))


@pytest.mark.parametrize("kind", ["own_positive", "no_queue"])
@pytest.mark.parametrize("method", ["forward", "labels"])
def test_so_do_losses_of_other_kinds(kind, method):
    criterion = used(kind)
    for bad in (OUT1[1:], OUT1.long(), None):
        match = names("out1")
        raises_and_keeps_state(
            criterion, (ValueError, TypeError), match, lambda b=bad: getattr(criterion, method)(OUT0, b)
        )


@pytest.mark.parametrize("bad", [OUT1[1:], OUT1[:, 1:], OUT1[None]], ids=["batch", "dimension", "3d"])
def test_a_shape_error_gives_the_shape_that_came(bad):
    with pytest.raises(ValueError, match=re.escape(str(tuple(bad.shape)))):
        SLRLoss()(OUT0, bad)


def test_a_queue_without_a_dimension_does_not_take_it_from_a_bad_batch():
    with pytest.warns(UserWarning, match="memory_bank_size"):
        criterion = SLRLoss(memory_bank_size=N)
    for argument, *values in (
        ("out1", OUT0, OUT1[1:]),
        ("out1", OUT0, None),
        ("mix", OUT0, OUT1, CROP),
        ("mix.theta", OUT0, OUT1, CROP, Mix(MIX.theta + 1, MIX.partner)),
    ):
        raises_and_keeps_state(
            criterion, (ValueError, TypeError), names(argument), lambda values=values: criterion(*values, update=True)
        )
    criterion(OUT0[:, 1:], OUT1[:, 1:], update=True)
    assert criterion.memory_bank.bank.shape == (N, D - 1)


@pytest.mark.parametrize("update", ["yes", 1, 0.0, torch.tensor(True)], ids=str)
def test_update_must_be_a_bool(update):
    criterion = used("queue")
    raises_and_keeps_state(criterion, TypeError, names("update"), lambda: criterion(OUT0, OUT1, update=update))


# -------------------------------------------------------------------------------------------------------- mixed queries

THETA, PARTNER = MIX
BAD_THETA = {
    "too_short": (ValueError, THETA[1:]),
    "too_long": (ValueError, torch.ones(S + 1)),
    "single": (ValueError, THETA[:1]),
    "0d": (ValueError, THETA[0]),
    "column": (ValueError, THETA[:, None]),
    "int": (TypeError, torch.ones(S, dtype=torch.long)),
    "bool": (TypeError, THETA > 0),
    "complex": (TypeError, THETA.to(torch.complex64)),
    "negative": (ValueError, THETA - 1.5),
    "above_1": (ValueError, torch.full((S,), 1.01)),
    "nan": (ValueError, torch.full((S,), NAN)),
}
BAD_PARTNER = {
    "too_short": (ValueError, PARTNER[1:]),
    "0d": (ValueError, PARTNER[0]),
    "column": (ValueError, PARTNER[:, None]),
    "float": (TypeError, PARTNER.float()),
    "bool": (TypeError, PARTNER > 0),
    "s": (ValueError, torch.full((S,), S)),
    "negative": (ValueError, torch.tensor([0, 1, -1, 2])),
}
BAD_MIX = [
    case("mixed_without_mix", ValueError, "mix", CROP, None),
    case("mix_without_mixed", ValueError, "mixed", None, MIX),
    *(
        case(f"mixed_{name}", error, "mixed", value, MIX)
        for name, (error, value) in NOT_FEATURES.items()
        if name not in ("none", "list")
    ),
    case("mixed_other_batch", ValueError, "mixed", CROP[1:], MIX),
    case("mixed_other_dimension", ValueError, "mixed", CROP[:, 1:], MIX),
    case("mixed_other_device", ValueError, "mixed", CROP.to("meta"), MIX),
    case("crops_stacked", ValueError, "mixed", torch.stack([CROP, CROP2]), MIX),
    case("second_crop_other_batch", ValueError, "mixed[1]", [CROP, CROP2[1:]], [MIX, MIX2]),
    case("second_crop_int", TypeError, "mixed[1]", [CROP, CROP2.long()], [MIX, MIX2]),
    case("second_crop_none", TypeError, "mixed[1]", [CROP, None], [MIX, MIX2]),
    case("more_crops_than_mixes", ValueError, "mixed", [CROP, CROP2], [MIX]),
    case("more_mixes_than_crops", ValueError, "mix", [CROP], [MIX, MIX2]),
    case("empty_lists", ValueError, "mixed", [], []),
    case("list_with_one_mix", ValueError, "mixed", [CROP], MIX),
    case("two_crops_with_one_mix", ValueError, "mixed", [CROP, CROP2], MIX),
    case("tensor_with_list_of_mixes", ValueError, "mixed", CROP, [MIX]),
    case("mixed_str", TypeError, "mixed", "crop", MIX),
    case("mixed_dict", TypeError, "mixed", {"crop": CROP}, [MIX]),
    case("mix_number", TypeError, "mix", CROP, 0.5),
    case("mix_theta_alone", TypeError, "mix", CROP, THETA),
    case("mix_of_numbers", TypeError, "mix", CROP, (0.5, 1)),
    case("mix_of_none", TypeError, "mix", CROP, Mix(None, None)),
    case("mix_of_lists", TypeError, "mix", CROP, Mix(THETA.tolist(), PARTNER.tolist())),
    case("mix_of_numpy", TypeError, "mix", CROP, Mix(THETA.numpy(), PARTNER.numpy())),
    case("mixed_list_of_lists", TypeError, "mixed[0]", OUT0.tolist(), [MIX] * S),
    case("mix_of_three", ValueError, "mix", CROP, (THETA, PARTNER, PARTNER)),
    case("mix_swapped", TypeError, "mix.theta", CROP, (PARTNER, THETA)),
    *(case(f"theta_{n}", error, "mix.theta", CROP, Mix(v, PARTNER)) for n, (error, v) in BAD_THETA.items()),
    *(case(f"partner_{n}", error, "mix.partner", CROP, Mix(THETA, v)) for n, (error, v) in BAD_PARTNER.items()),
    *(
        case(f"second_partner_{n}", error, "mix[1].partner", [CROP, CROP2], [MIX, Mix(THETA, v)])
        for n, (error, v) in BAD_PARTNER.items()
    ),
]


@pytest.mark.parametrize(("error", "match", "values", "options"), BAD_MIX)
def test_the_loss_refuses_bad_mixed_queries(error, match, values, options):
    criterion = used("queue")
    raises_and_keeps_state(criterion, error, match, lambda: criterion(OUT0, OUT1, *values, **options, update=True))


CLASSES = torch.tensor([0, 1, 0, 1])


@pytest.mark.parametrize(
    ("argument", "values"),
    [
        ("out1", (OUT0, CLASSES)),
        ("out1", (OUT0, CLASSES[:, None])),
        ("out1", (OUT0, torch.eye(S).long())),
        ("mixed", (OUT0, OUT1, CLASSES)),
        ("mixed", (OUT0, OUT1, CLASSES, CLASSES)),
    ],
    ids=["as_keys", "as_a_column", "one_hot", "third", "third_and_fourth"],
)
def test_class_labels_are_told_that_the_loss_takes_none(argument, values):
    criterion = used("queue")
    message = rf"^{argument} must be features.* got torch.int64 of shape .*; the loss takes no class labels"
    raises_and_keeps_state(criterion, TypeError, message, lambda: criterion(*values, update=True))


@pytest.mark.parametrize("queue", [0, (N, D)], ids=["no_queue", "queue"])
def test_mixed_queries_need_in_batch_keys(queue):
    criterion = SLRLoss(memory_bank_size=queue, in_batch_keys=False)
    raises_and_keeps_state(
        criterion, ValueError, names("in_batch_keys"), lambda: criterion(OUT0, OUT1, CROP, MIX, update=True)
    )


@pytest.mark.parametrize("method", ["forward", "labels"])
@pytest.mark.parametrize(
    ("error", "value"),
    [(ValueError, -1), (ValueError, NAN), (ValueError, INF), (TypeError, None), (TypeError, "1"), (TypeError, True)],
    ids=str,
)
def test_a_schedule_that_returns_no_confidence_is_refused(method, error, value):
    criterion = used("queue", confidence=lambda step: 1.0 if step == 0 else value)
    raises_and_keeps_state(criterion, error, names("confidence"), lambda: getattr(criterion, method)(OUT0, OUT1))


@KINDS
def test_an_error_inside_a_schedule_passes_through(kind):
    criterion = used(kind, confidence=[1.0].__getitem__)
    raises_and_keeps_state(criterion, IndexError, "index", lambda: criterion(OUT0, OUT1, update=True))


# ------------------------------------------------------------------------------------------------------- momentum mixup

IMAGES = torch.rand(S, 3, 2, 2)
NOT_IMAGES = {
    "uint8": (TypeError, (255 * IMAGES).to(torch.uint8)),
    "complex": (TypeError, IMAGES.to(torch.complex64)),
    "none": (TypeError, None),
    "numpy": (TypeError, IMAGES.numpy()),
    "list": (TypeError, IMAGES.tolist()),
}


@pytest.mark.parametrize(
    ("error", "match", "values", "options"),
    [
        *(case(f"queries_{n}", error, "queries", v, IMAGES) for n, (error, v) in NOT_IMAGES.items()),
        *(case(f"positives_{n}", error, "positives", IMAGES, v) for n, (error, v) in NOT_IMAGES.items()),
        case("batches_differ", ValueError, "positives", IMAGES, IMAGES[1:]),
        case("crop_sizes_differ", ValueError, "positives", IMAGES, IMAGES[..., 1:]),
        case("dtypes_differ", ValueError, "positives", IMAGES, IMAGES.double()),
        case("devices_differ", ValueError, "positives", IMAGES, IMAGES.to("meta")),
        case("0d", ValueError, "queries", torch.tensor(1.0), torch.tensor(1.0)),
        case("empty", ValueError, "queries", IMAGES[:0], IMAGES[:0]),
        *(case(f"theta_{n}", error, "theta", IMAGES, IMAGES, v) for n, (error, v) in BAD_THETA.items() if n != "0d"),
        case("theta_number_above_1", ValueError, "theta", IMAGES, IMAGES, 1.5),
        case("theta_number_nan", ValueError, "theta", IMAGES, IMAGES, NAN),
        case("theta_str", TypeError, "theta", IMAGES, IMAGES, "0.5"),
        case("theta_list", TypeError, "theta", IMAGES, IMAGES, [0.5] * S),
        case("theta_0d_above_1", ValueError, "theta", IMAGES, IMAGES, torch.tensor(1.5)),
        *(case(f"partner_{n}", error, "partner", IMAGES, IMAGES, None, v) for n, (error, v) in BAD_PARTNER.items()),
        case("partner_list", TypeError, "partner", IMAGES, IMAGES, None, PARTNER.tolist()),
    ],
)
def test_the_mixup_refuses_bad_input(error, match, values, options):
    with pytest.raises(error, match=match):
        MomentumMixup()(*values, **options)


def test_integer_images_are_told_to_convert():
    with pytest.raises(TypeError, match=r"queries.*torch\.uint8.*float\(\)"):
        MomentumMixup()(*NOT_IMAGES["uint8"][1:] * 2)


# -------------------------------------------------------------------------------------------------- non-finite features


def poisoned(values: torch.Tensor, poison: float) -> torch.Tensor:
    values = values.clone()
    values[1, 0] = poison
    return values.requires_grad_()


POISONED = pairwise(
    ALL_KINDS,
    ("out0", "out1", "mixed"),
    (0, 2),  # crops
    (torch.float32, torch.float16),
    (NAN, INF, -INF),
    (0.0, 0.5, 1.0),
    allowed=lambda kind, where, crops, *_: (crops or where != "mixed") and not (crops and kind == "own_positive"),
)


@pytest.mark.parametrize(("kind", "where", "crops", "dtype", "poison", "weight"), POISONED)
def test_non_finite_features_give_a_non_finite_loss_and_never_enter_the_queue(
    kind, where, crops, dtype, poison, weight
):
    criterion = used(kind, refined_weight=weight)
    before = {name: value.clone() for name, value in criterion.state_dict().items()}
    features = {"out0": OUT0.to(dtype).requires_grad_(), "out1": OUT1.to(dtype)}
    if crops:
        features |= {"mixed": [CROP.to(dtype), CROP2.to(dtype).requires_grad_()], "mix": [MIX, MIX2]}
    features[where] = (
        [CROP, poisoned(CROP2.to(dtype), poison)] if where == "mixed" else poisoned(features[where].detach(), poison)
    )
    loss = criterion(**features)
    assert not loss.isfinite()
    assert criterion.memory_bank.bank.isfinite().all()
    kept = [torch.equal(value, before[name]) for name, value in criterion.state_dict().items() if "groups" not in name]
    assert all(kept) if where == "out1" else not any(kept)
    # A GradScaler looks at the gradients.
    trained = [value for value in (features["out0"], *features.get("mixed", ())) if value.requires_grad]
    assert not all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, trained))


@pytest.mark.parametrize(("row", "n"), [(0, 9), (S - 1, 9), (0, 1), (1, 2), (S - 2, S)])  # in and out of the newest n
def test_a_batch_with_one_non_finite_key_leaves_the_whole_queue_and_the_step(n, row):
    criterion = SLRLoss(memory_bank_size=(n, D))
    keys = OUT1.clone()
    keys[row] = NAN
    before = {name: value.clone() for name, value in criterion.state_dict().items()}
    assert not criterion(OUT0, keys, update=True).isfinite()
    assert all(torch.equal(value, before[name]) for name, value in criterion.state_dict().items())
    assert criterion(OUT0, OUT1, update=True).isfinite()
    assert criterion.step == 1


# ------------------------------------------------------------------------------------------ settings, labels, negatives


@pytest.mark.parametrize(
    ("name", "error", "value"),
    [
        ("temperature", ValueError, 0),
        ("sharpening", ValueError, 1.5),
        ("confidence", ValueError, -1),
        ("refined_weight", ValueError, 2),
        ("chunk_size", ValueError, 0),
        ("chunk_size", TypeError, 1.5),
        ("in_batch_keys", TypeError, 0),
        ("gather_distributed", TypeError, 1),
    ],
)
def test_a_bad_setting_assigned_later_is_refused_and_the_old_one_kept(name, error, value):
    criterion = used("queue")
    before = getattr(criterion, name), criterion(OUT0, OUT1, update=False)
    with pytest.raises(error, match=names(name)):
        setattr(criterion, name, value)
    assert (getattr(criterion, name), criterion(OUT0, OUT1, update=False)) == before


def test_class_labels_in_place_of_keys_are_not_advised_to_become_floats():
    criterion = used("queue")
    raises_and_keeps_state(criterion, TypeError, r"out1(?!.*float\(\)).*labels", lambda: criterion(OUT0, PARTNER))


BAD_FEATURES = {"1d": OUT0[0], "int": OUT0.long(), "list": OUT0.tolist(), "meta": OUT0.to("meta")}


@pytest.mark.parametrize(("bad", "argument", "kind"), pairwise(BAD_FEATURES, ["negatives", "estimator"], ALL_KINDS))
def test_bad_negatives_and_estimators_are_refused(bad, argument, kind):
    criterion = used(kind)
    raises_and_keeps_state(
        criterion,
        (TypeError, ValueError),
        names(argument),
        lambda: criterion(OUT0, OUT1, update=True, **{argument: BAD_FEATURES[bad]}),
    )


@pytest.mark.parametrize("size", [(8, 4), 0])
def test_estimators_that_are_not_finite_change_nothing(size):
    criterion = SLRLoss(0.2, size, estimator_dim=5 if size else None)
    before = {name: state.clone() for name, state in criterion.state_dict().items()}
    loss = criterion(torch.randn(3, 4, requires_grad=True), torch.randn(3, 4), estimator=torch.full((3, 5), torch.nan))
    assert loss.isnan()
    for name, state in criterion.state_dict().items():
        assert torch.equal(state, before[name])


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_forward_mode_derivative_by_the_temperature_raises(symmetric):
    views, temperature = torch.randn(2, 4, 8), torch.tensor(0.5)
    with forward_ad.dual_level(), pytest.raises(RuntimeError):
        SLRLoss(forward_ad.make_dual(temperature, torch.ones(())), symmetric=symmetric)(*views)
