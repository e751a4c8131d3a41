"""Exported backbones give the features of the network that was trained."""

import argparse
import copy
import pickle
import pickletools
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

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


def randomize(model):
    """Every number in the state dict matters: batch norms as drawn would hide their own mix-ups."""
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.ndim == 1:
                value.uniform_(0.5, 1.5) if "var" in name or "weight" in name else value.uniform_(-0.5, 0.5)
    return model.eval()


def resnet(name, **kwargs):
    model = getattr(torchvision.models, name)(**kwargs)
    model.fc = nn.Identity()
    return randomize(model)


def save(path, rest=None, **modules):
    """A Lightning checkpoint of a module with these submodules."""
    state = OrderedDict()
    for prefix, module in modules.items():
        state.update((f"{prefix}.{name}", value) for name, value in module.state_dict().items())
    torch.save({"epoch": 3, "state_dict": state, "hyper_parameters": {"lr": 0.1}, **(rest or {})}, path)
    return path


def draw_images(size=64):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def features(model, size=64):
    with torch.no_grad():
        return model.eval()(draw_images(size))


@pytest.fixture(scope="module", params=BLOCKS)
def exported(request, tmp_path_factory):
    """Name, source and .safetensors file of a trained backbone and of its momentum copy."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    source, momentum = resnet(request.param), resnet(request.param)
    checkpoint = save(folder / "run.ckpt", backbone=source, key_backbone=momentum, projection_head=nn.Linear(2, 2))
    for name, flags in (("online", []), ("momentum", ["--momentum"])):
        main([str(checkpoint), str(folder / f"{name}.safetensors"), *flags])
    return request.param, {"online": source, "momentum": momentum}, folder


@pytest.mark.parametrize("which", ["online", "momentum"])
def test_torchvision_loads_it_and_gives_equal_features(exported, which):
    name, sources, folder = exported
    model = getattr(torchvision.models, name)()
    model.fc = nn.Identity()
    model.load_state_dict(safetensors_torch.load_file(folder / f"{which}.safetensors"))
    assert torch.equal(features(model), features(sources[which]))


def test_timm_loads_it_and_gives_equal_features(exported):
    name, sources, folder = exported
    model = timm.create_model(name, num_classes=0)
    model.load_state_dict(safetensors_torch.load_file(folder / "online.safetensors"))
    torch.testing.assert_close(features(model), features(sources["online"]), rtol=1e-6, atol=1e-6)


def test_the_file_says_what_it_is(exported):
    _, sources, folder = exported
    with safetensors.safe_open(folder / "online.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(sources["online"].state_dict())
        for key, value in sources["online"].state_dict().items():
            assert file.get_tensor(key).dtype == value.dtype


def test_the_command_prints_lines_of_python_that_load_it(exported, capsys, tmp_path):
    _, sources, folder = exported
    output = tmp_path / "it's here" / "backbone.safetensors"
    main([str(folder / "run.ckpt"), str(output)])
    summary, *lines = capsys.readouterr().out.splitlines()
    source = sources["online"]
    parameters = sum(value.numel() for value in source.parameters())
    assert summary == f"{output}: {len(source.state_dict())} tensors, {parameters:,} parameters"
    assert [("torchvision" in line, "timm" in line) for line in lines] == [(True, False), (False, True)]
    for line in lines:
        names = {}
        exec(line, names)
        torch.testing.assert_close(features(names["model"]), features(source), rtol=1e-6, atol=1e-6)


def test_as_a_module_of_python(tmp_path):
    source = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    checkpoint = save(tmp_path / "run.ckpt", backbone=source)
    output = tmp_path / "b.safetensors"
    command = [sys.executable, "-W", "error", "-m", "slr_plugin.adapters.export", checkpoint, output]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"{output}: 7 tensors, {3 * 4 * 9 + 4 + 8} parameters\n")
    lines = result.stdout.splitlines()[1:]
    model = copy.deepcopy(source)
    model[0].weight.data.zero_()
    exec("\n".join(lines), {"model": model})
    assert torch.equal(model[0].weight, source[0].weight)


def test_a_stem_for_small_images_loads_into_a_model_with_that_stem(tmp_path, capsys):
    def small():
        model = resnet("resnet18")
        model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
        return model

    source, model = small(), small()
    assert not torch.equal(features(model, 32), features(source, 32))
    main([str(save(tmp_path / "run.ckpt", backbone=source)), str(tmp_path / "b.safetensors")])
    lines = capsys.readouterr().out.splitlines()[1:]
    assert "torchvision.models" not in lines[0]
    exec(lines[0], {"model": model})
    assert torch.equal(features(model, 32), features(source, 32))


@pytest.mark.parametrize(
    "other",
    [
        lambda: resnet("resnet50", width_per_group=128),
        lambda: resnet("resnet50", groups=32, width_per_group=4),
        lambda: randomize(torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])),
        lambda: timm.create_model("seresnet50", num_classes=0),
        lambda: timm.create_model("resnet18d", num_classes=0),
    ],
    ids=["wide", "resnext", "shallow", "squeeze", "deep stem"],
)
def test_no_other_network_is_called_a_resnet_of_a_depth(tmp_path, capsys, other):
    main([str(save(tmp_path / "run.ckpt", backbone=other())), str(tmp_path / "b.safetensors")])
    _, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("import safetensors.torch; model.load_state_dict(")


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
def test_every_depth_is_recognised(name, tmp_path, capsys, monkeypatch):
    with torch.device("meta"):
        state = getattr(torchvision.models, name)().state_dict()
    state = {key: torch.empty(0).expand(0) if value.ndim == 0 else value for key, value in state.items()}
    monkeypatch.setattr("slr_plugin.adapters.export.read_backbone", lambda *_: state)
    monkeypatch.setattr("slr_plugin.adapters.export.write", lambda *_: 0)
    for key in ("fc.weight", "fc.bias"):
        del state[key]
    main(["in.ckpt", "out.safetensors"])
    _, *lines = capsys.readouterr().out.splitlines()
    assert f"torchvision.models.{name}()" in lines[0]
    assert f"create_model('{name}'" in lines[1]


# ------------------------------------------------------------------------------------------------- reading checkpoints


@pytest.mark.parametrize("prefix", ["key_backbone", "momentum_backbone"])
def test_the_momentum_copy_of_lightly_and_of_solo_learn(tmp_path, prefix):
    online, momentum = nn.Linear(2, 3), nn.Linear(2, 3)
    checkpoint = save(tmp_path / "run.ckpt", backbone=online, **{prefix: momentum})
    for flag, source in ((False, online), (True, momentum)):
        state = read_backbone(checkpoint, momentum=flag)
        assert list(state) == ["weight", "bias"]
        assert torch.equal(state["weight"], source.weight)


@pytest.mark.parametrize("before", [True, False], ids=["whole module", "backbone"])
def test_the_prefix_of_compiled_modules_is_taken_off(tmp_path, before):
    source = nn.Sequential(nn.Linear(2, 3), torch.compile(nn.Linear(3, 4)))
    checkpoint = tmp_path / "run.ckpt"
    prefix = "_orig_mod.backbone." if before else "backbone._orig_mod."
    state = {prefix + name: value for name, value in source.state_dict().items()}
    assert any("1._orig_mod." in name for name in state)
    torch.save({"state_dict": state}, checkpoint)
    assert list(read_backbone(checkpoint)) == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_the_classifier_is_left_out(tmp_path):
    model = torchvision.models.resnet18()
    state = read_backbone(save(tmp_path / "run.ckpt", backbone=model))
    assert set(model.state_dict()) - set(state) == {"fc.weight", "fc.bias"}


def test_tensors_are_contiguous_keep_their_dtype_and_share_no_memory(tmp_path):
    shared = torch.randn(6, 4, 3, 3)
    state = {
        "backbone.first": shared[:3].to(memory_format=torch.channels_last),
        "backbone.second": shared[3:],
        "backbone.third": shared,
        "backbone.half": shared.bfloat16(),
        "backbone.counter": torch.tensor(7),
    }
    checkpoint, output = tmp_path / "run.ckpt", tmp_path / "b.safetensors"
    torch.save({"state_dict": state}, checkpoint)
    backbone = read_backbone(checkpoint)
    assert all(value.is_contiguous() for value in backbone.values())
    assert len({value.untyped_storage().data_ptr() for value in backbone.values()}) == len(state)
    assert write(backbone, output) == len(state)
    loaded = safetensors_torch.load_file(output)
    for name, value in state.items():
        torch.testing.assert_close(loaded[name.removeprefix("backbone.")], value, rtol=0, atol=0)


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

    module = Module(rate=0.1)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[lightning.callbacks.ModelCheckpoint(tmp_path, filename="run")],
    )
    trainer.fit(module, torch.utils.data.DataLoader(torch.randn(8, 3, 8, 8), batch_size=2))
    for flag, source in ((False, module.backbone), (True, module.key_backbone)):
        state = read_backbone(tmp_path / "run.ckpt", momentum=flag)
        assert list(state) == list(source.state_dict())
        assert all(torch.equal(state[name], value) for name, value in source.state_dict().items())
    assert not torch.equal(module.backbone[0].weight, module.key_backbone[0].weight)


# ---------------------------------------------------------------------------------------------------------- detectron2


def detectron2_names(blocks, convolutions, projected):
    """Detectron2's names, from its blocks: each convolution owns its norm, a stage's first block has the shortcut."""
    modules = ["stem.conv1"]
    for stage, count in zip(("res2", "res3", "res4", "res5"), blocks, strict=True):
        modules += [f"{stage}.{i}.{conv}" for i in range(count) for conv in ("conv1", "conv2", "conv3")[:convolutions]]
        modules += [f"{stage}.0.shortcut"] if stage in projected else []
    fields = ("weight", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var")
    return {f"{module}.{field}" for module in modules for field in fields}


def detectron2_forward(arrays, images, blocks):
    """The averaged output of detectron2's res5 with STRIDE_IN_1X1 False: its computation, written out on its names."""
    weights = {name: torch.from_numpy(array) for name, array in arrays.items()}

    def convolve(x, name, stride=1):
        weight = weights[f"{name}.weight"]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        scale = weights[f"{name}.norm.weight"] * (weights[f"{name}.norm.running_var"] + 1e-5).rsqrt()
        shift = weights[f"{name}.norm.bias"] - weights[f"{name}.norm.running_mean"] * scale
        return x * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)

    x = F.max_pool2d(convolve(images, "stem.conv1", 2).relu(), 3, 2, 1)
    for stage, count in enumerate(blocks, start=2):
        for block in range(count):
            name, stride = f"res{stage}.{block}", 2 if stage > 2 and block == 0 else 1
            if f"{name}.conv3.weight" in weights:
                out = convolve(convolve(x, f"{name}.conv1").relu(), f"{name}.conv2", stride).relu()
                out = convolve(out, f"{name}.conv3")
            else:
                out = convolve(convolve(x, f"{name}.conv1", stride).relu(), f"{name}.conv2")
            x = (out + (convolve(x, f"{name}.shortcut", stride) if f"{name}.shortcut.weight" in weights else x)).relu()
    return x.mean((2, 3))


