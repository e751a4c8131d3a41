"""A missing framework, said as the command that installs it."""

from __future__ import annotations

from importlib.util import find_spec


def require(extra: str, *modules: str) -> None:
    """Raise ImportError with the pip command unless all top-level ``modules`` can be imported."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise ImportError(
            f'{", ".join(missing)} {verb} not installed: pip install "slr-plugin[{extra}]"', name=missing[0]
        )
