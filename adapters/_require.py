"""What an adapter asks of the machine: frameworks, or the command that installs them."""

from __future__ import annotations

from importlib.util import find_spec


def require(extra: str, *modules: str) -> None:
    """Raise ImportError with the pip command unless all top-level ``modules`` can be imported."""
    for module in modules:
        if find_spec(module) is None:
            raise ImportError(f"{module} is not installed: {install(extra)}", name=module)


def install(extra: str) -> str:
    """The command that installs an extra, from the package index or from a clone."""
    return f'pip install "slr-plugin[{extra}]", or in a clone of slr-plugin: pip install ".[{extra}]"'
