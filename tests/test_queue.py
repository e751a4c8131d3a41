"""The ring: order, wrap, batches larger than the queue, loading both ways."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightly.loss import NTXentLoss

from slr_plugin import CosineConfidence, SLRLoss
from slr_plugin.queue import KeyQueue


def unit_keys(count, dim=3, seed=0):
    return F.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.mark.parametrize("size", [1, 2, 5, 8])
@pytest.mark.parametrize("batch", [1, 2, 3, 5, 8, 13])
def test_holds_the_newest_keys_in_ring_order(size, batch):
    queue, stream = KeyQueue((size, 3)), unit_keys(batch * 8)
    for keys in stream.split(batch):
        queue.enqueue(keys)
    assert queue.bank_ptr.item() == len(stream) % size
    oldest_first = queue.bank.roll(-queue.bank_ptr.item(), 0)
    torch.testing.assert_close(oldest_first, stream[-size:], rtol=0, atol=0)


def test_numpys_integers_are_sizes():
    assert KeyQueue((np.int64(8), np.int32(3))).bank.shape == (8, 3)
    assert len(KeyQueue(np.int64(0))) == 0


def test_starts_with_lightlys_random_keys():
    torch.manual_seed(0)
    ours = SLRLoss(memory_bank_size=(16, 4))
    torch.manual_seed(0)
    theirs = NTXentLoss(memory_bank_size=(16, 4))
    assert torch.equal(ours.memory_bank.bank, theirs.memory_bank.bank)


def test_negatives_are_the_queue_before_the_call():
    criterion = SLRLoss(0.2, (4, 3), in_batch_keys=False, confidence=0.0)
    queries, keys = unit_keys(4, seed=1).requires_grad_(), unit_keys(4, seed=2)
    bank = criterion.memory_bank.bank.clone()
    loss = criterion(queries, keys)
    logits = torch.cat([(queries * keys).sum(1, keepdim=True), queries @ bank.T], dim=1) / 0.2
    torch.testing.assert_close(loss, F.cross_entropy(logits, torch.zeros(4, dtype=torch.long)))
    torch.testing.assert_close(criterion.memory_bank.bank, keys)


def test_stores_unit_float32_rows_without_graph():
    criterion = SLRLoss(memory_bank_size=(8, 3))
    keys = (100 * unit_keys(5)).double().requires_grad_()
    criterion(keys, keys)
    bank = criterion.memory_bank.bank
    assert bank.dtype == torch.float32
    assert not bank.requires_grad
    torch.testing.assert_close(bank.norm(dim=1), torch.ones(8))


def test_a_bare_int_warns_and_takes_the_dimension_from_the_first_batch():
    with pytest.warns(UserWarning, match=r"memory_bank_size=\(6, d\)"):
        criterion = SLRLoss(memory_bank_size=6)
    criterion(unit_keys(2), unit_keys(2))
    assert criterion.memory_bank.bank.shape == (6, 3)
    torch.testing.assert_close(criterion.memory_bank.bank.norm(dim=1), torch.ones(6))


@pytest.mark.parametrize("size", [0, (0,), (0, 128)])
def test_size_zero_is_no_queue(size):
    criterion = SLRLoss(memory_bank_size=size)
    criterion(unit_keys(2).requires_grad_(), unit_keys(2))
    assert set(criterion.state_dict()) == {"step"}


def trained(memory_bank_size, steps=3):
    criterion = SLRLoss(memory_bank_size=memory_bank_size)
    for step in range(steps):
        criterion(unit_keys(2, seed=step).requires_grad_(), unit_keys(2, seed=step + 9))
    return criterion


def test_checkpoint_restores_queue_pointer_and_step():
    source, copy_ = trained((5, 3)), SLRLoss(memory_bank_size=(5, 3))
    copy_.load_state_dict(source.state_dict())
    for name, value in source.state_dict().items():
        assert torch.equal(copy_.state_dict()[name], value), name


def test_checkpoint_restores_a_queue_whose_dimension_was_open():
    source = trained((5, 3))
    with pytest.warns(UserWarning, match="leaves the dimension"):
        copy_ = SLRLoss(memory_bank_size=5)
    copy_.load_state_dict(source.state_dict())
    assert torch.equal(copy_.memory_bank.bank, source.memory_bank.bank)


@pytest.mark.parametrize("wrap", [False, True], ids=["alone", "inside a model"])
def test_ntxent_checkpoint_keeps_the_fresh_queue_and_warns(wrap):
    theirs, ours = NTXentLoss(memory_bank_size=(5, 3)), SLRLoss(memory_bank_size=(5, 3))
    before = copy.deepcopy(ours.state_dict())
    if wrap:
        theirs, ours_module = torch.nn.ModuleDict({"loss": theirs}), torch.nn.ModuleDict({"loss": ours})
    else:
        ours_module = ours
    with pytest.warns(UserWarning, match=r"holds no .*bank"):
        ours_module.load_state_dict(theirs.state_dict())
    for name, value in before.items():
        assert torch.equal(ours.state_dict()[name], value), name


def test_ntxent_checkpoint_without_queue_loads_silently():
    SLRLoss().load_state_dict(NTXentLoss().state_dict())


def test_a_checkpoint_without_step_warns_where_a_schedule_needs_it():
    with pytest.warns(UserWarning, match="no step count"):
        SLRLoss(confidence=CosineConfidence(0, 1, 10)).load_state_dict(NTXentLoss().state_dict())


def test_a_loss_without_queue_drops_the_checkpoints_and_warns():
    source, target = trained((5, 3)), SLRLoss()
    with pytest.warns(UserWarning, match=r"shape \(5, 3\)"):
        target.load_state_dict(source.state_dict())
    assert target.step == source.step


@pytest.mark.parametrize("size", [(6, 3), (5, 4)])
def test_a_checkpoint_of_another_size_raises_and_changes_nothing(size):
    source, target = trained((5, 3)), trained(size, steps=0)
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(RuntimeError, match=r"memory_bank_size=\(5, 3\)"):
        target.load_state_dict(source.state_dict())
    for name, value in before.items():
        assert torch.equal(target.state_dict()[name], value)


def test_a_checkpoint_with_features_of_another_size_raises_and_changes_nothing():
    source, target = (SLRLoss(0.2, (5, 3), estimator_dim=width) for width in (4, 2))
    source.set_step(7)
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(RuntimeError, match="estimator_dim=4"):
        target.load_state_dict(source.state_dict())
    for name, value in before.items():
        assert torch.equal(target.state_dict()[name], value)


def test_a_checkpoint_whose_pointer_has_another_shape_raises_and_changes_nothing():
    source, target = trained((5, 3)), trained((5, 3), steps=0)
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(RuntimeError, match="bank_ptr must have shape"):
        target.load_state_dict(source.state_dict() | {"memory_bank.bank_ptr": torch.tensor(0)})
    for name, value in before.items():
        assert torch.equal(target.state_dict()[name], value)


def test_an_unknown_key_in_the_checkpoint_still_raises():
    state = trained((5, 3)).state_dict() | {"memory_bank.typo": torch.zeros(1)}
    with pytest.raises(RuntimeError, match="typo"):
        SLRLoss(memory_bank_size=(5, 3)).load_state_dict(state)


def test_non_finite_keys_leave_the_queue_as_it_is():
    queue = KeyQueue((5, 3))
    queue.enqueue(unit_keys(2))
    before = copy.deepcopy(queue.state_dict())
    keys = unit_keys(3)
    keys[1, 0] = torch.nan
    assert not queue.enqueue(keys)
    for name, value in before.items():
        assert torch.equal(queue.state_dict()[name], value)


def test_a_non_finite_estimator_advances_neither_queue_nor_step():
    criterion = SLRLoss(0.2, (8, 3), estimator_dim=2)
    before = copy.deepcopy(criterion.state_dict())
    estimator = torch.randn(2, 2)
    estimator[0, 0] = torch.nan
    criterion(unit_keys(2).requires_grad_(), unit_keys(2, seed=1), estimator=estimator)
    for name, value in before.items():
        assert torch.equal(criterion.state_dict()[name], value), name


def test_ids_that_another_process_shared_do_not_stay_on_new_keys():
    queue = KeyQueue((4, 2))
    queue.share(lambda values: values.fill_(7) if values.shape == (4,) else None)
    queue.enqueue(torch.eye(2))
    assert queue.groups.tolist() == [-1, -1, 7, 7]
