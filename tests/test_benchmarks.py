"""The benchmarks of time and memory, small: that they run and report, not how fast."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _intra_op import intra_op_threads
from torch import nn

ROOT = Path(__file__).parents[1]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("needs the repository", allow_module_level=True)
pytest.importorskip("lightly")
pytest.importorskip("pytorch_metric_learning")
pytest.importorskip("info_nce")

from benchmarks import __main__, clip, contenders, groups, load, loss, operations, processes, scaling, step, tiles
from benchmarks.contenders import BASELINE, Size
from slr_plugin import SLRLoss, presets
from slr_plugin.streaming import threads, tiled


@pytest.mark.filterwarnings("ignore::UserWarning:torch")  # of the compiler about itself
@pytest.mark.parametrize(("size", "compiles"), [(Size(4, 6, 3), True), (Size(4, 0, 3), False)])
def test_every_contender_runs(size, compiles, tmp_path, monkeypatch):
    monkeypatch.delenv("SOLO_LEARN_DIR", raising=False)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))  # needs no C++ compiler
    monkeypatch.setattr(loss, "SIZES", {"tiny": size})
    loss.run(["tiny"], "cpu", loss.SLOW_ROUNDS, "highest", compiles, 0, tmp_path)
    rows = json.loads((tmp_path / "loss.json").read_text())["results"]["tiny"]
    assert all(row["milliseconds"] > 0 and row["megabytes"] > 0 for row in rows)
    compiled = [row["contender"] for row in rows if "compiled" in row["contender"]]
    assert len(compiled) == compiles * (4 if size.queue else 3)
    assert len(rows) - len(compiled) == (9 if size.queue else 7)
    assert "under load" not in (tmp_path / "loss.md").read_text()


@pytest.mark.parametrize("largest_tensor", [2**30, 1])  # 1: there are contenders that do not fit
def test_every_contender_is_measured_beside_busy_processes_too(largest_tensor, tmp_path, monkeypatch):
    monkeypatch.setattr(loss, "SIZES", {"tiny": Size(4, 6, 3)})
    monkeypatch.setattr(contenders, "LARGEST_TENSOR", largest_tensor)
    command = ["benchmarks", "loss", "--load", "1", "--rounds", str(loss.SLOW_ROUNDS), "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(load.subprocess, "Popen", started := Recorded(subprocess.Popen))
    __main__.main()
    assert len(started.returned) == 1
    rows = json.loads((tmp_path / "loss.json").read_text())["results"]["tiny"]
    ran = [row for row in rows if "milliseconds" in row]
    assert all(row["milliseconds"] > 0 and row["under_load"]["milliseconds"] > 0 for row in ran)
    assert all(row["under_load"]["worst_ratio"] >= 1 for row in ran)
    head, line, *body = [line.count("|") for line in (tmp_path / "loss.md").read_text().splitlines()[: len(rows) + 2]]
    assert {head, line, *body} == {10}


class Recorded:
    """A function that keeps what it returned."""

    def __init__(self, function):
        self.function, self.returned = function, []

    def __call__(self, *args, **options):
        self.returned.append(self.function(*args, **options))
        return self.returned[-1]


def test_busy_processes_end_when_the_measurement_fails():
    started = []

    def measure_and_fail():
        with load.busy(2) as processes:
            started.extend(processes)
            assert [process.poll() for process in processes] == [None, None]
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        measure_and_fail()
    assert [process.poll() is None for process in started] == [False, False]


@pytest.mark.skipif(sys.platform == "win32", reason="a process there keeps the number of a parent that has ended")
def test_busy_processes_end_when_the_measuring_process_dies():
    script = "import os; from benchmarks import load; busy = load.busy(1); busy.__enter__(); os._exit(0)"
    # Returns when the pipe is closed at every end: the busy process has inherited it.
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, timeout=60, check=True)


def test_operations_are_counted(tmp_path, monkeypatch, one_thread):
    size = Size(8, 16, 4)
    row = torch.zeros(3)
    assert operations.count(lambda: (row.view(3, 1) * row).exp()) == 2
    monkeypatch.setattr(operations, "SIZES", {"queue": size})
    operations.run(["queue"], tmp_path)
    (found,) = json.loads((tmp_path / "operations.json").read_text())["results"].values()
    assert 0 < found["lightly NTXentLoss"] < found["SLRLoss, refinement"] < found["SLRLoss, refinement and mixup"]


def test_every_tile_is_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(tiles, "SIZES", {"queue": Size(4, 6, 3), "views": Size(4, 0, 3)})
    monkeypatch.setattr(tiles, "CPU_TILES", [(2, 4), (8, 8)])
    tiles.run("cpu", 1, "highest", tmp_path)
    results = json.loads((tmp_path / "tiles.json").read_text())["results"]
    assert list(results) == ["(2, 4)", "(8, 8)"]
    assert all(list(row) == ["queue, forward", "views, forward", "views, backward"] for row in results.values())


def test_memory_of_all_threads_counts():
    def share():
        for _ in range(2):  # one after the other
            torch.empty(1000)

    def step():
        held = torch.empty(100)
        threads.run([share] * 3)
        threads.run([share] * 2)
        return held

    assert loss.peak_memory(step, "cpu") == 4 * (100 + 3 * 1000)


def test_memory_of_a_shared_loss_is_that_of_its_tiles(monkeypatch):
    monkeypatch.setattr(tiled, "SHARED_PAIRS", 1)
    monkeypatch.setattr(tiled, "CPU_TILE", (256, 1024))
    monkeypatch.setattr(tiled, "LEAST_WIDTH", 1024)
    step = contenders.contenders(Size(768, 4096, 8), "cpu")["SLRLoss, refinement"]
    step()
    peaks = []
    for count in (1, 3):
        with intra_op_threads(count):
            peaks.append(loss.peak_memory(step, "cpu"))
    # Two more threads need two more tiles, and sums of their own.
    assert peaks[1] - peaks[0] == pytest.approx(2 * 4 * 256 * (1024 + 2 * tiled.SPARE), rel=0.08)


def test_the_peers_compute_what_they_are_said_to(monkeypatch):
    monkeypatch.delenv("SOLO_LEARN_DIR", raising=False)
    queries, positives, mixed = torch.randn(3, 4, 5)
    slr = SLRLoss(contenders.TEMPERATURE, (6, 5), confidence=0.0)
    inputs = contenders.Inputs(queries, positives, mixed, slr.memory_bank.bank)
    losses = contenders.with_queue(inputs, slr)
    batch_and_queue = losses["SLRLoss, refinement"]()
    torch.testing.assert_close(losses["pytorch-metric-learning NTXentLoss"](), batch_and_queue)
    own_and_queue = SLRLoss(contenders.TEMPERATURE, (6, 5), confidence=0.0, in_batch_keys=False)
    own_and_queue.load_state_dict(slr.state_dict())
    torch.testing.assert_close(losses["info-nce-pytorch InfoNCE"](), own_and_queue(queries, positives))

    losses = contenders.without_queue(inputs, SLRLoss(contenders.TEMPERATURE, confidence=0.0))
    ntxent = losses[BASELINE]()
    torch.testing.assert_close(losses["SLRLoss, refinement"](), ntxent)
    torch.testing.assert_close(losses["pytorch-metric-learning NTXentLoss"](), ntxent)


def test_processes_exchange_what_arithmetic_says(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "REAL", [processes.Share(8, 2)])
    monkeypatch.setattr(processes, "ALONE", [processes.Share(8, 4)])
    processes.run(1, tmp_path)
    two, _ = json.loads((tmp_path / "processes.json").read_text())["results"]["shares"]
    # Both views of 8 images in float32, once to gather and once to sum; and four numbers of rows, compared before.
    assert two["exchanged megabytes"] == pytest.approx((2 * 8 * 2 * processes.DIM * 4 + 4 * 2 * 8) / 1e6)


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
    baseline = [row["megabytes"] for row in results["rows, no queue"] if row["contender"] == BASELINE]
    assert baseline == sorted(set(baseline))


def test_labels_from_groups_are_measured_beside_dense_losses(tmp_path, monkeypatch):
    monkeypatch.setattr(groups, "DENSE_LIMIT", 16)
    groups.run([16, 24], "cpu", 2, "highest", tmp_path)
    results = json.loads((tmp_path / "groups.json").read_text())["results"]
    assert [len(results[size]) for size in ("16", "24")] == [6, 4]
    assert "SupConLoss" in (tmp_path / "groups.md").read_text()


@pytest.mark.parametrize("cpu_time", [False, True])
def test_the_loss_of_images_and_texts_is_measured_beside_open_clips(cpu_time, tmp_path, one_thread):
    pytest.importorskip("open_clip")
    clip.run([6], "cpu", 2, "highest", cpu_time, tmp_path)
    rows = json.loads((tmp_path / "clip.json").read_text())["results"]["6"]
    assert [row["contender"] for row in rows] == [clip.BASELINE, "SLRClipLoss", "SLRClipLoss, refinement"]
    assert all(row["milliseconds"] > 0 and row["megabytes"] > 0 for row in rows)
    assert "open_clip_torch" in (tmp_path / "clip.md").read_text()


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
