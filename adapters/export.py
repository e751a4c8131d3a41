"""Take a pretrained backbone out of its checkpoint, for torchvision, timm or detectron2.

    python -m slr_plugin.adapters.export CHECKPOINT OUTPUT [--to torchvision|detectron2] [--momentum]

CHECKPOINT was saved by Lightning, with ``slr_plugin.adapters.lightly`` or solo-learn. OUTPUT ends in .safetensors and
has the names of the network that was trained; or with ``--to detectron2`` it ends in .pkl, for ``MODEL.WEIGHTS``.
``model.load_state_dict(safetensors.torch.load_file(OUTPUT))`` loads it into that network, without its classifier:

- torchvision's, trained above 64 pixels: ``model = resnet18(); model.fc = torch.nn.Identity()``, or timm's,
  ``timm.create_model("resnet18", num_classes=0, checkpoint_path=OUTPUT)``;
- torchvision's with the stem for small images, which lightly's recipe takes at 64 pixels or below, and timm has not:
  ``model = slr_plugin.adapters.lightly.cifar_stem(resnet18()); model.fc = torch.nn.Identity()``;
- lightly's, ``resnet9`` and all with ``--width``: ``model = lightly.models.ResNetGenerator("resnet-9", WIDTH)``, with
  ``strict=False``, as the file has no classifier.

detectron2's defaults belong to another ResNet. Set ``MODEL.RESNETS.DEPTH`` (for 18 and 34 also ``RES2_OUT_CHANNELS``
64), ``STRIDE_IN_1X1`` False, ``INPUT.FORMAT`` RGB, ``MODEL.PIXEL_MEAN`` and ``MODEL.PIXEL_STD`` to the pretraining's
times 255: [123.675, 116.28, 103.53] and [58.395, 57.12, 57.375] for ImageNet's. To train every layer, as MoCo's authors
do on VOC and COCO, also set ``MODEL.BACKBONE.FREEZE_AT`` 0 and ``MODEL.RESNETS.NORM`` SyncBN (BN on one GPU).
"""

from __future__ import annotations

import argparse
import pickle
import re
import tarfile
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slr_plugin.adapters._require import require

_WRAPPERS = re.compile(r"^(_orig_mod\.)?module\.|_orig_mod\.")
_SUFFIX = {"torchvision": ".safetensors", "detectron2": ".pkl"}
_MOMENTUM = ("key_backbone.", "momentum_backbone.")  # of lightly, of solo-learn
_RESNET = re.compile(r"(conv1|bn1|layer[1-4]\.\d+\.(conv[123]|bn[123]|downsample\.[01]))\.\w+")


def read_backbone(checkpoint: str | Path, momentum: bool = False) -> dict[str, Tensor]:
    """Read the backbone's state dict, or that of its momentum copy, from Lightning's checkpoint.

    Returns:
        Contiguous tensors on the CPU, in the checkpoint's dtypes, that share no memory; without a classifier ``fc``.

    Raises:
        OSError: the file is not there or cannot be opened.
        ValueError: it is no checkpoint, could run code, or has no backbone.
    """
    try:
        if tarfile.is_tarfile(checkpoint):
            raise ValueError("torch before 2.6 runs the code in tar archives in spite of weights_only=True")
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # of damaged or foreign bytes torch.load raises what it will
        needed = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(
            f"{checkpoint} is damaged, or needs {needed[1] if needed else 'objects'}, whose loading can run code; if "
            "you trust it, load it with weights_only=False and save {'state_dict': its state_dict} alone"
        ) from error
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise ValueError(f'{checkpoint} is no checkpoint of Lightning: it has no dictionary "state_dict"')
    state = {_WRAPPERS.sub("", str(name)): value for name, value in state.items()}
    prefixes = _MOMENTUM if momentum else ("backbone.",)
    found = {name.partition(".")[2]: value for name, value in state.items() if name.startswith(prefixes)}
    if not found:
        beginnings = ", ".join(sorted({name.partition(".")[0] for name in state})) or "nothing"
        raise ValueError(f"{checkpoint} has no keys {'* or '.join(prefixes)}*; its keys begin with: {beginnings}")
    return _copy({name: value for name, value in found.items() if name not in ("fc.weight", "fc.bias")})


def to_detectron2(state: Mapping[str, Tensor]) -> dict[str, np.ndarray[Any, Any]]:
    """Give the arrays of a torchvision ResNet, without ``fc``, detectron2's names, in float32.

    ``num_batches_tracked`` is left out, as detectron2's frozen norms have none.

    Raises:
        ValueError: another architecture, or another stem than 7 x 7.
    """
    state = {name: value for name, value in state.items() if not name.endswith(".num_batches_tracked")}
    foreign = sorted(name for name in state if not _RESNET.fullmatch(name))
    if foreign or "conv1.weight" not in state:
        raise ValueError(f"only torchvision's ResNets with basic or bottleneck blocks fit; not theirs: {foreign[:3]}")
    stem = tuple(state["conv1.weight"].shape)
    if stem[2:] != (7, 7):
        raise ValueError(f"detectron2's stem is a 7 x 7 convolution, but conv1.weight, for small images, is {stem}")
    arrays = {}
    for name, value in _copy(state).items():
        place = name if name.startswith("layer") else f"stem.{name}"
        place = re.sub(r"^layer(\d)", lambda layer: f"res{int(layer[1]) + 1}", place)
        place = re.sub(r"bn(\d)", r"conv\1.norm", place)
        place = place.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        arrays[place] = value.float().numpy()
    return arrays


def write(state: Mapping[str, Tensor], output: str | Path, to: str = "torchvision") -> int:
    """Write a backbone's file, and the folders above it; return the number of tensors.

    Raises:
        OSError, ValueError: ``output`` cannot be written or has another suffix, ``state`` does not fit the format.
        ImportError: safetensors is not installed, and the format needs it.
    """
    output = Path(output)
    if output.suffix != _SUFFIX.get(to):
        raise ValueError(f"output must end in .safetensors for torchvision, .pkl for detectron2; got {output} for {to}")
    if to == "detectron2":
        content: Any = to_detectron2(state)
        data = _pickle(content)
    else:
        require("lightly", "safetensors")
        from safetensors.torch import save

        content = _copy(state)
        data = save(content, {"format": "pt"})
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(data)
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
    parser.add_argument("--to", choices=tuple(_SUFFIX), default="torchvision", help="default: torchvision, as trained")
    parser.add_argument("--momentum", action="store_true", help="take the momentum copy of the backbone")
    arguments = parser.parse_args(argv)
    try:
        state = read_backbone(arguments.checkpoint, arguments.momentum)
        tensors = write(state, arguments.output, arguments.to)
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))
    print(f"{arguments.output}: {tensors} tensors; --help says how to load it")


def _copy(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to the CPU, contiguous and apart in memory."""
    return {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in state.items()}


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