@pytest.fixture(scope="module")
def detectron(exported):
    """Name, source and what detectron2's DetectionCheckpointer reads from the .pkl."""
    name, sources, folder = exported
    main([str(folder / "run.ckpt"), str(folder / "b.pkl"), "--to", "detectron2"])
    with (folder / "b.pkl").open("rb") as file:
        return name, sources["online"], pickle.load(file, encoding="latin1")


def test_detectron2_matches_the_file_by_name(detectron):
    _, _, content = detectron
    assert set(content) == {"model", "__author__", "matching_heuristics"}
    assert content["matching_heuristics"] is True
    assert content["__author__"] != "Caffe2"  # whose weights detectron2 would rename


def test_names_and_arrays_are_those_of_detectron2(detectron):
    name, source, content = detectron
    wide = name == "resnet50"
    projected = ("res2", "res3", "res4", "res5")[0 if wide else 1 :]
    assert set(content["model"]) == detectron2_names(BLOCKS[name], 3 if wide else 2, projected)
    assert all(type(value) is np.ndarray and value.dtype == np.float32 for value in content["model"].values())
    assert all(value.flags.writeable for value in content["model"].values())  # torch.from_numpy warns otherwise
    ours = source.state_dict()
    for here, there in {
        "conv1.weight": "stem.conv1.weight",
        "bn1.running_var": "stem.conv1.norm.running_var",
        "layer1.0.conv1.weight": "res2.0.conv1.weight",
        "layer1.0.bn2.running_mean": "res2.0.conv2.norm.running_mean",
        "layer2.0.downsample.0.weight": "res3.0.shortcut.weight",
        "layer2.0.downsample.1.weight": "res3.0.shortcut.norm.weight",
        "layer2.0.downsample.1.running_var": "res3.0.shortcut.norm.running_var",
        f"layer4.{BLOCKS[name][-1] - 1}.bn2.bias": f"res5.{BLOCKS[name][-1] - 1}.conv2.norm.bias",
        **({"layer4.2.conv3.weight": "res5.2.conv3.weight"} if wide else {}),
    }.items():
        np.testing.assert_array_equal(content["model"][there], ours[here].numpy(), err_msg=there)


