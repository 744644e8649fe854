"""The runs of an experiment: every variant with every seed, one results file that each finished run is written to."""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import Dataset
from torchmetrics import MetricCollection
from tqdm import tqdm

from common.fit import fit
from common.recipes import parse_over_recipe
from common.record import run_record, write_json
from common.training_recipe import OPTIMISER, SCHEDULE, Recipe, add_recipe_options
from experiments.report import draw_curves, results_table
from fdconv_zoo.cost import count_parameters

RECIPES = Path(__file__).parents[1] / "configs" / "experiments"


def create_parser(
    name: str, description: str, examples: str, variants: Sequence[str], defaults: Sequence[str] | None = None
) -> argparse.ArgumentParser:
    """Command line that all experiments share.

    Args:
        name: Of the experiment; its recipe, results folder and script are called so.
        description: What it shows.
        examples: For the end of the help.
        variants: What there is to train.
        defaults: What is trained unasked, or None for all of it.
    """
    usual = list(variants if defaults is None else defaults)
    parser = argparse.ArgumentParser(
        prog=f"experiment_{name}.py",
        usage=f"experiment_{name}.py [options] [keys of the recipe: --lr 0.1 --batch-size 64 ...]",
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--variants", nargs="+", default=usual, choices=variants, metavar="NAME",
        help=f"what to train, of {', '.join(variants)} (default: {', '.join(usual) if defaults else 'all'})",
    )  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda where there is one"
    )
    parser.add_argument(
        "--config", type=Path, default=RECIPES / f"{name}.yaml", metavar="FILE",
        help=f"recipe: a yaml file of options (default: scripts/configs/experiments/{name}.yaml)",
    )  # fmt: skip
    parser.add_argument(
        "--results-file", type=Path, default=Path("results", name, "results.json"), metavar="FILE",
        help="written after each run; runs that are in it are not repeated (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--save-models", action="store_true", help="weights of each run, beside the results file")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="picture (default: the results file with .png)")
    recipe = parser.add_argument_group("recipe", "They override the recipe file, and mean what they mean to train.py.")
    add_recipe_options(recipe, "batch_size", "channels_last", "smoothing", *OPTIMISER, *SCHEDULE)
    return parser


