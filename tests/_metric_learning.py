"""What test_pytorch_metric_learning.py runs inside spawned processes."""

from pathlib import Path

import torch
from pytorch_metric_learning.losses import SelfSupervisedLoss
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from slr_plugin.adapters.pytorch_metric_learning import SLRLoss

BATCH, STEPS = 5, 4
CASES = {"both views": (0, True), "one direction": (0, False), "queue": (12, False), "classes": (20, None)}
CLASSES = torch.tensor([4, 4, 7, 7, 1])  # of a process's images


def train(case: str, rank: int | None, world: int) -> dict[str, torch.Tensor]:
    """The gradients of some SGD steps, and the queue, of one process with the whole batch or of one among several."""
    queue, symmetric = CASES[case]
    torch.manual_seed(0)
    encoder = torch.nn.Linear(5, 4).double()
    settings = {"confidence": 0.0} if symmetric is None else {}  # else whose label is asked for depends on the batch
    inner = SLRLoss(0.2, (queue, 4) if queue else 0, gather_distributed=rank is not None, **settings)
    loss_function = SelfSupervisedLoss(inner, symmetric=bool(symmetric))
    model = encoder if rank is None else DistributedDataParallel(encoder)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.5)
    generator = torch.Generator().manual_seed(1)
    part = slice(None) if rank is None else slice(rank * BATCH, (rank + 1) * BATCH)
    gradients = []
    for _ in range(STEPS):
        views = torch.randn(2, world * BATCH, 5, dtype=torch.float64, generator=generator)[:, part]
        queries, keys = model(views.flatten(0, 1)).chunk(2)
        optimizer.zero_grad()
        if symmetric is None:
            inner(torch.cat([queries, keys]), CLASSES.repeat(2 if rank is not None else 2 * world)).backward()
        else:
            loss_function(queries, keys.detach() if queue else keys).backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in encoder.parameters()]))
        optimizer.step()
    bank = inner.criterion.memory_bank.bank
    return {"gradients": torch.stack(gradients), "queue": bank.sort(0).values}  # processes have another order


def run(rank: int, folder: Path, world: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    torch.set_num_threads(1)
    torch.save({case: train(case, rank, world) for case in CASES}, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
