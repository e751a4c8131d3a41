"""The ranking loss beside those of sentence-transformers, in its trainer, in two processes, killed and resumed."""

import copy
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import multiprocessing

for package in ("sentence_transformers", "accelerate", "datasets"):
    pytest.importorskip(package, reason='pip install "slr-plugin[sentence-transformers]"')

from _sentences import (
    DIM,
    dataset,
    features,
    rank_in_processes,
    rank_sentences,
    sentences,
    small_transformer,
    static_model,
)
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.modules import Dense, Router
from sentence_transformers.util import cos_sim, dot_score
from transformers import TrainerCallback

from slr_plugin import CosineConfidence, dense
from slr_plugin.adapters.sentence_transformers import SelfLabelingCallback, SelfLabelingRankingLoss

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning:(sentence_transformers|transformers|torch|accelerate)"),
]
BOTH = ("query_to_doc", "doc_to_query")


def value_and_gradient(loss, batch):
    loss.model.zero_grad()
    value = loss(batch, None)
    value.backward()
    return [
        value.detach(),
        *(parameter.grad.clone() for parameter in loss.model.parameters() if parameter.grad is not None),
    ]


def columns_of(model, batch):
    return [model(dict(column))["sentence_embedding"] for column in batch]


@pytest.mark.parametrize("columns", [2, 3, 5])
@pytest.mark.parametrize("directions", [BOTH[:1], BOTH])
def test_one_hot_labels_give_their_loss(columns, directions):
    model = static_model(torch.float64)
    batch = features(model, columns, 12)
    mode = "per_direction" if directions == BOTH else "joint"
    theirs = MultipleNegativesRankingLoss(model, 13.0, directions=directions, partition_mode=mode)
    ours = SelfLabelingRankingLoss(model, 13.0, cos_sim, confidence=0.0, directions=directions)
    torch.testing.assert_close(value_and_gradient(ours, batch), value_and_gradient(theirs, batch), rtol=0, atol=1e-12)
    embeddings = columns_of(model, batch)  # as the losses of sparse encoders call it
    values = [loss.compute_loss_from_embeddings(embeddings, None) for loss in (ours, theirs)]
    torch.testing.assert_close(*values, rtol=0, atol=1e-12)


@pytest.mark.parametrize("queue", [0, 5])
def test_refined_labels_are_the_dense_ones(queue):
    model = static_model(torch.float64)
    settings = {"sharpening": 0.5, "confidence": 3.0, "refined_weight": 0.7}
    loss = SelfLabelingRankingLoss(model, memory_bank_size=(queue, DIM), directions=BOTH, **settings)
    batch = features(model, 4, 9)
    anchors, positives, *negatives = columns_of(model, batch)

    def direction(name, rows, keys, further):
        bank = loss.criteria[name].memory_bank.bank.double() if queue else None
        expected = {"temperature": 1 / 20.0, "negatives": further, "symmetric": False, **settings}
        return dense.slr_loss(rows, keys, bank, **expected)

    expected = (
        direction("query_to_doc", anchors, positives, torch.cat(negatives))
        + direction("doc_to_query", positives, anchors, None)
    ) / 2
    expected.backward()
    gradient = model[0].embedding.weight.grad.clone()
    torch.testing.assert_close(value_and_gradient(loss, batch), [expected.detach(), gradient], rtol=0, atol=1e-10)


def test_documents_enter_the_queue_in_training_only():
    model = static_model()
    loss = SelfLabelingRankingLoss(model, memory_bank_size=20)
    bank = loss.criteria["query_to_doc"].memory_bank
    with torch.no_grad():
        loss(features(model, 2, 6), None)
    assert bank.bank_ptr.item() == 0
    batch = features(model, 2, 6)
    loss(batch, None)
    documents = torch.nn.functional.normalize(columns_of(model, batch)[1], dim=1)
    torch.testing.assert_close(bank.bank[:6], documents)
    assert bank.bank.shape == (20, DIM)