def parse_args(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line over the recipe file; what can't be read ends the program with usage.

    Args:
        parser: Of :func:`create_parser`, with the experiment's own options.
        argv: Command line.

    Raises:
        ValueError: There are options that the experiment would ignore.
    """
    _, rest = parser.parse_known_args(argv)
    if rest:
        ignored = sorted(word.partition("=")[0].strip("-").replace("-", "_") for word in rest if word.startswith("-"))
        raise ValueError(f"options that this experiment has no use for: {', '.join(ignored or rest)}")
    return parse_over_recipe(parser, argv)


def open_results(path: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Read the results of earlier runs, or start without any.

    Args:
        path: Results file, which may not exist yet.
        facts: What all runs of a file have in common: data and settings.

    Returns:
        The facts and a list `runs`.

    Raises:
        ValueError: The file can't be read, or its runs had other data or settings.
    """
    facts = json.loads(json.dumps(facts))  # tuples are lists in the file
    if not path.exists():
        return {**facts, "runs": []}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        runs = found.pop("runs")
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no results file: {error}") from error
    different = []
    for part in facts:
        was, now = found.get(part, {}), facts[part]
        different += [
            f"{key} {was.get(key)}, not {now.get(key)}" for key in {**was, **now} if was.get(key) != now.get(key)
        ]
    if different:
        raise ValueError(f"{path} holds runs with {'; '.join(different)}: choose another --results-file")
    return {**facts, "runs": runs}


def run_all(
    args: argparse.Namespace,
    results: dict[str, Any],
    *,
    create_model: Callable[[str, int], nn.Module],
    adapt: Callable[[str, Recipe], Recipe],
    train_set: Dataset,
    test_set: Dataset,
    metrics: MetricCollection,
    describe: Callable[[str, int, nn.Module], dict[str, Any]],
    command: str,
) -> None:
    """Train what the results lack, seed after seed, and write the results file after each run.

    Raises:
        RuntimeError: A loss is not finite.
    """
    done = {(run["variant"], run["seed"]) for run in results["runs"]}
    missing = [(variant, seed) for seed, variant in product(args.seeds, args.variants) if (variant, seed) not in done]
    recipe = Recipe.of(args)
    updates = recipe.epochs * (len(train_set) // recipe.batch_size)
    with tqdm(total=len(missing) * updates, unit="update", smoothing=0.02, mininterval=2, file=sys.stderr) as bar:
        for variant, seed in missing:

            def report(epoch: int, loss: float, name: str = f"{variant}, seed {seed}") -> None:
                bar.set_description(f"{name}, epoch {epoch}, loss {loss:.3f}", refresh=False)
                bar.update()

            model, own = create_model(variant, seed).to(args.device), adapt(variant, recipe)
            start, cpu_start = time.perf_counter(), time.process_time()
            training = fit(
                model,
                train_set,
                test_set,
                own,
                seed=seed,
                metrics=lambda: metrics.clone().to(args.device),
                on_update=report,
            )
            curve = list(training)
            results["runs"].append(
                {
                    "variant": variant,
                    "seed": seed,
                    "parameters": count_parameters(model),
                    "wall_seconds": round(time.perf_counter() - start, 1),
                    "cpu_seconds": round(time.process_time() - cpu_start, 1),
                    **run_record(command, args.device, args.threads),
                    "epochs": curve,
                }
                | ({"temperature": [*own.temperature, own.temperature_epochs]} if own.temperature else {})
                | describe(variant, seed, model)
            )
            if args.save_models:
                save_file(model.state_dict(), args.results_file.with_name(f"{variant}_{seed}.safetensors"))
            write_json(args.results_file, results)
            last = ", ".join(f"{name} {value:.4f}" for name, value in curve[-1].items() if name != "epoch")
            tqdm.write(f"{variant}, seed {seed}: {last}", file=sys.stderr)


def experiment(
    args: argparse.Namespace,
    facts: dict[str, Any],
    *,
    create_model: Callable[[str, int], nn.Module],
    train_set: Dataset,
    test_set: Dataset,
    metrics: MetricCollection,
    argv: Sequence[str],
    adapt: Callable[[str, Recipe], Recipe] = lambda variant, recipe: recipe,
    describe: Callable[[str, int, nn.Module], dict[str, Any]] = lambda variant, seed, model: {},
) -> None:
    """Make the runs that the results file lacks, then print the table and draw the curves.

    Args:
        args: Of :func:`parse_args`.
        facts: Data and settings that the runs of one results file have in common.
        create_model: Model of a variant and a seed.
        train_set: Images to train on.
        test_set: Images to evaluate on.
        metrics: After each epoch; shares, so that the table gives percent.
        argv: Command line, for the record.
        adapt: The recipe of a variant, from that of all: what its method wants besides.
        describe: What else to write down of a variant and a seed, given the trained model.

    Raises:
        ValueError: The results file is of another experiment.
        RuntimeError: A loss is not finite.
    """
    torch.set_num_threads(args.threads)
    results = open_results(args.results_file, facts)
    command = shlex.join([f"experiment_{facts['settings']['experiment']}.py", *argv])
    try:
        run_all(
            args,
            results,
            create_model=create_model,
            adapt=adapt,
            train_set=train_set,
            test_set=test_set,
            metrics=metrics,
            describe=describe,
            command=command,
        )
    except KeyboardInterrupt:
        sys.exit(f"\ninterrupted: finished runs are in {args.results_file}, the same command makes the missing ones")
    finally:
        if results["runs"]:
            print(results_table(results["runs"], list(metrics)))
            picture = args.plot or args.results_file.with_suffix(".png")
            draw_curves(results["runs"], list(metrics), picture)
            print(f"\nall figures: {args.results_file}, curves: {picture}", file=sys.stderr)
