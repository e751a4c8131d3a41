"""The adapter beside pytorch-metric-learning's own NTXentLoss, and beside the dense oracle."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("pytorch_metric_learning")

import _metric_learning
from _oracle import slr
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.losses import CrossBatchMemory, NTXentLoss, SelfSupervisedLoss
from pytorch_metric_learning.regularizers import LpRegularizer
from torch import multiprocessing

import slr_plugin
from slr_plugin.adapters.pytorch_metric_learning import SLRLoss

TAU = 0.2


def features(*sizes, dim=6):
    """Leaves of these numbers of rows."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(size, dim, dtype=torch.float64, generator=generator).requires_grad_() for size in sizes]


def close(first, second, leaves, atol=1e-12):
    """Equal values and equal gradients."""
    torch.testing.assert_close(first, second, rtol=0, atol=atol)
    gradients = [torch.autograd.grad(loss, leaves) for loss in (first, second)]
    torch.testing.assert_close(*gradients, rtol=0, atol=atol)


def one_hot(*args, **kwargs):
    return SLRLoss(TAU, *args, confidence=0.0, **kwargs)


@pytest.mark.parametrize("symmetric", [True, False])
def test_without_refinement_it_is_their_loss_in_self_supervised_loss(symmetric):
    views = features(7, 7)
    ours, theirs = (SelfSupervisedLoss(loss, symmetric=symmetric)(*views) for loss in (one_hot(), NTXentLoss(TAU)))
    close(ours, theirs, views)


@pytest.mark.parametrize("labels", [[0, 1, 2, 3, 0, 1, 2, 3], [5, 5, 2, 2, 9, 9, 0, 0], [3, 1, 1, 0, 2, 3, 0, 2]])
def test_pairs_may_come_in_any_order(labels):
    (embeddings,) = features(8)
    labels = torch.tensor(labels)
    close(one_hot()(embeddings, labels), NTXentLoss(TAU)(embeddings, labels), [embeddings])


def test_samples_without_a_partner_are_hard_negatives_as_in_their_loss():
    (embeddings,) = features(9)
    labels = torch.tensor([4, 0, 1, 7, 2, 0, 1, 2, 8])
    close(one_hot()(embeddings, labels), NTXentLoss(TAU)(embeddings, labels), [embeddings])


def test_further_rows_of_ref_emb_are_hard_negatives_as_in_their_loss():
    embeddings, ref_emb = features(4, 9)
    labels, ref_labels = torch.tensor([3, 0, 1, 2]), torch.tensor([-1, 0, 1, -1, 2, 3, 9, -1, 8])
    ours, theirs = (
        loss(embeddings, labels, ref_emb=ref_emb, ref_labels=ref_labels) for loss in (one_hot(), NTXentLoss(TAU))
    )
    close(ours, theirs, [embeddings, ref_emb])


@pytest.mark.parametrize("in_batch_keys", [True, False])
def test_the_queue_is_further_negatives_of_their_loss(in_batch_keys):
    queries, keys = features(4, 4)
    ours = one_hot((10, 6), in_batch_keys=in_batch_keys)
    bank = ours.criterion.memory_bank.bank.double().clone()
    theirs = []
    for part in [slice(4)] if in_batch_keys else [slice(i, i + 1) for i in range(4)]:  # else each query alone
        labels = torch.arange(4)[part]
        ref = torch.cat([keys[part], bank]), torch.cat([labels, torch.full((10,), -1)])
        theirs.append(NTXentLoss(TAU)(queries[part], labels, ref_emb=ref[0], ref_labels=ref[1]))
    ours = SelfSupervisedLoss(ours, symmetric=False)(queries, keys)
    close(ours, torch.stack(theirs).mean(), [queries, keys], atol=1e-7)  # the queue's rows have unit length in float32


def test_the_queue_takes_the_second_views_and_leaves_out_hard_negatives():
    for symmetric in (True, False):
        queries, keys = features(4, 4)
        loss = SLRLoss(TAU, (10, 6))
        SelfSupervisedLoss(loss, symmetric=symmetric)(queries, keys)
        torch.testing.assert_close(loss.criterion.memory_bank.bank[:4], F.normalize(keys.detach().float()))
        assert loss.criterion.memory_bank.bank_ptr == 4
    embeddings, ref_emb = features(4, 7)
    loss(embeddings, torch.arange(4), ref_emb=ref_emb, ref_labels=torch.arange(7))
    assert loss.criterion.memory_bank.bank_ptr == 8


@pytest.mark.parametrize("negatives", [0, 3])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    "settings", [{"confidence": 1.0}, {"confidence": 5.0, "sharpening": 0.6, "refined_weight": 1.0}]
)
def test_refined_labels_are_those_of_the_dense_oracle(settings, symmetric, negatives):
    queries, keys, further = features(5, 5, negatives)
    labels = torch.arange(5)
    further_labels = torch.arange(5, 5 + negatives)
    ours = SLRLoss(TAU, **settings)
    if symmetric:
        loss = ours(torch.cat([queries, keys, further]), torch.cat([labels, labels, further_labels]))
    else:
        loss = ours(queries, labels, ref_emb=torch.cat([keys, further]), ref_labels=torch.cat([labels, further_labels]))
    dense = slr(queries, keys, negatives=further, temperature=TAU, symmetric=symmetric, **settings).loss
    close(loss, dense, [queries, keys] + ([further] if negatives else []))