@pytest.mark.parametrize("is_cached", [False, True])
@pytest.mark.parametrize("same_group", ["positive", "ignored"])
def test_a_toy_two_thirds_of_which_are_in_pairs(same_group, is_cached, tmp_path):
    """Documents 0 to 3 are two, twice each; 4 and 5 are there once. The same again are then in the queue."""
    ids = torch.tensor([3, 3, 8, 8, 1, -1])
    model = small_transformer(tmp_path) if is_cached else static_model()
    settings = {"memory_bank_size": 9, "directions": BOTH, "mini_batch_size": 4 if is_cached else None}
    loss = SelfLabelingRankingLoss(model, confidence=0.0, same_group=same_group, **settings)
    labels = {name: [] for name in BOTH}
    for name, criterion in loss.criteria.items():
        criterion.register_forward_pre_hook(
            lambda module, args, kwargs, name=name: labels[name].append(module.labels(*args, **kwargs)),
            with_kwargs=True,
        )
    for _ in range(2):
        loss(features(model, 2, 6), ids).backward()
    is_same = (ids[:, None] == ids) & (ids[:, None] >= 0)
    for name in BOTH:
        expected = torch.eye(6, 15)
        if same_group == "positive":
            expected[:, :6] += is_same & ~torch.eye(6, dtype=torch.bool)
        torch.testing.assert_close(labels[name][0], expected / expected.sum(1, keepdim=True))
        if same_group == "positive":
            expected[:, 6:12] += is_same
        torch.testing.assert_close(labels[name][-1], expected / expected.sum(1, keepdim=True))
        assert loss.criteria[name].memory_bank.groups.tolist() == [8, 1, -1, 8, 1, -1, 3, 3, 8]


def test_vectors_in_the_column_label_estimate_the_labels():
    model = static_model(torch.float64)
    batch = features(model, 2, 6)
    vectors = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for queue in (0, (7, DIM)):
        loss = SelfLabelingRankingLoss(model, confidence=2.0, memory_bank_size=queue, estimator_dim=3)
        criterion = copy.deepcopy(loss.criteria["query_to_doc"])
        expected = criterion(*columns_of(model, batch), estimator=vectors)
        torch.testing.assert_close(loss(batch, vectors), expected)


def test_without_same_group_a_column_label_changes_nothing():
    model = static_model()
    loss, batch = SelfLabelingRankingLoss(model), features(model, 2, 6)
    for labels in (torch.ones(6, dtype=torch.long), torch.rand(6)):
        assert torch.equal(loss(batch, labels), loss(batch, None))


@pytest.mark.parametrize("columns", [2, 4])
@pytest.mark.parametrize("directions", [BOTH[:1], BOTH])
def test_cached_gradients_are_those_of_the_whole_batch(columns, directions, tmp_path):
    model = small_transformer(tmp_path).double()
    settings = {"confidence": 2.0, "memory_bank_size": (7, DIM), "directions": directions}
    batch = features(model, columns, 10)
    torch.manual_seed(1)
    whole = SelfLabelingRankingLoss(model, **settings)
    torch.manual_seed(1)
    cached = SelfLabelingRankingLoss(model, mini_batch_size=3, **settings)
    for _ in range(2):  # the second time with documents in the queue
        torch.testing.assert_close(
            value_and_gradient(cached, batch), value_and_gradient(whole, batch), rtol=0, atol=1e-10
        )
    for name in directions:
        torch.testing.assert_close(cached.criteria[name].state_dict(), whole.criteria[name].state_dict())
    sizes = []
    model[0].register_forward_hook(lambda module, inputs, output: sizes.append(len(output["token_embeddings"])))
    value_and_gradient(cached, batch)
    assert max(sizes) == 3


def test_one_hot_labels_give_their_cached_loss(tmp_path):
    model = small_transformer(tmp_path).double()
    batch = features(model, 3, 10)
    theirs = CachedMultipleNegativesRankingLoss(model, mini_batch_size=4)
    ours = SelfLabelingRankingLoss(model, confidence=0.0, mini_batch_size=4)
    torch.testing.assert_close(value_and_gradient(ours, batch), value_and_gradient(theirs, batch), rtol=0, atol=1e-10)


