"""SLRLoss as a module: what advances when, schedules, statistics, resuming."""

import copy
import inspect
import warnings

import pytest
import torch
import torch.nn.functional as F
from _devices import WithoutFloat64
from lightly.loss import NTXentLoss
from torch.autograd import forward_ad

from slr_plugin import CosineConfidence, MomentumMixup, SLRLoss, presets


def features(count=6, dim=4, seed=0, grad=True):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


def test_signature_begins_with_ntxents():
    ours, theirs = (list(inspect.signature(c).parameters.values()) for c in (SLRLoss, NTXentLoss))
    assert [(p.name, p.default, p.kind) for p in ours[:3]] == [(p.name, p.default, p.kind) for p in theirs]
    assert {p.name: p.default for p in ours[3:]} == {
        "sharpening": 1.0,
        "confidence": 1.0,
        "refined_weight": 0.5,
        "in_batch_keys": True,
        "symmetric": None,
        "estimator_dim": None,
        "same_group": "positive",
    }
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[3:])


@pytest.mark.parametrize("memory_bank_size", [0, (8, 4)])
@pytest.mark.parametrize(
    ("grad", "update", "advances"),
    [(True, None, True), (False, None, False), (True, False, False), (False, True, True)],
)
def test_queue_and_step_advance_together(memory_bank_size, grad, update, advances):
    criterion = SLRLoss(memory_bank_size=memory_bank_size)
    bank = criterion.memory_bank.bank.clone()
    criterion(features(grad=grad), features(seed=1, grad=False), update=update)
    assert criterion.step == int(advances)
    if memory_bank_size:
        assert torch.equal(criterion.memory_bank.bank, bank) != advances


@pytest.mark.parametrize("memory_bank_size", [0, (8, 4)])
def test_a_criterion_left_on_the_cpu_takes_features_on_a_gpu(memory_bank_size, pretended_gpu):
    with pretended_gpu:
        criterion = SLRLoss(0.2, memory_bank_size, confidence=CosineConfidence(0.5, 2.0, 4))
        queries, keys = torch.empty(2, 6, 4, device="cuda", requires_grad=True).unbind()
        assert criterion(queries, keys).device.type == "cuda"
    assert {buffer.device.type for buffer in criterion.buffers()} == {"cpu"}


@pytest.mark.parametrize("first", ["forward", "labels"])
def test_a_queue_shaped_in_inference_mode_can_be_trained(first):
    with pytest.warns(UserWarning, match="leaves the dimension"):
        criterion = SLRLoss(0.2, 8)
    with torch.inference_mode():
        getattr(criterion, first)(features(grad=False), features(seed=1, grad=False))
    criterion(features(), features(seed=1, grad=False)).backward()
    assert criterion.step == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_queue_is_float32_whatever_torchs_default(dtype):
    torch.set_default_dtype(dtype)
    try:
        bank = SLRLoss(0.2, (8, 4)).memory_bank.bank
    finally:
        torch.set_default_dtype(torch.float32)
    assert bank.dtype == torch.float32
    torch.testing.assert_close(bank.norm(dim=1), torch.ones(8))


@pytest.mark.parametrize("memory_bank_size", [0, (8, 4)])
def test_labels_are_float32_under_autocast(memory_bank_size):
    criterion = SLRLoss(0.2, memory_bank_size)
    plain = criterion.labels(features(), features(seed=1))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(criterion.labels(features(), features(seed=1)), plain)


@pytest.mark.parametrize("confidence", [0.0, 1.0])
@pytest.mark.parametrize("memory_bank_size", [0, (8, 4)])
def test_derivatives_that_would_be_wrong_are_refused(memory_bank_size, confidence):
    criterion = SLRLoss(0.2, memory_bank_size, confidence=confidence)
    queries, keys = features(), features(seed=1, grad=False)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(criterion(queries, keys), queries, create_graph=True)
    with forward_ad.dual_level(), pytest.raises(RuntimeError):
        criterion(forward_ad.make_dual(queries.detach(), torch.ones_like(queries)), keys)


