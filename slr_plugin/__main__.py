"""Run a command of an adapter: ``slr-plugin lightly ...`` is ``python -m slr_plugin.adapters.lightly ...``.

    slr-plugin lightly cifar10|compare|SCRIPT.py ...   SANE with lightly
    slr-plugin solo-learn SCRIPT.py ...                a script of solo-learn, with SANE among its methods
    slr-plugin export CHECKPOINT OUTPUT ...            the backbone of a checkpoint

Each tells its options after ``--help``.
"""

import runpy
import sys

COMMANDS = {
    "lightly": "slr_plugin.adapters.lightly",
    "solo-learn": "slr_plugin.adapters.solo_learn",
    "export": "slr_plugin.adapters.export",
}


def main() -> None:
    """Run the module in this process, as ``python -m`` does: Lightning starts DDP's further processes by its name."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        print(__doc__)
        raise SystemExit(0 if name in ("-h", "--help") else 2)
    del sys.argv[1]
    runpy.run_module(COMMANDS[name], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