@pytest.mark.parametrize("mini_batch_size", [None, 3])
def test_works_in_matryoshka(mini_batch_size, tmp_path):
    model = small_transformer(tmp_path).double()
    loss = SelfLabelingRankingLoss(model, confidence=2.0, mini_batch_size=mini_batch_size)
    batch = features(model, 3, 10)
    expected = []
    for dim, weight in ((8, 1.0), (4, 0.5)):
        anchors, positives, negatives = (column[:, :dim] for column in columns_of(model, batch))
        expected.append(
            weight
            * dense.slr_loss(anchors, positives, temperature=0.05, confidence=2.0, negatives=negatives, symmetric=False)
        )
    sum(expected).backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    matryoshka = MatryoshkaLoss(model, loss, [8, 4], [1.0, 0.5])
    model.zero_grad()
    value = matryoshka(batch, None)
    value.backward()
    torch.testing.assert_close(value.detach(), sum(expected).detach())
    torch.testing.assert_close([p.grad for p in model.parameters() if p.grad is not None], gradients)


def test_matryoshka_and_a_queue_are_refused():
    model = static_model()
    matryoshka = MatryoshkaLoss(model, SelfLabelingRankingLoss(model, memory_bank_size=(16, DIM)), [8, 4])
    with pytest.raises(ValueError, match=r"out0 and out1 have shape \(4, 4\) but the queue has shape \(16, 8\)"):
        matryoshka(features(model, 2, 4), None)


def truncated(folder):
    model = static_model()
    model.truncate_dim = 4  # of encode alone: what is trained has 8 dimensions
    return model


def with_dense(folder):
    return SentenceTransformer(modules=[*small_transformer(folder), Dense(DIM, 6)], device="cpu")


def routed(folder):
    return SentenceTransformer(
        modules=[Router.for_query_document([static_model()[0]], [static_model()[0]])], device="cpu"
    )


@pytest.mark.parametrize(
    ("build", "width"), [(truncated, DIM), (with_dense, 6), (small_transformer, DIM), (routed, DIM)]
)
def test_the_queue_has_the_width_that_is_trained(build, width, tmp_path):
    model = build(tmp_path)
    loss = SelfLabelingRankingLoss(model, memory_bank_size=20)
    options = {"task": "query"} if build is routed else {}
    loss([model.preprocess(column, **options) for column in sentences(2, 6)], None).backward()
    assert loss.criteria["query_to_doc"].memory_bank.bank.shape == (20, width)


@pytest.mark.parametrize("queue", [0, 10])
def test_two_processes_have_the_gradient_of_one(queue, tmp_path):
    multiprocessing.spawn(rank_in_processes, (tmp_path, queue), nprocs=2)
    alone = rank_sentences(queue, None)
    together = [torch.load(tmp_path / f"rank{number}.pt") for number in range(2)]
    torch.testing.assert_close((together[0]["loss"] + together[1]["loss"]) / 2, alone["loss"])
    for results in together:
        torch.testing.assert_close(results["gradient"], alone["gradient"])
        torch.testing.assert_close(results["queue"], alone["queue"])


# ---------------------------------------------------------------------------------------------------------- the trainer


