"""Run a script of a solo-learn clone, unmodified, with the method "sane" in it.

    git clone https://github.com/vturrisi/solo-learn
    python -m slr_plugin.adapters.solo_learn SCRIPT.py [the script's own arguments]

SCRIPT.py is solo-learn/main_knn.py, say. main_pretrain.py needs no launcher with a configuration of ours. In the clone,
on a CPU and on a folder of images:

    python main_pretrain.py --config-path pkg://slr_plugin.adapters.solo_learn.configs --config-name sane-cpu
        data.dataset=custom data.train_path=DIR/train data.val_path=DIR/val

main_linear.py needs neither; on a CPU add to it
``accelerator=cpu "devices='1'" strategy=auto sync_batchnorm=False precision=32``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from slr_plugin.adapters.solo_learn.registry import CLONE, SoloLearnMissingError, register

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
        raise SystemExit(
            f"there is no script {path}; get solo-learn's with: {CLONE}, and pass solo-learn/main_pretrain.py"
        )
    path = path.resolve()
    os.environ[_SCRIPT] = str(path)
    sys.path.insert(0, str(path.parent))
    try:
        register()
    except SoloLearnMissingError as error:
        raise SystemExit(str(error)) from error
    sys.argv = [str(path), *arguments]
    script = sys.modules["__main__"]
    script.__file__ = str(path)
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec", dont_inherit=True), script.__dict__)


if __name__ == "__main__":
    main(sys.argv[1:])
