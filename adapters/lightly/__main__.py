"""Train SANE with lightly: by the recipe for CIFAR-10, or by a benchmark script of a lightly clone, unmodified.

    python -m slr_plugin.adapters.lightly cifar10 [options]

pretrains, evaluates and draws; ``cifar10 --help`` lists its options, and settings for a CPU.

    python -m slr_plugin.adapters.lightly compare --data DIR --groups FILE --seeds 5 [options]

measures whether what you know of your images pays: with it, without it, and it alone.

    git clone https://github.com/lightly-ai/lightly
    python -m slr_plugin.adapters.lightly lightly/benchmarks/imagenet/resnet50/main.py --methods sane [mocov2 ...]
        --train-dir DIR/train --val-dir DIR/val --num-classes 1000 [the script's other arguments]

adds sane, sane_single, sane_multi, and each with _strong, to the script's methods, and to its options ``--groups FILE``
and ``--estimator FILE.npy`` of the recipe. On a CPU add ``--accelerator cpu --devices 1 --precision 32``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from slr_plugin.adapters._require import require
from slr_plugin.adapters.knowledge import read
from slr_plugin.adapters.lightly.methods import VARIANTS, register

RECIPES = {"cifar10": "recipe", "compare": "compare"}


def main(arguments: Sequence[str]) -> None:
    """Run a recipe, or a script of lightly's."""
    if not arguments or arguments[0].startswith("-"):
        print(__doc__)
        raise SystemExit(0 if arguments and arguments[0] in ("-h", "--help") else 2)
    command, *rest = arguments
    if command in RECIPES:
        require("lightly", "matplotlib", "tensorboard")
        import_module(f"slr_plugin.adapters.lightly.{RECIPES[command]}").main(rest)
    else:
        run_script(Path(command), rest)


def run_script(path: Path, arguments: Sequence[str]) -> None:
    """Import a benchmark script, add the methods, call its ``main``.

    Lightning starts DDP children with the command line of this process. As the script is imported, not executed, that
    stays ``python -m slr_plugin.adapters.lightly PATH/main.py ...``, and the children know the methods too.
    """
    if path.suffix != ".py" or not path.is_file():
        raise SystemExit(
            f"there is no script {path}; get lightly's with: git clone https://github.com/lightly-ai/lightly, and pass "
            "lightly/benchmarks/imagenet/resnet50/main.py"
        )
    sys.path.insert(0, str(path.resolve().parent))
    script = import_module(path.stem)
    known = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    known.add_argument("--groups", type=Path)
    known.add_argument("--estimator", type=Path)
    files, rest = known.parse_known_args(arguments)
    options = vars(script.parser.parse_args(rest))
    names = ["sane", *(name for name in options["methods"] or [] if name in VARIANTS)]
    register(script.METHODS, names, **read("--", files.groups, files.estimator))
    script.main(**options)


if __name__ == "__main__":
    main(sys.argv[1:])
