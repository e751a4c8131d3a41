"""Writes the inventories that intersphinx reads, of the names that our pages use: the build needs no network."""

import zlib
from pathlib import Path

ABC = [
    f"collections.abc.{name} py:class 1 library/collections.abc.html#$ -"
    for name in ("Callable", "Iterable", "Mapping", "MutableMapping", "Sequence")
]
SITES = {
    "python": (
        "https://docs.python.org/3/",
        [
            *ABC,
            "pathlib.Path py:class 1 library/pathlib.html#$ -",
        ],
    ),
    "torch": (
        "https://docs.pytorch.org/docs/stable/",
        [
            "torch.Tensor py:class 1 tensors.html#$ -",
            "Tensor py:class 1 tensors.html#torch.Tensor -",
            "torch.Generator py:class 1 generated/torch.Generator.html#$ -",
            "torch.nn.Module py:class 1 generated/torch.nn.Module.html#$ -",
            "torch.nn.modules.module.Module py:class 1 generated/torch.nn.Module.html#torch.nn.Module -",
            "nn.Module py:class 1 generated/torch.nn.Module.html#torch.nn.Module -",
        ],
    ),
    "numpy": (
        "https://numpy.org/doc/stable/",
        ["numpy.ndarray py:class 1 reference/generated/numpy.ndarray.html#$ -"],
    ),
}


def write(folder: Path) -> dict[str, tuple[str, str]]:
    """Write one for each site; return what ``intersphinx_mapping`` wants."""
    folder.mkdir(exist_ok=True)
    mapping = {}
    for name, (site, lines) in SITES.items():
        header = f"# Sphinx inventory version 2\n# Project: {name}\n# Version: \n# zlib\n".encode()
        path = folder / f"{name}.inv"
        path.write_bytes(header + zlib.compress("\n".join([*lines, ""]).encode()))
        mapping[name] = site, str(path)
    return mapping
