"""Exported backbones give the features of the network that was trained."""

import argparse
import copy
import io
import pickle
import pickletools
import re
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slr_plugin.adapters.export import main, read_backbone, to_detectron2, write

torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")
safetensors = pytest.importorskip("safetensors")
safetensors_torch = pytest.importorskip("safetensors.torch")

BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3)}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def resnet(name, **kwargs):
    """Every number in its state dict matters: batch norms as drawn would hide their own mix-ups."""
    model = getattr(torchvision.models, name)(**kwargs)
    model.fc = nn.Identity()
    for key, value in model.state_dict().items():
        if value.ndim == 1:
            value.uniform_(0.5, 1.5) if "var" in key or "weight" in key else value.uniform_(-0.5, 0.5)
    return model.eval()


def small_images():
    model = resnet("resnet18")
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    return model


def shallow(block, **kwargs):
    return torchvision.models.ResNet(getattr(torchvision.models.resnet, block), [1, 1, 1, 1], **kwargs)


def lightlys(name, width):
    model = pytest.importorskip("lightly.models").ResNetGenerator(name, width=width)
    model.linear = nn.Identity()
    return model.eval()


def save(path, rest=None, **modules):
    """A Lightning checkpoint of a module with these submodules."""
    state = {f"{prefix}.{name}": v for prefix, module in modules.items() for name, v in module.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state, "hyper_parameters": {"lr": 0.1}, **(rest or {})}, path)
    return path


def features(model, dtype=torch.float32):
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        return (model.eval().to(dtype) if isinstance(model, nn.Module) else model)(images)


def export(*argv):
    main([str(argument) for argument in argv])


def fails(capsys, *argv):
    """What the command says, in one line, on its way out with 2."""
    with pytest.raises(SystemExit) as error:
        main([str(argument) for argument in argv])
    captured = capsys.readouterr()
    assert (error.value.code, captured.out) == (2, "")
    usage, _, message = captured.err.partition("error: ")
    assert usage.startswith("usage: ")
    assert message.count("\n") == 1
    return message.rstrip("\n")


# --------------------------------------------------------------------------------------------- torchvision and timm


@pytest.mark.parametrize(
    ("name", "which"),
    [("resnet50", "backbone"), ("resnet18", "key_backbone"), ("resnet18", "momentum_backbone")],
)  # the last two: lightly, solo-learn
def test_torchvision_and_timm_load_it(tmp_path, capsys, name, which):
    modules = {"head": nn.Linear(2, 2), "backbone": resnet(name), which: resnet(name)}
    checkpoint, output = save(tmp_path / "run.ckpt", **modules), tmp_path / "it's here" / "b.safetensors"
    source, flags = modules[which], [] if which == "backbone" else ["--momentum"]
    export(checkpoint, output, *flags)
    assert capsys.readouterr().out == f"{output}: {len(source.state_dict())} tensors; --help says how to load it\n"
    ours = getattr(torchvision.models, name)()
    ours.fc = nn.Identity()
    ours.load_state_dict(safetensors_torch.load_file(output))
    theirs = timm.create_model(name, num_classes=0, checkpoint_path=output)
    for model, tolerance in ((ours, 0), (theirs, 1e-6)):
        torch.testing.assert_close(features(model), features(source), rtol=tolerance, atol=tolerance)
    with safetensors.safe_open(output, "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize(
    "other",
    [
        small_images,
        lambda: lightlys("resnet-9", 0.25),
        lambda: shallow("Bottleneck", width_per_group=128),
        lambda: shallow("Bottleneck", groups=32, width_per_group=4),
        lambda: shallow("BasicBlock"),
        lambda: timm.create_model("seresnet18", num_classes=0),
        lambda: timm.create_model("resnet18d", num_classes=0),
    ],
    ids=["small images", "lightly's", "wide", "resnext", "shallow", "squeeze", "deep stem"],
)
def test_another_network_loads_into_its_own_kind(tmp_path, other):
    source, model = other(), other()
    source.fc = model.fc = nn.Identity()
    export(save(tmp_path / "run.ckpt", backbone=source), tmp_path / "b.safetensors")
    model.load_state_dict(safetensors_torch.load_file(tmp_path / "b.safetensors"))
    assert torch.equal(features(model), features(source))


def test_as_a_module_of_python(tmp_path):
    checkpoint, output = save(tmp_path / "run.ckpt", backbone=nn.Conv2d(3, 4, 3)), tmp_path / "b.safetensors"
    command = [sys.executable, "-W", "error", "-m", "slr_plugin.adapters.export", checkpoint, output]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"{output}: 2 tensors; ")


