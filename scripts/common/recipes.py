"""Recipe files: options of a command in yaml, under the command line and written by a run."""

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm.utils
import yaml


def recipe_tokens(recipe: dict[str, Any], parser: argparse.ArgumentParser) -> list[str]:
    """Spell a recipe as command-line tokens, so that both go through the same checks.

    Args:
        recipe: Option names (underscores, as in ``args.yaml``) and values; ``None`` leaves the default.
        parser: Parser that the tokens are for.

    Raises:
        ValueError: Keys that are no options; the message lists them with options of almost the same name, and all
            options if one has none.
    """
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    unknown = sorted(str(key) for key in recipe if key not in actions)
    if unknown:
        close = {key: difflib.get_close_matches(key, actions, n=3, cutoff=0.75) for key in unknown}
        told = ", ".join(f"{key} ({' or '.join(names)}?)" if names else key for key, names in close.items())
        there = "" if all(close.values()) else f"; there are {', '.join(sorted(actions))}"
        raise ValueError(f"unknown options: {told}{there}")
    tokens: list[str] = []
    for key, value in recipe.items():
        action = actions[key]
        option = next(option for option in action.option_strings if option.startswith("--"))
        if value is None:
            continue
        if isinstance(action, argparse.BooleanOptionalAction):
            if not isinstance(value, bool):
                raise ValueError(f"{key} is {value!r}, allowed are true and false")
            tokens.append(option if value else option.replace("--", "--no-", 1))
        elif isinstance(action, timm.utils.ParseKwargs):
            tokens += [option, *(f"{name}={entry}" for name, entry in value.items())]
        elif isinstance(value, list):
            tokens += [option, *map(str, value)]
        else:
            tokens.append(f"{option}={value}")
    return tokens


def parse_over_recipe(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line over the recipe file that its ``--config`` names, if any; unusable input ends the program.

    Args:
        parser: It has an option ``--config``.
        argv: Command line; ``None`` for the program's own.
    """
    config = parser.parse_args(argv).config
    loaded: dict[str, Any] = {}
    recipe: list[str] = []
    if config is not None:
        try:
            loaded = yaml.safe_load(config.read_text()) or {}
            if not isinstance(loaded, dict):
                raise ValueError("not a mapping of options to values")
            recipe = recipe_tokens(loaded, parser)
        except (OSError, ValueError, yaml.YAMLError) as error:
            parser.error(f"--config {config}: {error}")
    args = parser.parse_args([*recipe, *(sys.argv[1:] if argv is None else argv)])
    if os.environ.get("RANK", "0") == "0":
        _tell_lost(loaded, args, parser)
    return args


def _tell_lost(recipe: dict[str, Any], args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Print what the command line, which replaces whole options, leaves out of a recipe's options of names and values.

    One with nothing after it is meant to leave out all.

    Args:
        recipe: As in its file.
        args: What came of it and of the command line.
        parser: That they are of.
    """
    for action in parser._actions:
        if isinstance(action, timm.utils.ParseKwargs) and (found := getattr(args, action.dest)):
            named = recipe.get(action.dest) or {}
            lost = ", ".join(f"{key}={value}" for key, value in named.items() if str(key) not in found)
            if lost:
                told = f"{action.option_strings[-1]} replaces that of {args.config}, which had {lost}"
                print(f"{told}: give it again to keep it", file=sys.stderr)


def save_args(args: argparse.Namespace, path: Path) -> None:
    """Write the arguments as a recipe file that ``--config`` reads back."""
    recipe = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in vars(args).items()
        if key not in ("config", "resume")
    }
    path.write_text(yaml.safe_dump(recipe))