def test_shapes_of_a_resnet50():
    shapes = {name: array.shape for name, array in to_detectron2(resnet("resnet50").state_dict()).items()}
    assert shapes["stem.conv1.weight"] == (64, 3, 7, 7)
    channels = 64
    for stage, count, width in (("res2", 3, 64), ("res3", 4, 128), ("res4", 6, 256), ("res5", 3, 512)):
        assert shapes[f"{stage}.0.shortcut.weight"] == (4 * width, channels, 1, 1)
        for block in range(count):
            assert shapes[f"{stage}.{block}.conv1.weight"] == (width, channels, 1, 1)
            assert shapes[f"{stage}.{block}.conv2.weight"] == (width, width, 3, 3)
            assert shapes[f"{stage}.{block}.conv3.weight"] == (4 * width, width, 1, 1)
            assert shapes[f"{stage}.{block}.conv3.norm.bias"] == (4 * width,)
            channels = 4 * width


def test_detectron2_computes_the_same_features(detectron):
    name, source, content = detectron
    arrays = {name: array.astype(np.float64) for name, array in content["model"].items()}
    images = draw_images().double()
    with torch.no_grad():
        expected = copy.deepcopy(source).double()(images)
    torch.testing.assert_close(detectron2_forward(arrays, images, BLOCKS[name]), expected, rtol=1e-10, atol=1e-10)


