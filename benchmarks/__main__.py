"""``python -m benchmarks NAME``: one measurement, printed as a table and kept as JSON."""

import argparse
from pathlib import Path

from benchmarks import loss


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    names = parser.add_subparsers(dest="name", required=True)
    command = names.add_parser("loss", help="time and memory of forward and backward, beside the peers")
    command.add_argument("--device", default="cpu")
    command.add_argument("--rounds", type=int, default=15, help="paired repetitions (default: %(default)s)")
    command.add_argument("--precision", default="highest", choices=["highest", "high", "medium"])
    command.add_argument("--sizes", nargs="+", choices=sorted(loss.SIZES), default=list(loss.SIZES))
    command.add_argument("--output", type=Path, default=Path("outputs"), help="folder for loss.json and loss.md")
    arguments = parser.parse_args()
    if arguments.rounds < loss.SLOW_ROUNDS:
        parser.error(f"--rounds must be at least {loss.SLOW_ROUNDS}")
    loss.run(arguments.sizes, arguments.device, arguments.rounds, arguments.precision, arguments.output)


if __name__ == "__main__":
    main()
