"""``sane`` beside stable-pretraining's own simclr, beside the dense oracle, and in runs that are killed and resumed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("stable_pretraining")

import stable_pretraining as spt
from _oracle import slr
from _stable_pretraining import BATCH, SIZE, STEPS, build, data, encoder, projector, trainer
from stable_pretraining.forward import simclr

from slr_plugin import CosineConfidence, MomentumMixup, SLRLoss
from slr_plugin.adapters.stable_pretraining import sane

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs and Lightning's, of short runs
HERE = Path(__file__).parent

CONFIG = """
seed: 0
trainer:
  _target_: lightning.Trainer
  max_epochs: 4
  accelerator: cpu
  num_sanity_val_steps: 0
  enable_checkpointing: false
  enable_progress_bar: false
  log_every_n_steps: 1
  callbacks:
    - _target_: stable_pretraining.callbacks.OnlineProbe
      _partial_: true
      name: probe
      input: embedding
      target: label
      probe: {_target_: torch.nn.Linear, in_features: 6, out_features: 3}
      loss: {_target_: torch.nn.CrossEntropyLoss}
      metrics: {top1: {_target_: torchmetrics.classification.MulticlassAccuracy, num_classes: 3}}
    - _target_: stable_pretraining.callbacks.OnlineKNN
      name: knn
      input: embedding
      target: label
      queue_length: 16
      input_dim: 6
      target_dim: 1
      num_classes: 3
      k: 3
      metrics: {top1: {_target_: torchmetrics.classification.MulticlassAccuracy, num_classes: 3}}
    - _target_: _stable_pretraining.Recorder
      path: ${oc.env:RECORD}
      kill_at: ${oc.decode:${oc.env:KILL_AT}}
module:
  _target_: stable_pretraining.Module
  forward: slr_plugin.adapters.stable_pretraining.sane
  backbone:
    _target_: stable_pretraining.backbone.TeacherStudentWrapper
    student: {_target_: _stable_pretraining.encoder}
  projector:
    _target_: stable_pretraining.backbone.TeacherStudentWrapper
    student: {_target_: _stable_pretraining.projector}
  criterion:
    _target_: slr_plugin.SLRLoss
    temperature: 0.2
    memory_bank_size: [20, 4]
    confidence: {_target_: slr_plugin.CosineConfidence, start: 0.0, end: 2.0, total_steps: 12}
  mixup: {_target_: slr_plugin.MomentumMixup, kappa: 2.0}
  optim: {optimizer: {type: SGD, lr: 0.1, momentum: 0.9}}
data:
  _target_: stable_pretraining.data.DataModule
  train: {batch_size: 8, dataset: {_target_: _stable_pretraining.Views}}
  val: {batch_size: 8, dataset: {_target_: _stable_pretraining.Views, count: 1}}