def test_the_file_names_no_module_that_moved_between_versions_of_numpy(exported, detectron):
    *_, folder = exported
    operations = list(pickletools.genops((folder / "b.pkl").read_bytes()))
    strings = {argument for _, argument, _ in operations if isinstance(argument, str)}
    assert {"numpy", "ndarray"} <= strings
    assert not [text for text in strings if text.startswith(("numpy.", "numpy_"))]


@pytest.mark.parametrize(("name", "more"), [("resnet18", ["RES2_OUT_CHANNELS"]), ("resnet50", [])])
def test_the_command_prints_detectron2s_settings(tmp_path, capsys, name, more):
    output = tmp_path / "b.pkl"
    main([str(save(tmp_path / "run.ckpt", backbone=resnet(name))), str(output), "--to", "detectron2"])
    summary, line = capsys.readouterr().out.splitlines()
    parameters = sum(value.numel() for value in resnet(name).parameters())
    tensors = len(detectron2_names(BLOCKS[name], 2 + (not more), ("res2", "res3", "res4", "res5")[len(more) :]))
    assert summary == f"{output}: {tensors} tensors, {parameters:,} parameters"
    settings = {}

    class Config:
        def merge_from_list(self, values):
            settings.update(zip(values[::2], values[1::2], strict=True))

    exec(line, {"cfg": Config()})
    assert settings.pop("MODEL.WEIGHTS") == str(output)
    mean, deviation = settings.pop("MODEL.PIXEL_MEAN"), settings.pop("MODEL.PIXEL_STD")
    np.testing.assert_allclose(np.divide(mean, 255), (0.485, 0.456, 0.406))
    np.testing.assert_allclose(np.divide(deviation, 255), (0.229, 0.224, 0.225))
    assert settings == {
        "MODEL.RESNETS.DEPTH": int(name.removeprefix("resnet")),
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
        "INPUT.FORMAT": "RGB",
        **{f"MODEL.RESNETS.{key}": 64 for key in more},
    }


def test_bfloat16_becomes_float32_where_numpy_lacks_it():
    state = {name: value.bfloat16() for name, value in resnet("resnet18").state_dict().items()}
    arrays = to_detectron2(state)
    assert {array.dtype for array in arrays.values()} == {np.dtype("float32")}
    np.testing.assert_array_equal(arrays["stem.conv1.weight"], state["conv1.weight"].float().numpy())


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (lambda: timm.create_model("resnet18d", num_classes=0), "conv1.0.weight"),
        (lambda: timm.create_model("seresnet18", num_classes=0, block_args={"attn_layer": "se"}), "layer1.0.se.fc1"),
        (lambda: torchvision.models.resnet18(norm_layer=lambda d: nn.GroupNorm(1, d)), "bn1.running_mean"),
        (lambda: nn.Sequential(*list(torchvision.models.resnet18().children())[:-1]), "0.weight"),
        (lambda: torchvision.models.vgg11_bn(), "classifier.0.weight"),
    ],
    ids=["deep stem", "squeeze", "group norm", "sequential", "vgg"],
)
def test_another_architecture_is_refused(other, named):
    state = other().state_dict()
    state = {name: value for name, value in state.items() if not name.startswith("fc.")}
    with pytest.raises(ValueError, match="only torchvision's ResNets") as error:
        to_detectron2(state)
    assert named in str(error.value)