@pytest.mark.parametrize("kind", ["CosineConfidence", "callable"])
def test_schedule_sees_the_step_before_the_call_and_holds_in_evaluation(kind):
    cosine = CosineConfidence(0.5, 2.0, 4)
    seen = []

    def schedule(step):
        seen.append(step)
        return cosine(step)

    criterion = SLRLoss(confidence=cosine if kind == "CosineConfidence" else schedule)
    mus = []
    for call in range(6):
        criterion(features(seed=call), features(seed=call + 50))
        mus.append(criterion.stats["mu"].item())
        criterion(features(seed=call, grad=False), features(seed=call + 50, grad=False))
    assert mus == pytest.approx([cosine(step) for step in range(6)])
    if kind == "callable":
        assert seen == [step for step in range(6) for step in (step, step + 1)]
        assert all(type(step) is int for step in seen)


@pytest.mark.parametrize("confidence", [0.3, 0.7, 10**0.0625, 3.0, 9.0])
def test_a_label_without_other_keys_is_one_hot_in_the_stats_too(confidence):
    criterion = SLRLoss(0.5, confidence=confidence, same_group="ignored")
    criterion(torch.randn(16, 4, requires_grad=True), torch.randn(16, 4), groups=torch.zeros(16, dtype=torch.long))
    stats = {name: value.item() for name, value in criterion.stats.items()}
    assert stats["positive_weight"] <= 1
    assert (stats["positive_weight"], stats["label_entropy"]) == pytest.approx((1, 0), abs=1e-5)


def test_statistics_are_detached_scalars_of_the_last_call():
    criterion = SLRLoss(0.2, (16, 4), confidence=2.0)
    criterion(features(), features(seed=1))
    stats = criterion.stats
    assert set(stats) == {"positive_weight", "alpha", "beta", "mu", "label_entropy"}
    assert all(value.shape == () and not value.requires_grad for value in stats.values())
    labels = criterion.labels(features(), features(seed=1))
    assert labels.shape == (6, 6 + 16)
    assert stats["mu"] == 2.0
    criterion(features(), features(seed=1), update=False)
    torch.testing.assert_close(criterion.stats["positive_weight"], labels.diagonal().mean())


def test_gradients_reach_queries_mixed_and_keys():
    criterion = SLRLoss(0.2, (16, 4))
    queries, keys, mixed = features(), features(seed=1), features(seed=2)
    _, mix = MomentumMixup()(queries.detach(), keys.detach())
    criterion(queries, keys, [mixed, queries], [mix, mix]).backward()
    assert all(x.grad.abs().sum() > 0 for x in (queries, keys, mixed))


def test_a_missing_gradient_request_on_keys_is_respected():
    queries, keys = features(), features(seed=1, grad=False)
    SLRLoss()(queries, keys).backward()
    assert keys.grad is None


def test_the_queue_may_lie_in_another_precision_and_inputs_may_mix_dtypes():
    criterion = SLRLoss(0.2, (16, 4)).double()
    loss = criterion(features(), features(seed=1).half())
    assert loss.dtype == torch.float32
    assert criterion(features().double(), features(seed=1)).dtype == torch.float64


def test_training_resumes_bit_for_bit(tmp_path):
    def build():
        torch.manual_seed(0)
        encoder = torch.nn.Linear(8, 4)
        criterion = presets.CIFAR10.loss(4, total_steps=20, memory_bank_size=(10, 4))
        return encoder, criterion, torch.optim.SGD(encoder.parameters(), 0.1, momentum=0.9)

    def steps(parts, numbers):
        encoder, criterion, optimizer = parts
        losses = []
        for number in numbers:
            x0, x1 = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(number))
            mixed, mix = presets.CIFAR10.mixup(torch.Generator().manual_seed(number))(x0, x1)
            loss = criterion(encoder(x0), encoder(x1).detach(), encoder(mixed), mix)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    whole = steps(build(), range(12))
    first = build()
    losses = steps(first, range(5))
    torch.save([part.state_dict() for part in first], tmp_path / "checkpoint.pt")
    second = build()
    for part, state in zip(second, torch.load(tmp_path / "checkpoint.pt"), strict=True):
        part.load_state_dict(state)
    assert losses + steps(second, range(5, 12)) == whole