class Kill(TrainerCallback):
    """Ends the process's run after some steps, as a kill would: without on_train_end."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt


def trainer(folder, model, loss, size=64, accumulate=1, **arguments):
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": accumulate,
        "num_train_epochs": 1,
        "learning_rate": 0.05,
        "save_steps": 4,
        "logging_steps": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 1,
    }
    args = SentenceTransformerTrainingArguments(**(settings | arguments))
    result = SentenceTransformerTrainer(
        model=model, args=args, train_dataset=dataset(size), eval_dataset=dataset(16, 1), loss=loss
    )
    result.add_callback(SelfLabelingCallback(result))
    return result


def refined(model):
    torch.manual_seed(3)
    return SelfLabelingRankingLoss(
        model, memory_bank_size=20, confidence=CosineConfidence(0.0, 2.0, 8), directions=BOTH, same_group="positive"
    )


@pytest.mark.parametrize("is_moved", [False, True])
def test_a_killed_run_goes_on_with_its_queue_and_schedule(is_moved, tmp_path):
    whole = trainer(tmp_path / "whole", static_model(), refined)
    whole.train()

    killed = trainer(tmp_path / "killed", static_model(), refined)
    killed.add_callback(Kill())
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    checkpoint, moved = tmp_path / "killed" / "checkpoint-4", tmp_path / "moved"
    if is_moved:
        checkpoint = checkpoint.rename(moved)
    resumed = trainer(
        tmp_path / "killed", static_model(), refined, resume_from_checkpoint=str(moved) if is_moved else None
    )
    for criterion in resumed.loss.criteria.values():
        criterion.reset_parameters()  # another random queue than the first process's
    resumed.train(resume_from_checkpoint=str(checkpoint))

    assert resumed.state.global_step == 8
    for name in BOTH:
        expected, found = (run.loss.criteria[name].state_dict() for run in (whole, resumed))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert -1 < found["memory_bank.groups"].min() < found["memory_bank.groups"].max() < 32  # ids of pairs of texts
    torch.testing.assert_close(resumed.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)
    logged = [[entry.get("slr/mu") for entry in run.state.log_history] for run in (whole, resumed)]
    assert logged[0][:4] == logged[1][:4]


def test_a_checkpoint_without_the_queue_warns(tmp_path):
    run = trainer(tmp_path, static_model(), refined)
    run.train()
    (tmp_path / "checkpoint-4" / "slr_loss.pt").unlink()
    with pytest.warns(UserWarning, match=r"slr_loss.pt: the queue starts afresh; if the checkpoint lies elsewhere"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_a_checkpoint_of_other_losses_is_refused(tmp_path):
    trainer(tmp_path, static_model(), refined).train()
    other = trainer(tmp_path, static_model(), SelfLabelingRankingLoss)
    with pytest.raises(ValueError, match=r"slr_loss.pt is of the losses \['loss.criteria.doc_to_query', 'loss.crit"):
        other.train(resume_from_checkpoint=True)


def test_the_schedule_counts_optimizer_steps(tmp_path):
    run = trainer(tmp_path, static_model(), refined, accumulate=3, size=96, num_train_epochs=2)
    seen = []
    original = run.loss.criteria["query_to_doc"].forward

    def forward(*args, **kwargs):
        seen.append(run.loss.criteria["query_to_doc"].step.item())
        return original(*args, **kwargs)

    run.loss.criteria["query_to_doc"].forward = forward
    run.train()
    assert seen == [step for step in range(8) for _ in range(3)]


def test_the_schedule_stands_still_within_a_step_of_matryoshka(tmp_path):
    def build(model):
        loss = SelfLabelingRankingLoss(model, confidence=CosineConfidence(0.0, 2.0, 8))
        return MatryoshkaLoss(model, loss, [8, 4, 2])

    run = trainer(tmp_path, static_model(), build)
    seen = []
    (criterion,) = [module for module in run.loss.modules() if type(module).__name__ == "SLRLoss"]
    criterion.register_forward_hook(lambda module, inputs, output: seen.append(module.stats["mu"].item()))
    run.train()
    schedule = CosineConfidence(0.0, 2.0, 8)
    assert seen == pytest.approx([schedule(step) for step in range(8) for _ in range(3)], abs=1e-6)


def test_logs_the_means_of_the_label_statistics(tmp_path):
    run = trainer(tmp_path, static_model(), lambda model: SelfLabelingRankingLoss(model, confidence=2.0), eval_steps=3,
                  eval_strategy="steps")  # fmt: skip
    weights = []
    run.loss.criteria["query_to_doc"].register_forward_hook(
        lambda criterion, *_: weights.append(criterion.stats["positive_weight"]) if run.model.training else None
    )
    run.train()
    logged = [entry["slr/positive_weight"] for entry in run.state.log_history if "slr/positive_weight" in entry]
    expected = torch.stack(weights).reshape(-1, 2).mean(1)
    torch.testing.assert_close(torch.tensor(logged), expected, rtol=0, atol=1e-4)
    assert all(0.3 < weight < 1 for weight in logged)
    evaluated = [entry["eval_slr/positive_weight"] for entry in run.state.log_history if "eval_loss" in entry]
    assert len(evaluated) == 3
    assert all(0.3 < weight < 1 for weight in evaluated)


def test_the_model_card_names_loss_and_paper(tmp_path):
    run = trainer(tmp_path, static_model(), refined)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "SelfLabelingRankingLoss" in card
    assert "zhou2021theory" in card
    assert "CosineConfidence(start=0.0, end=2.0, total_steps=8)" in card


def test_a_trainer_with_another_loss_is_told(tmp_path):
    run = trainer(tmp_path, static_model(), MultipleNegativesRankingLoss)
    with pytest.raises(ValueError, match=r"MultipleNegativesRankingLoss has no slr_plugin\.SLRLoss"):
        run.train()


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"similarity_fct": dot_score}, "similarity_fct must be None or cos_sim, got dot_score"),
        ({"directions": ("doc_to_query",)}, "directions must be"),
        ({"mini_batch_size": 8}, "mini_batch_size must be None for a StaticEmbedding"),
        ({"sharpening": 2.0}, "sharpening must be between"),
        ({"same_group": "negative"}, "same_group must be"),
        ({"same_group": "positive", "estimator_dim": 3}, "pass same_group or estimator_dim"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        SelfLabelingRankingLoss(static_model(), **arguments)


def test_a_data_set_without_the_column_label_is_refused():
    model = static_model()
    with pytest.raises(ValueError, match="need a column 'label'"):
        SelfLabelingRankingLoss(model, same_group="ignored")(features(model, 2, 4), None)
    with pytest.raises(TypeError, match="groups must be whole numbers"):
        SelfLabelingRankingLoss(model, same_group="ignored")(features(model, 2, 4), torch.rand(4))


# ---------------------------------------------------------------------------------------------------------- the example


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    import sentence_duplicates

    pairs = list(zip(*sentences(2, 60), strict=True))
    monkeypatch.setattr(sentence_duplicates, "verses", lambda: pairs)
    monkeypatch.setattr(sentence_duplicates, "BATCH", 16)
    monkeypatch.setattr(sentence_duplicates, "HELD_OUT", 10)
    return sentence_duplicates


def test_the_example_measures_every_method(example, tmp_path, monkeypatch):
    methods = ["mnrl", "exact", "sampler", "gist-0.05", "gist0-0.05", "soft-1", "hard-0.8", "refined-1-1-0.5"]
    command = ["x", "--methods", *methods, "--shares", "50", "--seeds", "0", "--steps", "3", "--near"]
    monkeypatch.setattr(sys, "argv", [*command, "--output", str(tmp_path / "runs.jsonl")])
    example.main()
    runs = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [run["method"] for run in runs] == methods
    assert all(0 < run["mrr"] <= 100 for run in runs)
    assert len({run["mrr"] for run in runs}) > 4  # the losses differ


def test_the_examples_groups_are_the_share_of_the_batch(example):
    train = example.verses()
    for share in (0.0, 0.25, 0.5):
        (batch, *_) = example.epoch(train, share, False, random.Random(0))
        times = Counter(number for _, _, number in batch)
        assert sum(count for count in times.values() if count == 4) == share * 16
        assert set(times.values()) <= {1, 4}
        assert len(batch) == 16


def test_the_examples_masks_are_multiple_negatives_ranking_where_nothing_is_alike(example):
    model = static_model()
    batch = features(model, 2, 6)
    theirs = MultipleNegativesRankingLoss(model)(batch, None)
    numbers = torch.arange(6)
    for mask in ({"exact": True}, {"threshold": 1.1}, {"sharpening": 1e-4}):
        torch.testing.assert_close(example.Masked(model, **mask)(batch, numbers), theirs, rtol=0, atol=1e-4)


def test_the_examples_masks_leave_copies_out(example):
    model = static_model()
    queries, documents = sentences(2, 6)
    with_copies = [model.preprocess(queries), model.preprocess([*documents[:5], documents[0]])]
    anchors, keys = columns_of(model, with_copies)
    logits = 20 * cos_sim(anchors, keys)
    logits[0, 5] = logits[5, 0] = -torch.inf
    expected = torch.nn.functional.cross_entropy(logits, torch.arange(6))
    for mask in ({"exact": True}, {"threshold": 0.999}, {"sharpening": 1e-3}):
        found = example.Masked(model, **mask)(with_copies, torch.tensor([0, 1, 2, 3, 4, 0]))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def test_a_missing_framework_names_the_command():
    code = "import sys; sys.modules['accelerate'] = None; import slr_plugin.adapters.sentence_transformers"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert 'pip install "slr-plugin[sentence-transformers]"' in result.stderr.splitlines()[-1]
