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
from pytorch_metric_learning.losses import CrossBatchMemory, NTXentLoss, SelfSupervisedLoss, SupConLoss
from pytorch_metric_learning.regularizers import LpRegularizer
from torch import multiprocessing

import slr_plugin
from slr_plugin.adapters.pytorch_metric_learning import SLRLoss

TAU = 0.2


def features(*sizes, dim=6, seed=3):
    """Leaves of these numbers of rows."""
    generator = torch.Generator().manual_seed(seed)
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


def test_features_that_estimate_the_labels_have_a_queue_and_are_in_the_state_dict():
    first, second = (SLRLoss(TAU, (10, 6), confidence=2.0, estimator_dim=3) for _ in range(2))
    plain = slr_plugin.SLRLoss(TAU, (10, 6), confidence=2.0, estimator_dim=3)
    plain.load_state_dict({name.removeprefix("criterion."): value for name, value in first.state_dict().items()})
    views, known = features(4, 4), features(4, dim=3)[0].detach()
    for _ in range(2):
        assert torch.equal(first.criterion(*views, estimator=known), plain(*views, estimator=known))
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.criterion.memory_bank.estimator_bank[:4], first.criterion.memory_bank.estimator_bank[4:8])
    assert torch.equal(first.criterion(*views, estimator=known), second.criterion(*views, estimator=known))


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


# ---------------------------------------------------------------------------------------------------- labels as classes

CLASSES = [[0, 0, 1, 1, 1, 2], [7, 3, 7, 7, 3, 9, 7, 4, 4, 4], [5] * 3 + [1] * 5]


@pytest.mark.parametrize("labels", CLASSES)
def test_without_refinement_it_is_supcon_of_classes(labels):
    (embeddings,) = features(len(labels))
    labels = torch.tensor(labels)
    close(one_hot()(embeddings, labels), SupConLoss(TAU)(embeddings, labels), [embeddings])


@pytest.mark.parametrize("labels", CLASSES)
def test_without_refinement_it_is_supcon_of_classes_in_ref_emb(labels):
    embeddings, ref_emb = features(len(labels), 8)
    labels, ref_labels = torch.tensor(labels), torch.tensor([1, 1, 0, 7, 4, 1, 8, 5])
    ours, theirs = (
        loss(embeddings, labels, ref_emb=ref_emb, ref_labels=ref_labels) for loss in (one_hot(), SupConLoss(TAU))
    )
    close(ours, theirs, [embeddings, ref_emb])


def test_a_queue_of_labels_is_supcon_with_their_memory(tmp_path):
    """Theirs holds the batch beside what ours holds, which is full of known keys after two steps."""
    ours, theirs = one_hot((8, 6)), CrossBatchMemory(SupConLoss(TAU), embedding_size=6, memory_size=12)
    for step, labels in enumerate([[0, 0, 1, 1], [1, 1, 2, 2], [2, 0, 2, 0], [3, 3, 0, 0], [1, 1, 1, 1]]):
        (embeddings,) = features(4, seed=step)
        labels = torch.tensor(labels)
        if step == 4:  # killed and resumed
            torch.save(ours.state_dict(), tmp_path / "loss.pt")
            ours = one_hot((8, 6))
            ours.load_state_dict(torch.load(tmp_path / "loss.pt"))
        assert ours.criterion.memory_bank.groups.tolist().count(-1) == max(0, 8 - 4 * step)
        losses = ours(embeddings, labels), theirs(embeddings, labels)
        if step > 1:
            torch.testing.assert_close(
                *losses, rtol=0, atol=1e-6
            )  # our queue is float32, theirs gives keys no gradient


def test_numbered_pairs_leave_no_labels_in_the_queue():
    loss = SLRLoss(TAU, (10, 6))
    for symmetric in (True, False):
        SelfSupervisedLoss(loss, symmetric=symmetric)(*features(4, 4))
    assert loss.criterion.memory_bank.bank_ptr == 8
    assert loss.criterion.memory_bank.groups.tolist() == [-1] * 10


def seen(loss, *args, **kwargs):
    """The key set and the dense labels of a call."""
    found, build = [], loss.criterion._key_set

    def watch(checked):
        found.append(build(checked))
        return found[-1]

    loss.criterion._key_set = watch
    loss(*args, **kwargs)
    return found[-1], slr_plugin.dense.labels(found[-1], loss.criterion.settings_at(0, torch.float64))


