"""Compiles the kernels of slr_plugin/streaming/triton.py for GPUs that need not be here; prints JSON of their sizes."""

import json
import os
import re
import subprocess
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from slr_plugin.streaming import triton as kernels

POINTERS = {"masked_keys": "*i32"}  # the others are *fp32
NUMBERS = {"count": "i32", "width": "i32", "first": "i32", "span": "i32", "scale": "fp32"}


def compiled(kernel, tiles, capability, dim, slots, **constants):
    """Registers spilled, bytes of shared memory and instructions of tensor cores."""
    constants = kernels._sizes(tiles, dim, dim)[1] | {"SLOTS": slots} | constants
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    signature = {
        name: "constexpr" if name in constants else NUMBERS.get(name) or POINTERS.get(name, "*fp32")
        for name in kernel.arg_names
    }
    # What the launcher finds out by itself: addresses are multiples of 16, and so is a split of the keys.
    aligned = [name for name, kind in signature.items() if kind.startswith("*") or name == "span"]
    source = ASTSource(
        kernel,
        signature,
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
        "dim": dim,
        "numbers": constants["NUMBERS"],
        "registers": int(re.search(r"REG:(\d+)", usage.stdout)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage.stdout)[1]),
        "shared": binary.metadata.shared,
        "products": sorted(set(re.findall(r"(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)\S*", binary.asm["ptx"]))),
    }


def main():
    """Every kernel, for an A100 and an H100."""
    found = []
    for capability in (80, 90):
        for dim in (128, 256):
            for slots, numbers in ((1, "tf32"), (1, "bf16"), (2, "tf32")):
                kernel = kernels._forward_kernel
                found.append(compiled(kernel, kernels.FORWARD, capability, dim, slots, NUMBERS=numbers, APART=False))
            kernel = kernels._keys_backward_kernel
            found.append(compiled(kernel, kernels.BACKWARD, capability, dim, 2, NUMBERS="tf32"))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
