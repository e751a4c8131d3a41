"""Labels from known groups: against the definition, dense; against SupCon; in queue and checkpoints; compiled."""

import copy
import itertools

import pytest
import torch
from _oracle import ask, call, gradients, make_batch, make_criterion, one_thread  # noqa: F401
from torch.nn.functional import normalize

from slr_plugin import SLRLoss, dense
from slr_plugin.functional import slr_loss

GROUPS = torch.tensor([0, 0, 7, 2, 7, -1, -1])
QUEUE_GROUPS = torch.tensor([0, 7, 7, 3, -1, -1, 2, 2, 2])
MODES = {
    "queue": ({"n": 9}, {}),
    "queue and negatives": ({"n": 9, "negatives": 4}, {}),
    "queue and mixed": ({"n": 9, "crops": 2}, {}),
    "queue and estimator": ({"n": 9, "estimator_dim": 3}, {}),
    "own positive": ({"n": 9}, {"in_batch_keys": False}),
    "both views": ({}, {}),
    "both views and negatives": ({"negatives": 4}, {}),
    "both views and mixed": ({"crops": 1}, {}),
    "both views and estimator": ({"estimator_dim": 3}, {}),
    "one direction": ({}, {"symmetric": False}),
}


def batch_of(mode, **options):
    batch = make_batch(7, 5, **MODES[mode][0], **options)
    return batch._replace(groups=GROUPS, queue_groups=None if batch.bank is None else QUEUE_GROUPS)


