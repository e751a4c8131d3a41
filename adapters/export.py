"""A pretrained backbone out of its checkpoint, for torchvision, timm or detectron2.

    python -m slr_plugin.adapters.export CHECKPOINT OUTPUT [--to torchvision|detectron2] [--momentum]

CHECKPOINT is Lightning's, of ``slr_plugin.adapters.lightly`` or of solo-learn. OUTPUT ends in .safetensors, with
torchvision's names, which are timm's too; or with ``--to detectron2`` in .pkl, for ``MODEL.WEIGHTS``.

detectron2's defaults belong to another ResNet. Set ``INPUT.FORMAT`` RGB, ``MODEL.PIXEL_MEAN`` and ``MODEL.PIXEL_STD``
the pretraining's times 255, and ``MODEL.RESNETS.STRIDE_IN_1X1`` False; this command prints the line, with ImageNet's
mean and deviation. To train every layer, as MoCo's authors do on VOC and COCO, also set ``MODEL.BACKBONE.FREEZE_AT`` 0
and ``MODEL.RESNETS.NORM`` SyncBN (BN on one GPU).
"""

from __future__ import annotations

import argparse
import io
import os
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slr_plugin.adapters._require import require

_ONLINE = ("backbone.",)
_MOMENTUM = ("key_backbone.", "momentum_backbone.")  # lightly's and solo-learn's
_SUFFIX = {"torchvision": ".safetensors", "detectron2": ".pkl"}
_NORM = ("weight", "bias", "running_mean", "running_var")
_DEPTHS: dict[tuple[int, ...], int] = {  # convolutions per block, blocks per layer
    (2, 2, 2, 2, 2): 18,
    (2, 3, 4, 6, 3): 34,
    (3, 3, 4, 6, 3): 50,
    (3, 3, 4, 23, 3): 101,
    (3, 3, 8, 36, 3): 152,
}


def read_backbone(checkpoint: Path, momentum: bool = False) -> dict[str, Tensor]:
    """The backbone's state dict, without a classifier ``fc``.

    Args:
        checkpoint: a Lightning checkpoint with the keys ``backbone.*``. torch.compile's ``_orig_mod`` may be in them.
        momentum: take the momentum copy, ``key_backbone.*`` (lightly) or ``momentum_backbone.*`` (solo-learn).

    Returns:
        Contiguous tensors on the CPU, in the checkpoint's dtypes, that share no memory.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint, holds objects other than tensors and plain values, or has no such keys.
    """
    state = {name.replace("_orig_mod.", ""): value for name, value in _read_state(checkpoint).items()}
    prefixes = _MOMENTUM if momentum else _ONLINE
    backbone = {name.partition(".")[2]: value for name, value in state.items() if name.startswith(prefixes)}
    if not backbone:
        found = ", ".join(sorted({name.partition(".")[0] for name in state})) or "nothing"
        raise ValueError(f"{checkpoint} has no keys {'* or '.join(prefixes)}*; its keys begin with: {found}")
    return {
        name: value.detach().clone(memory_format=torch.contiguous_format)
        for name, value in backbone.items()
        if not name.startswith("fc.")
    }


def to_detectron2(state: Mapping[str, Tensor]) -> dict[str, np.ndarray[Any, Any]]:
    """A torchvision ResNet's state dict under detectron2's names.

    ``num_batches_tracked`` is left out, as detectron2's frozen norms have none. bfloat16, which numpy lacks, becomes
    float32.

    Args:
        state: of a ResNet with basic or bottleneck blocks and the 7 x 7 stem, without ``fc``. ResNeXt and wide too.

    Raises:
        ValueError: another architecture, or another stem.
    """
    names, present = _names(state), _without_counters(state)
    if present != names.keys():
        raise ValueError(
            "only torchvision's ResNets with basic or bottleneck blocks fit detectron2; "
            f"missing here: {_first(names.keys() - present)}; not theirs: {_first(present - names.keys())}"
        )
    stem = tuple(state["conv1.weight"].shape)
    if stem[2:] != (7, 7):
        raise ValueError(
            f"detectron2's stem is a 7 x 7 convolution, but conv1.weight has shape {stem}: "
            "a ResNet with a stem for small images cannot be used there"
        )
    arrays = ((ours, state[name].detach().cpu()) for name, ours in names.items())
    return {name: (value.float() if value.dtype is torch.bfloat16 else value).numpy() for name, value in arrays}


def write(state: Mapping[str, Tensor], output: Path, to: str = "torchvision") -> int:
    """Write a backbone's file, whole or not at all, and the folders above it.

    Args:
        state: from :func:`read_backbone`.
        output: ends in .safetensors for torchvision, in .pkl for detectron2.
        to: ``"torchvision"`` (and timm) or ``"detectron2"``.

    Returns:
        The number of tensors written.

    Raises:
        ValueError: ``to`` is unknown, ``output`` has another suffix, or :func:`to_detectron2` cannot name ``state``.
        ImportError: safetensors is not installed, and the format needs it.
    """
    if to not in _SUFFIX:
        raise ValueError(f'to must be "torchvision" or "detectron2", got {to!r}')
    if output.suffix != _SUFFIX[to]:
        raise ValueError(f"output must end in {_SUFFIX[to]} for {to}, got {output}")
    content: Mapping[str, Any] = to_detectron2(state) if to == "detectron2" else state
    data = _pickle(content) if to == "detectron2" else _safetensors(content)
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_name(f"{output.name}.{os.getpid()}.part")  # beside it: only there is the replacement atomic
    try:
        part.write_bytes(data)
        part.replace(output)
    finally:
        part.unlink(missing_ok=True)
    return len(content)