@pytest.mark.parametrize(
    "gone", ["layer4.", "layer1.0.", "layer3.1.bn2.running_var", "layer2.0.downsample.1.", "bn1.bias"]
)
def test_a_part_of_a_resnet_is_refused(gone):
    state = {name: value for name, value in resnet("resnet18").state_dict().items() if not name.startswith(gone)}
    with pytest.raises(ValueError, match=f"missing here: .*{gone}"):
        to_detectron2(state)


def test_the_refusal_names_all_of_a_few_names_and_three_of_many():
    state = resnet("resnet18").state_dict()
    del state["bn1.bias"]
    with pytest.raises(ValueError, match=r"missing here: bn1\.bias; not theirs: none$"):
        to_detectron2(state)
    state.update({f"{letter}.weight": torch.zeros(1) for letter in "vwxyz"})
    with pytest.raises(ValueError, match=r"not theirs: v\.weight, w\.weight, x\.weight and 2 more$"):
        to_detectron2(state)


@pytest.mark.parametrize("kwargs", [{"width_per_group": 128}, {"groups": 32, "width_per_group": 4}])
def test_wide_and_grouped_resnets_have_the_same_names(kwargs):
    arrays = to_detectron2(resnet("resnet50", **kwargs).state_dict())
    assert set(arrays) == detectron2_names(BLOCKS["resnet50"], 3, ("res2", "res3", "res4", "res5"))


def test_a_stem_for_small_images_is_refused_by_detectron2():
    model = resnet("resnet18")
    model.conv1 = nn.Conv2d(3, 64, 3, bias=False)
    with pytest.raises(ValueError, match=r"7 x 7 .* conv1.weight has shape \(64, 3, 3, 3\)"):
        to_detectron2(model.state_dict())


# -------------------------------------------------------------------------------------------------------------- errors


def fails(capsys, *argv):
    """What the command says on its way out with 2."""
    with pytest.raises(SystemExit) as error:
        main([str(argument) for argument in argv])
    assert error.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


@pytest.fixture
def checkpoint(tmp_path):
    return save(tmp_path / "run.ckpt", backbone=nn.Linear(2, 3), criterion=nn.Linear(1, 1))


def test_a_missing_file_and_a_folder(tmp_path, capsys):
    for path in (tmp_path / "none.ckpt", tmp_path):
        with pytest.raises(FileNotFoundError, match="there is no file"):
            read_backbone(path)
        assert str(path) in fails(capsys, path, tmp_path / "b.safetensors")


def foreign_files():
    whole = pickle.dumps({"state_dict": {}})
    return {"empty": b"", "text": b"hello world", "pickle": whole, "zeros": bytes(100)}


@pytest.mark.parametrize("kind", foreign_files())
def test_a_file_that_is_no_checkpoint(tmp_path, capsys, kind):
    path = tmp_path / "run.ckpt"
    path.write_bytes(foreign_files()[kind])
    with pytest.raises(ValueError, match=r"no checkpoint of torch\.save"):
        read_backbone(path)
    assert str(path) in fails(capsys, path, tmp_path / "b.safetensors")


def test_a_checkpoint_that_was_cut_off(checkpoint):
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cut off"):
        read_backbone(checkpoint)


def test_a_zip_file_that_is_no_checkpoint(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.zeros(3))
    with pytest.raises(ValueError, match=r"no checkpoint of torch\.save"):
        read_backbone(tmp_path / "a.npz")


@pytest.mark.parametrize("content", [{"model": {}}, [1], {"state_dict": [1]}, {"state_dict": None}])
def test_a_file_without_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "run.ckpt")
    with pytest.raises(ValueError, match='no "state_dict"'):
        read_backbone(tmp_path / "run.ckpt")


