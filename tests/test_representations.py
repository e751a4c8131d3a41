"""The benchmark of representations: its baselines against their formulas, its harness on real images."""

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

for package in ("lightly", "kornia", "sklearn", "matplotlib"):
    pytest.importorskip(package, reason='pip install "slr-plugin[dev]"')

import lightly.loss
from _digits import write_digits

ROOT = Path(__file__).parents[1]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("installed without the repository", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from benchmarks.representations import (
    baselines,
    data,
    estimators,
    features,
    harness,
    labelled,
    objectives,
    report,
    training,
)
from benchmarks.representations.budgets import BUDGETS
from benchmarks.representations.methods import METHODS
from slr_plugin import CosineConfidence, Mix, MomentumMixup, SLRLoss, dense

SMOKE = BUDGETS["smoke"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("digits"), test=range(100, 180), train=range(100))


@pytest.fixture(scope="module")
def images(folder):
    """Every second pixel: principal components of all of them take seconds."""
    loaded = data.load(folder, SMOKE, torch.device("cpu"))
    return [data.Images(part.pixels[..., ::2, ::2].contiguous(), *part[1:]) for part in loaded]


@pytest.fixture(scope="module")
def views(tmp_path_factory):
    """The folder in which all methods find the views of a seed."""
    return tmp_path_factory.mktemp("views")


@pytest.fixture(autouse=True)
def imagenet(monkeypatch):
    """The colours of the quarters of an image, in the place of a network's features."""

    def quarters(images):
        return F.adaptive_avg_pool2d(images.pixels.float(), 2).flatten(1)

    monkeypatch.setattr(features, "imagenet", quarters)


def draw(rows=6, dim=5):
    generator = torch.Generator().manual_seed(0)
    out0, out1, mixed = torch.randn(3, rows, dim, dtype=torch.float64, generator=generator)
    mix = Mix(torch.rand(rows, dtype=torch.float64, generator=generator), torch.randperm(rows, generator=generator))
    return out0.requires_grad_(), out1, mixed.requires_grad_(), mix


@pytest.mark.parametrize("is_mixed", [False, True])
def test_the_dense_form_with_the_papers_labels_is_slr_loss(is_mixed):
    confidence = CosineConfidence(0.5, 2.0, 4)

    def labeler(similarity, own, mu):
        return dense.self_labels(similarity, own, temperature=0.2, sharpening=0.7, confidence=mu).refined

    ours = SLRLoss(0.2, (9, 5), sharpening=0.7, confidence=confidence, refined_weight=0.3)
    other = baselines.SoftLabelLoss((9, 5), labeler, 0.2, confidence, 0.3)
    other.memory_bank.load_state_dict(ours.memory_bank.state_dict())
    out0, out1, mixed, mix = draw()
    for _ in range(3):
        torch.testing.assert_close(other.labelled_keys(out0, out1)[1], ours.labels(out0, out1))
        arguments = (out0, out1, mixed, mix) if is_mixed else (out0, out1)
        losses = ours(*arguments), other(*arguments)
        torch.testing.assert_close(*losses)
        gradients = [torch.autograd.grad(loss, (out0, mixed)[: 1 + is_mixed]) for loss in losses]
        torch.testing.assert_close(*gradients)
        torch.testing.assert_close(other.memory_bank.bank, ours.memory_bank.bank)


@pytest.mark.parametrize("which", ["p", "q"])
def test_one_estimator_alone(which):
    """Equation (5) with the other's share left out."""
    similarity = torch.randn(4, 7, dtype=torch.float64).tanh()
    labels = baselines.one_estimator(which, 0.2)(similarity, torch.arange(4), 3.0)
    for i in range(4):
        estimate = similarity[i] / 0.2
        if which == "q":
            estimate[i] = -torch.inf
        estimate = estimate.softmax(0)
        z = 1 + 3 * estimate.max()
        share = 3 * estimate.max() / z
        torch.testing.assert_close(labels[i], (1 - share) * F.one_hot(torch.tensor(i), 7) + share * estimate)


def test_sce_gives_half_to_the_others():
    similarity = torch.randn(3, 6, dtype=torch.float64)
    labels = baselines.sce(0.05)(similarity, torch.arange(3), 0.0)
    torch.testing.assert_close(labels.sum(1), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(labels.diagonal(), torch.full((3,), 0.5, dtype=torch.float64))
    others = torch.cat([similarity[1, :1], similarity[1, 2:]])
    torch.testing.assert_close(torch.cat([labels[1, :1], labels[1, 2:]]), 0.5 * (others / 0.05).softmax(0))


def test_the_oracle_sets_the_purity_and_nothing_else():
    setup = objectives.Setup((20, 5), 1, torch.Generator())
    oracle = objectives.Oracle(setup, 0.75, 0.05)
    oracle.classes = torch.tensor([0, 1, 2, 0])
    oracle.monitor.load_state_dict({"queue_classes": torch.arange(20) % 4})
    key_classes = torch.cat([oracle.classes, oracle.monitor.queue_classes])
    similarity = torch.randn(4, 24, dtype=torch.float64)
    label, plain = (labeler(similarity, torch.arange(4), 0.0) for labeler in (oracle.label, baselines.sce()))
    for i in range(4):
        same = (key_classes == oracle.classes[i]) & (torch.arange(24) != i)
        other = key_classes != oracle.classes[i]
        assert label[i, i] == pytest.approx(0.5)
        assert label[i, same].sum() == pytest.approx(0.375)
        assert label[i, other].sum() == pytest.approx(0.125)
        for keys in (same, other):
            torch.testing.assert_close(label[i, keys] / label[i, keys].sum(), plain[i, keys] / plain[i, keys].sum())


def test_co2_is_infonce_and_a_symmetric_divergence():
    out0, out1, *_ = draw()
    losses = {}
    for weight in (0.0, 3.0):
        loss = baselines.CO2Loss((8, 5), 0.2, 0.1, weight)
        torch.manual_seed(0)
        loss.memory_bank.bank.copy_(F.normalize(torch.randn(8, 5), dim=1))
        bank = loss.memory_bank.bank.clone().double()
        loss.double()
        losses[weight] = loss(out0, out1)
    queries, keys = F.normalize(out0, dim=1), F.normalize(out1, dim=1)
    infonce, divergence = 0.0, 0.0
    for q, k in zip(queries, keys, strict=True):
        infonce -= torch.cat([(q @ k)[None], bank @ q]).div(0.2).log_softmax(0)[0] / 6
        a, b = (torch.softmax(bank @ x / 0.1, 0) for x in (q, k))
        divergence += (stats_kl(a, b) + stats_kl(b, a)) / 2 / 6
    torch.testing.assert_close(losses[0.0], infonce)
    torch.testing.assert_close(losses[3.0] - losses[0.0], 3 * divergence)
    losses[3.0].backward()
    assert out0.grad.isfinite().all()


@pytest.mark.parametrize("attracts", [False, True])
def test_keys_nearer_to_the_positive_than_its_query_are_no_negatives(attracts):
    degrees = {"queries": [35.0, 180.0], "positives": [5.0, 90.0], "bank": [20.0, -40.0, 85.0]}
    queries, positives, bank = (
        torch.stack([torch.cos(angle), torch.sin(angle)], 1)
        for angle in (torch.tensor(values).deg2rad() for values in degrees.values())
    )
    loss = baselines.NeighbourLoss((3, 2), 0.5, attracts)
    loss.memory_bank.bank.copy_(bank)
    logits = queries @ torch.cat([positives, bank]).T / 0.5
    alike = [[0, 2], [0, 1, 2, 4]]  # the second query is 90 degrees off
    if attracts:
        rows = [logits[row].logsumexp(0) - logits[row, keys].mean() for row, keys in enumerate(alike)]
    else:
        kept = [[column for column in range(5) if column == row or column not in alike[row]] for row in range(2)]
        rows = [logits[row, kept[row]].logsumexp(0) - logits[row, row] for row in range(2)]
    torch.testing.assert_close(loss(queries, positives), torch.stack(rows).mean())


def stats_kl(a, b):
    return (a * (a / b).log()).sum()


@pytest.fixture
def bootstrap():
    """BYOL around a network of one layer, and a batch of four vectors."""

    def build(**options):
        torch.manual_seed(0)
        online = torch.nn.Linear(6, objectives.DIM)
        objective = objectives.Bootstrap(**options)
        objective.start(online)
        torch.nn.init.normal_(objective.target.weight)
        batch = data.Batch(*torch.randn(2, 4, 6), None, torch.arange(4), torch.arange(4))
        return objective, online, batch

    return build


def test_byol_is_lightlys_loss_in_both_directions(bootstrap):
    objective, online, batch = bootstrap()
    distance, predict = lightly.loss.NegativeCosineSimilarity(), objective.prediction_head
    p0, p1 = predict(online(batch.query)), predict(online(batch.key))
    z0, z1 = objective.target(batch.query), objective.target(batch.key)
    torch.testing.assert_close(objective(online, batch), (distance(p0, z1) + distance(p1, z0)) / 2)


def test_a_mixed_query_of_byol_approaches_both_targets_by_their_shares(bootstrap):
    mixup = MomentumMixup(2.0, generator=torch.Generator().manual_seed(1))
    objective, online, batch = bootstrap(mixup=mixup)
    plain = bootstrap()[0](online, batch)
    images, (theta, partner) = MomentumMixup(2.0, generator=torch.Generator().manual_seed(1))(batch.query, batch.key)
    predictions, targets = objective.prediction_head(online(images)), objective.target(batch.key)
    cosines = [F.cosine_similarity(predictions, to) for to in (targets, targets[partner])]
    mixed = -(theta * cosines[0] + (1 - theta) * cosines[1]).mean()
    torch.testing.assert_close(objective(online, batch), (plain + mixed) / 2)


def test_alike_images_of_byol_share_a_target(bootstrap):
    objective, _, batch = bootstrap(alike=0.9)
    view = torch.stack([batch.query[0], 1.01 * batch.query[0] + 0.01, *batch.query[1:3]])
    unit, targets = F.normalize(objective.target(view)), objective.targets(view)
    torch.testing.assert_close(targets[0], F.normalize(unit[0] + unit[1], dim=0))
    torch.testing.assert_close(targets[0], targets[1])
    torch.testing.assert_close(targets[2:], unit[2:])


@pytest.mark.parametrize("groups", [[0, 1, 2, 3, 4, 5], [0, 1, 1, 2, 0, 1], [3, 3, 3, 3, 3, 0]])
def test_supcon_is_that_of_pytorch_metric_learning(groups):
    metric = pytest.importorskip("pytorch_metric_learning.losses", reason='pip install "slr-plugin[dev]"')
    out0, out1, *_ = draw()
    out1.requires_grad_()
    ids = torch.tensor(groups)
    loss = baselines.SupConLoss(0.1)(out0, out1, ids)
    theirs = metric.SupConLoss(0.1)(torch.cat([out0, out1]), ids.repeat(2))
    torch.testing.assert_close(loss, theirs)
    ours, expected = (torch.autograd.grad(value, (out0, out1)) for value in (loss, theirs))
    torch.testing.assert_close(ours, expected)
    if groups == sorted(set(groups)):  # each image alone
        torch.testing.assert_close(loss, lightly.loss.NTXentLoss(0.1)(out0, out1))


@pytest.fixture
def linear_network():
    """A network of one layer, and a batch of the images 3 and 1 of four."""
    torch.manual_seed(0)
    views = torch.randn(2, 2, 6)
    return torch.nn.Linear(6, objectives.DIM), data.Batch(*views, None, torch.zeros(2), torch.tensor([3, 1]))


def test_both_views_are_told_what_is_known(linear_network):
    online, batch = linear_network
    known = torch.randn(4, 7)
    regressed, classified = objectives.Regressed(known), objectives.Classified(known.softmax(1))
    cosines, entropies = [], []
    for view in (batch.query, batch.key):
        for row, image in zip(view, (3, 1), strict=True):
            cosines.append(F.cosine_similarity(regressed.predictor(online(row)), known[image], dim=0))
            entropies.append(-(known[image].softmax(0) * classified.classifier(online(row)).log_softmax(0)).sum())
    torch.testing.assert_close(regressed(online, batch), 1 - torch.stack(cosines).mean())
    torch.testing.assert_close(classified(online, batch), torch.stack(entropies).mean())


def test_images_of_a_group_are_found_by_their_number(linear_network):
    online, batch = linear_network
    loss = baselines.SupConLoss(0.1)
    grouped = objectives.Grouped(loss, torch.tensor([5, 6, 7, 6]))
    expected = loss(online(batch.query), online(batch.key), torch.tensor([6, 6]))
    torch.testing.assert_close(grouped(online, batch), expected)


def test_clusters_are_those_of_the_cosine():
    centres = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    rows = centres.repeat(5, 1) * torch.rand(15, 1) * 100 + 0.01 * torch.randn(15, 2)
    numbers = features.clusters(rows, 3)
    assert sorted(numbers[:3].tolist()) == [0, 1, 2]
    assert torch.equal(numbers, numbers[:3].repeat(5))


def test_what_is_fitted_is_fitted_to_the_training_images(images, tmp_path):
    train_images, test_images = images
    for name in ("pixels", "gradients", "guesses", "imagenet"):
        table = features.known(name, test_images, tmp_path, train_images)
        half = data.Images(*(part[:32] for part in test_images[:2]), name="half")
        torch.testing.assert_close(features.known(name, half, tmp_path, train_images), table[:32])
        if name != "guesses":
            mean = features.known(name, train_images, tmp_path).mean(0)
            torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-3)


def test_the_decoupled_loss_is_lightlys():
    (out0, out1, *_), (other0, other1, *_) = draw(), draw()
    out1.requires_grad_(), other1.requires_grad_()
    loss, expected = baselines.DecoupledLoss(0.1)(out0, out1), lightly.loss.DCLLoss(0.1)(other0, other1)
    torch.testing.assert_close(loss, expected)
    ours, theirs = torch.autograd.grad(loss, (out0, out1)), torch.autograd.grad(expected, (other0, other1))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains(name, images, views):
    record = training.train(name, 0, replace(SMOKE, epochs=1, evaluations=1), *images, views)
    json.dumps(record)
    if not METHODS[name].trains:
        assert 0 <= record["knn"] <= 100
        assert 50 < record["linear"] <= 100
        return
    assert record["epochs"] == round(METHODS[name].stretch)
    assert all(np.isfinite(row["loss"]) for row in record["curve"])
    assert 0 <= record["knn"] <= 100
    assert 0 <= record["linear"] <= 100
    soft_labels = bool(record["labels"]) and record["labels"][-1]["own"] < 0.999
    one_hot = name.startswith(
        (
            "byol",
            "moco",
            "simclr",
            "dcl",
            "nnclr",
            "co2",
            "one-hot",
            "mm",
            "vanilla",
            "supervised",
            "decoupled",
            "eliminate",
            "attract",
            "supcon",
            "guesses",
            "imagenet",
            "gradients-",
            "drawn-cross",
            "drawn-supcon",
            "classified",
            "burst",  # without copies
            "groups-1",  # with hardly an image of a known class
        )
    )
    one_hot &= not name.endswith(("p+q", "sane", "gradients", "imagenet-labels")) and "whole" not in name
    assert soft_labels != one_hot


def test_few_labels_are_all_that_an_encoder_is_judged_by(monkeypatch):
    monkeypatch.setattr(features, "LABELLED", 40)
    classes = torch.arange(120) % 4
    train = training.Features(torch.randn(120, 8) + 3 * F.one_hot(classes, 8), classes)
    test = training.Features(torch.randn(60, 8) + 3 * F.one_hot(classes[:60], 8), classes[:60])
    few, every = labelled.judged((train, test), seed=0)
    assert (few["labels"], every["labels"]) == (40, 120)
    told = torch.randperm(120, generator=features.generator(0))[:40]  # as for the estimator "drawn-guesses"
    others = torch.ones(120, dtype=torch.bool).scatter(0, told, False)
    lied = train._replace(classes=torch.where(others, (classes + 1) % 4, classes))
    told_lies, every_told_lies = labelled.judged((lied, test), seed=0)
    assert told_lies == few
    assert few["linear"] > 80 > every_told_lies["linear"]


def test_an_encoder_in_bfloat16(images, tmp_path):
    record = training.train("one-hot-batch", 0, replace(SMOKE, half=True), *images, tmp_path)
    other = training.train("one-hot-batch", 0, SMOKE, *images, tmp_path)
    assert record["curve"][-1]["loss"] != other["curve"][-1]["loss"]
    assert record["curve"][-1]["loss"] == pytest.approx(other["curve"][-1]["loss"], rel=0.1)


def test_a_single_learning_rate_needs_no_tuning(tmp_path):
    assert harness.best_rate("sane", (0.06,), tmp_path) == 0.06
    assert harness.best_rate("sane", (), tmp_path) is None


@pytest.mark.parametrize(
    ("accuracies", "further"),
    [({0.03: 40, 0.1: 50}, 0.3333), ({0.03: 50, 0.1: 40}, 0.009), ({0.03: 40, 0.1: 50, 0.3333: 45}, None)],
)
def test_rates_go_on_while_the_best_is_at_an_end(accuracies, further):
    runs = {rate: [{"knn": value, "linear": value}] for rate, value in accuracies.items()}
    assert harness.further_rate(runs) == further


def test_the_best_rate_is_trained_with_further_seeds_until_it_has_enough():
    spent = replace(SMOKE, confirmations=2)

    def further(**accuracies):
        runs = {float(rate): [{"knn": value, "linear": value} for value in row] for rate, row in accuracies.items()}
        return harness.further_runs("sane", runs, spent)

    assert further(**{"0.1": [50], "0.3": [60]}) == [harness.Run("sane", 1, 0.3, True)]
    assert further(**{"0.1": [50], "0.3": [60, 20]}) == [harness.Run("sane", 1, 0.1, True)]  # it was luck
    assert further(**{"0.1": [50, 45], "0.3": [60, 20]}) == []


def test_a_budget_that_widens_finds_a_best_rate_between_others(folder, tmp_path, monkeypatch):
    accuracy = {0.009: 30.0, 0.03: 40.0, 0.1: 50.0, 0.3333: 60.0, 1.111: 55.0}
    made = []

    def instead(runs, start, pool):
        for one in runs:
            made.append(one)
            score = accuracy[one.rate] if one.rate else 1.0
            yield one, {"method": one.method, "seed": one.seed, "rate": one.rate, "knn": score, "linear": score}

    monkeypatch.setattr(harness, "_in_processes", instead)
    for _ in range(2):  # the second time there is nothing to do
        harness.run(["moco", "alone-gradients"], 2, "teacher", folder, "cpu", 1, tmp_path / "a", tmp_path / "b")
    assert [one.rate for one in made if one.held_out] == [0.009, 0.03, 0.1, 0.3333, 1.111, 0.3333]
    final = [harness.Run("moco", 0, 0.3333), harness.Run("alone-gradients", 0), harness.Run("moco", 1, 0.3333)]
    assert [one for one in made if not one.held_out] == final


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "name", ["one-hot", "sane", "one-hot-batch", "decoupled", "whole-plain", "simclr-cold-sane", "oracle-1.0", "p+mm"]
)
def test_recorded_steps_train_as_others_do(name, folder, tmp_path, monkeypatch):
    budget = replace(SMOKE, epochs=8, evaluations=1)
    images = data.load(folder, budget, torch.device("cuda"))
    torch.manual_seed(0)
    ends = []

    def keep(network):
        ends.append(torch.cat([parameter.detach().flatten() for parameter in network.cuda().parameters()]))

    keep(training.Network(budget))

    for warm_up in (3, 1000):
        monkeypatch.setattr("benchmarks.representations.recorded.WARM_UP", warm_up)
        with torch.cuda.stream(torch.cuda.Stream()):
            training.train(name, 0, budget, *images, tmp_path, observe=keep)
    start, replayed, called = ends
    assert (replayed - called).norm() < 0.1 * (called - start).norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_recorded_runs_share_a_gpu(folder, tmp_path):
    harness.run(["one-hot", "sane"], 2, "smoke", folder, "cuda", 3, tmp_path / "results", tmp_path / "views")
    assert len(harness.read(tmp_path / "results")) == 4