def main(argv: Sequence[str] | None = None) -> None:
    """The command, on ``argv`` or on the process's own arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m slr_plugin.adapters.export",
        description="Write a checkpoint's backbone as a file for torchvision, timm or detectron2.",
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
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    parameters = sum(value.numel() for name, value in state.items() if not name.endswith(buffers))
    print(f"{arguments.output}: {tensors} tensors, {parameters:,} parameters")
    for line in _usage(state, str(arguments.output), arguments.to):
        print(line)


def _read_state(checkpoint: Path) -> dict[str, Tensor]:
    """The entry ``state_dict`` of a Lightning checkpoint."""
    if not checkpoint.is_file():
        raise FileNotFoundError(f"there is no file {checkpoint}")
    if not zipfile.is_zipfile(checkpoint):  # what torch.save writes; of other bytes torch.load raises what it will
        raise ValueError(f"{checkpoint} is no checkpoint of torch.save, or it was cut off")
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        needed = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(
            f"{checkpoint} needs {needed[1] if needed else 'Python objects'}, more than tensors and plain values, and "
            "loading that can run code. If you trust it, keep its weights alone and export these: python -c "
            f"\"import torch; c = torch.load({str(checkpoint)!r}, 'cpu', weights_only=False); "
            "torch.save({'state_dict': c['state_dict']}, 'weights.ckpt')\""
        ) from error
    except RuntimeError as error:
        raise ValueError(f"{checkpoint} is no checkpoint of torch.save: {error}") from error
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise ValueError(f'{checkpoint} is no checkpoint of Lightning: it has no "state_dict"')
    return state


def _names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """All names of a torchvision ResNet with the blocks of ``state``, and detectron2's names for them."""
    modules = [("conv1", "bn1", "stem.conv1")]
    convolutions, *blocks = _layout(state)
    for layer, count in enumerate(blocks, start=1):
        for block in range(max(count, 1)):
            ours, theirs = f"layer{layer}.{block}", f"res{layer + 1}.{block}"
            modules += [(f"{ours}.conv{i}", f"{ours}.bn{i}", f"{theirs}.conv{i}") for i in range(1, convolutions + 1)]
            if f"{ours}.downsample.0.weight" in state:
                modules.append((f"{ours}.downsample.0", f"{ours}.downsample.1", f"{theirs}.shortcut"))
    names = {f"{conv}.weight": f"{target}.weight" for conv, _, target in modules}
    return names | {f"{norm}.{field}": f"{target}.norm.{field}" for _, norm, target in modules for field in _NORM}


def _without_counters(state: Mapping[str, Tensor]) -> set[str]:
    """The names in ``state`` but ``num_batches_tracked``."""
    return {name for name in state if not name.endswith(".num_batches_tracked")}


def _layout(state: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Convolutions per block, then the number of blocks in each of the four layers."""
    blocks = (len({name.split(".")[1] for name in state if name.startswith(f"layer{i}.")}) for i in range(1, 5))
    return (3 if "layer1.0.conv3.weight" in state else 2, *blocks)


def _depth(state: Mapping[str, Tensor]) -> int | None:
    """18, 34, 50, 101 or 152 if ``state`` is of torchvision's ResNet of that depth, else None."""
    if _names(state).keys() != _without_counters(state):
        return None
    stem, second = tuple(state["conv1.weight"].shape), tuple(state["layer1.0.conv2.weight"].shape)
    plain = stem == (64, 3, 7, 7) and second == (64, 64, 3, 3)  # not for small images, not wide, not ResNeXt
    return _DEPTHS.get(_layout(state)) if plain else None


def _usage(state: Mapping[str, Tensor], output: str, to: str) -> list[str]:
    """Lines of Python that load the file."""
    depth = _depth(state)
    if to == "detectron2":
        settings = ["MODEL.WEIGHTS", output, "MODEL.RESNETS.STRIDE_IN_1X1", False, "INPUT.FORMAT", "RGB"]
        settings += ["MODEL.PIXEL_MEAN", [123.675, 116.28, 103.53], "MODEL.PIXEL_STD", [58.395, 57.12, 57.375]]
        settings += [] if depth is None else ["MODEL.RESNETS.DEPTH", depth]
        settings += ["MODEL.RESNETS.RES2_OUT_CHANNELS", 64] if depth in (18, 34) else []
        return [f"cfg.merge_from_list({settings})"]
    load = f"model.load_state_dict(safetensors.torch.load_file({output!r}))"
    if depth is None:
        return [
            f"import safetensors.torch; {load}  # model: the backbone as it was pretrained, without a classifier fc"
        ]
    build = f"model = torchvision.models.resnet{depth}(); model.fc = torch.nn.Identity()"
    return [
        f"import safetensors.torch, torch, torchvision; {build}; {load}",
        f"import timm; model = timm.create_model('resnet{depth}', num_classes=0, checkpoint_path={output!r})",
    ]


def _safetensors(state: Mapping[str, Tensor]) -> bytes:
    require("lightly", "safetensors")
    from safetensors.torch import save

    return save(dict(state), {"format": "pt"})


def _pickle(model: Mapping[str, np.ndarray[Any, Any]]) -> bytes:
    """The file that detectron2's DetectionCheckpointer matches by name, wherever the ResNet is in the model."""
    file = io.BytesIO()
    pickler = pickle.Pickler(file, protocol=4)
    # numpy's own pickles name modules that moved in numpy 2: they would not load beside an older detectron2's numpy.
    pickler.dispatch_table = {np.ndarray: lambda a: (np.ndarray, (a.shape, a.dtype.str, bytearray(a.tobytes())))}
    pickler.dump({"model": dict(model), "__author__": "slr-plugin", "matching_heuristics": True})
    return file.getvalue()


def _first(names: set[str]) -> str:
    """The first three of them."""
    return ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "none"


if __name__ == "__main__":
    main()
