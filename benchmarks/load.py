"""Processes that keep cores busy beside a measurement, as the workers of a data loader do beside a training."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

# It ends with the process that started it, however that one ends.
LOOP = """
import os, sys
while os.getppid() == int(sys.argv[1]):
    for _ in range(10**6):
        pass
"""


@contextmanager
def busy(count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Run ``count`` processes of a plain Python loop meanwhile; they are killed when the block is left."""
    with ExitStack() as stack:
        processes = []
        for _ in range(count):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", LOOP, str(os.getpid())]))
            stack.callback(process.kill)
            processes.append(process)
        yield processes
