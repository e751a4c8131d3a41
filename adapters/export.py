"""Take a pretrained backbone out of its checkpoint, for torchvision, timm or detectron2.

    python -m slr_plugin.adapters.export CHECKPOINT OUTPUT [--to torchvision|detectron2] [--momentum]

CHECKPOINT was saved by Lightning, with ``slr_plugin.adapters.lightly`` or solo-learn. OUTPUT ends in .safetensors and
has torchvision's names, which are timm's too; or with ``--to detectron2`` it ends in .pkl, for ``MODEL.WEIGHTS``.
``model.load_state_dict(safetensors.torch.load_file(OUTPUT))`` loads it into the network that was trained, without its
classifier (``model.fc = torch.nn.Identity()``); ``timm.create_model("resnet50", num_classes=0,
checkpoint_path=OUTPUT)`` into timm's.

detectron2's defaults belong to another ResNet. Set ``MODEL.RESNETS.DEPTH`` (for 18 and 34 also ``RES2_OUT_CHANNELS``
64), ``STRIDE_IN_1X1`` False, ``INPUT.FORMAT`` RGB, ``MODEL.PIXEL_MEAN`` and ``MODEL.PIXEL_STD`` to the pretraining's
times 255: [123.675, 116.28, 103.53] and [58.395, 57.12, 57.375] for ImageNet's. To train every layer, as MoCo's authors
do on VOC and COCO, also set ``MODEL.BACKBONE.FREEZE_AT`` 0 and ``MODEL.RESNETS.NORM`` SyncBN (BN on one GPU).
"""

from __future__ import annotations

import argparse
import os
import pickle
import re
import tarfile
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from slr_plugin.adapters._require import require

_WRAPPERS = re.compile(r"^(_orig_mod\.)?module\.|_orig_mod\.")
_SUFFIX = {"torchvision": ".safetensors", "detectron2": ".pkl"}
_MOMENTUM = ("key_backbone.", "momentum_backbone.")  # of lightly, of solo-learn


def read_backbone(checkpoint: str | Path, momentum: bool = False) -> dict[str, Tensor]:
    """Read the backbone's state dict, or that of its momentum copy, from Lightning's checkpoint.

    Returns:
        Contiguous tensors on the CPU, in the checkpoint's dtypes, that share no memory; without a classifier ``fc``.

    Raises:
        OSError: the file is not there or cannot be opened.
        ValueError: it is no checkpoint, could run code, or has no backbone of dense tensors of real numbers.
    """
    state = _read_state(Path(checkpoint))
    prefixes = _MOMENTUM if momentum else ("backbone.",)
    found = [(name.partition(".")[2], value) for name, value in state if name.startswith(prefixes)]
    if not found:
        beginnings = ", ".join(sorted({name.partition(".")[0] for name, _ in state})) or "nothing"
        raise ValueError(f"{checkpoint} has no keys {'* or '.join(prefixes)}*; its keys begin with: {beginnings}")
    if len(dict(found)) < len(found):
        raise ValueError(f"{checkpoint} has two backbones with the same names; leave one of them in its state_dict")
    return _copy({name: value for name, value in found if name not in ("fc.weight", "fc.bias")}, str(checkpoint))


def to_detectron2(state: Mapping[str, Tensor]) -> dict[str, np.ndarray[Any, Any]]:
    """Give the arrays of a torchvision ResNet, without ``fc``, detectron2's names, in float32.

    ``num_batches_tracked`` is left out, as detectron2's frozen norms have none.

    Raises:
        ValueError: another architecture, another stem than 7 x 7, or values other than floating point numbers.
    """
    names = _detectron2_names(state)
    present = {name for name in state if not name.endswith(".num_batches_tracked")}
    missing, foreign = sorted(names.keys() - present), sorted(present - names.keys())
    if missing or foreign:
        different = f"missing here: {missing[:3]}; not theirs: {foreign[:3]}"
        raise ValueError(f"only torchvision's ResNets with basic or bottleneck blocks fit detectron2; {different}")
    tensors = _copy({name: state[name] for name in names}, "the state")
    stem = tuple(tensors["conv1.weight"].shape)
    if stem[2:] != (7, 7):
        raise ValueError(f"detectron2's stem is a 7 x 7 convolution, but conv1.weight, for small images, is {stem}")
    if integers := [name for name, value in tensors.items() if not value.is_floating_point()]:
        raise ValueError(f"{integers[0]} is {tensors[integers[0]].dtype}; detectron2 takes floating point numbers")
    return {names[name]: value.float().numpy() for name, value in tensors.items()}


