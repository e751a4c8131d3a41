"""The threads that share a pass: nobody else's settings change, and nothing hangs."""

import functools
import itertools
import os
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from _intra_op import intra_op_threads

from slr_plugin import SLRLoss
from slr_plugin.streaming import threads, tiled


@pytest.fixture
def two_threads():
    with intra_op_threads(2):
        yield


def shared_loss(seed=0):
    """The loss of a batch whose pass is shared, with its gradient."""
    generator = torch.Generator().manual_seed(seed)
    out0 = torch.randn(1500, 8, generator=generator).requires_grad_()
    out1 = torch.randn(1500, 8, generator=generator)
    assert (2 * len(out0)) ** 2 >= tiled.SHARED_PAIRS
    loss = SLRLoss(0.2)(out0, out1)
    loss.backward()
    return loss.detach(), out0.grad


def threads_of_a_product():
    """How many threads of this process a large product keeps busy, by their CPU time."""
    table = torch.ones(1500, 1500)
    table @ table
    process, thread = time.process_time(), time.thread_time()
    for _ in range(3):
        table @ table
    return (time.process_time() - process) / (time.thread_time() - thread)


def test_a_number_of_threads_gives_one_result_and_all_agree(two_threads):
    shared = shared_loss()
    for again, first in zip(shared_loss(), shared, strict=True):
        assert torch.equal(again, first)
    with intra_op_threads(1):
        for alone, together in zip(shared_loss(), shared, strict=True):
            torch.testing.assert_close(alone, together)


def test_everybody_keeps_their_number_of_threads(two_threads):
    shared_loss()
    assert torch.get_num_threads() == 2
    assert threads_of_a_product() > 1.3
    with ThreadPoolExecutor(1) as others:
        assert others.submit(threads_of_a_product).result() > 1.3


def test_shares_have_one_intra_op_thread(two_threads):
    shared_loss()
    found = threads.run([lambda: (torch.get_num_threads(), threads_of_a_product())] * 2)
    assert [number for number, _ in found] == [1, 1]


def test_one_thread_is_the_callers_own(monkeypatch):
    monkeypatch.setattr(threads, "ThreadPoolExecutor", None)
    with intra_op_threads(1):
        shared_loss()


def test_several_callers_at_once_get_what_each_gets_alone(two_threads):
    alone = [shared_loss(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as callers:
        together = list(callers.map(shared_loss, range(4)))
    for first, second in zip(alone, together, strict=True):
        torch.testing.assert_close(first, second)


def test_works_in_inference_mode(two_threads):
    features = torch.randn(2, 1500, 8)
    expected = SLRLoss(0.2)(*features)
    with torch.inference_mode():
        assert torch.equal(SLRLoss(0.2)(*features), expected)


def test_an_error_in_a_share_reaches_the_caller():
    def fail():
        raise ValueError("in a share")

    with pytest.raises(ValueError, match="in a share"):
        threads.run([fail, lambda: None])


@pytest.mark.parametrize("started", [0, 1, 2])
@pytest.mark.filterwarnings("ignore:the system starts no further thread")
def test_each_task_runs_where_threads_cannot_be_started(started, monkeypatch):
    monkeypatch.setattr(threads, "pool", threads.Pool())
    start, count = threading.Thread.start, itertools.count()

    def fail(self):
        if self.name.startswith("slr_plugin") and next(count) >= started:
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", fail)
    for _ in range(2):
        assert threads.run([functools.partial(abs, -number) for number in range(3)]) == [0, 1, 2]
    assert next(count) == started + 1  # the second run does not try again


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_makes_threads_of_its_own():
    threads.run([lambda: None] * 2)
    child = os.fork()
    if child == 0:
        found = []
        try:
            found = threads.run([lambda: 1] * 2)
        finally:
            os._exit(0 if found == [1, 1] else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_new_process_keeps_its_settings_and_ends_after_a_last_loss():
    script = """
        import atexit, torch
        from concurrent.futures import ThreadPoolExecutor
        from slr_plugin import SLRLoss
        torch.set_num_threads(2)
        features = torch.randn(2, 1500, 8)
        expected = SLRLoss(0.2)(*features)
        with ThreadPoolExecutor(1) as others:
            print(torch.get_num_threads(), others.submit(torch.get_num_threads).result())
        atexit.register(lambda: print(torch.allclose(SLRLoss(0.2)(*features), expected)))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == "2 2\nTrue\n"
    assert "Error" not in done.stderr