@pytest.mark.parametrize("same_group", ["positive", "ignored"])
def test_a_toy_two_thirds_of_which_are_in_pairs(same_group):
    """Samples 0 to 3 are two pairs, 4 and 5 alone; both views of each are there."""
    ids = torch.tensor([3, 3, 8, 8, 1, 2])
    first, second = features(6, 6)
    _, labels = seen(one_hot(same_group=same_group), torch.cat([first, second]), ids.repeat(2))
    if same_group == "positive":
        assert sorted(labels.unique().round(decimals=9).tolist()) == pytest.approx([0, 1 / 3, 1])
        assert ((labels - 1 / 3).abs() < 1e-9).sum(1).tolist().count(3) == 8
    else:
        assert labels.max(1).values.tolist() == [1] * 12
    half = 1 / 2 if same_group == "positive" else 1
    column = torch.stack([ids, ids], 1)[:, 0]  # of a table: not contiguous
    _, labels = seen(one_hot(same_group=same_group), first, column, ref_emb=second, ref_labels=ids)
    assert labels.max(1).values.tolist() == pytest.approx([half] * 4 + [1] * 2)
    assert (labels > 0).sum(1).tolist() == [round(1 / half)] * 4 + [1] * 2


@pytest.mark.parametrize("has_ref", [False, True])
def test_refined_labels_of_classes_are_mixed_with_the_known_ones(has_ref):
    embeddings, ref_emb = features(8, 9)
    labels, ref_labels = torch.tensor([0, 0, 1, 1, 1, 2, 0, 2]), torch.tensor([1, 1, 0, 7, 2, 1, -1, 2, 0])
    call = (embeddings, labels), {"ref_emb": ref_emb, "ref_labels": ref_labels} if has_ref else {}
    loss = SLRLoss(TAU, confidence=2.0, refined_weight=0.7)
    keys, refined = seen(loss, *call[0], **call[1])
    known = seen(one_hot(), *call[0], **call[1])[1][: len(keys.rows)]
    logits = keys.rows @ keys.keys.T / TAU
    if not has_ref:
        logits = logits.scatter(1, keys.self_index[:, None], -1e9)
        assert len(keys.rows) == 6  # the last of each three is a key alone
        rows = keys.self_index
        known = (labels[rows][:, None] == labels).double().scatter(1, rows[:, None], 0)
        known = known / known.sum(1, keepdim=True)
    assert (refined - known).abs().max() > 0.01
    expected = -((0.3 * known + 0.7 * refined.detach()) * logits.log_softmax(1)).sum(1).mean()
    close(loss(*call[0], **call[1]), expected, [embeddings, *([ref_emb] if has_ref else [])])


def test_bad_labels_are_named():
    (embeddings,) = features(6)
    with pytest.raises(ValueError, match="no sample has a key of its label"):
        SLRLoss()(embeddings, torch.arange(6))
    with pytest.raises(ValueError, match="no sample has a key of its label"):
        SLRLoss()(embeddings[:2], torch.arange(2), ref_emb=embeddings[2:], ref_labels=torch.tensor([5, 2, 3, -1]))
    with pytest.raises(TypeError, match="groups must be whole numbers"):
        SLRLoss()(embeddings, torch.tensor([0.5, 0.5, 1, 1, 1, 2]))
    with pytest.raises(ValueError, match="labels are required"):
        SLRLoss()(embeddings)
    with pytest.raises(ValueError, match="both >= 1, got"):
        SLRLoss()(embeddings[:0], torch.arange(0))


def test_their_miners_memory_and_other_distances_are_refused():
    (embeddings,) = features(4)
    labels = torch.tensor([0, 1, 0, 1])
    with pytest.raises(ValueError, match="indices_tuple is not supported"):
        SLRLoss()(embeddings, labels, (torch.tensor([0]), torch.tensor([2]), torch.tensor([1])))
    with pytest.raises(ValueError, match="indices_tuple is not supported"):
        CrossBatchMemory(SLRLoss(), embedding_size=6)(embeddings, labels)
    with pytest.raises(AssertionError, match="to be CosineSimilarity"):
        SLRLoss(distance=LpDistance())