def test_a_run_repeats(images, tmp_path):
    runs = [training.train("sane", 1, SMOKE, *images, tmp_path) for _ in range(2)]
    for run in runs:
        run.pop("seconds")
    assert runs[0] == runs[1]
    assert training.train("sane", 2, SMOKE, *images, tmp_path)["curve"] != runs[0]["curve"]


def test_all_methods_of_a_seed_start_alike_and_see_the_same_views(images, tmp_path, monkeypatch):
    seen, weights = {}, {}

    def recorded(*args):
        for batch in data.minibatches(*args):
            seen[name].append((batch.query, batch.key, batch.classes))
            yield batch

    def start(network, *args):
        weights.setdefault(name, copy.deepcopy(network.state_dict()))
        return follow(network, *args)

    follow = training.Network.forward
    monkeypatch.setattr(training, "minibatches", recorded)
    monkeypatch.setattr(training.Network, "forward", start)
    for name in ("moco", "simclr", "sane-strong"):
        seen[name] = []
        training.train(name, 0, SMOKE, *images, tmp_path / name)
    for name in ("simclr", "sane-strong"):
        torch.testing.assert_close(seen[name], seen["moco"], rtol=0, atol=0)
        torch.testing.assert_close(weights[name], weights["moco"], rtol=0, atol=0)