def test_a_checkpoint_that_could_run_code_comes_with_the_way_out(tmp_path, capsys):
    source = nn.Linear(2, 3)
    path = save(tmp_path / "run.ckpt", {"hyper_parameters": argparse.Namespace(a=1)}, backbone=source)
    with pytest.raises(ValueError, match=r"argparse\.Namespace") as error:
        read_backbone(path)
    assert "argparse.Namespace" in fails(capsys, path, tmp_path / "b.safetensors")
    command = str(error.value).partition('python -c "')[2].removesuffix('"')
    subprocess.run([sys.executable, "-c", command], cwd=tmp_path, check=True)
    assert torch.equal(read_backbone(tmp_path / "weights.ckpt")["weight"], source.weight)


def test_keys_that_are_not_there_name_those_that_are(checkpoint, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"key_backbone\.\* or momentum_backbone\.\*.*: backbone, criterion$"):
        read_backbone(checkpoint, momentum=True)
    assert "backbone, criterion" in fails(capsys, checkpoint, tmp_path / "b.safetensors", "--momentum")
    path = save(tmp_path / "other.ckpt", encoder=nn.Linear(1, 1), my_backbone=nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"no keys backbone\.\*; its keys begin with: encoder, my_backbone$"):
        read_backbone(path)
    with pytest.raises(ValueError, match=r"begin with: nothing$"):
        read_backbone(save(tmp_path / "empty.ckpt"))


@pytest.mark.parametrize(
    ("name", "to", "suffix"),
    [
        ("b.pkl", "torchvision", ".safetensors"),
        ("b.pth", "torchvision", ".safetensors"),
        ("b", "torchvision", ".safetensors"),
        ("b.safetensors", "detectron2", ".pkl"),
    ],
)
def test_the_suffix_belongs_to_the_format(checkpoint, tmp_path, capsys, name, to, suffix):
    with pytest.raises(ValueError, match=f"output must end in {suffix} for {to}, got .*{name}"):
        write(read_backbone(checkpoint), tmp_path / name, to)
    assert suffix in fails(capsys, checkpoint, tmp_path / name, "--to", to)
    assert not (tmp_path / name).exists()


def test_an_unknown_format(checkpoint, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"to must be .* got 'onnx'"):
        write(read_backbone(checkpoint), tmp_path / "b.onnx", "onnx")
    assert "onnx" in fails(capsys, checkpoint, tmp_path / "b.onnx", "--to", "onnx")


def test_detectron2_refuses_on_the_command_line_too(checkpoint, tmp_path, capsys):
    assert "only torchvision's ResNets" in fails(capsys, checkpoint, tmp_path / "b.pkl", "--to", "detectron2")
    assert list(tmp_path.iterdir()) == [checkpoint]


def test_without_safetensors_the_pip_command_is_named(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("slr_plugin.adapters._require.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'safetensors is not installed: pip install "slr-plugin\[lightly\]"'):
        write(read_backbone(checkpoint), tmp_path / "b.safetensors")
    assert "pip install" in fails(capsys, checkpoint, tmp_path / "b.safetensors")
    assert write(resnet("resnet18").state_dict(), tmp_path / "b.pkl", "detectron2") > 0  # which does not need it


def test_missing_folders_are_created(checkpoint, tmp_path):
    write(read_backbone(checkpoint), tmp_path / "a" / "b" / "c.safetensors")
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["c.safetensors"]


def test_an_output_that_is_a_folder(checkpoint, tmp_path, capsys):
    (tmp_path / "b.safetensors").mkdir()
    assert "b.safetensors" in fails(capsys, checkpoint, tmp_path / "b.safetensors")


def test_an_interrupted_run_leaves_what_was_there(checkpoint, tmp_path, monkeypatch):
    output = tmp_path / "b.safetensors"
    output.write_bytes(b"before")

    def interrupted(path, data):
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(read_backbone(checkpoint), output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.safetensors", "run.ckpt"]
    assert output.read_bytes() == b"before"


def test_a_second_run_replaces_the_file_and_keeps_ordinary_permissions(checkpoint, tmp_path):
    output = tmp_path / "b.safetensors"
    output.write_bytes(b"before")
    write(read_backbone(checkpoint), output)
    assert set(safetensors_torch.load_file(output)) == {"weight", "bias"}
    (tmp_path / "plain").touch()
    assert output.stat().st_mode == (tmp_path / "plain").stat().st_mode
