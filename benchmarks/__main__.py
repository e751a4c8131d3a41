"""``python -m benchmarks NAME``: one measurement, printed as tables and kept as JSON."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from benchmarks import clip, groups, loss, operations, processes, scaling, step, tiles
from benchmarks.representations import estimators, harness, labelled, report
from benchmarks.representations.budgets import BUDGETS
from benchmarks.representations.data import load
from benchmarks.representations.methods import METHODS
from benchmarks.representations.report import STUDIES


def add_timing(parser: argparse.ArgumentParser, rounds: int) -> None:
    """What the benchmarks of time and memory share."""
    add = parser.add_argument
    add("--device", default="cpu")
    add("--precision", default="highest", choices=["highest", "high", "medium"])
    add_rounds(parser, rounds)


def add_rounds(parser: argparse.ArgumentParser, rounds: int) -> None:
    """How often, and where to."""
    add = parser.add_argument
    add("--rounds", type=int, default=rounds, help="repetitions (default: %(default)s)")
    add("--output", type=Path, default=Path("outputs"), help="folder for the tables (default: %(default)s)")


def add_loss(parser: argparse.ArgumentParser) -> None:
    """Time and memory of the loss."""
    add_timing(parser, rounds=15)
    usual = [name for name in loss.SIZES if name not in loss.HUGE]
    parser.add_argument("--sizes", nargs="+", choices=sorted(loss.SIZES), default=usual)
    parser.add_argument("--compile", action="store_true", help="ours and lightly's under torch.compile, too")
    parser.add_argument(
        "--load", type=int, default=0, metavar="N", help="measure again beside N busy processes (default: %(default)s)"
    )

    def run(args: argparse.Namespace) -> None:
        if args.rounds < loss.SLOW_ROUNDS:
            parser.error(f"--rounds must be at least {loss.SLOW_ROUNDS}")
        if args.load < 0:
            parser.error(f"--load must not be negative, got {args.load}")
        loss.run(args.sizes, args.device, args.rounds, args.precision, args.compile, args.load, args.output)

    parser.set_defaults(run=run)


def add_operations(parser: argparse.ArgumentParser) -> None:
    """Operations of the loss."""
    parser.add_argument("--sizes", nargs="+", choices=sorted(loss.SIZES), default=list(operations.DEFAULT))
    parser.add_argument("--output", type=Path, default=Path("outputs"), help="default: %(default)s")
    parser.set_defaults(run=lambda args: operations.run(args.sizes, args.output))


def add_clip(parser: argparse.ArgumentParser) -> None:
    """Images and texts."""
    add_timing(parser, rounds=5)
    parser.add_argument("--pairs", nargs="+", type=int, default=list(clip.PAIRS), help="default: %(default)s")
    parser.add_argument("--cpu-time", action="store_true", help="of one thread, where other processes are busy too")

    def run(args: argparse.Namespace) -> None:
        clip.run(args.pairs, args.device, args.rounds, args.precision, args.cpu_time, args.output)

    parser.set_defaults(run=run)


def add_groups(parser: argparse.ArgumentParser) -> None:
    """Labels from groups."""
    add_timing(parser, rounds=5)
    parser.add_argument("--images", nargs="+", type=int, default=list(groups.IMAGES), help="default: %(default)s")
    parser.set_defaults(run=lambda args: groups.run(args.images, args.device, args.rounds, args.precision, args.output))


def add_scaling(parser: argparse.ArgumentParser) -> None:
    """Growth of both."""
    add_timing(parser, rounds=5)
    parser.add_argument("--axes", nargs="+", choices=scaling.AXES, default=list(scaling.AXES))
    parser.set_defaults(run=lambda args: scaling.run(args.axes, args.device, args.rounds, args.precision, args.output))


def add_step(parser: argparse.ArgumentParser) -> None:
    """The whole step."""
    add_timing(parser, rounds=5)
    parser.add_argument("--workloads", nargs="+", choices=step.WORKLOADS, default=list(step.WORKLOADS))
    parser.set_defaults(
        run=lambda args: step.run(args.workloads, args.device, args.rounds, args.precision, args.output)
    )


def add_tiles(parser: argparse.ArgumentParser) -> None:
    """Tiles of other sizes."""
    add_timing(parser, rounds=15)
    parser.set_defaults(run=lambda args: tiles.run(args.device, args.rounds, args.precision, args.output))


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Several processes."""
    add_rounds(parser, rounds=3)
    parser.set_defaults(run=lambda args: processes.run(args.rounds, args.output))


