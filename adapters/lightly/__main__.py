"""Train SANE with lightly: by the recipe for CIFAR-10, or by a benchmark script of a lightly clone, unmodified.

    python -m slr_plugin.adapters.lightly cifar10 [options]

pretrains, evaluates and draws; ``cifar10 --help`` lists its options, and settings for a CPU.

    python -m slr_plugin.adapters.lightly compare --data DIR --groups FILE --seeds 5 [options]

measures whether what you know of your images pays: with it, without it, and it alone.

    git clone https://github.com/lightly-ai/lightly
    python -m slr_plugin.adapters.lightly lightly/benchmarks/imagenet/resnet50/main.py --methods sane [mocov2 ...]
        --train-dir DIR/train --val-dir DIR/val --num-classes 1000 [the script's other arguments]

adds sane, sane_single, sane_multi, and each with _strong, to the script's methods. On a CPU add
``--accelerator cpu --devices 1 --precision 32``. The script's own --help follows its path. SANE's labels take what is
known of the training images from ``--groups FILE`` or ``--estimator FILE.npy``, as in the recipe.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from slr_plugin.adapters._require import require


def main(arguments: Sequence[str]) -> None:
    """Run the recipe; or import the script as a module, add the methods, call its ``main``.

    Lightning starts DDP children with the command line of this process. As the script is imported, not executed, that
    stays ``python -m slr_plugin.adapters.lightly PATH/main.py ...``, and the children know the methods too.
    """
    if not arguments or arguments[0].startswith("-"):
        print(__doc__)
        raise SystemExit(0 if arguments and arguments[0] in ("-h", "--help") else 2)
    if arguments[0] in ("cifar10", "compare"):
        require("lightly", "matplotlib", "tensorboard", "tqdm")
        name = "recipe" if arguments[0] == "cifar10" else "compare"
        importlib.import_module(f"slr_plugin.adapters.lightly.{name}").main(arguments[1:])
        return
    script = load(Path(arguments[0]))
    from slr_plugin.adapters.knowledge import read
    from slr_plugin.adapters.lightly.methods import VARIANTS, register

    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in ("--estimator", "--groups"):
        own.add_argument(option, type=Path)
    files, rest = own.parse_known_args(arguments[1:])
    options = vars(script.parser.parse_args(rest))
    methods = options.get("methods") or []
    try:
        register(script.METHODS, ["sane", *(name for name in methods if name in VARIANTS)], **read("--", **vars(files)))
    except ValueError as error:
        script.parser.error(str(error))
    if unknown := [name for name in methods if name not in script.METHODS]:
        known = ", ".join({**script.METHODS, **VARIANTS})
        script.parser.error(f"--methods must be among {known}, got {', '.join(unknown)}")
    script.main(**options)


def load(path: Path) -> ModuleType:
    """The script as a module, importing its neighbours as if it had been run."""
    spec = importlib.util.spec_from_file_location(path.stem, path) if path.is_file() else None
    if spec is None or spec.loader is None:  # or no .py
        raise SystemExit(
            f"there is no script {path}; get lightly's with: git clone https://github.com/lightly-ai/lightly, and pass "
            "lightly/benchmarks/imagenet/resnet50/main.py"
        )
    sys.path.insert(0, str(path.resolve().parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # for pickle: what the script defines belongs to this name
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main(sys.argv[1:])
