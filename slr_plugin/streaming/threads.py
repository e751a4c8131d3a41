"""Threads that compute a share of a pass each: they wait for one another once, not after every operation.

Inside torch every operation on a large tensor is a parallel region: it begins when all threads have come and ends when
the last one is done. Where other processes keep the cores busy, as the workers of a data loader do, each region waits
for a thread that the system has put aside, and a pass has some thousand regions. Here a thread computes its whole share
with one intra-op thread.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch

Task = Callable[[], None]
START_SECONDS = 30  # within which the threads have to start


def run(tasks: Sequence[Task]) -> None:
    """Run tasks at once, each in a thread of its own; a single one here. Raises what the first that fails raises.

    Tasks write into tensors that the caller made, and record no gradient.
    """
    if len(tasks) == 1:
        tasks[0]()
        return
    futures: list[Future[None]] = []
    try:
        executor = pool.of(len(tasks))
        for task in tasks:
            futures.append(executor.submit(_without_gradient, task))
    except RuntimeError:  # no thread can be started, as at the interpreter's end
        for task in tasks[len(futures) :]:
            task()
    wait(futures)
    for future in futures:
        future.result()


def _without_gradient(task: Task) -> None:
    # What the caller has set for its own thread does not reach this one; its tensors may be those of inference mode.
    with torch.inference_mode():
        task()


class Pool:
    """The threads, started when they are first needed, and anew where more of them are."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Start anew: a forked process has none of its parent's threads, and perhaps a lock that one of them held."""
        self.executor: ThreadPoolExecutor | None = None
        self.size = 0
        self.lock = threading.Lock()

    def of(self, size: int) -> ThreadPoolExecutor:
        """At least ``size`` threads, all of them started and prepared; raises RuntimeError if they cannot be."""
        with self.lock:
            if self.executor is None or self.size < size:
                executor = ThreadPoolExecutor(size, "slr_plugin", _prepare_thread)
                everyone = threading.Barrier(size + 1, timeout=START_SECONDS)
                try:
                    for _ in range(size):  # each waits, so that the next one gets a thread of its own
                        executor.submit(everyone.wait)
                    everyone.wait()  # BrokenBarrierError, which is a RuntimeError, if one does not come
                except RuntimeError:
                    everyone.abort()
                    raise
                self.executor, self.size = executor, size
            return self.executor


_preparing = threading.Lock()


def _prepare_thread() -> None:
    """Give this thread one intra-op thread, and leave what torch gives to other threads as it was.

    ``torch.set_num_threads`` sets the number of the calling thread and the default of new threads. The latter is put
    back by a thread that ends at once; one thread at a time is prepared, or it would read what another one has set.
    """
    with _preparing:
        default = torch.get_num_threads()
        torch.set_num_threads(1)
        restorer = threading.Thread(target=torch.set_num_threads, args=(default,))
        restorer.start()
        restorer.join()


pool = Pool()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=pool.forget)