def write(state: Mapping[str, Tensor], output: str | Path, to: str = "torchvision") -> int:
    """Write a backbone's file, whole or not at all, and the folders above it; return the number of tensors.

    Raises:
        OSError, ValueError: ``output`` cannot be written or has another suffix, ``state`` does not fit the format.
        ImportError: safetensors is not installed, and the format needs it.
    """
    output = Path(output)
    if output.suffix != _SUFFIX.get(to) or output.is_dir():
        wanted = "a file that ends in .safetensors for torchvision, .pkl for detectron2"
        raise ValueError(f"output must be {wanted}; got {output} for {to}")
    content: Mapping[str, Any]
    if to == "detectron2":
        content = to_detectron2(state)
        data = _pickle(content)
    else:
        require("lightly", "safetensors")
        from safetensors.torch import save

        content = _copy(state, "the state")
        data = save(content, {"format": "pt"})
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_name(f"{output.name}.{os.getpid()}.part")  # beside it: only there is the replacement atomic
    try:
        part.write_bytes(data)
        part.replace(output)
    finally:
        part.unlink(missing_ok=True)
    return len(content)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command on ``argv``, or on the process's own arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m slr_plugin.adapters.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="Lightning's, of lightly or solo-learn")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="ends in .safetensors, or in .pkl for detectron2")
    parser.add_argument("--to", choices=tuple(_SUFFIX), default="torchvision", help="default: torchvision, and timm")
    parser.add_argument("--momentum", action="store_true", help="take the momentum copy of the backbone")
    arguments = parser.parse_args(argv)
    try:
        state = read_backbone(arguments.checkpoint, arguments.momentum)
        tensors = write(state, arguments.output, arguments.to)
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))
    print(f"{arguments.output}: {tensors} tensors; --help says how to load it")


def _read_state(checkpoint: Path) -> list[tuple[str, Any]]:
    """Read a Lightning checkpoint's names, without those of wrappers, and values; run no code that may be in it."""
    try:
        if tarfile.is_tarfile(checkpoint):
            raise ValueError("torch before 2.6 runs the code in tar archives in spite of weights_only=True")
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # of damaged or foreign bytes torch.load raises what it will
        needed = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(
            f"{checkpoint} needs {needed[1]}, and loading that can run code; if you trust it, load it with "
            "weights_only=False and save {'state_dict': its state_dict} alone"
            if needed
            else f"{checkpoint} is damaged, or nothing that torch.load reads safely; name a checkpoint of Lightning"
        ) from error
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise ValueError(f'{checkpoint} is no checkpoint of Lightning: it has no dictionary "state_dict"')
    return [(_WRAPPERS.sub("", str(name)), value) for name, value in state.items()]


def _copy(state: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    """Copy tensors to the CPU, contiguous and apart in memory; refuse what is no dense tensor of real numbers."""
    for name, value in state.items():
        is_dense = type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided and not value.is_nested
        if not is_dense or value.is_quantized or value.is_meta or value.is_complex():
            kind = f"{value.dtype}, {value.layout} on {value.device}" if isinstance(value, Tensor) else type(value)
            raise ValueError(f"{name} in {where} is no dense tensor of real numbers, but {kind}; leave it out")
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    if not any(value.numel() for name, value in state.items() if not name.endswith(buffers)):
        raise ValueError(f"{where} has no weights to export, except perhaps those of a classifier fc")
    return {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in state.items()}


def _detectron2_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """The names of a torchvision ResNet with so many blocks, and detectron2's for them."""
    modules = [("conv1", "bn1", "stem.conv1")]
    for layer in range(1, 5):
        for block in range(len({name.split(".")[1] for name in state if name.startswith(f"layer{layer}.")}) or 1):
            ours, theirs = f"layer{layer}.{block}", f"res{layer + 1}.{block}"
            last = 3 if "layer1.0.conv3.weight" in state else 2
            modules += [(f"{ours}.conv{i}", f"{ours}.bn{i}", f"{theirs}.conv{i}") for i in range(1, last + 1)]
            if f"{ours}.downsample.0.weight" in state:
                modules.append((f"{ours}.downsample.0", f"{ours}.downsample.1", f"{theirs}.shortcut"))
    fields = ("weight", "bias", "running_mean", "running_var")
    names = {f"{norm}.{field}": f"{target}.norm.{field}" for _, norm, target in modules for field in fields}
    return names | {f"{conv}.weight": f"{target}.weight" for conv, _, target in modules}


def _pickle(model: Mapping[str, np.ndarray[Any, Any]]) -> bytes:
    """Pickle what detectron2's DetectionCheckpointer matches by name, wherever the ResNet is in the model."""
    file = BytesIO()
    pickler = pickle.Pickler(file, protocol=4)
    # numpy's own pickles name modules that moved in numpy 2: they would not load beside an older detectron2's numpy.
    pickler.dispatch_table = {np.ndarray: lambda a: (np.ndarray, (a.shape, a.dtype.str, bytearray(a.tobytes())))}
    pickler.dump({"model": model, "__author__": "slr-plugin", "matching_heuristics": True})
    return file.getvalue()


if __name__ == "__main__":
    main()
