"""What runs inside spawned processes: importable by name, so it cannot live in a test module."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from slr_plugin import CosineConfidence, Mix, SLRLoss
from slr_plugin.diagnostics import LabelMonitor
from slr_plugin.streaming import tiled

BATCH, STEPS = 6, 6
WORLDS = (2, 3)


class Scenario(NamedTuple):
    queue: int
    in_batch_keys: bool
    mixed: bool
    trains_both: bool
    gather: bool = True
    one_direction: bool = False
    negatives: bool = False
    estimator: bool = False
    groups: str = ""  # what same_group is
    own_seeds: bool = False  # and no DDP, which would make the queues equal: gradients are averaged by hand


SCENARIOS = {
    "queue": Scenario(20, True, False, False),
    "queue and mixed": Scenario(20, True, True, False),
    "own positive and queue": Scenario(20, False, False, False),
    "queue, both views trained": Scenario(7, True, True, True),
    "symmetric": Scenario(0, True, False, True),
    "symmetric and mixed": Scenario(0, True, True, True),
    "one direction": Scenario(0, True, True, True, one_direction=True),
    "queue and negatives": Scenario(20, True, True, False, negatives=True),
    "own positive and negatives": Scenario(20, False, False, False, negatives=True),
    "symmetric and negatives": Scenario(0, True, False, True, negatives=True),
    "queue and estimator": Scenario(20, True, True, False, estimator=True),
    "own positive and estimator": Scenario(20, False, False, False, estimator=True),
    "symmetric and estimator": Scenario(0, True, True, True, estimator=True),
    "queue, seeds of one's own": Scenario(20, True, True, False, own_seeds=True),
    "estimator, seeds of one's own": Scenario(20, True, False, False, estimator=True, own_seeds=True),
    "queue and groups": Scenario(20, True, True, False, groups="positive"),
    "own positive and groups": Scenario(20, False, False, False, groups="positive"),
    "symmetric and groups": Scenario(0, True, False, True, groups="positive"),
    "symmetric and ignored groups": Scenario(0, True, True, True, groups="ignored"),
    "queue and ignored groups": Scenario(20, True, False, False, groups="ignored"),
    "queue, not gathered": Scenario(20, False, False, False, gather=False),
}


class Model(nn.Module):
    """Encoder, target network and criterion in one module, so that DDP sees the criterion's buffers."""

    def __init__(self, scenario: Scenario, gather: bool, seed: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4)).double()
        self.target = copy.deepcopy(self.encoder).requires_grad_(False)
        self.trains_both = scenario.trains_both
        torch.manual_seed(seed)
        self.criterion = SLRLoss(
            0.2,
            (scenario.queue, 4) if scenario.queue else 0,
            gather,
            sharpening=0.7,
            confidence=CosineConfidence(0.5, 2.0, STEPS),
            in_batch_keys=scenario.in_batch_keys,
            symmetric=False if scenario.one_direction else None,
            estimator_dim=5 if scenario.estimator and scenario.queue else None,
            same_group=scenario.groups or "positive",
        )
        self.estimates = scenario.estimator

    def forward(
        self,
        x0: Tensor,
        x1: Tensor,
        mixed: Tensor | None,
        mix: Mix | None,
        further: Tensor | None,
        groups: Tensor | None,
    ) -> Tensor:
        keys = (self.encoder if self.trains_both else self.target)(x1)
        crop = None if mixed is None else self.encoder(mixed)
        negatives = None if further is None else self.encoder(further)
        estimator = x1 if self.estimates else None
        further = {"negatives": negatives, "estimator": estimator, "groups": groups}
        return self.criterion(self.encoder(x0), keys, crop, mix, **further)


