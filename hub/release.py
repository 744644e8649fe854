"""What is published: a model with its weights and the facts that its card tells."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import yaml
from safetensors import safe_open
from timm.data import resolve_data_config
from timm.data.loader import adapt_to_chs
from timm.models import load_state_dict
from torch import nn

from fdconv_zoo.checkpoint import describe_misfits, strip_prefixes
from fdconv_zoo.choice import named_dynamic_layers, named_fd_layers
from fdconv_zoo.integrity import check_safetensors
from fdconv_zoo.names import check_name
from fdconv_zoo.run_files import ARGS_FILE, CLASSES_FILE, START_FILE, SUMMARY_FILE

WEIGHT_FILES = tuple(f"{name}{suffix}" for name in ("model_best", "last") for suffix in (".safetensors", ".pth.tar"))


@dataclass(frozen=True)
class Release:
    """A model and its facts.

    Attributes:
        model: The model, weights loaded.
        name: Its timm name, with the tag if the weights are the tag's own.
        data_config: Preprocessing the weights were made for, as timm names it.
        trained: Whether the weights come from a run here, as opposed to a tag.
        base_model: Repository of the weights it started from, if any.
        license: Licence identifier, if known.
        datasets: Data sets of the training.
        results: Metrics in percent by name.
        recipe: Options of the training worth telling.
        start: What the training started from: `random`, `pretrained`, `file`, or None where nobody knows.
        label_names: Name of each output, if known.
    """

    model: nn.Module
    name: str
    data_config: dict[str, Any]
    trained: bool
    base_model: str | None = None
    license: str | None = None
    datasets: tuple[str, ...] = ()
    results: dict[str, float] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    start: str | None = None
    label_names: tuple[str, ...] = ()

    @property
    def is_fdconv(self) -> bool:
        """Whether any layer is an FDConv layer."""
        return next(named_fd_layers(self.model), None) is not None

    @property
    def method(self) -> str:
        """What its dynamic layers are, or an empty string."""
        return next((layer.method for _, layer in named_dynamic_layers(self.model)), "")


RECIPE_KEYS = ("epochs", "batch_size", "opt", "lr", "lr_base", "weight_decay", "sched", "seed")


def read_run(folder: Path, file: str | None) -> Release:
    """The model of a run of scripts/train.py.

    Args:
        folder: The run's directory, with args.yaml.
        file: Name of the weight file; None takes the best, else the last.

    Raises:
        ValueError: The directory or the weights are not what they should be.
    """
    arguments = folder / ARGS_FILE
    if not arguments.exists():
        raise ValueError(f"{folder} is no directory of scripts/train.py: it has no {ARGS_FILE}")
    options = yaml.safe_load(arguments.read_text(encoding="utf-8"))
    names = [name for name in ((file,) if file else WEIGHT_FILES) if (folder / name).exists()]
    if not names:
        raise ValueError(f"{folder} has none of {', '.join((file,) if file else WEIGHT_FILES)}")
    path = folder / names[0]
    arguments = {"num_classes": options.get("num_classes"), "in_chans": options.get("in_chans")}
    release = read_weights(path, options["model"], **arguments, **(options.get("model_kwargs") or {}))
    results = read_results(folder / SUMMARY_FILE, path)
    if release.model.num_classes <= 5:
        results.pop("top5", None)  # always right
    dataset = (options.get("dataset") or "").partition("/")[2]
    start = read_start(folder, options)
    pretrained = start["from"] == "pretrained"
    recipe = {key: options[key] for key in RECIPE_KEYS if options.get(key) is not None}
    if "name" in start:
        recipe["start"] = start["name"]
    return replace(
        release,
        data_config=preprocessing(release.model, options.get("in_chans"), options),
        base_model=start.get("repo", release.base_model) if pretrained else None,
        license=release.license if pretrained else None,
        start=start["from"],
        label_names=read_label_names(folder, release.model.num_classes),
        datasets=(dataset,) if dataset else (),
        results=results,
        recipe=recipe,
    )


def preprocessing(model: nn.Module, channels: int | None, options: dict[str, Any] | None = None) -> dict[str, Any]:
    """timm's configuration of the data, as a run with these options feeds a model of so many channels.

    Args:
        model: Its `pretrained_cfg` says what nothing else does.
        channels: Of its input, if not the usual ones.
        options: Of scripts/train.py.
    """
    config = resolve_data_config(options, model=model)
    channels = channels or config["input_size"][0]
    # As timm's loader does where there are others.
    mean, std = (adapt_to_chs(config[name], channels) for name in ("mean", "std"))
    return {**config, "input_size": (channels, *config["input_size"][1:]), "mean": mean, "std": std}


def read_start(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Where the run's first weights came from: start.json tells, or of runs without one their options."""
    path = folder / START_FILE
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    if options.get("initial_checkpoint"):
        return {"from": "file", "name": Path(options["initial_checkpoint"]).name}
    return {"from": "pretrained" if options.get("pretrained") else "random"}


def read_label_names(folder: Path, num_classes: int) -> tuple[str, ...]:
    """Names of the outputs from the run's classes.txt; empty if it has none, or for other outputs."""
    path = folder / CLASSES_FILE
    names = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return tuple(names) if len(names) == num_classes else ()


def read_results(summary: Path, weights: Path) -> dict[str, float]:
    """Accuracy of a weight file, from the row of summary.csv of the epoch that its header names; empty if unknown."""
    if weights.suffix != ".safetensors" or not summary.exists():
        return {}
    with safe_open(weights, "pt") as file:
        epoch = (file.metadata() or {}).get("epoch")
    with summary.open(newline="", encoding="utf-8") as file:
        row = next((row for row in csv.DictReader(file) if row["epoch"] == epoch), {})
    averaged = "eval_ema_top1" in row and weights.stem != "last"
    prefix = "eval_ema_" if averaged else "eval_"
    return {name: float(row[prefix + name]) for name in ("top1", "top5") if prefix + name in row}


def read_weights(path: Path, name: str, **model_args: Any) -> Release:
    """A model of the registry with weights from a local file; other than .safetensors only with `weights_only`.

    Raises:
        ValueError: timm has no such model, or the weights do not fit it.
    """
    check_name(name)
    if path.suffix == ".safetensors":
        check_safetensors(path)
    model = timm.create_model(name, **model_args)
    state = strip_prefixes(load_state_dict(str(path)), model)
    if misfits := describe_misfits(state, model):
        raise ValueError(f"{path} does not fit {name}: {misfits}")
    try:
        model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # of layers that were saved with other options
        raise ValueError(f"{path} does not fit {name}: {error}") from error
    cfg = model.pretrained_cfg
    return Release(
        model.eval(),
        name=cfg["architecture"],
        data_config=preprocessing(model, model_args.get("in_chans")),
        trained=True,
        base_model=cfg.get("hf_hub_id"),
        license=cfg.get("license"),
    )


def read_tag(name: str) -> Release:
    """A model of the registry with the weights of its tag, downloaded and verified.

    Raises:
        ValueError: timm has no such model.
    """
    check_name(name)
    model = timm.create_model(name, pretrained=True).eval()
    cfg = model.pretrained_cfg
    tag = cfg.get("tag") or ""
    return Release(
        model,
        name=f"{cfg['architecture']}.{tag}" if tag else cfg["architecture"],
        data_config=resolve_data_config(model=model),
        trained=False,
        base_model=cfg.get("hf_hub_id"),
        license=cfg.get("license"),
        datasets=("imagenet-1k",) if "in1k" in tag else (),
    )
