"""What is timed side by side: our loss, its peers, and the products that no loss can do without."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import info_nce
import lightly.loss
import pytorch_metric_learning.losses
import torch
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention

from slr_plugin import MomentumMixup, SLRLoss, dense

TEMPERATURE = 0.2
BASELINE, LIMIT = "lightly NTXentLoss", "bare products"
GRAPH = ", CUDA graph"
ATTENTION = "torch's attention, forward only"

# A contender that would hold one tensor beyond this many bytes is named but not run.
LARGEST_TENSOR = 2**30


class Size(NamedTuple):
    """Rows per view, keys in the queue, dimension."""

    rows: int
    queue: int
    dim: int


class Inputs(NamedTuple):
    """Features of one batch, and the queue's keys."""

    queries: Tensor
    positives: Tensor
    mixed: Tensor
    bank: Tensor


Losses = dict[str, Callable[[], Tensor]]


def contenders(size: Size, device: str, compiles: bool = False) -> dict[str, Callable[[], Any] | None]:
    """One callable per contender that computes the loss and its gradients; None where it does not fit.

    With ``compiles``, the baseline and ours once more under ``torch.compile``, which needs a C++ compiler on a CPU.
    """
    generator = torch.Generator().manual_seed(0)
    queries, positives, mixed = (torch.randn(size.rows, size.dim, generator=generator).to(device) for _ in range(3))
    slr = SLRLoss(TEMPERATURE, (size.queue, size.dim) if size.queue else 0).to(device)
    inputs = Inputs(queries.requires_grad_(), positives, mixed.requires_grad_(), slr.memory_bank.bank)
    positives.requires_grad_(not size.queue)
    losses = with_queue(inputs, slr) if size.queue else without_queue(inputs, slr)

    def step(loss: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            queries.grad = positives.grad = mixed.grad = None
            loss().backward()

        return run

    count, keys = (size.rows, size.rows + size.queue) if size.queue else (2 * size.rows, 2 * size.rows)
    largest = {
        "dense.py, refinement": 4 * count * keys,
        "solo-learn simclr_loss_func": 4 * count * keys,
        # It compares every positive pair with every negative pair, one byte each.
        "pytorch-metric-learning NTXentLoss": count * count * keys,
    }
    steps = {name: step(loss) if largest.get(name, 0) < LARGEST_TENSOR else None for name, loss in losses.items()}
    if compiles:
        names = [name for name in losses if name == BASELINE or name.startswith("SLRLoss")]
        steps |= {f"{name}, compiled": step(torch.compile(losses[name])) for name in names}
    if device != "cpu":
        steps |= {
            f"{name}{GRAPH}": in_a_graph(run) for name, run in steps.items() if name.startswith("SLRLoss") and run
        }
    if size.queue:
        steps[ATTENTION] = attention(size, device)
    return steps | {LIMIT: bare_products(size, device)}


def with_queue(inputs: Inputs, slr: SLRLoss) -> Losses:
    """Losses of queries against positives and a queue."""
    queries, positives, mixed, bank = inputs
    _, mix = MomentumMixup(2.0)(queries.detach(), positives.detach())
    ntxent = lightly.loss.NTXentLoss(TEMPERATURE, tuple(bank.shape)).to(bank.device)
    swap = SLRLoss(TEMPERATURE, tuple(bank.shape), confidence=0.0, in_batch_keys=False).to(bank.device)
    losses = {
        BASELINE: lambda: ntxent(queries, positives),
        "SLRLoss, the same loss": lambda: swap(queries, positives),
        "SLRLoss, refinement": lambda: slr(queries, positives),
        "SLRLoss, refinement and mixup": lambda: slr(queries, positives, mixed, mix),
        "dense.py, refinement and mixup": lambda: dense.slr_loss(
            queries, positives, bank, mixed, mix, temperature=TEMPERATURE
        ),
        "info-nce-pytorch InfoNCE": lambda: info_nce.InfoNCE(TEMPERATURE)(queries, positives, bank),
    }
    if finds_solo_learn():
        from solo.losses.mocov2plus import mocov2plus_loss_func

        queue = bank.T.contiguous()  # as it keeps it
        losses["solo-learn mocov2plus_loss_func"] = lambda: mocov2plus_loss_func(
            normalize(queries), normalize(positives), queue, TEMPERATURE
        )
    labels = torch.arange(len(queries), device=bank.device)
    reference_labels = torch.arange(len(queries) + len(bank), device=bank.device)
    metric = pytorch_metric_learning.losses.NTXentLoss(TEMPERATURE)
    losses["pytorch-metric-learning NTXentLoss"] = lambda: metric(
        queries, labels, ref_emb=torch.cat([positives, bank]), ref_labels=reference_labels
    )
    return losses


def without_queue(inputs: Inputs, slr: SLRLoss) -> Losses:
    """Losses of two views against each other."""
    queries, positives, *_ = inputs
    ntxent, decoupled = lightly.loss.NTXentLoss(TEMPERATURE), lightly.loss.DCLLoss(TEMPERATURE)
    swap = SLRLoss(TEMPERATURE, confidence=0.0).to(queries.device)
    losses = {
        BASELINE: lambda: ntxent(queries, positives),
        "SLRLoss, the same loss": lambda: swap(queries, positives),
        "SLRLoss, refinement": lambda: slr(queries, positives),
        "lightly DCLLoss": lambda: decoupled(queries, positives),
        "dense.py, refinement": lambda: dense.symmetric_slr_loss(queries, positives, temperature=TEMPERATURE),
    }
    if finds_solo_learn():
        from solo.losses.simclr import simclr_loss_func

        images = torch.arange(len(queries), device=queries.device).repeat(2)
        losses["solo-learn simclr_loss_func"] = lambda: simclr_loss_func(
            torch.cat([queries, positives]), images, TEMPERATURE
        )
    metric = pytorch_metric_learning.losses.NTXentLoss(TEMPERATURE)
    symmetric = pytorch_metric_learning.losses.SelfSupervisedLoss(metric)
    losses["pytorch-metric-learning NTXentLoss"] = lambda: symmetric(queries, positives)
    return losses


def finds_solo_learn() -> bool:
    """Whether SOLO_LEARN_DIR names a clone of solo-learn, which is then importable; it is on no package index."""
    clone = os.environ.get("SOLO_LEARN_DIR")
    if clone and clone not in sys.path:
        sys.path.append(clone)
    return bool(clone)


def in_a_graph(step: Callable[[], Any]) -> Callable[[], Any]:
    """The step as a CUDA graph, which is launched as one; lightly's losses read values back and cannot be recorded."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # before a recording every library must have run
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def attention(size: Size, device: str) -> Callable[[], Any]:
    """A yardstick: torch's fused attention of as many rows over as many keys, which are the values too."""
    dtype = torch.bfloat16 if torch.get_float32_matmul_precision() == "medium" else torch.float32
    rows, keys = (
        torch.randn(1, 1, n, size.dim, device=device, dtype=dtype) for n in (3 * size.rows, size.rows + size.queue)
    )
    return lambda: scaled_dot_product_attention(rows, keys, keys)


def bare_products(size: Size, device: str) -> Callable[[], Any]:
    """The matrix products that the whole loss cannot do without, and nothing else: its limit.

    With a queue, the rows of queries, mixed queries and positives times all keys, twice. Without one, half the logits
    (their matrix is symmetric) times all rows, forward and again for the gradient of the keys. In the number format of
    the loss, and on the CPU in its tiles, as at once is slower there.
    """
    count, keys = (3 * size.rows, size.rows + size.queue) if size.queue else (2 * size.rows, 2 * size.rows)
    rows = torch.randn(count, size.dim, device=device)
    table = torch.randn(keys, size.dim, device=device) if size.queue else rows
    medium = torch.get_float32_matmul_precision() == "medium"
    if size.queue and medium and device != "cpu":
        rows, table = rows.bfloat16(), table.bfloat16()
    result = torch.empty_like(rows)
    side = 1024 if device == "cpu" else 8192
    blocks = list(table.split(side))

    def run() -> None:
        for _ in range(1 if size.queue else 2):
            for i, (part, out) in enumerate(zip(rows.split(side), result.split(side), strict=True)):
                for j, block in enumerate(blocks[0 if size.queue else i :]):
                    logits = part @ block.T
                    out.addmm_(logits, block, beta=0)
                    if j and not size.queue:
                        result[side * (i + j) :][: len(block)].addmm_(logits.T, part, beta=0)

    return run