def train(scenario: Scenario, rank: int | None, world: int) -> dict[str, object]:
    """Some SGD steps on the whole batch (rank None) or on one process's part of it, under DDP's defaults."""
    model = Model(scenario, scenario.gather and rank is not None, seed=rank or 0 if scenario.own_seeds else 0)
    if rank and scenario.own_seeds:
        model.criterion.set_step(7)  # as where process 0 alone has loaded a checkpoint
    step_model = model if rank is None or scenario.own_seeds else DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.encoder.parameters(), lr=0.5)
    generator = torch.Generator().manual_seed(1)
    part = slice(None) if rank is None else slice(rank * BATCH, (rank + 1) * BATCH)
    monitor = LabelMonitor(model.criterion)
    losses, gradients = [], []
    for _ in range(STEPS):
        views = torch.randn(2, world * BATCH, 5, dtype=torch.float64, generator=generator)
        theta = torch.rand(world * BATCH, dtype=torch.float64, generator=generator)
        # Partners stay within a process's part, as they do in a real run.
        partner = torch.cat([torch.randperm(BATCH, generator=generator) + BATCH * r for r in range(world)])
        mixed = torch.lerp(views[1, partner], views[0], theta[:, None])
        x0, x1 = views[:, part]
        mix = Mix(theta[part], partner[part] - (0 if rank is None else rank * BATCH))
        classes = torch.randint(3, (world * BATCH,), generator=generator)[part]
        monitor.announce(classes)
        groups = classes - 1 if scenario.groups else None  # a third of them alone
        further = views[0, part].flip(1) if scenario.negatives else None
        crop = (mixed[part], mix) if scenario.mixed else (None, None)
        loss = step_model(x0, x1, *crop, further, groups)
        optimizer.zero_grad()
        loss.backward()
        if rank is not None and scenario.own_seeds:
            for parameter in model.encoder.parameters():
                dist.all_reduce(parameter.grad)
                parameter.grad /= world
        losses.append(loss.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in model.encoder.parameters()]))
        optimizer.step()
    return {
        "loss": torch.stack(losses),
        "gradient": torch.stack(gradients),
        "quality": torch.stack(monitor.measured[-1][:-1]),  # without the purity, a ratio of two
        "queue_classes": monitor.queue_classes,
        **model.criterion.state_dict(),
    }


def uneven(rank: int, memory_bank_size: int | tuple[int, int], in_batch_keys: bool, watched: bool = False) -> str:
    """The message that a last batch of unequal size raises, or what else happened."""
    criterion = SLRLoss(0.2, memory_bank_size, True, in_batch_keys=in_batch_keys)
    if watched:
        LabelMonitor(criterion)
    before = copy.deepcopy(criterion.state_dict())
    features = torch.randn(3 + rank, 4, requires_grad=True)
    try:
        criterion(features, features)
    except ValueError as error:
        unchanged = all(torch.equal(before[name], value) for name, value in criterion.state_dict().items())
        return f"{error} (unchanged: {unchanged})"
    return "no error"


def alone(rank: int, argument: str) -> str:
    """The message where process 0 alone brings an argument, or what else happened."""
    criterion = SLRLoss(0.2, 0, True)
    value = {"negatives": torch.randn(2, 4), "groups": torch.arange(3), "estimator": torch.randn(3, 5)}[argument]
    features = torch.randn(3, 4, requires_grad=True)
    try:
        criterion(features, features, **({argument: value} if rank == 0 else {}))
    except ValueError as error:
        return str(error)
    return "no error"


def run(rank: int, folder: Path) -> None:
    """Everything in two processes, and once more in three: starting one takes longer than what it does."""
    tiled.SHARED_PAIRS = 1  # with two threads, every pass is shared
    for world in WORLDS:
        if rank < world:
            run_among(rank, folder, world)


def run_among(rank: int, folder: Path, world: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous-{world}", rank=rank, world_size=world)
    torch.set_num_threads(2 if world == 2 else 1)
    results = {name: train(scenario, rank, world) for name, scenario in SCENARIOS.items()}
    messages = [uneven(rank, size, in_batch_keys) for size in ((8, 4), 8) for in_batch_keys in (True, False)]
    results |= {"uneven": [*messages, uneven(rank, 0, True), uneven(rank, (8, 4), True, watched=True)]}
    results |= {"alone": {name: alone(rank, name) for name in ("negatives", "groups", "estimator")}}
    torch.save(results, folder / f"rank-{rank}-of-{world}.pt")
    dist.barrier()
    dist.destroy_process_group()
