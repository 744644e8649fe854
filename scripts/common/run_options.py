"""What a command takes from the run that left the weights: options of the model, and how images are prepared.

What the command line says counts more.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from timm.data import resolve_data_config
from torch import nn

from fdconv_zoo.run_files import ARGS_FILE

# Options of train.py that its validation goes by.
RUN_OPTIONS = ("img_size", "interpolation", "crop_pct", "mean", "std")


def adopt_model_options(args: argparse.Namespace) -> None:
    """Give a command, in place, the run's number of classes and other options of the model.

    Args:
        args: It has `num_classes`, `model_kwargs` and the `checkpoint`, in the folder of its run of train.py perhaps.

    Raises:
        ValueError: The run's args.yaml can't be read.
    """
    run = _run_options(args.checkpoint) if args.checkpoint else None
    if run is None:
        return
    if args.num_classes is None:
        args.num_classes = run.get("num_classes")
    channels = run.get("in_chans") or 3
    args.model_kwargs = {
        **({} if channels == 3 else {"in_chans": channels}),
        **(run.get("model_kwargs") or {}),
        **args.model_kwargs,
    }


def resolve_preprocessing(
    model: nn.Module,
    chosen: Mapping[str, Any],
    checkpoint: Path | None,
    channels: int | None = None,
    test_size: bool = False,
) -> dict[str, Any]:
    """Preprocessing for inference, as timm's loader takes it.

    Args:
        model: Its `pretrained_cfg` says what nothing else does.
        chosen: Options of the command by name; None is not chosen.
        checkpoint: The model's weights, if they are of a file. Beside one of train.py lies the run's args.yaml, and
            images are prepared as in the run's own validation.
        channels: Of the images; None for those that the model's `pretrained_cfg` tells.
        test_size: Take the size and crop that the model is to be tested with, where it has others than in training.
            They are not for a run's weights, whose training they say nothing of.

    Raises:
        ValueError: An args.yaml can't be read.
    """
    run = _run_options(checkpoint) if checkpoint else None
    options = {key: value for key, value in (run or {}).items() if key in RUN_OPTIONS}
    options |= {key: value for key, value in chosen.items() if value is not None}
    if channels is None:
        channels = ((getattr(model, "pretrained_cfg", None) or {}).get("input_size") or (None,))[0]
    if channels is not None:
        options["in_chans"] = channels
    config = resolve_data_config(options, model=model, use_test_size=test_size and run is None)
    return {**config, "input_size": (channels or config["input_size"][0], *config["input_size"][1:])}


def _run_options(checkpoint: Path) -> dict[str, Any] | None:
    """The options of the run of train.py that left a weight file, or None.

    Raises:
        ValueError: They can't be read.
    """
    path = checkpoint.parent / ARGS_FILE
    if not path.is_file():
        return None
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"can't read the options of the run in {path}: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"{path} has no options of a run; copy the weights to another folder to go without")
    return options
