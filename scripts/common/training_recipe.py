"""The recipe of a training: images a batch, loss, optimiser and schedule, declared once for all commands."""

import argparse
import difflib
from dataclasses import dataclass, field, fields
from typing import Any

import timm.optim
import timm.utils

OPTIMISER = (
    "opt", "opt_eps", "opt_betas", "momentum", "weight_decay", "opt_kwargs", "clip_grad", "clip_mode", "layer_decay",
    "static_lr_scale", "modulation_lr_scale", "modulation_weight_decay", "modulation_frozen_epochs", "clip_modulation",
)  # fmt: skip
SCHEDULE = (
    "epochs", "lr", "lr_base", "lr_base_size", "lr_base_scale", "sched", "warmup_epochs", "warmup_lr", "min_lr",
    "decay_epochs", "decay_milestones", "decay_rate", "cooldown_epochs", "temperature", "temperature_epochs",
)  # fmt: skip
# Schedules of timm's that come to an end, after which epochs of a cool-down follow.
ENDING = ("cosine", "tanh", "poly", "wsd", "rsqrt")


def _option(meaning: str, *flags: str, **argument: Any) -> dict[str, Any]:
    """What `add_argument` wants to know of a field, besides its name and its default."""
    return {"flags": flags, "help": meaning, **argument}


def check_optimizer(name: str) -> None:
    """Refuse an optimiser that timm does not have.

    Raises:
        ValueError: Names close matches.
    """
    known = timm.optim.list_optimizers()
    if name.lower().removeprefix("lookahead_") not in known:
        close = difflib.get_close_matches(name.lower(), known, n=3)
        raise ValueError(f"unknown optimiser {name}" + (f", did you mean {', '.join(close)}?" if close else ""))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is trained, whatever the model and the data.

    Raises:
        ValueError: A number is out of its range, or timm has no such optimiser.
    """

    batch_size: int = field(default=128, metadata=_option("images a process and a backward pass", "-b", type=int))
    channels_last: bool = field(
        default=False, metadata=_option("memory layout that suits tensor cores", action=argparse.BooleanOptionalAction)
    )
    smoothing: float = field(default=0.0, metadata=_option("label smoothing", type=float))

    opt: str = field(default="sgd", metadata=_option("any of timm.optim.list_optimizers()"))
    opt_eps: float | None = field(default=None, metadata=_option("epsilon (default: the optimiser's)", type=float))
    opt_betas: list[float] | None = field(
        default=None, metadata=_option("betas (default: the optimiser's)", type=float, nargs="+")
    )
    momentum: float = field(default=0.9, metadata=_option("of optimisers that have one", type=float))
    weight_decay: float = field(default=1e-4, metadata=_option("biases and norms are never decayed", type=float))
    opt_kwargs: dict[str, Any] = field(
        default_factory=dict,
        metadata=_option(
            "further arguments of the optimiser", nargs="*", action=timm.utils.ParseKwargs, metavar="NAME=VALUE"
        ),
    )
    clip_grad: float | None = field(default=None, metadata=_option("gradient clipping value", type=float))
    clip_mode: str = field(default="norm", metadata=_option("what is clipped", choices=["norm", "value", "agc"]))
    layer_decay: float | None = field(
        default=None, metadata=_option("factor of the rate from each layer group to the one below", type=float)
    )
    static_lr_scale: float = field(
        default=1.0,
        metadata=_option("factor of the rate of all parameters but FDConv's modulation and the classifier", type=float),
    )
    modulation_lr_scale: float | None = field(
        default=None, metadata=_option("factor of the rate of FDConv's modulation (default: none, 1)", type=float)
    )
    modulation_weight_decay: float | None = field(
        default=None, metadata=_option("of the modulation's matrices (default: --weight-decay)", type=float)
    )
    modulation_frozen_epochs: float | None = field(
        default=None, metadata=_option("epochs that the modulation is frozen for at first (default: none)", type=float)
    )
    clip_modulation: float | None = field(
        default=None,
        metadata=_option("clips the modulation's gradients apart from the others (default: all together)", type=float),
    )

    epochs: int = field(default=100, metadata=_option("epochs of the schedule, warm-up included", type=int))
    lr: float | None = field(default=None, metadata=_option("learning rate; overrides --lr-base", type=float))
    lr_base: float = field(
        default=0.1, metadata=_option("learning rate at --lr-base-size images an update", type=float)
    )
    lr_base_size: int = field(default=256, metadata=_option("images an update that --lr-base is for", type=int))
    lr_base_scale: str = field(default="linear", metadata=_option("how the rate follows", choices=["linear", "sqrt"]))
    sched: str = field(
        default="cosine",
        metadata=_option(
            "timm schedule, stepped each update",
            choices=["cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant"],
        ),
    )
    warmup_epochs: float = field(default=5, metadata=_option("epochs of linear warm-up", type=float))
    warmup_lr: float = field(default=1e-5, metadata=_option("rate that the warm-up starts from", type=float))
    min_lr: float = field(default=0.0, metadata=_option("rate that the schedule ends with", type=float))
    decay_epochs: float | None = field(
        default=None, metadata=_option("step length, or length of the wsd decay", type=float)
    )
    decay_milestones: list[int] = field(
        default_factory=lambda: [90, 180, 270], metadata=_option("of multistep", type=int, nargs="+")
    )
    decay_rate: float = field(default=0.1, metadata=_option("factor of each step", type=float))
    cooldown_epochs: int = field(
        default=0, metadata=_option("epochs at --min-lr after a schedule that ends there", type=int)
    )

    # None by default: older results files know nothing of it.
    temperature: list[float] | None = field(
        default=None,
        metadata=_option(
            "first and last temperature of DY-Conv, ODConv (30 1) or KernelWarehouse (1 0)",
            type=float,
            nargs=2,
            metavar=("START", "END"),
        ),
    )
    temperature_epochs: float | None = field(
        default=None, metadata=_option("epochs from the first temperature to the last", type=float)
    )

    def __post_init__(self) -> None:
        for name in ("batch_size", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, it must be at least 1")
        if (self.temperature is None) != (self.temperature_epochs is None):
            raise ValueError("temperature and temperature_epochs go together")
        if self.temperature_epochs is not None and self.temperature_epochs <= 0:
            raise ValueError(f"temperature_epochs is {self.temperature_epochs}, it must be above 0")
        if self.cooldown_epochs and self.sched not in ENDING:
            raise ValueError(
                f"cooldown_epochs is {self.cooldown_epochs}, but the schedule {self.sched} has no end for them to come "
                f"after, as {', '.join(ENDING)} have: add them to the epochs"
            )
        # Weights load at the last temperature: a run that ends at another saves another function than it measures.
        if self.temperature_epochs is not None and self.temperature_epochs > self.epochs + self.cooldown_epochs:
            raise ValueError(
                f"temperature_epochs is {self.temperature_epochs:g}, but the run has "
                f"{self.epochs + self.cooldown_epochs} epochs: it must end at the last temperature"
            )
        check_optimizer(self.opt)

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Recipe":
        """The recipe among the arguments of a command, which has all options of :func:`add_recipe_options`."""
        return cls(**{each.name: getattr(args, each.name) for each in fields(cls)})


def add_recipe_options(group: argparse._ArgumentGroup, *names: str) -> None:
    """Give a command the options of these fields of a recipe, in this order."""
    declared, defaults = {each.name: each.metadata for each in fields(Recipe)}, Recipe()
    for name in names:
        argument = dict(declared[name])
        flags = [*argument.pop("flags"), f"--{name.replace('_', '-')}"]
        group.add_argument(*flags, default=getattr(defaults, name), **argument)
