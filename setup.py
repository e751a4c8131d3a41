"""Gives PyPI the README with links that lead somewhere from there; all else is in pyproject.toml and setup.cfg."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)]+)\)")


def description() -> str:
    """The README, its links to files absolute; their words alone while the project has no address."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    stated = dict(re.findall(r'^(Repository|version) = "(.+)"', project, re.MULTILINE))

    def link(match: re.Match[str]) -> str:
        is_image, words, path = match.groups()
        if "Repository" not in stated:
            return "" if is_image else words
        kind = "raw" if is_image else "blob"
        return f"{is_image}[{words}]({stated['Repository']}/{kind}/v{stated['version']}/{path})"

    return LINK.sub(link, (ROOT / "README.md").read_text(encoding="utf-8"))


setup(long_description=description(), long_description_content_type="text/markdown")
