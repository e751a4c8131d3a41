"""The README and the pages in docs/: their Python runs, their commands exist, their links lead somewhere."""

import importlib
import importlib.util
import inspect
import re
from pathlib import Path

import pytest
import torch

from slr_plugin import MomentumMixup, SLRLoss, presets

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
if not PAGES[0].is_file():
    pytest.skip("installed without the repository", allow_module_level=True)
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
# Sorted, as whatever names a test: the processes that run the tests must find the same ones in the same order.
LINKS = sorted({(page, link) for page, text in TEXTS.items() for link in re.findall(r"\]\((?!http|#)([^)#]+)", text)})
START = "(_start.py)"
PRESET_NAMES = {"memory_bank_size": "queue_size"}
# What the configuration on the page of stable-pretraining leaves to its user.
RUN = """
seed: 0
trainer:
  _target_: lightning.Trainer
  accelerator: cpu
  max_steps: 2
  limit_val_batches: 0
  enable_progress_bar: false
data:
  _target_: stable_pretraining.data.DataModule
  train: {batch_size: 8, dataset: {_target_: _stable_pretraining.Views, shape: [3, 32, 32]}}
  val: {batch_size: 8, dataset: {_target_: _stable_pretraining.Views, count: 1, shape: [3, 32, 32]}}
"""


def blocks(page, language="python"):
    return re.findall(rf"```{language}\n(.*?)```", TEXTS[page], flags=re.DOTALL)


def missing(code):
    """The packages that a block imports and that are not installed."""
    for module in re.findall(r"^(?:from|import) ([\w.]+)", code, flags=re.MULTILINE):
        if module.startswith("slr_plugin.adapters."):
            framework = {"pytorch_metric_learning", "stable_pretraining", "sentence_transformers", "lightly"}
            module = next((name for name in framework if name in module), "slr_plugin")
        package = module.partition(".")[0]
        if importlib.util.find_spec(package) is None:
            yield package


@pytest.mark.filterwarnings("ignore")  # the frameworks'
@pytest.mark.parametrize("page", [page for page in PAGES[1:] if blocks(page)], ids=lambda page: page.stem)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch, one_thread):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPT_CACHE_DIR", str(tmp_path / "cache"))
    for text in blocks(page, "yaml"):
        Path("config.yaml").write_text(text + RUN)
    torch.manual_seed(0)
    names, absent = {}, set()
    start = [(page.parent / "_start.py").read_text()] if START in TEXTS[page] else []
    for block in [*start, *blocks(page)]:
        absent |= set(missing(block))
        if not absent or not list(missing(block)):
            try:
                exec(compile(block, page.name, "exec"), names)
            except NameError:  # of a block that was left out
                if not absent:
                    raise
    if "loss" in names:
        assert names["loss"].isfinite()
    if absent:
        pytest.skip(f"not installed: {', '.join(sorted(absent))}")


def test_the_readmes_whole_method_advances_and_says_what_it_found(capsys):
    names = {}
    for block in blocks(PAGES[0]):
        exec(compile(block, "README.md", "exec"), names)
    assert names["criterion"].step == names["criterion"].memory_bank.bank_ptr / 16 == 3
    assert "positive_weight" in capsys.readouterr().out


def test_the_readme_and_the_results_are_short():
    assert len(TEXTS[PAGES[0]].split()) <= 1000
    assert len((ROOT / "RESULTS.md").read_text(encoding="utf-8").split()) <= 2500


@pytest.mark.parametrize(("page", "link"), LINKS, ids=lambda value: str(getattr(value, "name", value)))
def test_links_lead_somewhere(page, link):
    assert (page.parent / link).exists()


def named(pattern):
    """What commands on the pages name, such as a module."""
    return sorted({name for text in TEXTS.values() for name in re.findall(pattern, text)})


@pytest.mark.parametrize("module", sorted({*named(r"python -m ([\w.]+)")} - {"pip", "venv", "build", "pytest"}))
def test_modules_in_commands_run(module):
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.submodule_search_locations is None or importlib.util.find_spec(f"{module}.__main__") is not None


@pytest.mark.parametrize("target", named(r"`(?:\w+=\S+ )?make ([a-z-]+)"))
def test_make_has_the_targets_in_commands(target):
    assert f"\n{target}:" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("name", named(r"\bsane-(?:cpu|cifar|imagenet)[\w-]*"))
def test_solo_learns_configurations_exist(name):
    assert (ROOT / "adapters" / "solo_learn" / "configs" / f"{name}.yaml").is_file()


@pytest.mark.parametrize("extra", named(r'pip install "\.\[([\w-]+)\]"'))
def test_extras_in_commands_exist(extra):
    assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text()


def test_the_table_of_settings_has_the_defaults_and_the_presets():
    loss, mixup = (inspect.signature(kind).parameters for kind in (SLRLoss, MomentumMixup))
    rows = re.findall(
        r"^\| `(\w+)`[^|]*\|[^|]*\| (.*?) \| (.*?) \| (.*?) \| (.*?) \|$",
        TEXTS[ROOT / "docs" / "choose.md"],
        re.MULTILINE,
    )
    assert len(rows) == 6
    for name, *cells in rows:
        default = mixup[name].default if name == "kappa" else loss[name].default
        every = (presets.CIFAR10, presets.IMAGENET, presets.FROM_FEATURES)
        settings = [getattr(preset, PRESET_NAMES.get(name, name)) for preset in every]
        for cell, value in zip(cells, [default, *settings], strict=True):
            shown = [float(number.replace(",", "")) for number in cell.split(" to ")]
            assert shown == list(value if isinstance(value, tuple) else [value]), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_shows_no_directive_where_it_is_read_as_markdown(page):
    shown = re.sub(r"<!--.*?-->|```(?!\{).*?```|\$\$.*?\$\$", "", TEXTS[page], flags=re.DOTALL)
    assert not re.findall(r"^:::.*|```\{.*|\{[a-z-]+\}`.*", shown, flags=re.MULTILINE)


@pytest.fixture
def builder(monkeypatch):
    """What makes the site of the pages."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    return importlib.import_module


def test_the_site_has_tabs_figures_and_included_files_in_their_places(builder):
    pages = builder("_pages")
    read = {page: pages.read(page) for page in PAGES if page.is_relative_to(ROOT / "docs")}
    assert not any("<!-- tabs" in text or "<!-- site" in text or "<!-- figure" in text for text in read.values())
    assert ":::{tab-item} Two views, no queue\n" in read[ROOT / "docs" / "pytorch.md"]
    assert "{image} _generated/keys-moco-dark.svg" in read[ROOT / "docs" / "method.md"]
    assert "(results/representations.md#equal-compute)" in read[ROOT / "docs" / "choose.md"]
    assert "(gallery/1_swap_the_loss.rst)" in read[ROOT / "docs" / "index.md"]
    assert len(read[ROOT / "docs" / "results" / "representations.md"]) > 5000


@pytest.mark.parametrize(
    "module", ["", ".diagnostics", ".adapters.lightly", ".adapters.solo_learn", ".adapters.open_clip"]
)
def test_the_api_has_every_public_name(builder, module):
    api = builder("_api")
    shown = {
        name.rpartition(".")[2]
        for page, names in api.PAGES.items()
        for name in names
        if page.startswith(f"slr_plugin{module}")
    }
    try:
        public = set(importlib.import_module(f"slr_plugin{module}").__all__)
    except ImportError as error:
        pytest.skip(str(error))
    assert public - {"presets"} <= shown
    assert all(api.source(page).is_file() for page in api.PAGES)
