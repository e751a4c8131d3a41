"""What test_open_clip.py trains, and what it runs inside spawned processes."""

import contextlib
from pathlib import Path
from types import SimpleNamespace

import open_clip
import torch
import torch.nn.functional as F
from open_clip_train import train as loop
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from slr_plugin.adapters.open_clip import SLRClipLoss

BATCH, DIM, WORDS = 6, 8, 5
MODES = [(local_loss, gather_with_grad) for local_loss in (False, True) for gather_with_grad in (False, True)]
REFINED = {"confidence": 3.0, "sharpening": 0.6, "refined_weight": 0.8}
GROUPS = torch.tensor([0, 1, 1, -1, 2, -1, 2, -1, 0, 3, 3, 0])  # of the pairs of two processes


class Towers(nn.Module):
    """Two linear towers and a scale, as an open_clip model returns them."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.image, self.text = (
            nn.Parameter(torch.randn(DIM, DIM, generator=generator, dtype=torch.float64)) for _ in range(2)
        )
        self.logit_scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, images: torch.Tensor, texts: torch.Tensor) -> dict[str, torch.Tensor]:
        return {
            "image_features": F.normalize(images @ self.image, dim=1),
            "text_features": F.normalize(texts @ self.text, dim=1),
            "logit_scale": self.logit_scale.exp(),
        }


def value_and_gradients(loss: nn.Module, model: nn.Module, sync: bool = True, **known) -> list[torch.Tensor]:
    """The loss of this process's part of a batch, and the gradients of the parameters."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    whole = torch.randn(2, 2 * BATCH, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    part = slice(None) if world == 1 else slice(rank * BATCH, (rank + 1) * BATCH)
    known = {name: value[part] for name, value in known.items()}
    model.zero_grad()
    with contextlib.nullcontext() if sync else model.no_sync():
        value = loss(**model(*whole[:, part]), **known)
        value.backward()
    return [value.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


def run(rank: int, folder: Path, world: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    torch.set_num_threads(1)
    place = {"rank": rank, "world_size": world}
    results = {}
    for mode in MODES:
        model = DistributedDataParallel(Towers())
        for name, kind in (("ours", SLRClipLoss), ("theirs", open_clip.ClipLoss)):
            loss = kind(*mode, cache_labels=True, **place)
            results[name, mode] = [value_and_gradients(loss, model, sync) for sync in (False, True)]
    refined = SLRClipLoss(True, True, **place, **REFINED)
    results["refined"] = value_and_gradients(refined, DistributedDataParallel(Towers()))
    grouped = SLRClipLoss(False, True, **place)
    results["groups"] = value_and_gradients(grouped, DistributedDataParallel(Towers()), groups=GROUPS)
    queued = SLRClipLoss(True, True, **place, memory_bank_size=(3 * BATCH, DIM))
    value_and_gradients(queued, DistributedDataParallel(Towers()))
    results["queue"] = queued.state_dict()
    torch.save(results, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def small_clip(seed: int = 0, **settings) -> nn.Module:
    """A model of open_clip's in float64, with some thousand weights."""
    torch.manual_seed(seed)
    vision = open_clip.CLIPVisionCfg(layers=1, width=16, head_width=8, patch_size=8, image_size=16)
    text = open_clip.CLIPTextCfg(layers=1, width=16, heads=2, vocab_size=50, context_length=WORDS)
    return open_clip.CLIP(DIM, vision, text, output_dict=True, **settings).double()


class Batches:
    """Random images and tokens, as the loader that open_clip's loop goes through."""

    def __init__(self, count: int = 6) -> None:
        generator = torch.Generator().manual_seed(2)
        images = torch.randn(count, 4, 3, 16, 16, generator=generator, dtype=torch.float64)
        tokens = torch.randint(1, 49, (count, 4, WORDS), generator=generator)
        tokens[:, :, -1] = 49  # the largest number ends a text
        self.batches = list(zip(images, tokens, strict=True))
        self.num_batches, self.num_samples = count, 4 * count

    def __iter__(self):
        return iter(self.batches)


def train(model: nn.Module, loss: nn.Module, accum_freq: int, lr: float = 0.1) -> list[torch.Tensor]:
    """One epoch of open_clip's own loop; the weights afterwards."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    data = {"train": SimpleNamespace(set_epoch=lambda epoch: None, dataloader=Batches())}
    usual = {"device": "cpu", "precision": "fp32", "batch_size": 4, "log_every_n_steps": 1, "skip_scheduler": True}
    alone = {"distributed": False, "horovod": False, "rank": 0, "world_size": 1, "distill": False, "wandb": False}
    args = SimpleNamespace(accum_freq=accum_freq, grad_clip_norm=None, **usual, **alone)
    if hasattr(loop, "TrainState"):  # open_clip 4
        from open_clip.task import CLIPTask

        data["train"].dataloader.batches = [{"image": x, "text": y} for x, y in data["train"].dataloader]
        task = CLIPTask(model, loss=loss, verbose=False)
        loop.train_one_epoch(loop.TrainState(task, optimizer), data, args)
    else:
        loop.train_one_epoch(model, data, loss, 0, optimizer, None, None, None, args)
    return [parameter.detach().clone() for parameter in model.parameters()]
