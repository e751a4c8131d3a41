"""The examples beyond images at toy size, on data that ships with scikit-learn."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.io import wavfile

EXAMPLES = Path(__file__).parents[1] / "examples"
if not EXAMPLES.is_dir():
    pytest.skip("installed without the repository", allow_module_level=True)
for package in ("sklearn", "scipy", "matplotlib", "tqdm"):
    pytest.importorskip(package, reason='pip install "slr-plugin[demo]"')
sys.path.insert(0, str(EXAMPLES))

import comparison
import signals
import speech
import tabular
import views

MODULES = (signals, tabular, views, *([speech] if importlib.util.find_spec("torchaudio") else []))
TASKS = {f"{module.__name__}: {name}": task for module in MODULES for name, task in module.tasks(None).items()}


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


def test_recordings_are_cut_into_windows_that_overlap():
    signal = np.arange(20.0).reshape(10, 2)
    windows = signals.cut([signal, signal[:5]], length=4, overlap=50)
    assert windows.samples.shape == (5, 2, 4)
    assert windows.recordings.tolist() == [0, 0, 0, 0, 1]
    torch.testing.assert_close(windows.samples[1, :, :2], windows.samples[0, :, 2:])
    torch.testing.assert_close(windows.samples.mean((0, 2)), torch.zeros(2))


def test_pressure_is_read_from_both_files_and_judged_on_other_recordings(tmp_path):
    folder = tmp_path / "Pig"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for part, pigs in (("TRAIN", [1, 2]), ("TEST", [1, 2, 2])):
        np.savetxt(folder / f"Pig_{part}.txt", np.c_[pigs, generator.normal(size=(len(pigs), 2000))])
    task = signals.tasks(folder)["pressure, 0 % overlap"]
    assert task.samples.shape == (5 * 4, 1, 500)
    assert task.classes[::4].tolist() == [0, 1, 0, 1, 1]
    assert task.groups.tolist() == sorted(4 * list(range(5)))


def test_prompts_are_read_but_for_pauses_and_short_ones(tmp_path):
    for name, length in (("en/digits/1", 9000), ("fr/digits/1", 9000), ("en/short", 100), ("en/silence/1", 9000)):
        path = tmp_path / f"{name}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        wavfile.write(path, speech.RATE, np.full(length, 16384, dtype=np.int16))
    assert [found[:2] for found in speech.prompts(tmp_path)] == [("en", "digits/1.wav"), ("fr", "digits/1.wav")]
    assert speech.prompts(tmp_path)[0][2].max() == 0.5
    wavfile.write(tmp_path / "en" / "fast.wav", 16000, np.zeros(9000, dtype=np.int16))
    with pytest.raises(SystemExit, match="16000 samples a second"):
        speech.prompts(tmp_path)
    with pytest.raises(SystemExit, match=r"no LANGUAGE/PROMPT\.wav"):
        speech.prompts(tmp_path / "fr" / "digits")


def test_methods_are_chosen_by_their_names_in_the_table(one_thread):
    task = small(TASKS["tabular: wines"], 178)
    assert sorted(comparison.compare(task, 1, 2, only=["momentum mixup"])) == ["NT-Xent", "momentum mixup"]
    untrained = comparison.compare(task, 1, 2, only=["raw features"])
    assert list(untrained) == ["raw features"]
    assert comparison.table({"wines": untrained}, 2).endswith(" |  |  |")
    with pytest.raises(SystemExit, match="no method is called other"):
        comparison.compare(task, 1, 2, only=["other"])


def test_the_table_pairs_folds_with_ntxent():
    results = {"data": {"NT-Xent": [(50.0, 60.0), (52.0, 60.0)], "other": [(53.0, 61.0), (55.0, 61.0)]}}
    assert comparison.table(results, 2).splitlines()[-1] == (
        "| data | other | 54.00 | 61.00 | +3.00 (+3.00 to +3.00) | +1.00 (+1.00 to +1.00) |"
    )


def test_intervals_know_that_folds_share_training_samples():
    """Nadeau and Bengio (2003): with K folds, the variance of the mean is (1/n + 1/(K - 1)) / (1/n) times as large."""
    generator = np.random.default_rng(0)
    for folds, seeds, wider in ((None, 5, 1.0), (5, 1, 1.5), (5, 5, (25 * (1 / 25 + 1 / 4)) ** 0.5), (2, 1, 3**0.5)):
        differences = generator.normal(1.0, 2.0, (folds or 1) * seeds)
        low, high = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
        mean, margin = comparison.interval(differences, folds)
        assert mean == pytest.approx((low + high) / 2)
        assert margin == pytest.approx(wider * (high - low) / 2)


def test_what_is_known_has_its_rivals():
    task = small(TASKS["tabular: wines"], 178)
    task = task._replace(estimators={"sums": torch.randn(178, 3), "the number": torch.eye(178)})
    names = comparison.methods(task)
    assert {
        "sums",
        "alone sums",
        "predict sums",
        "beside sums",
        "the number",
        "supcon the number",
        "apart the number",
    } < set(names)
    assert not {"supcon sums", "alone the number"} & set(names)
    part = comparison.folds(task, 3)[0]
    alone = comparison.run("alone sums", task, *part, comparison.Settings(0.03), steps=1)
    assert alone == comparison.judge(task.estimators["sums"], task.classes, *part)
    beside = comparison.train("beside sums", task, part[0], comparison.Settings(0.03), 3)
    labels = comparison.train("sums", task, part[0], comparison.Settings(0.03), 3)
    torch.testing.assert_close(beside.state_dict(), labels.state_dict())
    positives = comparison.train("supcon the number", task, part[0], comparison.Settings(0.03), 3)
    left_out = comparison.train("apart the number", task, part[0], comparison.Settings(0.03), 3)
    plain = comparison.train("nt-xent", task, part[0], comparison.Settings(0.03), 3)
    # A number of its own for each sample: both are NT-Xent.
    torch.testing.assert_close([positives.state_dict(), left_out.state_dict()], [plain.state_dict()] * 2)


def test_a_comparison_goes_on_from_its_records(tmp_path, monkeypatch, one_thread):
    task = small(TASKS["tabular: wines"], 178)
    path = tmp_path / "records.jsonl"

    def compare(seeds):
        return comparison.compare(task, 1, 2, "wines", ["raw features", "NT-Xent"], seeds, comparison.Records(path))

    first = compare(1)
    lines = path.read_text().splitlines()
    assert len(lines) == 4
    second = compare(2)
    assert path.read_text().splitlines()[:4] == lines
    assert {title: scores[:2] for title, scores in second.items()} == first
    assert second["NT-Xent"][2:] != first["NT-Xent"]
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")
    assert compare(2) == second
    monkeypatch.setattr(comparison, "run", None)
    assert compare(2) == second


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