def test_refined_labels_over_the_queue_are_those_of_the_dense_oracle():
    queries, keys = features(5, 5)
    loss = SLRLoss(TAU, (12, 6), confidence=3.0)
    bank = loss.criterion.memory_bank.bank.double().clone()
    dense = slr(queries, keys, bank=bank, temperature=TAU, confidence=3.0).loss
    close(SelfSupervisedLoss(loss, symmetric=False)(queries, keys), dense, [queries, keys])


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gloo")
    multiprocessing.spawn(_metric_learning.run, (folder, 2), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", _metric_learning.CASES)
def test_two_processes_train_like_one_without_their_wrapper(processes, case):
    alone = _metric_learning.train(case, rank=None, world=2)
    for results in processes:
        torch.testing.assert_close(results[case]["gradients"], alone["gradients"], rtol=0, atol=1e-10)
        torch.testing.assert_close(results[case]["queue"], alone["queue"])


def test_it_goes_by_the_name_of_their_loss_and_prints_its_own():
    loss = SLRLoss(TAU, (8, 4))
    assert type(loss).__name__ == "NTXentLoss"
    assert str(loss).startswith("SLRLoss(")
    for twin in (pickle.loads(pickle.dumps(loss)), copy.deepcopy(loss)):
        assert isinstance(twin, SLRLoss)
        assert torch.equal(twin.criterion.memory_bank.bank, loss.criterion.memory_bank.bank)


def test_the_queue_is_in_the_state_dict():
    views = features(4, 4)
    first, second = (SelfSupervisedLoss(SLRLoss(TAU, (10, 6)), symmetric=False) for _ in range(2))
    first(*views)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(*views), second(*views))


def test_their_record_keeper_finds_the_label_statistics():
    loss = SLRLoss(TAU, confidence=2.0, collect_stats=True)
    SelfSupervisedLoss(loss)(*features(4, 4))
    recorded = {name: getattr(loss, name) for name in loss._record_these_stats}
    assert recorded == {name: value.item() for name, value in loss.criterion.stats.items()}
    assert recorded["mu"] == 2.0


def test_their_regularizer_is_added():
    views = features(4, 4)
    plain, regularized = (
        SelfSupervisedLoss(SLRLoss(TAU, embedding_regularizer=regularizer))(*views)
        for regularizer in (None, LpRegularizer())
    )
    torch.testing.assert_close(regularized - plain, torch.cat(views).norm(dim=1).mean())


def test_mixed_queries_go_to_the_criterion():
    views = features(4, 4)
    loss = SLRLoss(TAU, (10, 6))
    mixed, mix = slr_plugin.MomentumMixup()(*views)
    assert loss.criterion(*views, mixed, mix).isfinite()


def test_labels_that_are_classes_are_refused():
    (embeddings,) = features(6)
    with pytest.raises(ValueError, match="got 1 3 times"):
        SLRLoss()(embeddings, torch.tensor([0, 0, 1, 1, 1, 2]))
    with pytest.raises(ValueError, match="each at most twice and one at least"):
        SLRLoss()(embeddings, torch.arange(6))
    with pytest.raises(ValueError, match="got 1 2 times"):
        SLRLoss()(embeddings[:2], torch.arange(2), ref_emb=embeddings[2:], ref_labels=torch.tensor([0, 1, 1, 2]))
    with pytest.raises(ValueError, match="got 1 0 times"):
        SLRLoss()(embeddings[:2], torch.arange(2), ref_emb=embeddings[2:], ref_labels=torch.tensor([0, 2, 3, 4]))
    with pytest.raises(ValueError, match="labels must differ"):
        SLRLoss()(embeddings[:2], torch.zeros(2), ref_emb=embeddings[2:], ref_labels=torch.arange(4.0))
    with pytest.raises(ValueError, match="use SelfSupervisedLoss"):
        SLRLoss()(embeddings)
    with pytest.raises(ValueError, match="the batch is empty"):
        SLRLoss()(embeddings[:0], torch.arange(0))


def test_their_miners_memory_and_other_distances_are_refused():
    (embeddings,) = features(4)
    labels = torch.tensor([0, 1, 0, 1])
    with pytest.raises(ValueError, match="leave the miner out"):
        SLRLoss()(embeddings, labels, (torch.tensor([0]), torch.tensor([2]), torch.tensor([1])))
    with pytest.raises(ValueError, match="in place of CrossBatchMemory"):
        CrossBatchMemory(SLRLoss(), embedding_size=6)(embeddings, labels)
    with pytest.raises(ValueError, match="distance must be CosineSimilarity"):
        SLRLoss(distance=LpDistance())
