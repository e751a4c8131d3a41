"""The examples beyond images at toy size, on data that ships with scikit-learn."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
if not EXAMPLES.is_dir():
    pytest.skip("installed without the repository", allow_module_level=True)
for package in ("sklearn", "scipy", "matplotlib", "tqdm"):
    pytest.importorskip(package, reason='pip install "slr-plugin[demo]"')
sys.path.insert(0, str(EXAMPLES))

import comparison
import signals
import tabular
import views

TASKS = {
    f"{module.__name__}: {name}": task
    for module in (signals, tabular, views)
    for name, task in module.tasks(None).items()
}


def small(task, count=160):
    """The first samples, each class of which occurs."""
    return task._replace(
        samples=task.samples[:count],
        classes=task.classes[:count],
        raw=task.raw[:count],
        groups=None if task.groups is None else task.groups[:count],
        estimators={name: table[:count] for name, table in task.estimators.items()},
        partner=task.partner and small(task.partner, count),
        batch=32,
    )


@pytest.mark.filterwarnings("ignore:.*number of iterations")  # of the linear classifier, on few samples
@pytest.mark.parametrize("name", TASKS)
def test_every_method_trains_and_is_judged(name, one_thread):
    task = small(TASKS[name], 178)  # all wines; they are sorted by class
    (train_part, test_part), *_ = comparison.folds(task, 3)
    for method in comparison.methods(task):
        scores = comparison.run(method, task, train_part, test_part, comparison.Settings(0.03), steps=2)
        assert all(0 <= score <= 100 for score in scores)


def test_two_runs_give_the_same_scores(one_thread):
    task = small(TASKS["tabular: wines"], 178)
    part = comparison.folds(task, 3)[0]
    runs = [comparison.run("both", task, *part, comparison.Settings(0.03), steps=4) for _ in range(2)]
    assert runs[0] == runs[1]


def test_no_group_is_trained_on_and_judged_on():
    task = small(TASKS["tabular: wines"], 178)._replace(groups=torch.arange(178) % 10)
    for train_part, test_part in comparison.folds(task, 5):
        assert not set(task.groups[train_part].tolist()) & set(task.groups[test_part].tolist())


def test_labels_that_are_told_the_classes_pull_them_together(one_thread):
    task = small(TASKS["tabular: wines"], 178)
    part = comparison.folds(task, 3)[0]

    def within(method):
        encoder = comparison.train(method, task, part[0], comparison.Settings(0.1, 0.5), steps=30)
        features = torch.nn.functional.normalize(comparison.features_of(encoder, task))
        same = task.classes[:, None] == task.classes
        cosines = features @ features.T
        return cosines[same].mean() - cosines[~same].mean()

    assert within("classes") > within("nt-xent") + 0.05


def test_windows_of_a_recording_resemble_each_other_the_more_the_nearer_they_are():
    table = signals.places(torch.tensor([0, 0, 0, 1]), torch.tensor([0.0, 0.5, 3.0, 0.0]))
    cosines = torch.nn.functional.normalize(table) @ torch.nn.functional.normalize(table).T
    assert cosines[0, 1] > cosines[0, 2]
    assert cosines[0, 3] == 0


def test_the_table_pairs_folds_with_ntxent():
    results = {"data": {"NT-Xent": [(50.0, 60.0), (52.0, 60.0)], "other": [(53.0, 61.0), (55.0, 61.0)]}}
    assert comparison.table(results).splitlines()[-1] == (
        "| data | other | 54.00 | 61.00 | +3.00 (+3.00 to +3.00) | +1.00 (+1.00 to +1.00) |"
    )


def test_compares_and_draws(tmp_path, monkeypatch, capsys, one_thread):
    monkeypatch.setattr(sys, "argv", ["x", "--steps", "1", "--folds", "2", "--output", str(tmp_path / "figure.png")])
    comparison.main("", lambda data: {"wines": small(TASKS["tabular: wines"], 178)}, steps=1)
    assert capsys.readouterr().out.count("\n| wines |") == 6
    assert (tmp_path / "figure.png").stat().st_size > 0


def test_settings_are_chosen_without_the_judged_samples(one_thread, monkeypatch):
    task = small(TASKS["tabular: wines"], 178)
    train_part, test_part = comparison.folds(task, 3)[0]
    seen = []
    monkeypatch.setattr(
        comparison, "run", lambda method, task, inner, held_out, *rest: seen.append((inner, held_out)) or (0,)
    )
    comparison.choose("nt-xent", task, train_part, 1)
    for inner, held_out in seen:
        assert not np.isin(torch.cat([inner, held_out]).numpy(), test_part.numpy()).any()
