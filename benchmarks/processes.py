"""What gathering costs: several processes with one batch between them, and the share of one among many.

Without a queue every process meets its own rows with the keys of all. Up to 4 processes are real ones over gloo with
one thread each; the time is that of the slowest. Of 64 only one is real: it does its share of the work, and its gather
hands out random keys in place of an exchange.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, multiprocessing
from torch import distributed as dist
from torch.nn.functional import normalize

from benchmarks.contenders import TEMPERATURE
from benchmarks.loss import peak_memory, seconds
from benchmarks.machine import machine, publish
from slr_plugin import SLRLoss

DIM = 128


class Share(NamedTuple):
    """A batch of so many images, and the processes that hold it."""

    images: int
    processes: int


REAL = [Share(2048, 1), Share(2048, 2), Share(2048, 4), Share(32768, 1)]
ALONE = [Share(2048, 64), Share(8192, 64), Share(32768, 64)]


def step(share: Share) -> Callable[[], None]:
    """Loss and gradients of one process's part of the batch."""
    criterion = SLRLoss(TEMPERATURE, gather_distributed=True)
    queries, positives = torch.randn(2, share.images // share.processes, DIM).requires_grad_()

    def run() -> None:
        criterion(queries, positives).backward()

    return run


@contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Seconds inside collectives, and bytes: of the buffer that is filled or summed."""
    spent = {"seconds": 0.0, "bytes": 0}

    def wrapped(name: str) -> Callable[..., Any]:
        call = getattr(dist, name)

        def timed(*args: Any) -> Any:
            start = time.perf_counter()
            result = call(*args)
            spent["seconds"] += time.perf_counter() - start
            spent["bytes"] += sum(t.nbytes for t in (args[0] if isinstance(args[0], list) else args[:1]))
            return result

        return timed

    names = ("all_gather", "all_reduce")
    with mock.patch.multiple(dist, **{name: wrapped(name) for name in names}):
        yield spent


def work(rank: int, share: Share, rounds: int, folder: str) -> None:
    """One process: its times, next to the others."""
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=share.processes)
    run = step(share)
    run()
    whole, exchange = [], []
    for _ in range(rounds):
        dist.barrier()
        with watched() as spent:
            whole.append(seconds(run, "cpu"))
        exchange.append(spent["seconds"])
    found = {"seconds": whole, "exchange": exchange, "bytes": spent["bytes"], "peak": peak_memory(run, "cpu")}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def together(share: Share, rounds: int) -> dict[str, float]:
    """Real processes; of every round the slowest."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(work, (share, rounds, folder), nprocs=share.processes)
        found = [torch.load(f"{folder}/{rank}.pt") for rank in range(share.processes)]
    return {
        "milliseconds": 1e3 * statistics.median(map(max, zip(*(one["seconds"] for one in found), strict=True))),
        "exchange": 1e3 * statistics.median(map(max, zip(*(one["exchange"] for one in found), strict=True))),
        "exchanged megabytes": found[0]["bytes"] / 1e6,
        "peak megabytes": max(one["peak"] for one in found) / 1e6,
    }


def alone(share: Share, rounds: int) -> dict[str, float]:
    """One process with the work of one among many."""
    others = normalize(torch.randn(share.images - share.images // share.processes, 2 * DIM), dim=1)

    def gather(local: Tensor) -> Tensor:
        return torch.cat([local, others])

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    exchange = mock.Mock(side_effect=gather)
    instead = {"gather": exchange, "world_size": lambda: share.processes, "check_alike": lambda *_, **__: None}
    with mock.patch.multiple("slr_plugin.loss", **instead):
        run = step(share)
        run()
        assert exchange.called, "the loss has met its own keys alone"
        times = [seconds(run, "cpu") for _ in range(rounds)]
        peak = peak_memory(run, "cpu")
    torch.set_num_threads(threads)
    return {"milliseconds": 1e3 * statistics.median(times), "peak megabytes": peak / 1e6}


def table(results: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = [
        "| images | processes | ms | of which exchange | MB gathered and summed by each | peak MB of each |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    for row in results:
        exchange = ["exchange", "exchanged megabytes"]
        cells = [f"{row['images']:,}", row["processes"], f"{row['milliseconds']:,.0f}"]
        cells += [f"{row[name]:.1f}" if name in row else "not run" for name in exchange]
        lines.append("| " + " | ".join(map(str, [*cells, f"{row['peak megabytes']:.1f}"])) + " |")
    return "\n".join(lines)


def run(rounds: int, output: Path) -> None:
    """Measure, print the table, write processes.json and processes.md."""
    results = [
        {**share._asdict(), **measure(share, rounds)}
        for shares, measure in ((REAL, together), (ALONE, alone))
        for share in shares
    ]
    caption = (
        f"{machine('cpu').split(',')[0]}, one thread per process; no queue, d = {DIM}; torch {torch.__version__}, "
    )
    caption += f"gloo; medians of {rounds} rounds."
    publish(output, "processes", table(results), caption, {"shares": results})