hydra: {run: {dir: .}, output_subdir: null}
"""


def module(**kwargs):
    """What ``sane`` is bound to, outside of a trainer, in float64."""
    torch.manual_seed(0)
    logged = {}
    networks = {"backbone": encoder().double(), "projector": projector().double()}
    if kwargs.pop("has_teacher", False):
        networks = {name: spt.backbone.TeacherStudentWrapper(network) for name, network in networks.items()}
        for wrapper in networks.values():  # apart, as after some steps
            torch.nn.utils.vector_to_parameters(
                torch.nn.utils.parameters_to_vector(wrapper.teacher.parameters()) + 0.1, wrapper.teacher.parameters()
            )
    ours = {"training": True, "trainer": SimpleNamespace(global_step=3), "logged": logged, "mixup": None}
    ours |= {"log": lambda name, value, **_: logged.update({name: value}), "log_dict": lambda d, **_: logged.update(d)}
    return SimpleNamespace(**(ours | networks | kwargs))


def views(count=2, size=5):
    generator = torch.Generator().manual_seed(4)
    images = torch.randn(count, size, 1, 4, 4, dtype=torch.float64, generator=generator)
    return [{"image": image, "label": torch.arange(size)} for image in images]


def parameters(module):
    return [p for name in ("backbone", "projector") for p in getattr(module, name).parameters() if p.requires_grad]


def close(module, first, second):
    torch.testing.assert_close(first, second, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(loss, parameters(module), retain_graph=True) for loss in (first, second)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


@pytest.mark.parametrize("trains_by", ["step", "run"])
def test_without_refinement_it_is_their_simclr(trains_by):
    ours = {"criterion": SLRLoss(0.5, confidence=0.0)}
    theirs = {"forward": simclr, "criterion": None, "simclr_loss": spt.losses.NTXEntLoss(0.5)}
    if trains_by == "step":
        bound = module(**ours, simclr_loss=theirs["simclr_loss"])
        first, second = (forward(bound, {"views": views()}, "fit") for forward in (sane, simclr))
        close(bound, first["loss"], second["loss"])
        for name in ("embedding", "label"):
            assert torch.equal(first[name], second[name])
        return
    trained = []
    for kwargs in (ours, theirs):
        built = build(has_teacher=False, **kwargs)
        trainer(logger=False).fit(built, data())
        trained.append([*built.backbone.parameters(), *built.projector.parameters()])
    torch.testing.assert_close(*trained, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mixes", [False, True])
def test_students_make_queries_and_teachers_keys(mixes):
    criterion = SLRLoss(0.2, (12, 4), confidence=3.0, refined_weight=0.7)
    seeds = [torch.Generator().manual_seed(9) for _ in range(2)]
    ours = module(
        criterion=criterion, has_teacher=True, mixup=MomentumMixup(2.0, generator=seeds[0]) if mixes else None
    )
    bank = criterion.memory_bank.bank.double().clone()
    first, second = views()
    out = sane(ours, {"views": [first, second]}, "fit")

    def queries(images):
        return ours.projector.student(ours.backbone.student(images))

    keys = ours.projector.teacher(ours.backbone.teacher(second["image"])).detach()
    mixed, mix = MomentumMixup(2.0, generator=seeds[1])(first["image"], second["image"])
    crops = ([queries(mixed)], [mix]) if mixes else (None, None)
    settings = {"temperature": 0.2, "confidence": 3.0, "refined_weight": 0.7}
    close(ours, out["loss"], slr(queries(first["image"]), keys, *crops, bank=bank, **settings).loss)
    assert torch.equal(out["embedding"], ours.backbone.student(first["image"]))
    assert torch.equal(out["label"], first["label"])
    assert criterion.memory_bank.bank_ptr == 5
    assert ours.logged["fit/loss"] is out["loss"]
    assert ours.logged["slr/mu"] == 3.0


def test_both_views_are_trained_without_teachers():
    ours = module(criterion=SLRLoss(0.2, confidence=2.0))
    batch = views()
    out = sane(ours, {"first": batch[0], "second": batch[1], "batch_idx": 0}, "fit")  # views by name, and no list
    dense = slr(*(ours.projector(ours.backbone(view["image"])) for view in batch), temperature=0.2, confidence=2.0)
    close(ours, out["loss"], dense.loss)
    assert len(out["embedding"]) == len(out["label"]) == 10


def test_the_schedule_follows_the_trainer():
    schedule = CosineConfidence(0.0, 2.0, 10)
    ours = module(criterion=SLRLoss(0.2, confidence=schedule))
    for _ in range(2):  # two batches of one optimizer step
        sane(ours, {"views": views()}, "fit")
        assert ours.logged["slr/mu"].item() == pytest.approx(schedule(3), abs=1e-6)


@pytest.mark.parametrize("is_beside", [True, False])
@pytest.mark.parametrize("has_teacher", [True, False])
def test_a_toy_two_thirds_of_which_are_in_pairs(has_teacher, is_beside):
    """Samples 0 to 3 are two pairs, 4 and 5 alone."""
    ids = torch.tensor([3, 3, 8, 8, 1, -1])
    criterion = SLRLoss(0.2, (12, 4) if has_teacher else 0, confidence=0.0)
    labels = []
    criterion.register_forward_pre_hook(
        lambda module, args, kwargs: labels.append(module.labels(*args, **kwargs)), with_kwargs=True
    )
    batch = {"views": views(size=6)}
    (batch if is_beside else batch["views"][0])["groups"] = ids
    ours = module(criterion=criterion, has_teacher=has_teacher)
    for _ in range(2):  # the second time with the first one's keys in the queue
        sane(ours, batch, "fit")
    same = (ids[:, None] == ids) & (ids[:, None] >= 0) | torch.eye(6, dtype=torch.bool)
    if has_teacher:
        first, second = torch.zeros(2, 6, 18).double()
        first[:, :6] = same
        second[:, :6], second[:, 6:12] = same, same & (ids[:, None] >= 0)
        assert criterion.memory_bank.groups.tolist() == 2 * ids.tolist()
    else:
        first = second = same.repeat(2, 2).double().fill_diagonal_(0)
        assert first.sum(1).tolist() == [3, 3, 3, 3, 1, 1] * 2
    for found, expected in zip(labels, (first, second), strict=True):
        torch.testing.assert_close(found, expected / expected.sum(1, keepdim=True))


def test_features_in_the_batch_estimate_the_labels():
    features = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours = module(criterion=SLRLoss(0.2, confidence=2.0))
    out = sane(ours, {"views": views(), "estimator": features}, "fit")
    queries, keys = (ours.projector(ours.backbone(view["image"])) for view in views())
    close(ours, out["loss"], SLRLoss(0.2, confidence=2.0)(queries, keys, estimator=features))


def test_another_loss_is_a_baseline():
    ours = module(criterion=spt.losses.NTXEntLoss(0.5))
    assert sane(ours, {"views": views()}, "fit")["loss"].isfinite()
    assert set(ours.logged) == {"fit/loss"}


def test_beside_training_there_are_embeddings_alone():
    ours = module(criterion=None, has_teacher=True, training=False)
    (view,) = views(1)
    del view["label"]
    assert set(sane(ours, view, "validate")) == {"embedding"}
    out = sane(ours, {"views": views()}, "validate")
    assert len(out["embedding"]) == len(out["label"]) == 10


def test_processes_mix_differently_from_one_seed(monkeypatch):
    seeds = set()
    for rank in range(2):
        monkeypatch.setattr("slr_plugin.adapters._run.rank", lambda rank=rank: rank)
        ours = module(criterion=SLRLoss(0.2), mixup=MomentumMixup())
        sane(ours, {"views": views()}, "fit")
        seeds.add(ours.mixup.generator.initial_seed())
    assert len(seeds) == 2


def test_a_single_view_is_refused_in_training():
    with pytest.raises(ValueError, match="got 1: use MultiViewTransform"):
        sane(module(), views(1)[0], "fit")


class Run:
    """One process that trains by their Manager."""

    def __init__(self, folder, *command, kill_at=-1, name="record"):
        self.record = folder / f"{name}.jsonl"
        environment = os.environ | {
            "SPT_CACHE_DIR": str(folder / "cache"),
            "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
            "RECORD": str(self.record),
            "KILL_AT": str(kill_at),
            "OMP_NUM_THREADS": "1",
        }
        command = [str(self.record) if part == "RECORD" else part for part in command]
        self.result = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
        self.was_killed = self.result.returncode in (-9, 247, 137)

    def lines(self):
        return [json.loads(line) for line in self.record.read_text().splitlines()]

    def checkpoint(self):
        (path,) = (self.record.parent / "cache").rglob("last.ckpt")
        return str(path)


def script(*arguments):
    return [sys.executable, "-W", "ignore", str(HERE / "_stable_pretraining.py"), *arguments]


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path):
    """Killed in its third epoch of three steps each, it repeats the two of them that no checkpoint has."""
    (tmp_path / "whole").mkdir()
    whole = Run(tmp_path / "whole", *script("python", "RECORD", "-1"))
    assert whole.result.returncode == 0, whole.result.stderr[-2000:]
    names = json.loads(whole.record.with_suffix(".names").read_text())
    assert {"eval/knn_top1", "eval/probe_top1"} <= set(names)

    killed = Run(tmp_path, *script("python", "RECORD", "8"), name="killed")
    assert killed.was_killed, killed.result.stderr[-2000:]
    resumed = Run(tmp_path, *script("python", "RECORD", "-1", killed.checkpoint()), name="resumed")
    assert resumed.result.returncode == 0, resumed.result.stderr[-2000:]
    assert len(killed.lines()) == 8
    assert killed.lines() == whole.lines()[:8]
    assert resumed.lines() == whole.lines()[6:]
    assert [line["step"] for line in whole.lines()] == list(range(1, STEPS + 1))
    schedule = CosineConfidence(0.0, 2.0, STEPS)
    for line in whole.lines():
        assert line["mu"] == pytest.approx(schedule(line["step"] - 1), abs=1e-6)
        assert line["pointer"] == line["step"] * BATCH % 20
        assert line["groups"][line["pointer"] - 1] == (line["step"] * BATCH - 1) % SIZE // 2  # in the images' order


def test_a_yaml_trains_and_goes_on_after_a_kill(tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG)
    killed = Run(tmp_path, *script("yaml", "config.yaml"), kill_at=8)
    assert killed.was_killed, killed.result.stderr[-2000:]
    resumed = Run(tmp_path, *script("yaml", "config.yaml", killed.checkpoint()), name="resumed")
    assert resumed.result.returncode == 0, resumed.result.stderr[-2000:]
    went_on(killed.lines(), resumed.lines())
    assert "eval/probe_top1" in resumed.record.with_suffix(".names").read_text()


def test_spt_run_trains_and_goes_on_after_a_kill(tmp_path):
    before, rest = CONFIG.split("    - _target_: stable_pretraining.callbacks.OnlineProbe")
    after = rest[rest.index("    - _target_: stable_pretraining.callbacks.OnlineKNN") :]
    (tmp_path / "config.yaml").write_text(before + after)  # a probe needs the module, which spt run does not give it
    command = [sys.executable, "-m", "stable_pretraining.cli", "run", "config.yaml"]
    killed = Run(tmp_path, *command, kill_at=8)
    if "unexpected keyword argument 'resume_weights_only'" in killed.result.stdout + killed.result.stderr:
        pytest.skip("spt run of this release fails with every configuration")
    assert killed.was_killed or len(killed.lines()) == 8, killed.result.stderr[-2000:]
    resumed = Run(tmp_path, *command, f"+ckpt_path={killed.checkpoint()}", "+weights_only=false", name="resumed")
    assert resumed.result.returncode == 0, resumed.result.stderr[-2000:]
    went_on(killed.lines(), resumed.lines())


def went_on(killed, resumed):
    """The queue, its pointer and the schedule stand where they stood; mixing is drawn anew."""
    assert [line["step"] for line in resumed] == list(range(7, STEPS + 1))
    assert resumed[0]["queue"] == killed[6]["queue"]
    assert resumed[0]["pointer"] == killed[6]["pointer"]
    schedule = CosineConfidence(0.0, 2.0, STEPS)
    for line in killed + resumed:
        assert line["mu"] == pytest.approx(schedule(line["step"] - 1), abs=1e-6)