# ------------------------------------------------------------------------------------------------- reading checkpoints


@pytest.mark.parametrize("before", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("after", ["", "._orig_mod"])
def test_the_prefixes_of_wrapped_modules_and_the_classifier_are_left_out(tmp_path, before, after):
    source = nn.Sequential(nn.Linear(2, 3), torch.compile(nn.Linear(3, 4)))
    source.module = nn.Linear(1, 1)  # which is the backbone's own
    source.fc = nn.Linear(1, 1)
    state = read_backbone(str(save(tmp_path / "run.ckpt", **{f"{before}backbone{after}": source})))
    assert list(state) == [f"{part}.{field}" for part in ("0", "1", "module") for field in ("weight", "bias")]


def test_an_fc_that_is_no_classifier_is_part_of_the_backbone(tmp_path):
    source = nn.Sequential(nn.Linear(2, 3))
    source.fc = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    state = read_backbone(str(save(tmp_path / "run.ckpt", backbone=source)))
    assert sorted(state) == ["0.bias", "0.weight", "fc.0.bias", "fc.0.weight"]


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_tensors_are_contiguous_keep_their_dtype_and_share_no_memory(tmp_path, zipped):
    shared = torch.randn(6, 4, 3, 3)
    state = {
        "first": shared[:3].to(memory_format=torch.channels_last),
        "second": shared[3:],
        "third": shared,
        "half": shared.bfloat16(),
        **({"eighth": shared.to(torch.float8_e4m3fn)} if zipped else {}),  # which torch cannot read from the other
        "parameter": nn.Parameter(shared),
        "negated": shared.to(torch.complex64).conj().imag,
        "counter": torch.tensor(7),
        "empty": torch.empty(0),
    }
    checkpoint, output = tmp_path / "run.ckpt", tmp_path / "b.safetensors"
    whole = {"state_dict": {f"backbone.{name}": value for name, value in state.items()}}
    torch.save(whole, checkpoint, _use_new_zipfile_serialization=zipped)
    backbone = read_backbone(checkpoint)
    assert all(value.is_contiguous() and not value.requires_grad for value in backbone.values())
    assert len({value.untyped_storage().data_ptr() for value in backbone.values()}) == len(state)
    for source in (backbone, state):  # a model's own state dict may be written as it is
        assert write(source, str(output)) == len(state)
        for name, value in safetensors_torch.load_file(output).items():
            torch.testing.assert_close(value, state[name].detach(), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_by_lightning_itself(tmp_path):
    lightning = pytest.importorskip("pytorch_lightning")

    class Module(lightning.LightningModule):
        def __init__(self, rate):
            super().__init__()
            self.save_hyperparameters()
            self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
            self.key_backbone = copy.deepcopy(self.backbone).requires_grad_(False)

        def training_step(self, batch, _):
            return self.backbone(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module, saving = Module(rate=0.1), lightning.callbacks.ModelCheckpoint(tmp_path, filename="run")
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(accelerator="cpu", max_steps=2, callbacks=[saving], **quiet)
    trainer.fit(module, torch.utils.data.DataLoader(torch.randn(8, 3, 8, 8), batch_size=2))
    for flag, source in ((False, module.backbone), (True, module.key_backbone)):
        state = read_backbone(tmp_path / "run.ckpt", momentum=flag)
        assert list(state) == list(source.state_dict())
        assert all(torch.equal(state[name], value) for name, value in source.state_dict().items())
    assert not torch.equal(module.backbone[0].weight, module.key_backbone[0].weight)


# ---------------------------------------------------------------------------------------------------------- detectron2


def detectron2_names(name):
    """Detectron2's names, from its blocks: each convolution owns its norm, a stage's first block has the shortcut."""
    modules, wide = ["stem.conv1"], name == "resnet50"
    for stage, count in zip(("res2", "res3", "res4", "res5"), BLOCKS[name], strict=True):
        modules += [f"{stage}.{block}.conv{i}" for block in range(count) for i in range(1, 4 if wide else 3)]
        modules += [f"{stage}.0.shortcut"] if wide or stage != "res2" else []
    fields = ("weight", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var")
    return {f"{module}.{field}" for module in modules for field in fields}


def detectron2_forward(arrays, blocks):
    """From images to the mean of detectron2's res5, with STRIDE_IN_1X1 False, written out on its names."""
    weights = {name: torch.from_numpy(array).double() for name, array in arrays.items()}

    def convolve(x, name, stride=1):
        weight = weights[f"{name}.weight"]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        scale = weights[f"{name}.norm.weight"] * (weights[f"{name}.norm.running_var"] + 1e-5).rsqrt()
        shift = weights[f"{name}.norm.bias"] - weights[f"{name}.norm.running_mean"] * scale
        return x * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)

    def forward(images):
        x = F.max_pool2d(convolve(images, "stem.conv1", 2).relu(), 3, 2, 1)
        for name, first in [(f"res{i}.{j}", i > 2 and j == 0) for i, n in enumerate(blocks, 2) for j in range(n)]:
            stride = 2 if first else 1
            if f"{name}.conv3.weight" in weights:
                out = convolve(convolve(x, f"{name}.conv1").relu(), f"{name}.conv2", stride).relu()
                out = convolve(out, f"{name}.conv3")
            else:
                out = convolve(convolve(x, f"{name}.conv1", stride).relu(), f"{name}.conv2")
            x = (out + (convolve(x, f"{name}.shortcut", stride) if f"{name}.shortcut.weight" in weights else x)).relu()
        return x.mean((2, 3))

    return forward


@pytest.mark.parametrize("name", BLOCKS)
def test_detectron2_matches_the_file_by_name_and_computes_the_same_features(tmp_path, name):
    source, output = resnet(name), tmp_path / "b.pkl"
    export(save(tmp_path / "run.ckpt", backbone=source), output, "--to", "detectron2")
    content = pickle.loads(output.read_bytes(), encoding="latin1")  # as detectron2's DetectionCheckpointer does
    arrays = content.pop("model")
    assert content.pop("__author__") != "Caffe2"  # whose weights detectron2 would rename
    assert content == {"matching_heuristics": True}
    assert set(arrays) == detectron2_names(name)
    assert all(type(value) is np.ndarray and value.dtype == np.float32 for value in arrays.values())
    assert all(value.flags.writeable for value in arrays.values())  # torch.from_numpy warns otherwise
    result = features(detectron2_forward(arrays, BLOCKS[name]), torch.float64)
    torch.testing.assert_close(result, features(source, torch.float64), rtol=1e-10, atol=1e-10)

    # numpy's own pickles name modules that moved between its versions.
    strings = {argument for _, argument, _ in pickletools.genops(output.read_bytes()) if isinstance(argument, str)}
    assert [text for text in strings if text.startswith("numpy")] == ["numpy"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float64])
def test_every_floating_point_dtype_becomes_float32(dtype):
    state = {name: value.to(dtype) for name, value in resnet("resnet18").state_dict().items()}
    arrays = to_detectron2(state)
    assert {array.dtype for array in arrays.values()} == {np.dtype("float32")}
    np.testing.assert_array_equal(arrays["stem.conv1.weight"], state["conv1.weight"].float().numpy())


@pytest.mark.parametrize("kwargs", [{"width_per_group": 128}, {"groups": 32, "width_per_group": 4}])
def test_wide_and_grouped_resnets_have_the_same_names(kwargs):
    assert set(to_detectron2(resnet("resnet50", **kwargs).state_dict())) == detectron2_names("resnet50")


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (lambda: timm.create_model("resnet18d"), "conv1.0.weight"),
        (lambda: timm.create_model("seresnet18", block_args={"attn_layer": "se"}), "layer1.0.se.fc1"),
        (lambda: nn.Sequential(*list(torchvision.models.resnet18().children())[:-1]), "0.weight"),
        (lambda: torchvision.models.vgg11_bn(), "classifier.0.weight"),
        (small_images, "7 x 7 convolution, but conv1.weight, for small images, is (64, 3, 3, 3)"),
    ],
    ids=["deep stem", "squeeze", "sequential", "vgg", "small images"],
)
def test_another_architecture_is_refused_by_detectron2(other, said):
    state = {name: value for name, value in other().state_dict().items() if not name.startswith("fc.")}
    with pytest.raises(ValueError, match=r"only torchvision's ResNets|detectron2's stem") as error:
        to_detectron2(state)
    assert said in str(error.value)


