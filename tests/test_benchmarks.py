"""The benchmarks of time and memory, small: that they run and report, not how fast."""

import json
from pathlib import Path

import pytest
from torch import nn

ROOT = Path(__file__).parents[1]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("needs the repository", allow_module_level=True)
pytest.importorskip("lightly")
pytest.importorskip("pytorch_metric_learning")

from benchmarks import loss, scaling, step
from benchmarks.loss import Size
from slr_plugin import presets


def test_the_exponent_is_that_of_the_largest_sizes():
    assert scaling.exponent([1, 2, 4, 8, 16], [9, 9, 48, 192, 768]) == pytest.approx(2)


def test_growth_is_measured_written_and_drawn(tmp_path, monkeypatch):
    axes = {"keys": [Size(4, keys, 3) for keys in (8, 16, 32)], "rows, no queue": [Size(n, 0, 3) for n in (4, 8, 16)]}
    monkeypatch.setattr(scaling, "AXES", axes)
    scaling.run(list(axes), "cpu", 2, "highest", tmp_path)
    results = json.loads((tmp_path / "scaling.json").read_text())["results"]
    assert {row["contender"] for rows in results.values() for row in rows} == set(scaling.COMPARED)
    for rows in results.values():
        assert all(row["milliseconds"] > 0 and row["megabytes"] > 0 for row in rows)
    assert (tmp_path / "scaling.png").stat().st_size
    # NTXentLoss stores rows x keys; more keys need more of its memory.
    baseline = [row["megabytes"] for row in results["rows, no queue"] if row["contender"] == loss.BASELINE]
    assert baseline == sorted(set(baseline))


def test_a_whole_step_is_taken_apart(tmp_path, monkeypatch):
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    backbone.fc = nn.Linear(8, 2)
    tiny = step.Workload(lambda: backbone, 8, 4, presets.CIFAR10)
    monkeypatch.setitem(step.WORKLOADS, "tiny", tiny)
    before = backbone[0].weight.clone()
    step.run(["tiny"], "cpu", 1, "highest", tmp_path)
    parts = json.loads((tmp_path / "step.json").read_text())["results"]["tiny"]
    assert tuple(parts) == step.PARTS
    assert all(seconds > 0 for seconds in parts.values())
    assert not before.equal(backbone[0].weight)  # it trained
