"""Threads that compute a share of a pass each: they wait for one another once, not after every operation.

Inside torch every operation on a large tensor is a parallel region: it begins when all threads have come and ends when
the last one is done. Where other processes keep the cores busy, as the workers of a data loader do, each region waits
for a thread that the system has put aside, and a pass has some thousand regions. Here a thread computes its whole share
with one intra-op thread.
"""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


def run(tasks: Sequence[Callable[[], T]]) -> list[T]:
    """Return what the tasks return, each computed in a thread of its own; a single one is computed here.

    Where the system gives no thread, as at the interpreter's end, the others and the caller do its work, so a task may
    be computed twice: it must write to nothing but tensors of its own. Tasks record no gradient. Raises what the first
    task that fails raises.
    """
    futures: list[Future[T]] = []
    try:
        if len(tasks) > 1 and not pool.is_broken:
            executor = pool.of(len(tasks))
            for task in tasks:
                futures.append(executor.submit(_without_gradient, task))
    except RuntimeError as error:
        if "start new thread" in str(error):
            pool.is_broken = True
            warnings.warn("the system starts no further thread: the loss computes with one from now on", stacklevel=2)
    return [future.result() for future in futures] + [task() for task in tasks[len(futures) :]]


def _without_gradient(task: Callable[[], T]) -> T:
    with torch.no_grad():  # what the caller has set holds in its own thread only
        return task()


class Pool:
    """The threads, started when they are first needed."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Start anew: a forked process has none of its parent's threads, and perhaps a lock that one of them held."""
        self.executor: ThreadPoolExecutor | None = None
        self.size = 0
        self.is_broken = False  # whether no thread could be started
        self.choosing, self.preparing = threading.Lock(), threading.Lock()

    def of(self, size: int) -> ThreadPoolExecutor:
        """At least ``size`` threads."""
        with self.choosing:
            if self.executor is None or self.size < size:
                self.executor, self.size = ThreadPoolExecutor(size, "slr_plugin", self.prepare_thread), size
            return self.executor

    def prepare_thread(self) -> None:
        """Give this thread one intra-op thread, and leave what torch gives to other threads as it was.

        ``torch.set_num_threads`` sets the number of the calling thread and the default of new threads. The latter is
        put back by a thread that ends at once; one thread at a time is prepared, or it would read what another one set.
        """
        with self.preparing:
            default = torch.get_num_threads()
            torch.set_num_threads(1)
            restorer = threading.Thread(target=torch.set_num_threads, args=(default,))
            with contextlib.suppress(RuntimeError):  # no thread can be started: there is none to keep the default for
                restorer.start()
                restorer.join()


pool = Pool()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=pool.forget)