# -------------------------------------------------------------------------------------------------------------- errors

UNREADABLE = "is damaged, or needs "
ONES = torch.ones(3)


def saved(content, end=None):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()[:end]


def archived(open_archive):
    file = io.BytesIO()
    open_archive(fileobj=file, mode="w").close()
    return file.getvalue()


FILES = {
    "empty": (b"", UNREADABLE),
    "text": (b"hello world", UNREADABLE),
    "pickle": (pickle.dumps({"state_dict": {}}), UNREADABLE),
    "cut off": (saved({"state_dict": {}}, -100), UNREADABLE),
    "tar": (archived(tarfile.open), UNREADABLE),
    "zip": (archived(lambda fileobj, mode: zipfile.ZipFile(fileobj, mode)), UNREADABLE),
    "dictionary": (saved({"model": {}}), 'no dictionary "state_dict"'),
    "list": (saved([1]), 'no dictionary "state_dict"'),
    "list of state": (saved({"state_dict": [1]}), 'no dictionary "state_dict"'),
    "no keys": (saved({"state_dict": {}}), "no keys backbone.*; its keys begin with: nothing"),
    "other keys": (saved({"state_dict": {"my_backbone.a": ONES, 3: ONES}}), "its keys begin with: 3, my_backbone"),
}


@pytest.mark.parametrize(("content", "said"), FILES.values(), ids=FILES)
def test_a_file_without_a_backbone_is_refused_and_nothing_written(tmp_path, capsys, content, said):
    checkpoint = tmp_path / "run.ckpt"
    checkpoint.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        read_backbone(checkpoint)
    assert fails(capsys, checkpoint, tmp_path / "new" / "b.safetensors") == str(error.value)
    assert str(error.value).startswith(str(checkpoint))
    assert list(tmp_path.iterdir()) == [checkpoint]