@pytest.mark.parametrize("same_group", ["positive", "ignored"])
@pytest.mark.parametrize("mode", MODES)
def test_value_gradients_and_labels_equal_the_definition(mode, same_group):
    for sharpening, confidence, weight in itertools.product((1.0, 0.5), (0.0, 2.0), (0.0, 0.4, 1.0)):
        settings = {
            "temperature": 0.3,
            "sharpening": sharpening,
            "confidence": confidence,
            "refined_weight": weight,
            "same_group": same_group,
            **MODES[mode][1],
        }
        batch = batch_of(mode).leaves()
        answer = ask(batch, **settings)
        criterion = make_criterion(batch, **settings)
        loss = call(criterion, batch)
        torch.testing.assert_close(loss, answer.loss, rtol=0, atol=1e-12)
        for got, want in zip(gradients(loss, batch), gradients(answer.loss, batch), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
        expected = answer.stats(confidence)
        if confidence:
            expected.pop("label_entropy") if same_group == "positive" or batch.estimator is not None else None
        for name, value in expected.items():
            assert criterion.stats[name].item() == pytest.approx(value, abs=1e-9), name


@pytest.mark.parametrize("same_group", ["positive", "ignored"])
@pytest.mark.parametrize("mode", ["queue", "own positive", "both views", "one direction"])
def test_the_dense_form_and_the_labels_for_looking_at(mode, same_group):
    batch, options = batch_of(mode), MODES[mode][1]
    settings = {"temperature": 0.3, "confidence": 2.0, "same_group": same_group} | options
    ours = {"groups": batch.groups, "queue_groups": batch.queue_groups}
    form = dense.slr_loss if batch.bank is not None or options.get("symmetric") is False else dense.symmetric_slr_loss
    views = (batch.out0, batch.out1) + ((batch.bank,) if form is dense.slr_loss else ())
    dense_settings = {name: value for name, value in settings.items() if name != "symmetric"}
    expected = form(*views, **dense_settings, **ours)
    torch.testing.assert_close(slr_loss(batch.out0, batch.out1, batch.bank, **settings, **ours), expected)
    labels = make_criterion(batch, **settings).labels(batch.out0, batch.out1, groups=batch.groups)
    torch.testing.assert_close(labels.sum(1), torch.ones(len(labels), dtype=torch.float64))
    row = 0  # of group 0, as sample 1 is
    twin = labels[row, 8 if mode == "both views" else 1] if mode != "own positive" else labels[row, 1]
    assert (twin > 0.1) if same_group == "positive" else (twin == 0)


def test_both_views_without_refinement_are_supcon():
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    batch = batch_of("both views").leaves()
    ids = torch.tensor([0, 0, 7, 2, 7, 5, 6])
    ours = SLRLoss(0.3, confidence=0.0)(batch.out0, batch.out1, groups=ids)
    theirs = losses.SupConLoss(0.3)(torch.cat([batch.out0, batch.out1]), ids.repeat(2))
    torch.testing.assert_close(ours, theirs)
    for got, want in zip(gradients(ours, batch), gradients(theirs, batch), strict=True):
        torch.testing.assert_close(got, want)


def test_ids_enqueue_with_their_keys_and_are_saved():
    criterion = SLRLoss(0.2, (10, 4))
    for ids in (torch.tensor([1, 2, 3, 4]), torch.tensor([5, -1, 6, 7], dtype=torch.int32), None):
        criterion(torch.randn(4, 4, requires_grad=True), torch.randn(4, 4), groups=ids)
    assert criterion.memory_bank.groups.tolist() == [-1, -1, 3, 4, 5, -1, 6, 7, -1, -1]
    other = SLRLoss(0.2, (10, 4))
    other.load_state_dict(criterion.state_dict())
    assert torch.equal(other.memory_bank.groups, criterion.memory_bank.groups)
    other(torch.randn(8, 4, requires_grad=True), torch.randn(8, 4))
    assert other.memory_bank.groups.tolist() == [-1] * 10
    other.load_state_dict(criterion.state_dict())
    # A queue that was saved without ids has unknown ones, without a warning.
    state = {name: value for name, value in criterion.state_dict().items() if not name.endswith("groups")}
    other.load_state_dict(state)
    assert other.memory_bank.groups.tolist() == [-1] * 10
    assert torch.equal(other.memory_bank.bank, criterion.memory_bank.bank)
    criterion.reset_parameters()
    assert criterion.memory_bank.groups.tolist() == [-1] * 10


def test_a_batch_that_is_not_finite_leaves_the_ids_as_they_are():
    criterion = SLRLoss(0.2, (10, 4))
    keys = torch.randn(4, 4).index_fill(0, torch.tensor([2]), torch.nan)
    criterion(torch.randn(4, 4, requires_grad=True), keys, groups=torch.arange(4))
    assert criterion.memory_bank.groups.tolist() == [-1] * 10


def test_alone_is_as_without_groups():
    out0, out1 = torch.randn(2, 6, 4, dtype=torch.float64)
    for options in ({}, {"memory_bank_size": (8, 4)}, {"symmetric": False}, {"same_group": "ignored"}):
        criterion = SLRLoss(0.2, **options)
        plain = criterion(out0, out1)
        for ids in (torch.full((6,), -1), torch.arange(6)):
            torch.testing.assert_close(criterion(out0, out1, groups=ids), plain, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("groups", "error", "said"),
    [
        (torch.arange(3), ValueError, r"groups must have shape \(4,\), an id for each sample, got \(3,\)"),
        (torch.arange(4)[:, None], ValueError, r"shape \(4,\)"),
        (torch.arange(4.0), TypeError, "whole numbers.*negative for none, got torch.float32"),
        (torch.ones(4, dtype=torch.bool), TypeError, "got torch.bool"),
        ([0, 1, 2, 3], TypeError, "got list"),
    ],
)
def test_bad_ids_are_refused_and_change_nothing(groups, error, said):
    criterion = SLRLoss(0.2, (8, 4))
    before = copy.deepcopy(criterion.state_dict())
    with pytest.raises(error, match=said):
        criterion(torch.randn(4, 4, requires_grad=True), torch.randn(4, 4), groups=groups)
    for name, value in criterion.state_dict().items():
        assert torch.equal(value, before[name])


def test_other_mistakes_say_what_to_pass():
    out0, out1, queue = *torch.randn(2, 4, 3), normalize(torch.randn(5, 3), dim=1)
    with pytest.raises(TypeError, match="groups="):
        SLRLoss(0.2)(out0, out1, estimator=torch.arange(4))
    with pytest.raises(ValueError, match='same_group must be "positive" or "ignored"'):
        SLRLoss(0.2, same_group="same")
    with pytest.raises(ValueError, match="queue_groups came without groups"):
        slr_loss(out0, out1, queue, queue_groups=torch.arange(5))
    with pytest.raises(ValueError, match=r"queue_groups must have shape \(5,\)"):
        slr_loss(out0, out1, queue, groups=torch.arange(4), queue_groups=torch.arange(4))


@pytest.mark.parametrize("same_group", ["positive", "ignored"])
def test_no_matrix_of_all_pairs_is_stored(same_group):
    out0, out1 = torch.randn(2, 3000, 8, requires_grad=True)
    with torch.profiler.profile(profile_memory=True) as profile:
        SLRLoss(0.2, same_group=same_group)(out0, out1, groups=torch.arange(3000) // 3).backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 < largest < 6000 * 6000  # bytes, where a matrix of bools takes as many


@pytest.mark.parametrize(("size", "same_group"), [((16, 8), "positive"), (0, "ignored")])
def test_compiles_without_a_break(size, same_group):
    criterion = SLRLoss(0.2, size, same_group=same_group)
    compiled = torch.compile(copy.deepcopy(criterion), fullgraph=True, backend="aot_eager")
    for step in range(2):
        out0, out1 = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(step))
        ids = torch.tensor([0, 0, 1, 2, 2, -1])
        losses = [loss(out0.requires_grad_(), out1, groups=ids) for loss in (criterion, compiled)]
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*(torch.autograd.grad(loss, out0)[0] for loss in losses))
