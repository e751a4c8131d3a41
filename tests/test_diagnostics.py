"""Label quality against a loop over queries and keys; the monitor against the queue that it follows."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from slr_plugin import CosineConfidence, MomentumMixup, SLRLoss
from slr_plugin.diagnostics import LabelMonitor, LabelQuality, label_quality


def looped(labels, classes, key_classes, own):
    """The definitions, query by query and key by key."""
    rows = []
    for label, of, positive in zip(labels.tolist(), classes.tolist(), own.tolist(), strict=True):
        known = [k for k, c in enumerate(key_classes.tolist()) if c >= 0 or k == positive]
        others = [k for k in known if k != positive]
        if of < 0 or not others:
            continue
        same = [k for k in others if key_classes[k] == of]
        truth = {k: 1 / (1 + len(same)) for k in [positive, *same]}
        rest = sum(label[k] for k in others)

        # The label itself, the one-hot one, and the one that spreads the rest evenly.
        compared = [label, *([float(k == positive) for k in range(len(label))] for _ in range(2))]
        for k in others:
            compared[2][k] = rest / len(others)
        compared[2][positive] = label[positive]
        heaviest = max(others, key=lambda k, label=label: (label[k], -k))
        rows.append(
            [
                label[positive],
                sum(label[k] for k in same),
                sum(label[k] for k in others if k not in same),
                len(same) / len(others),
                float(heaviest in same),
                *(math.sqrt(sum((y[k] - truth.get(k, 0.0)) ** 2 for k in known)) for y in compared),
            ]
        )
    if not rows:
        return np.full(9, np.nan)
    means = np.mean(rows, axis=0)
    with np.errstate(invalid="ignore"):
        return np.append(means, means[1] / (means[1] + means[2]))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**16), st.integers(1, 5), st.integers(1, 9), st.booleans())
def test_is_what_the_definitions_say(seed, rows, more, shifted):
    generator = torch.Generator().manual_seed(seed)
    keys = rows + more
    labels = torch.rand(rows, keys, dtype=torch.float64, generator=generator)
    labels /= labels.sum(1, keepdim=True)
    classes = torch.randint(-1, 3, (rows,), generator=generator)
    key_classes = torch.randint(-1, 3, (keys,), generator=generator)
    own = torch.randperm(keys, generator=generator)[:rows] if shifted else torch.arange(rows)
    key_classes[own] = classes
    quality = label_quality(labels, classes, key_classes, own if shifted else None)
    np.testing.assert_allclose(torch.stack(quality), looped(labels, classes, key_classes, own), atol=1e-12)
    each = label_quality(labels, classes, key_classes.expand(rows, -1), own)
    torch.testing.assert_close(each, quality, equal_nan=True)


def test_the_labels_that_it_compares_with():
    classes, key_classes = torch.tensor([0, 1]), torch.tensor([0, 1, 0, 0, 1, 2])
    truth = (classes[:, None] == key_classes).double()
    truth /= truth.sum(1, keepdim=True)
    one_hot = torch.eye(2, 6, dtype=torch.float64)
    blind = torch.where(one_hot > 0, 0.7, 0.3 / 5)
    assert label_quality(truth, classes, key_classes).distance == 0
    quality = label_quality(one_hot, classes, key_classes)
    assert quality.distance == quality.one_hot_distance == quality.blind_distance
    assert (quality.own, quality.same, quality.other) == (1, 0, 0)
    quality = label_quality(blind, classes, key_classes)
    torch.testing.assert_close(quality.distance, quality.blind_distance)
    torch.testing.assert_close(quality.same / (quality.same + quality.other), quality.chance)


def test_a_labelled_part_of_the_data_will_do():
    labels = torch.rand(4, 10, dtype=torch.float64)
    classes, key_classes = torch.tensor([0, -1, 1, 0]), torch.tensor([0, -1, 1, 0, -1, 1, 1, -1, 0, 0])
    known = key_classes >= 0
    part = label_quality(labels[classes >= 0][:, known], classes[classes >= 0], key_classes[known])
    torch.testing.assert_close(label_quality(labels, classes, key_classes), part)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"labels": torch.ones(2, 3, dtype=torch.long)}, TypeError, "labels must have a floating point dtype"),
        ({"labels": torch.ones(3)}, ValueError, r"labels must have shape \(queries, keys\), got \(3,\)"),
        ({"classes": torch.zeros(3, dtype=torch.long)}, ValueError, r"classes must have shape \(2,\)"),
        ({"classes": torch.zeros(2)}, TypeError, "classes must have dtype torch.int64"),
        (
            {"key_classes": torch.zeros(2, dtype=torch.long)},
            ValueError,
            r"key_classes must have shape \(3,\) or \(2, 3\)",
        ),
        ({"own": torch.tensor([0, 3])}, ValueError, "own must name columns of labels"),
        ({"labels": torch.ones(2, 1), "key_classes": torch.tensor([0])}, ValueError, "pass own="),
    ],
)
def test_bad_input(changed, error, message):
    good = {"labels": torch.ones(2, 3), "classes": torch.tensor([0, 1]), "key_classes": torch.tensor([0, 1, 1])}
    label_quality(**good)
    with pytest.raises(error, match=message):
        label_quality(**good | changed)


def features(classes):
    """Features whose first entry tells the class that they were made for."""
    values = torch.randn(len(classes), 4, requires_grad=True)
    return values, torch.cat([10.0 * classes[:, None], torch.ones(len(classes), 3)], dim=1)


def test_classes_keep_step_with_the_queue():
    torch.manual_seed(0)
    criterion = SLRLoss(0.2, (5, 4))
    monitor = LabelMonitor(criterion)
    held = torch.full((5,), -1)  # what a queue that moves by hand would hold
    number = 0
    for size, enters in [(2, True), (2, True), (3, False), (2, True), (7, True), (1, None), (3, True), (-2, True)]:
        announced, size = size > 0, abs(size)
        classes = torch.arange(number, number + size)
        number += size
        queries, keys = features(classes)
        if enters is None:  # not finite: the queue refuses it
            keys[0, 0] = torch.inf
        if announced:
            monitor.announce(classes)
        criterion(queries, keys, update=enters)
        if enters:
            pointer = int(criterion.memory_bank.bank_ptr)
            for age, one in enumerate(reversed(classes.tolist()[-5:]), start=1):
                held[pointer - age] = one if announced else -1
        assert monitor.queue_classes.tolist() == held.tolist()
    expected = torch.nn.functional.normalize(torch.cat([10.0 * held[:, None], torch.ones(5, 3)], dim=1), dim=1)
    known = held >= 0
    assert known.sum() == 3
    torch.testing.assert_close(criterion.memory_bank.bank[known], expected[known])


@pytest.mark.parametrize(("size", "in_batch_keys"), [(12, True), (12, False), (0, True)])
def test_measures_the_labels_of_the_call(size, in_batch_keys):
    torch.manual_seed(0)
    criterion = SLRLoss(
        0.2, (size, 4) if size else 0, in_batch_keys=in_batch_keys, confidence=CosineConfidence(1, 3, 9)
    )
    monitor = LabelMonitor(criterion)
    for _ in range(3):
        classes = torch.randint(2, (6,))
        queries, keys = torch.randn(2, 6, 4, requires_grad=True)
        labels, queue_classes = criterion.labels(queries, keys), monitor.queue_classes.clone()
        monitor.announce(classes)
        criterion(queries, keys)
    if not size:
        key_classes = classes.repeat(2).expand(12, -1).clone().fill_diagonal_(-1)  # a row does not see itself
        arguments = classes.repeat(2), key_classes, torch.arange(12).roll(6)
    elif in_batch_keys:
        arguments = classes, torch.cat([classes, queue_classes]), torch.arange(6)
    else:
        key_classes = torch.cat([classes[:, None], queue_classes.expand(6, -1)], dim=1)
        arguments = classes, key_classes, torch.zeros(6, dtype=torch.long)
    torch.testing.assert_close(monitor.measured[-1], label_quality(labels, *arguments))


def test_without_a_queue_a_row_is_no_key_of_its_own_class():
    criterion = SLRLoss(0.2)
    monitor = LabelMonitor(criterion)
    monitor.announce(torch.arange(4))  # no two samples of a class
    criterion(torch.randn(4, 8), torch.randn(4, 8))
    quality = monitor.mean()
    assert quality.chance == 0
    torch.testing.assert_close(quality.one_hot_distance, torch.tensor(0.0))


def test_measures_float32_labels_under_autocast():
    criterion = SLRLoss(0.1, (16, 8), sharpening=0.5)
    monitor = LabelMonitor(criterion)
    monitor.announce(torch.arange(4))
    with torch.autocast("cpu", torch.bfloat16):
        criterion(torch.randn(4, 8), torch.randn(4, 8))
    assert monitor.measured[0].own.dtype == torch.float32


def test_changes_nothing_and_measures_where_told():
    def train(watched):
        torch.manual_seed(0)
        criterion, mixup = SLRLoss(0.2, (8, 4)), MomentumMixup()
        monitor = LabelMonitor(criterion) if watched else None
        losses = []
        for step in range(4):
            queries, keys, other = torch.randn(3, 5, 4, requires_grad=True)
            if monitor and step != 3:  # one call that was not announced
                monitor.announce(torch.arange(5), measure=step > 0)
            _, mix = mixup(queries.detach(), keys.detach())
            losses.append(criterion(queries, keys, mixed=other, mix=mix))
        return torch.stack(losses), criterion, monitor

    plain, watched = train(False), train(True)
    assert torch.equal(plain[0], watched[0])
    assert torch.equal(plain[1].memory_bank.bank, watched[1].memory_bank.bank)
    monitor = watched[2]
    first, second = monitor.measured
    assert first.own != second.own
    torch.testing.assert_close(monitor.mean().own, (first.own + second.own) / 2)
    assert all(value.isnan() for value in monitor.mean())
    monitor.remove()
    monitor.announce(torch.arange(5))
    watched[1](torch.randn(5, 4), torch.randn(5, 4))
    assert not monitor.measured


def test_goes_on_from_a_checkpoint():
    criterion = SLRLoss(0.2, (4, 4))
    monitor = LabelMonitor(criterion)
    monitor.announce(torch.tensor([1, 2]))
    criterion(*features(torch.tensor([1, 2])))
    resumed = LabelMonitor(criterion)
    assert resumed.queue_classes.tolist() == [-1] * 4
    resumed.load_state_dict(monitor.state_dict())
    assert resumed.queue_classes.tolist() == [1, 2, -1, -1]
    with pytest.raises(ValueError, match="has 4 entries, the queue 3 keys"):
        LabelMonitor(SLRLoss(0.2, (3, 4))).load_state_dict(monitor.state_dict())


def test_classes_of_another_batch_raise_and_lose_nothing():
    criterion = SLRLoss(0.2, (4, 4))
    monitor = LabelMonitor(criterion)
    bank = criterion.memory_bank.bank.clone()
    monitor.announce(torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match=r"shape \(3,\), the criterion's batch 2 rows"):
        criterion(*features(torch.tensor([1, 2])))
    assert torch.equal(criterion.memory_bank.bank, bank)


@pytest.mark.parametrize("rows", [slice(None), slice(1)])
def test_labels_that_are_not_numbers_give_measures_that_are_not(rows):
    labels = torch.full((2, 4), 0.25)
    labels[rows] = torch.nan
    quality = label_quality(labels, torch.tensor([0, 1]), torch.tensor([0, 1, 0, 1]))
    assert all(getattr(quality, name).isnan() for name in ("own", "same", "other", "nearest", "distance"))


def watched(size=8, **options):
    criterion = SLRLoss(0.2, (size, 4) if size else 0, **options)
    return criterion, LabelMonitor(criterion)


@pytest.mark.parametrize(
    "replace",
    [
        lambda c: c.load_state_dict(copy.deepcopy(c.state_dict())),
        lambda c: c.load_state_dict(SLRLoss(0.2, (8, 4)).state_dict(), assign=True),
        lambda c: c.memory_bank.load_state_dict(c.memory_bank.state_dict()),
        lambda c: c.reset_parameters(),
        lambda c: c.to("meta").to_empty(device="cpu"),
    ],
    ids=["load", "load by assignment", "load the queue alone", "reset", "meta device"],
)
def test_classes_become_unknown_where_the_queue_is_replaced(replace):
    criterion, monitor = watched()
    monitor.announce(torch.arange(4))
    criterion(*features(torch.arange(4)))
    assert monitor.queue_classes.tolist() == [0, 1, 2, 3, -1, -1, -1, -1]
    replace(criterion)
    assert monitor.queue_classes.tolist() == [-1] * 8
    pointer = int(criterion.memory_bank.bank_ptr)
    monitor.announce(torch.arange(4))
    criterion(*features(torch.arange(4)))
    assert monitor.queue_classes[pointer : pointer + 4].tolist() == [0, 1, 2, 3]


def test_a_queue_that_stays_in_place_keeps_its_classes():
    criterion, monitor = watched()
    monitor.announce(torch.arange(4))
    criterion(*features(torch.arange(4)))
    with pytest.warns(UserWarning, match=r"holds no .*bank"):
        criterion.load_state_dict(SLRLoss(0.2).state_dict())
    criterion.double()
    assert monitor.queue_classes.tolist() == [0, 1, 2, 3, -1, -1, -1, -1]


@pytest.mark.parametrize("rows", [3, 4], ids=["announced too few", "the loss refuses"])
def test_a_call_that_fails_takes_its_announcement_along(rows):
    criterion, monitor = watched()
    queries, keys = features(torch.arange(4))
    monitor.announce(torch.arange(rows))
    with pytest.raises(ValueError, match="shape"):
        criterion(queries, keys if rows == 3 else keys[:3])
    criterion(queries, keys)
    assert monitor.queue_classes.tolist() == [-1] * 8
    assert not monitor.measured


@pytest.mark.parametrize("other", [torch.nn.MSELoss(), None, "criterion"])
def test_other_criteria_are_refused(other):
    with pytest.raises(TypeError, match=r"criterion must be a slr_plugin\.SLRLoss, got"):
        LabelMonitor(other)


def test_two_monitors_and_a_copy_each_follow_their_own():
    criterion, first = watched()
    second = LabelMonitor(criterion)
    first.announce(torch.arange(4))
    criterion(*features(torch.arange(4)))
    copy.deepcopy(criterion)(*features(torch.arange(4)))
    second.announce(torch.arange(4, 8))
    criterion(*features(torch.arange(4, 8)))
    assert first.queue_classes.tolist() == [0, 1, 2, 3, -1, -1, -1, -1]
    assert second.queue_classes.tolist() == [-1, -1, -1, -1, 4, 5, 6, 7]
    assert (len(first.measured), len(second.measured)) == (1, 1)
    second.remove()
    second.remove()
    second.announce(torch.arange(4))
    criterion(*features(torch.arange(4)))
    assert second.measured == second.measured[:1]
    assert second.queue_classes.tolist() == [-1, -1, -1, -1, 4, 5, 6, 7]


@pytest.mark.parametrize("options", [{}, {"size": 0}, {"in_batch_keys": False}, {"size": 0, "symmetric": False}])
def test_further_negatives_have_no_class(options):
    torch.manual_seed(0)
    criterion, monitor = watched(**options)
    classes = torch.tensor([0, 1, 0, 1])
    monitor.announce(classes, measure=False)
    criterion(*features(classes))
    (queries, keys), negatives = features(classes), torch.randn(5, 4)
    labels, queue = criterion.labels(queries, keys, negatives=negatives), monitor.queue_classes
    batch = classes.repeat(2) if criterion.symmetric else classes
    columns = torch.cat([batch if criterion.in_batch_keys else classes[:0], torch.full((5,), -1), queue])
    rows, own = classes, None
    if criterion.symmetric:
        rows, own = batch, torch.arange(8).roll(4)
        columns = columns.expand(8, -1).clone().fill_diagonal_(-1)  # a row does not see itself
    if not criterion.in_batch_keys:
        columns, own = torch.cat([classes[:, None], columns.expand(4, -1)], dim=1), torch.zeros(4, dtype=torch.long)
    monitor.announce(classes)
    criterion(queries, keys, negatives=negatives)
    torch.testing.assert_close(monitor.measured[-1], label_quality(labels, rows, columns, own))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_call_is_measured_once(reentrant):
    criterion, monitor = watched(0)
    queries, keys = features(torch.arange(4))
    monitor.announce(torch.arange(4))
    torch.utils.checkpoint.checkpoint(criterion, queries, keys, use_reentrant=reentrant).backward()
    assert len(monitor.measured) == 1


def test_measures_the_labels_that_mixed_queries_are_given():
    criterion = SLRLoss(0.2)  # both views are rows, but mixed queries see the second views only
    monitor = LabelMonitor(criterion)
    queries, keys, mixed = torch.randn(3, 6, 4, requires_grad=True)
    _, mix = MomentumMixup()(queries.detach(), keys.detach())
    monitor.announce(torch.arange(6))
    criterion(queries, keys, mixed, mix)
    torch.testing.assert_close(monitor.mean().own, criterion.stats["positive_weight"])


# ----------------------------------------------------------------------------------------------- print, words, pictures


def quality_of(own, same, other, chance=0.1):
    nearest, distances = 0.5, (0.6, 0.9, 0.7)
    purity = same / (same + other) if same + other else math.nan
    return LabelQuality(*map(torch.tensor, (own, same, other, chance, nearest, *distances, purity)))


def test_purity_of_an_average_is_that_of_the_mean_masses():
    one, two = quality_of(0.8, 0.2, 0.0), quality_of(0.2, 0.2, 0.6)
    assert LabelQuality.average([one, two]).purity.item() == pytest.approx(0.4)


def test_prints_what_each_number_says():
    text = str(quality_of(0.7, 0.2, 0.1))
    assert "70.0% own positive, 20.0% other keys of the own class, 10.0% other classes" in text
    assert "66.7% of what lies on other keys is on the own class; chance is 10.0%" in text
    assert "tensor" not in text


LABELS = torch.full((2, 4), 0.25)
NONE, SOME = torch.tensor([-1, -1]), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("labels", "classes", "key_classes"),
    [
        (LABELS, NONE, torch.tensor([0, 1, 0, 1])),
        (LABELS[:1], SOME[:1], torch.full((4,), -1)),
        (LABELS * torch.nan, SOME, torch.tensor([0, 1, 0, 1])),
    ],
)
def test_values_are_not_a_number_where_nothing_can_be_told(labels, classes, key_classes):
    quality = label_quality(labels, classes, key_classes)
    for one in (quality, LabelQuality.average([quality, quality]), copy.deepcopy(quality), LabelQuality.average([])):
        assert one.own.isnan()
        assert "not a number" in str(one)
    known = label_quality(LABELS, SOME, torch.tensor([0, 1, 0, 1]))
    assert LabelQuality.average([quality, known]) == known


def test_one_hot_labels_have_no_purity():
    one_hot = label_quality(torch.eye(2, 4), SOME, torch.tensor([0, 1, 0, 1]))
    assert one_hot.own == 1
    assert one_hot.purity.isnan()
    assert "100.0% own positive" in str(one_hot)


def test_a_monitor_that_measured_nothing_says_so():
    assert "not a number" in str(LabelMonitor(SLRLoss(0.2, (4, 4))).mean())


def test_the_own_mass_does_not_depend_on_how_many_keys_have_a_class():
    """Of 104 keys that share a quarter of each label, all have a class, or four."""
    labels = torch.full((4, 104), 0.25 / 100).scatter(1, torch.arange(4)[:, None], 0.75 - 3 * 0.25 / 100)
    labels[:, :4] += 0.25 / 100 * (1 - torch.eye(4))  # so that purity is above chance where few are known
    classes, every = torch.tensor([0, 1, 0, 1]), torch.arange(104) % 2
    few = every.masked_fill(torch.arange(104) >= 4, -1)
    own = labels.diagonal()
    for known in (few, every):
        quality = label_quality(labels, classes, known)
        torch.testing.assert_close(quality.own, own.mean())
    assert "unknown ones" in str(label_quality(labels, classes, few))
    assert "unknown ones" not in str(label_quality(labels, classes, every))


def test_the_advice_does_what_it_says():
    """More confidence gives more away; less sharpening gives away purer labels."""
    torch.manual_seed(0)
    centres = torch.randn(5, 16)
    classes = torch.arange(64) % 5
    queries, keys = (centres[classes] + 0.8 * torch.randn(64, 16) for _ in range(2))

    def measured(**options):
        criterion = SLRLoss(0.2, symmetric=False, **options)
        return label_quality(criterion.labels(queries, keys), classes, classes)

    usual, more, sharper = measured(), measured(confidence=5.0), measured(sharpening=0.5)
    assert more.own < usual.own
    assert sharper.purity > usual.purity


def test_labels_of_both_views_are_not_taken_for_those_of_one_direction():
    criterion = SLRLoss(0.1)
    labels = criterion.labels(*torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0)))
    classes = torch.tensor([0, 0, 1, 1]).repeat(2)
    with pytest.raises(ValueError, match="no label has weight on its own column"):
        label_quality(labels, classes, classes)
    assert label_quality(labels, classes, classes, own=torch.arange(8).roll(4)).own > 0


def evaluate_first(criterion):
    monitor = LabelMonitor(criterion)
    criterion.load_state_dict(SLRLoss(0.2, (16, 4)).state_dict())
    with torch.inference_mode():
        monitor.announce(torch.arange(4))
        criterion(*torch.randn(2, 4, 4))
    return monitor


def look_at_the_classes_first(criterion):
    monitor = LabelMonitor(criterion)
    criterion.reset_parameters()
    with torch.inference_mode():
        monitor.state_dict()
    return monitor


def build_while_evaluating(criterion):
    with torch.inference_mode():
        return LabelMonitor(criterion)


@pytest.mark.parametrize("prepare", [evaluate_first, look_at_the_classes_first, build_while_evaluating])
def test_training_goes_on_after_inference_mode(prepare):
    criterion = SLRLoss(0.2, (16, 4))
    monitor = prepare(criterion)
    for step in range(2):
        monitor.announce(torch.arange(4) + 4 * step)
        criterion(*features(torch.arange(4))).backward()
    assert criterion.step == 2
    assert monitor.queue_classes[:8].tolist() == list(range(8))


@pytest.mark.parametrize("records", [False, True])
@pytest.mark.parametrize("rows", [4, 2])
def test_keys_that_enter_after_a_later_call_have_unknown_classes(rows, records):
    criterion, monitor = watched(8)
    queries, keys = features(torch.arange(4))
    monitor.announce(torch.arange(4))
    loss = torch.utils.checkpoint.checkpoint(criterion, queries, keys, use_reentrant=True)
    with torch.set_grad_enabled(records):
        monitor.announce(torch.full((rows,), 9))
        criterion(*features(torch.arange(rows)), update=False)
    loss.backward()
    assert criterion.step == 1
    assert monitor.queue_classes.tolist() == [-1] * 8


def test_the_classes_that_were_read_stay():
    criterion, monitor = watched(8)
    before, state = monitor.queue_classes, monitor.state_dict()
    monitor.announce(torch.arange(4))
    criterion(*features(torch.arange(4)))
    assert before.tolist() == state["queue_classes"].tolist() == [-1] * 8


def test_a_monitor_that_did_not_see_a_call_begin_knows_no_classes():
    criterion, _ = watched(8)
    loss = torch.utils.checkpoint.checkpoint(criterion, *features(torch.arange(4)), use_reentrant=True)
    late = LabelMonitor(criterion)
    loss.backward()
    assert criterion.step == 1
    assert late.queue_classes.tolist() == [-1] * 8