@pytest.fixture
def checkpoint(tmp_path):
    return save(tmp_path / "run.ckpt", backbone=nn.Linear(2, 3), criterion=nn.Linear(1, 1))


def test_a_missing_momentum_copy_names_the_keys_that_are_there(checkpoint, tmp_path, capsys):
    message = fails(capsys, checkpoint, tmp_path / "b.safetensors", "--momentum")
    assert message.endswith("no keys key_backbone.* or momentum_backbone.*; its keys begin with: backbone, criterion")


def test_an_abbreviated_option_is_refused(checkpoint, tmp_path, capsys):
    assert fails(capsys, checkpoint, tmp_path / "b.safetensors", "--mom") == "unrecognized arguments: --mom"


def test_a_missing_checkpoint_and_a_folder(tmp_path, capsys):
    for path, said in ((tmp_path / "none.ckpt", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(OSError, match=said):
            read_backbone(path)
        assert str(path) in fails(capsys, path, tmp_path / "b.safetensors")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_a_checkpoint_that_could_run_code_is_not_loaded(tmp_path, capsys, zipped):
    source, checkpoint = nn.Linear(2, 3), tmp_path / "run.ckpt"
    state = {f"backbone.{name}": value for name, value in source.state_dict().items()}
    content = {"state_dict": state, "hyper_parameters": argparse.Namespace(a=1)}
    torch.save(content, checkpoint, _use_new_zipfile_serialization=zipped)
    message = fails(capsys, checkpoint, tmp_path / "b.safetensors")
    assert message.startswith(f"{checkpoint} is damaged, or needs argparse.Namespace, whose loading can run code")


@pytest.mark.parametrize(
    ("name", "to", "said"),
    [
        ("b.pkl", "torchvision", "output must end in .safetensors for torchvision"),
        ("b", "torchvision", "output must end in .safetensors for torchvision"),
        ("b.safetensors", "detectron2", ".pkl for detectron2; got "),
        ("b.onnx", "onnx", "onnx"),
        ("b.pkl", "detectron2", "only torchvision's ResNets"),
    ],
)
def test_an_output_that_does_not_fit_is_refused_and_nothing_written(checkpoint, tmp_path, capsys, name, to, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        write(read_backbone(checkpoint), tmp_path / name, to)
    assert said in fails(capsys, checkpoint, tmp_path / name, "--to", to)
    assert [path.name for path in tmp_path.iterdir()] == ["run.ckpt"]


def test_without_safetensors_the_pip_command_is_named(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("slr_plugin.adapters._require.find_spec", lambda name: None)
    message = 'safetensors is not installed: pip install "slr-plugin[lightly]"'
    assert fails(capsys, checkpoint, tmp_path / "b.safetensors").startswith(message)
    assert write(resnet("resnet18").state_dict(), tmp_path / "b.pkl", "detectron2") > 0  # which does not need it


def test_help_waits_for_no_framework():
    code = "import sys, slr_plugin.adapters.export; print({'lightly', 'torchvision', 'timm'} & {*sys.modules})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout == "set()\n", result.stderr
