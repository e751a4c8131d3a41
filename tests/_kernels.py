"""What slr_plugin/streaming/triton.py launches; as a program, compiles it for GPUs that need not be here."""

import json
import os
import re
import subprocess
import tempfile
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.runtime.jit import KernelInterface

from slr_plugin.streaming import triton as backend
from slr_plugin.streaming.stats import Pass


class Launch(NamedTuple):
    """A kernel, its grid, and what it is called with."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]


@contextmanager
def recorded_launches():
    """The launches from now on, in a list; none is run."""
    launches = []

    def record(kernel, grid):
        return lambda *args, **constants: launches.append(Launch(kernel, grid, args, constants))

    with mock.patch.object(KernelInterface, "__getitem__", record):
        yield launches


def compiled(launch, capability):
    """Registers spilled, bytes of shared memory and instructions of tensor cores."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, constants = launch.kernel, dict(launch.constants)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    kinds = {torch.float32: "*fp32", torch.int32: "*i32"}
    signature = {
        name: kinds[value.dtype] if isinstance(value, torch.Tensor) else "i32" if isinstance(value, int) else "fp32"
        for name, value in zip(kernel.arg_names, launch.args, strict=False)
    }
    # What the launcher finds out by itself: addresses are multiples of 16, and so is a split of the keys.
    aligned = [name for name, kind in signature.items() if kind.startswith("*") or name == "span"]
    source = ASTSource(
        kernel,
        signature | dict.fromkeys(constants, "constexpr"),
        {(kernel.arg_names.index(name),): value for name, value in constants.items()},
        {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return {
        "capability": capability,
        "kernel": kernel.__name__,
        "dim": constants["DIM"],
        "numbers": constants["NUMBERS"],
        "registers": int(re.search(r"REG:(\d+)", usage.stdout)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage.stdout)[1]),
        "shared": binary.metadata.shared,
        "products": sorted(set(re.findall(r"(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)\S*", binary.asm["ptx"]))),
    }


def launches_of(dim):
    """Of a pass over batch and queue, one where two keys are hidden, and its backward."""
    rows, keys, queue = torch.zeros(3, 512, dim)
    first, second = (
        Pass(rows, keys, table, hidden=torch.zeros(len(rows), hidden, dtype=torch.long), scale=5.0, bound=5.0)
        for table, hidden in ((queue, 1), (None, 2))
    )
    with recorded_launches() as launches:
        backend.forward(first)
        stats = backend.forward(second)
        backend.keys_backward(second, stats.reference, stats.offset, stats.mean)
    return launches


def main():
    """Every kernel, for an A100 and an H100, as JSON."""
    torch.set_float32_matmul_precision("medium")  # the queue's numbers are bfloat16 then
    launches = [launch for dim in (128, 256) for launch in launches_of(dim)]
    print(json.dumps([compiled(launch, capability) for capability in (80, 90) for launch in launches], indent=1))


if __name__ == "__main__":
    main()
