"""Writes the pages of the API, one for each module, from the names that it should show."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = {
    "slr_plugin.loss": ["slr_plugin.SLRLoss"],
    "slr_plugin.functional": ["slr_loss", "clip_loss"],
    "slr_plugin.mixup": ["slr_plugin.MomentumMixup", "slr_plugin.Mix"],
    "slr_plugin.schedules": ["slr_plugin.CosineConfidence"],
    "slr_plugin.presets": ["Preset", "CIFAR10", "IMAGENET", "FROM_FEATURES"],
    "slr_plugin.diagnostics": ["LabelMonitor", "LabelQuality", "label_quality"],
    "slr_plugin.groups": ["group_labels", "GroupLabels"],
    "slr_plugin.queue": ["KeyQueue"],
    "slr_plugin.dense": ["self_labels", "SelfLabels", "slr_loss", "symmetric_slr_loss"],
    "slr_plugin.adapters.lightly": [
        *("SANE", "SANETransform", "Indexed", "cifar_stem", "register"),
        "slr_plugin.adapters.lightly.methods.VARIANTS",
        "slr_plugin.adapters.lightly.transforms.SINGLE",
        "slr_plugin.adapters.lightly.transforms.MULTI",
        "slr_plugin.adapters.lightly.transforms.transform",
    ],
    "slr_plugin.adapters.lightning": ["LabelQualityCallback", "targets"],
    "slr_plugin.adapters.solo_learn": ["register", "RegisterSANE", "SANE"],
    "slr_plugin.adapters.pytorch_metric_learning": ["SLRLoss"],
    "slr_plugin.adapters.stable_pretraining": ["sane"],
    "slr_plugin.adapters.sentence_transformers": [
        *("SelfLabelingRankingLoss", "SelfLabelingCallback"),
    ],
    "slr_plugin.adapters.open_clip": ["SLRClipLoss"],
    "slr_plugin.adapters.export": ["read_backbone", "to_detectron2", "write"],
}
DATA = {"CIFAR10", "IMAGENET", "FROM_FEATURES", "VARIANTS", "SINGLE", "MULTI", "transform"}


def source(module: str) -> Path:
    """The file of a module."""
    path = ROOT / module.replace("slr_plugin.adapters", "adapters").replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def write(folder: Path) -> None:
    """Write every page: what the module is for, a table of its contents, each of them."""
    folder.mkdir(exist_ok=True)
    for module, names in PAGES.items():
        lines = [module, "=" * len(module), ""]
        lines += [f".. automodule:: {module}", "   :no-members:", ""]
        if len(names) > 1:
            lines += [
                ".. autosummary::",
                "",
                *(f"   ~{name.removeprefix(f'{module}.')}" for name in names),
            ]
        for name in names:
            lines += ["", f".. auto{kind(name)}:: {name}"]
            if module == "slr_plugin.adapters.pytorch_metric_learning":
                lines.append("   :no-index:")  # its name is that of the loss itself
        text = "\n".join(lines) + "\n"
        page = folder / f"{module}.rst"
        if (
            not page.exists() or page.read_text("utf-8") != text
        ):  # else it need not be read again
            page.write_text(text, "utf-8")


def kind(name: str) -> str:
    """What a name is, as the directives of autodoc call it."""
    name = name.rpartition(".")[2]
    return "data" if name in DATA else "class" if name[0].isupper() else "function"
