"""Run a script of a solo-learn clone, unmodified, with the method "sane" in it.

    git clone https://github.com/vturrisi/solo-learn
    python -m slr_plugin.adapters.solo_learn SCRIPT.py [the script's own arguments]

SCRIPT.py is solo-learn/main_knn.py, say. main_linear.py needs no launcher, and neither does main_pretrain.py with
``--config-path pkg://slr_plugin.adapters.solo_learn.configs --config-name sane-cifar10``, or sane-cpu on a CPU.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from slr_plugin.adapters.solo_learn import CLONE, register

# Lightning starts DDP's further processes as ``python -m`` this module with the script's arguments alone.
_SCRIPT = "SLR_PLUGIN_SOLO_LEARN_SCRIPT"


def main(arguments: Sequence[str]) -> None:
    """Do what the command line says."""
    first, *rest = arguments or ("",)
    if first.endswith(".py"):
        run(Path(first), rest)
    elif _SCRIPT in os.environ and first not in ("-h", "--help"):
        run(Path(os.environ[_SCRIPT]), arguments)
    else:
        print(__doc__)
        raise SystemExit(0 if first in ("-h", "--help") else 2)


def run(path: Path, arguments: Sequence[str]) -> None:
    """Execute the script as ``__main__``, the method being registered.

    ``__main__`` stays this module's: from its ``__spec__`` Lightning reads how to start the processes of DDP. Had the
    script a ``__main__`` of its own, as runpy gives it, they would run the script without the method.
    """
    if not path.is_file():
        raise SystemExit(f"there is no script {path}; get solo-learn's with: {CLONE}")
    path = path.resolve()
    os.environ[_SCRIPT] = str(path)
    sys.path.insert(0, str(path.parent))
    try:
        register()
    except ImportError as error:
        raise SystemExit(str(error)) from error
    sys.argv = [str(path), *arguments]
    script = sys.modules["__main__"]
    script.__file__ = str(path)
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec", dont_inherit=True), script.__dict__)


if __name__ == "__main__":
    main(sys.argv[1:])