def add_representations(parser: argparse.ArgumentParser) -> None:
    """The comparison of methods."""
    add = parser.add_argument
    add(
        "--data",
        type=Path,
        metavar="DIR",
        help="images as DIR/train/<class>/* and DIR/test/<class>/*, or MNIST's files",
    )
    add("--budget", choices=sorted(BUDGETS), default="cpu", help="default: %(default)s")
    add("--studies", nargs="+", choices=STUDIES, help="tables to fill (default: all of the budget)")
    add("--methods", nargs="+", choices=METHODS, metavar="METHOD", help=f"instead of a study's: {', '.join(METHODS)}")
    add("--seeds", type=int, default=3, help="runs of each method (default: %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    add("--jobs", type=int, help="runs at a time (default: one per CPU core, or eight on a GPU)")
    add("--results", type=Path, default=Path("results/representations"), help="records (default: %(default)s)")
    add("--cache", type=Path, default=Path("outputs/views"), help="for views, 2 GB a seed (default: %(default)s)")
    add("--documents", type=Path, nargs="+", default=[], help="Markdown files whose marked tables are replaced")
    add("--only-report", action="store_true", help="train nothing, draw what there is")

    def run(args: argparse.Namespace) -> None:
        results = args.results / args.budget
        studies = args.studies or [name for name, study in STUDIES.items() if args.budget in study.budgets]
        if not args.only_report:
            if args.data is None or not any(args.data.glob("train*")):
                parser.error(
                    f"--data must hold train/<class>/* and test/<class>/*, or MNIST's train-* and t10k-*, got "
                    f"{args.data}"
                )
            methods = args.methods or dict.fromkeys(name for study in studies for name in STUDIES[study].methods)
            jobs = args.jobs or (8 if args.device != "cpu" else os.cpu_count() or 1)
            harness.run(list(methods), args.seeds, args.budget, args.data, args.device, jobs, results, args.cache)
        print(report.write(results))
        tables = report.sections(results)
        marked = {f"{args.budget}/{name}": text for name, text in tables.items()}
        for document in args.documents:
            document.write_text(report.fill(document.read_text(), marked))

    parser.set_defaults(run=run)


def add_estimators(parser: argparse.ArgumentParser) -> None:
    """The comparison of estimators."""
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR", required=True, help="as for representations")
    add("--budget", choices=sorted(BUDGETS), default="cpu", help="default: %(default)s")
    add("--method", choices=METHODS, default="mm", metavar="METHOD", help="trains the network (default: %(default)s)")
    add("--cache", type=Path, default=Path("outputs/views"), help="default: %(default)s")

    def run(args: argparse.Namespace) -> None:
        budget = BUDGETS[args.budget]
        print(estimators.compare(args.method, 0, budget, *load(args.data, budget, torch.device("cpu")), args.cache))

    parser.set_defaults(run=run)


def add_labelled(parser: argparse.ArgumentParser) -> None:
    """What a few labels are worth."""
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR", help="as for representations; without it, draw what there is")
    add("--seeds", type=int, default=5, help="runs of each method (default: %(default)s)")
    add("--cache", type=Path, default=Path("outputs/views"), help="default: %(default)s")
    add("--results", type=Path, default=Path("results"), help="records (default: %(default)s)")

    def run(args: argparse.Namespace) -> None:
        results = args.results / "labelled"
        if args.data:
            known = args.results / "representations" / labelled.BUDGET
            labelled.run(args.seeds, args.data, known, results, args.cache)
        page = results / "README.md"
        page.write_text(report.fill(page.read_text(), {"labelled": labelled.table(results)}))

    parser.set_defaults(run=run)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    names = parser.add_subparsers(required=True)
    add_loss(names.add_parser("loss", help="time and memory of forward and backward, beside the peers"))
    add_operations(names.add_parser("operations", help="how many operations the loss takes, beside the peers"))
    add_clip(names.add_parser("clip", help="the loss of images and texts, beside open_clip's"))
    add_groups(names.add_parser("groups", help="labels from known groups, beside SupCon's dense losses"))
    add_scaling(names.add_parser("scaling", help="how time and memory grow with keys, rows and dimension"))
    add_step(names.add_parser("step", help="where the time of a whole training step goes"))
    add_tiles(names.add_parser("tiles", help="the pass over the keys in tiles of other sizes"))
    add_processes(names.add_parser("processes", help="what gathering over processes costs"))
    add_representations(names.add_parser("representations", help="accuracy of encoders trained with each method"))
    add_labelled(names.add_parser("labelled", help="what encoders are worth to who has 250 labels"))
    add_estimators(names.add_parser("estimators", help="how well ways to weigh the other keys see classes"))
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