def test_deepcopy_and_repr():
    criterion = SLRLoss(0.2, (16, 4), confidence=CosineConfidence(0, 1, 10))
    criterion(features(), features(seed=1))
    twin = copy.deepcopy(criterion)
    assert torch.equal(criterion(features(), features(), update=False), twin(features(), features(), update=False))
    assert "temperature=0.2" in repr(criterion)
    assert "size=16, dim=4" in repr(criterion)


def test_presets_carry_the_papers_table():
    for preset, expected in (
        (presets.CIFAR10, (0.2, 0.8, (0.0, 1.0), 0.5, 2.0, 4096)),
        (presets.IMAGENET, (0.2, 1.0, (0.5, 10.0), 0.5, 0.1, 65536)),
    ):
        criterion, mixup = preset.loss(dim=2, total_steps=10), preset.mixup()
        confidence = (criterion.confidence.start, criterion.confidence.end)
        values = (criterion.temperature, criterion.sharpening, confidence, criterion.refined_weight, mixup.kappa)
        assert (*values, len(criterion.memory_bank)) == expected
    assert presets.CIFAR10.loss(2, 10, temperature=0.1).temperature == 0.1


@pytest.mark.parametrize(("given", "missing"), [({"total_steps": 10}, "dim"), ({"dim": 4}, "total_steps")])
def test_a_preset_asks_for_what_its_settings_need(given, missing):
    with pytest.raises(ValueError, match=f"{missing} must be passed"):
        presets.CIFAR10.loss(**given)
    presets.CIFAR10.loss(**given, memory_bank_size=0, confidence=0.0)


def test_the_preset_for_known_features_leaves_the_label_to_them():
    criterion = presets.FROM_FEATURES.loss()
    assert criterion.symmetric
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    out0, out1 = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    labels = criterion.labels(out0, out1, estimator=F.one_hot(groups).float())
    rows = groups.repeat(2)
    same = rows[:, None] == rows
    assert ((labels * same).sum(1) > 0.99).all()
    assert labels.max() < 0.25  # no part of the five alike keys' label is one-hot
    assert (criterion(out0.requires_grad_(), out1, estimator=F.one_hot(groups).float())).isfinite()


MODES = {
    "queue": {"memory_bank_size": (8, 4)},
    "own positive": {"memory_bank_size": (8, 4), "in_batch_keys": False},
    "both views": {},
    "one direction": {"symmetric": False},
    "schedule": {"memory_bank_size": (8, 4), "confidence": CosineConfidence(0.5, 2.0, 4)},
}


@pytest.fixture(params=MODES)
def mode(request):
    return MODES[request.param]


def on_meta(mode):
    with torch.device("meta"):
        return SLRLoss(0.2, **mode)


def test_on_the_meta_device_there_is_an_error_until_there_are_values(mode):
    criterion = on_meta(mode)
    for call in (criterion, criterion.labels):
        with pytest.raises(RuntimeError, match=r"meta device.*to_empty"):
            call(features(), features(seed=1))
    with pytest.warns(UserWarning, match="assign=True"):
        criterion.load_state_dict(SLRLoss(0.2, **mode).state_dict())
    with pytest.raises(RuntimeError, match=r"meta device.*to_empty"):
        criterion(features(), features(seed=1))
    twin = torch.nn.Sequential(criterion).to_empty(device="cpu")[0]
    assert twin.step == 0
    bank = twin.memory_bank
    torch.testing.assert_close(bank.bank.norm(dim=1), torch.ones(len(bank)))
    assert bank.bank_ptr == 0
    twin(features(), features(seed=1)).backward()
    assert twin.step == 1


def test_the_meta_device_takes_values_by_assignment(mode):
    criterion, source = on_meta(mode), SLRLoss(0.2, **mode)
    source(features(), features(seed=1))
    criterion.load_state_dict(source.state_dict(), assign=True)
    criterion, source = (loss(features(seed=2), features(seed=3)) for loss in (criterion, copy.deepcopy(source)))
    assert torch.equal(criterion, source)