def test_views_are_random_and_belong_to_their_images(tmp_path):
    """Images of one colour each: a crop is the image, unless its colours are jittered."""
    colours = torch.randint(256, (64, 3, 1, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = data.Images(colours.expand(-1, -1, 32, 32), torch.arange(64))
    first, second = data.minibatches(images, SMOKE, 0, 1, ("query", "weak"), tmp_path)
    assert sorted(torch.cat([first.classes, second.classes]).tolist()) == list(range(64))
    own = data.normalize(images.pixels)[first.classes][..., : SMOKE.side, : SMOKE.side]
    torch.testing.assert_close(data.normalize(first.key), own, rtol=0, atol=0.03)
    changed = (data.normalize(first.query) - own).abs().amax((1, 2, 3)) > 0.1
    assert 0.5 < changed.float().mean() < 1
    again = next(data.minibatches(images, SMOKE, 0, 1, ("query", "weak"), tmp_path))
    later = next(data.minibatches(images, SMOKE, 0, 2, ("query", "weak"), tmp_path))
    assert torch.equal(first.query, again.query)
    assert not torch.equal(first.classes, later.classes)


@pytest.mark.parametrize("percent", [25, 50, 75])
def test_guessed_classes_are_right_for_so_many_of_the_pairs(percent):
    classes = torch.arange(10).repeat(200)
    guesses = features.FEATURES[f"classes-{percent}"](*[data.Images(torch.empty(0), classes)] * 2).argmax(1)
    pairs = torch.combinations(torch.arange(len(classes)))[::7]
    alike = pairs[guesses[pairs[:, 0]] == guesses[pairs[:, 1]]]
    assert (classes[alike[:, 0]] == classes[alike[:, 1]]).float().mean() == pytest.approx(percent / 100, abs=0.02)


def test_copies_of_an_image_differ_and_lie_together(folder):
    budget = replace(SMOKE, copies=4)
    images, _ = data.load(folder, budget, torch.device("cpu"))
    originals, _ = data.load(folder, replace(SMOKE, train_images=24), torch.device("cpu"))
    assert len(images) == SMOKE.train_images
    assert torch.equal(images.classes, originals.classes.repeat_interleave(4))
    assert len(images.pixels.flatten(1).unique(dim=0)) == len(images)
    known = F.normalize(features.FEATURES["copies"](images, images))
    same = torch.arange(24).repeat_interleave(4)
    torch.testing.assert_close(known @ known.T, (same[:, None] == same).float(), rtol=0, atol=0.3)
    assert torch.equal(known[0], known[3])


def test_the_harness_runs_what_is_missing(folder, tmp_path, monkeypatch):
    def run(methods, seeds):
        harness.run(methods, seeds, "smoke", folder, "cpu", 1, tmp_path / "smoke", tmp_path / "views")
        return (tmp_path / "smoke" / "records.jsonl").read_text().splitlines()

    def here(runs, start, pool):
        return ((one, harness._exhaust(start, one)) for one in runs)

    first = run(["moco"], 1)
    monkeypatch.setattr(harness, "_in_processes", here)  # one process has shown that it works
    second = run(["moco", "p", "alone-gradients"], 2)
    assert second[:1] == first
    runs = [(record["method"], record["seed"]) for record in map(json.loads, second)]
    assert runs == [("moco", 0), ("p", 0), ("alone-gradients", 0), ("moco", 1), ("p", 1)]
    found = harness.records(tmp_path / "smoke")
    assert found["p"][1]["seed"] == 1
    text = report.write(tmp_path / "smoke")
    assert "| p: p alone | 2 |" in text
    assert {"accuracy.png", "labels.png"} < {path.name for path in (tmp_path / "smoke").iterdir()}


def test_tables_pair_by_seed():
    def records(knn):
        return {seed: {"knn": value, "linear": 2 * value} for seed, value in knn.items()}

    found = {"moco": records({0: 40.0, 1: 42.0, 2: 41.0}), "sane": records({0: 42.0, 1: 45.0, 2: 43.5, 3: 90.0})}
    table = report.table(report.STUDIES["methods"], found)
    differences = np.array([2.0, 3.0, 2.5])
    low, high = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert f"| +2.50 ({low:+.2f} to {high:+.2f}) | +5.00 ({2 * low:+.2f} to {2 * high:+.2f}) | 1.75 |" in table
    assert "41.00 ± 1.00" in table
    assert "92.5 / 93.9" in table


def test_what_is_not_trained_is_paired_with_every_seed_and_the_primary_comparison_is_marked():
    runs = {seed: {"knn": value, "linear": 2 * value} for seed, value in enumerate((40.0, 42.0, 41.0))}
    found = {"one-hot": runs, "p+q": runs, "alone-gradients": {0: {"knn": 43.0, "linear": 82.0}}}
    study = report.STUDIES["estimators"]._replace(primary=("p+q", "linear"))
    lines = {line.split(":")[0]: line for line in report.table(study, found).splitlines()}
    low, high = stats.ttest_1samp([3.0, 1.0, 2.0], 0).confidence_interval(0.95)
    assert f" |  | 43.00 | 82.00 | +2.00 ({low:+.2f} to {high:+.2f}) | +0.00 (" in lines["| alone-gradients"]
    assert "| +0.00 (+0.00 to +0.00) | **+0.00 (+0.00 to +0.00)** |" in lines["| p+q"]


def test_equal_compute_is_equal():
    assert report.cost("moco-longer") == report.cost("sane") == 1.75
    assert report.cost("simclr") == 1.5


def test_estimators_of_one_sharpness():
    similarity = torch.randn(5, 40, dtype=torch.float64)
    q = estimators.at_perplexity(7.0)(similarity)
    torch.testing.assert_close((-torch.xlogy(q, q).sum(1)).exp(), torch.full((5,), 7.0, dtype=torch.float64))
    shifted = estimators.at_perplexity(7.0)(3 * similarity + 2)  # standardising changes nothing
    torch.testing.assert_close(shifted, q)
    nearest = estimators.at_rank(3)(similarity)
    assert ((nearest > 0) == (similarity >= similarity.topk(3).values[:, -1:])).all()
    torch.testing.assert_close(nearest.sum(1), torch.ones(5, dtype=torch.float64))


def test_whitening_divides_the_covariance_out():
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(5000, 3, generator=generator) * torch.tensor([5.0, 1.0, 1.0]) + 2
    rows = torch.tensor([[7.0, 2.0, 2.0], [2.0, 3.0, 2.0]])  # one deviation from the mean each, along another axis
    single = estimators.whitened(rows, torch.cat([keys, rows]))[:, -2:]
    torch.testing.assert_close(single, torch.eye(2), atol=0.1, rtol=0)


def test_the_table_of_estimators(images, tmp_path, monkeypatch):
    monkeypatch.setattr(estimators, "ROWS", 32)
    table = estimators.compare("mm", 0, SMOKE, *images, tmp_path)
    assert table.count("\n") == 1 + len(estimators.ESTIMATORS)
    assert "nan" not in table
