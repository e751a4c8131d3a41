"""What an installation is: its imports, its modules, its promises to type checkers."""

import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import slr_plugin
from slr_plugin import __main__ as command

ROOT = Path(__file__).parent.parent


def python(code, **kwargs):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, **kwargs)


def test_the_core_imports_no_framework_and_adapters_are_found_in_the_repositorys_root():
    """Where Python finds the folder slr_plugin before what is installed."""
    frameworks = {"lightly", "pytorch_lightning", "lightning", "solo", "torchvision", "sklearn", "matplotlib", "scipy"}
    root = ROOT if (ROOT / "adapters").is_dir() else None
    without = "sys.meta_path = [finder for finder in sys.meta_path if 'editable' not in repr(finder)]" if root else ""
    code = f"import sys; {without}\nimport slr_plugin.adapters; print(sorted({frameworks} & set(sys.modules)))"
    result = python(code, cwd=root)
    assert result.stdout.strip() == "[]", result.stderr


def test_version_is_stated_once():
    assert importlib.metadata.version("slr-plugin") == slr_plugin.__version__


def test_the_public_surface():
    assert set(slr_plugin.__all__) == {"CosineConfidence", "Mix", "MomentumMixup", "SLRLoss", "presets"}
    assert all(getattr(slr_plugin, name).__module__.startswith("slr_plugin") for name in {"SLRLoss", "MomentumMixup"})


def test_adapters_belong_to_the_package():
    assert importlib.util.find_spec("slr_plugin.adapters") is not None
    if (ROOT / "adapters").is_dir():
        result = python("import adapters", cwd=ROOT)
        assert "slr_plugin.adapters" in result.stderr


def test_every_folder_with_modules_is_listed_for_setuptools():
    if not (ROOT / "setup.cfg").is_file():
        pytest.skip("installed without the repository")
    listed = (ROOT / "setup.cfg").read_text()
    for folder, package in (("slr_plugin", "slr_plugin"), ("adapters", "slr_plugin.adapters")):
        for init in (ROOT / folder).rglob("__init__.py"):
            name = ".".join((package, *init.parent.relative_to(ROOT / folder).parts))
            assert f"    {name}\n" in listed, name


def test_a_command_runs_its_module_as_python_m_does(tmp_path, monkeypatch, capsys):
    """Under this name Lightning starts DDP's further processes."""
    (tmp_path / "asked.py").write_text("import sys, __main__; print(__main__.__spec__.name, __name__, sys.argv[1:])")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(command.COMMANDS, "asked", "asked")
    monkeypatch.setattr(sys, "argv", ["slr-plugin", "asked", "--devices", "2"])
    command.main()
    assert capsys.readouterr().out == "asked __main__ ['--devices', '2']\n"


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), ([], 2), (["lighty"], 2)])
def test_the_command_names_its_commands(arguments, code, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["slr-plugin", *arguments])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert stopped.value.code == code
    shown = capsys.readouterr().out
    assert all(f"slr-plugin {name} " in shown for name in command.COMMANDS)
    assert all(importlib.util.find_spec(module) for module in command.COMMANDS.values())