def test_a_checkpoint_without_step_leaves_the_meta_device_to_to_empty(mode):
    criterion, source = on_meta(mode), SLRLoss(0.2, **mode)
    stored = {name: value for name, value in source.state_dict().items() if name != "step"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # only a schedule warns
        criterion.load_state_dict(stored, assign=True)
    with pytest.raises(RuntimeError, match=r"meta device.*to_empty"):
        criterion(features(), features(seed=1))


def test_parameters_can_be_reset(mode):
    criterion = SLRLoss(0.2, **mode)
    before = criterion.memory_bank.bank.clone()
    criterion(features(), features(seed=1))
    criterion.reset_parameters()
    assert criterion.step == 0
    assert criterion.memory_bank.bank_ptr == 0
    if len(before):
        assert not torch.isclose(criterion.memory_bank.bank, before).all(1).any()
        torch.testing.assert_close(criterion.memory_bank.bank.norm(dim=1), torch.ones(8))


def test_a_device_without_float64_computes_every_mode(mode):
    criterion = SLRLoss(0.2, **mode, sharpening=0.5)
    with WithoutFloat64():
        queries, keys = features(), features(seed=1)
        criterion(queries, keys).backward()
        criterion.labels(queries, keys)
        if criterion.in_batch_keys:
            criterion(queries, keys, queries, MomentumMixup()(queries, keys)[1]).backward()
        assert all(value.dtype == torch.float32 for value in criterion.stats.values())
    assert criterion.step >= 1


def test_a_direction_assigned_later_is_checked():
    criterion = SLRLoss(0.2, (8, 4))
    with pytest.raises(ValueError, match="symmetric=True needs memory_bank_size=0"):
        criterion.symmetric = True
    with pytest.raises(TypeError, match="symmetric must be True or False"):
        criterion.symmetric = 3
    criterion(features(), features(seed=1)).backward()


def test_temperature_may_become_a_parameter_a_number_and_a_tensor():
    criterion = SLRLoss(0.2, (8, 4))
    expected = criterion(features(), features(seed=1), update=False)
    for value in (torch.nn.Parameter(torch.tensor(0.2)), 0.2, torch.tensor(0.2), torch.nn.Parameter(torch.tensor(0.2))):
        criterion.temperature = value
        trained = isinstance(value, torch.nn.Parameter)
        assert len(list(criterion.parameters())) == int(trained)
        assert ("temperature" in criterion.state_dict()) == trained
        twin = copy.deepcopy(criterion)
        loss = twin(features(), features(seed=1), update=False)
        torch.testing.assert_close(loss, expected)
        loss.backward()
        assert not trained or twin.temperature.grad != 0
        assert not trained or criterion.temperature.grad is None
        with pytest.raises(ValueError, match="temperature"):
            criterion.temperature = 0
        assert criterion.temperature is value or criterion.temperature == value


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp", "jacrev"])
def test_functional_transforms_are_refused(mode, transform):
    criterion = SLRLoss(0.2, **mode)

    queries, keys = features(grad=False), features(seed=1, grad=False)
    arguments = {"vmap": (torch.stack([queries] * 2),), "jvp": ((queries,), (queries,))}.get(transform, (queries,))
    apply = torch.func.jvp if transform == "jvp" else lambda call, x: getattr(torch.func, transform)(call)(x)
    with pytest.raises(RuntimeError):
        apply(lambda queries: criterion(queries, keys), *arguments)
    assert criterion.step == 0


@pytest.mark.parametrize("whole", [True, False])
def test_averages_belong_to_the_encoder_alone(whole):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), SLRLoss(0.2, (8, 4)))
    encoder, criterion = model
    source = model if whole else encoder
    average = torch.optim.swa_utils.AveragedModel(source, use_buffers=True)
    for step in range(3):
        criterion(encoder(features(seed=step)), features(seed=step + 9))
        average.update_parameters(source)
    torch.testing.assert_close(criterion.memory_bank.bank.norm(dim=1), torch.ones(8))
    assert criterion.step == 3
    if whole:  # as the docstring of SLRLoss says
        assert average.module[1].memory_bank.bank.norm(dim=1).min() < 0.99
        assert average.module[1].step < 3


def test_a_bare_size_warns_of_copies_made_before_the_first_batch():
    with pytest.warns(UserWarning, match=r"a copy made before it .* cannot follow; write memory_bank_size=\(8, d\)"):
        criterion = SLRLoss(0.2, 8)
    average = torch.optim.swa_utils.AveragedModel(criterion, use_buffers=True)
    criterion(features(), features(seed=1))
    with pytest.raises(RuntimeError):
        average.update_parameters(criterion)
