"""The confidence schedule: its formula, precision, extreme numbers, devices, and the presets that use it."""

import copy
import dataclasses
import math
import pickle

import numpy as np
import pytest
import torch
from _devices import WithoutFloat64

from slr_plugin import CosineConfidence, SLRLoss, presets

HUGE = 2**63 - 1


def formula(m1, m2, total, step):
    return m2 - (m2 - m1) * (math.cos(math.pi * min(step / total, 1.0)) + 1) / 2


@pytest.mark.parametrize(("m1", "m2"), [(0.5, 10.0), (3.0, 0.25), (1.0, 1.0), (0, 2)])
def test_follows_the_formula_then_holds(m1, m2):
    total = 40
    schedule = CosineConfidence(m1, m2, total)
    for step in range(total + 1):
        expected = pytest.approx(formula(m1, m2, total, step), abs=1e-12)
        assert schedule(step) == expected
        assert schedule(torch.tensor(float(step), dtype=torch.float64)).item() == expected
    assert schedule(0) == schedule(torch.tensor(0)) == m1
    for late in (total, 10 * total, HUGE):
        assert schedule(late) == schedule(torch.tensor(late)) == m2


@pytest.mark.parametrize("total", [1, 7, 390_000, 10**7, 10**7 + 1, 3 * 10**9, HUGE])
@pytest.mark.parametrize(("m1", "m2"), [(0.0, 1.0), (0.5, 10.0), (10.0, 0.5), (0.0, 1e38), (1e-30, 2e-30)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_on_a_tensor_it_is_precise_at_every_step_of_any_run(total, m1, m2, dtype):
    """The worst step here is off by 1.7e-7 of the larger end."""
    steps = sorted({int(total * part) for part in np.linspace(0, 1, 2001).tolist()} | {min(total, 10**7 - 1)})
    found = CosineConfidence(m1, m2, total)(torch.tensor([min(step, HUGE) for step in steps]).to(dtype))
    assert found.dtype == torch.float32
    expected = torch.tensor([formula(m1, m2, total, step) for step in steps], dtype=torch.float64)
    assert (found.double() - expected).abs().max() <= 5e-7 * max(m1, m2)


def test_a_device_without_float64_computes_it():
    with WithoutFloat64():
        for dtype in (torch.int64, torch.int32, torch.float32, torch.bfloat16):
            confidence = CosineConfidence(0.5, 3.0, 40)(torch.tensor([0, 20, 40, 50]).to(dtype))
            torch.testing.assert_close(confidence, torch.tensor([0.5, 1.75, 3.0, 3.0]))


@pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::DeprecationWarning")
def test_compiles_once_for_all_steps():
    torch.compiler.reset()
    compiled = torch.compile(CosineConfidence(0.5, 3.0, 40), fullgraph=True, backend="aot_eager")
    step = torch.tensor(0)
    compiled(step)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(4):
            step += 13
            torch.testing.assert_close(compiled(step), CosineConfidence(0.5, 3.0, 40)(step))
    torch.compiler.reset()


@pytest.mark.parametrize("scalar", [np.float16, np.float32, np.float64, np.int64, np.uint8])
def test_numpy_scalars_are_numbers(scalar):
    schedule = CosineConfidence(scalar(1), scalar(3), np.int32(40))
    assert schedule == CosineConfidence(1, 3, 40)
    assert repr(schedule) == "CosineConfidence(start=1.0, end=3.0, total_steps=40)"
    assert type(schedule(np.int64(13))) is float
    assert schedule(np.int64(13)) == CosineConfidence(1, 3, 40)(13)
    assert schedule(torch.tensor(13)).dtype == torch.float32


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "start must be between 0.0 and 1e+38, got 1e+39", (1e39, 1, 10)),
        (ValueError, "end must be between 0.0 and 1e+38, got 1e+39", (0, 1e39, 10)),
        (ValueError, "end must be between 0.0 and 1e+38, got 1000", (0, 10**400, 10)),
        (ValueError, "end must be between 0.0 and 1e+38, got inf", (0, np.float32("inf"), 10)),
        (ValueError, r"total_steps must be below 2**63, got 9223372036854775808", (0, 1, HUGE + 1)),
        (ValueError, r"total_steps must be below 2**63, got 1000", (0, 1, 10**400)),
        (TypeError, "start must be a number, got tensor(0.5000) of type Tensor", (torch.tensor(0.5), 1, 10)),
        (TypeError, "end must be a number, got tensor(1) of type Tensor", (0, torch.tensor(1), 10)),
        (TypeError, "total_steps must be an integer, got tensor(10) of type Tensor", (0, 1, torch.tensor(10))),
        (TypeError, "total_steps must be an integer, got 10.0 of type float", (0, 1, 10.0)),
    ],
)
def test_extreme_or_odd_arguments_are_refused_by_name(error, message, arguments):
    with pytest.raises(error) as caught:
        CosineConfidence(*arguments)
    assert str(caught.value).startswith(message)


def test_the_largest_confidence_gives_a_finite_loss_in_float32():
    for value in (1e38, CosineConfidence(1e38, 0.0, 10), CosineConfidence(0.0, 1e38, 1)):
        criterion = SLRLoss(0.2, (32, 16), confidence=value)
        for _ in range(2):
            queries = torch.randn(8, 16, requires_grad=True)
            loss = criterion(queries, torch.randn(8, 16))
            loss.backward()
            assert loss.isfinite()
            assert queries.grad.isfinite().all()
            assert all(value.isfinite() for value in criterion.stats.values())


@pytest.mark.parametrize(
    ("error", "step"), [(ValueError, -0.5), (ValueError, math.nan), (TypeError, "3"), (TypeError, None)]
)
def test_a_step_that_is_no_step_is_refused(error, step):
    with pytest.raises(error, match="step must be"):
        CosineConfidence(0, 1, 10)(step)


def test_settings_cannot_change_and_copies_are_equal():
    schedule = CosineConfidence(0.5, 3.0, 40)
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.end = -1.0
    for twin in (copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
        assert twin == schedule
        assert twin(13) == schedule(13)


@pytest.mark.parametrize(
    ("error", "message", "settings"),
    [
        (ValueError, "queue_size must be >= 0, got -1", {"queue_size": -1}),
        (TypeError, "queue_size must be an integer", {"queue_size": 4096.0}),
        (ValueError, "batch_size must be >= 1, got 0", {"batch_size": 0}),
        (ValueError, "epochs must be >= 1, got -1", {"epochs": -1}),
        (ValueError, r"confidence must be \(m1, m2\), .* got 1.0", {"confidence": 1.0}),
        (ValueError, r"confidence must be \(m1, m2\), .* got \(0, 1, 2\)", {"confidence": (0, 1, 2)}),
        (ValueError, "start must be", {"confidence": (-1, 1)}),
        (ValueError, "temperature must be", {"temperature": 0}),
        (ValueError, "sharpening must be", {"sharpening": 2}),
        (ValueError, "refined_weight must be", {"refined_weight": -1}),
        (ValueError, "kappa must be", {"kappa": -1}),
    ],
)
def test_a_preset_with_a_wrong_setting_is_refused_when_it_is_used_at_the_latest(error, message, settings):
    def use():
        preset = dataclasses.replace(presets.CIFAR10, **settings)
        return preset.loss(dim=4, total_steps=10), preset.mixup()

    with pytest.raises(error, match=message):
        use()
