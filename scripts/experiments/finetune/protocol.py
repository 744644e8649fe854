"""The protocol: which runs there are in each phase, with which settings, and where their files are."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from common.training_recipe import Recipe

PHASES = ("tune", "search", "claim")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One network of the comparison.

    Attributes:
        layer: Keyword arguments of FDConv2d; None leaves the network static.
        fourier: Static layers whose parameters are spectra: FDConv with its gates frozen at 1.
        recipe: What differs from the recipe that all share.
        as_long: Trains for as much time as `fdconv`, by the task's `time_ratio`.
        rate_of: Variant whose rate it takes; empty for one tuned for itself.
    """

    layer: dict[str, Any] | None = None
    fourier: bool = False
    recipe: dict[str, Any] = field(default_factory=dict)
    as_long: bool = False
    rate_of: str = ""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Runs of a phase of a task: each variant with each fold and each seed.

    Attributes:
        variants: Names.
        seeds: Of heads, order and augmentation.
        folds: Of the task.
    """

    variants: list[str]
    seeds: list[int]
    folds: list[int] = field(default_factory=lambda: [0])


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """A task's settings.

    Attributes:
        data: `elpv`, `fashion` or `landcover`.
        options: Keyword arguments of its class.
        recipe: What differs from the recipe that all tasks share.
        time_ratio: Time of an update of `fdconv` over one of `static`.
        choice_epochs: Epochs of runs that choose a rate or a variant; None for those of a claim.
        rates: Its grid of learning rates where it is not that of all; an extended one, for example.
        rates_of: Task whose chosen rates it takes; empty for its own.
        tune: Runs that choose rates, each with every rate of the grid.
        search: Runs that choose a variant.
        claim: Runs that figures are told of.
    """

    data: str
    options: dict[str, Any]
    recipe: dict[str, Any]
    time_ratio: float = 1
    choice_epochs: int | None = None
    rates: list[float] | None = None
    rates_of: str = ""
    tune: Plan | None = None
    search: Plan | None = None
    claim: Plan | None = None


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training.

    Attributes:
        task: Name of the task.
        phase: `tune`, `search` or `claim`.
        variant: Name of the variant.
        fold: What is tested on.
        seed: Of head, order and augmentation.
        recipe: With its rate.
    """

    task: str
    phase: str
    variant: str
    fold: int
    seed: int
    recipe: Recipe

    @property
    def name(self) -> str:
        """Name of its results file, in the folder of task and phase."""
        rate = f"-lr{self.recipe.lr:g}" if self.phase == "tune" else ""
        return f"{self.variant}{rate}-fold{self.fold}-seed{self.seed}"


@dataclass(frozen=True)
class Protocol:
    """All of it, as read from the yaml file.

    Attributes:
        recipe: Settings that all runs share.
        rates: Grid of learning rates.
        variants: By name.
        tasks: By name.
        folder: Of the results.
    """

    recipe: dict[str, Any]
    rates: list[float]
    variants: dict[str, Variant]
    tasks: dict[str, TaskSettings]
    folder: Path

    @classmethod
    def read(cls, path: Path, folder: Path) -> "Protocol":
        """Read the file.

        Raises:
            ValueError: A key is unknown, or a plan names a variant that there is not.
        """
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        try:
            variants = {name: Variant(**options) for name, options in content["variants"].items()}
            tasks = {}
            for name, options in content["tasks"].items():
                plans = {phase: Plan(**options.pop(phase)) for phase in PHASES if phase in options}
                tasks[name] = TaskSettings(**options, **plans)
            protocol = cls(content["recipe"], content["rates"], variants, tasks, folder)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error
        for name, task in tasks.items():
            for phase in PHASES:
                plan = getattr(task, phase)
                unknown = set(plan.variants if plan else ()) - set(variants)
                if unknown:
                    raise ValueError(f"{path}: {name}, {phase}: no variants {', '.join(sorted(unknown))}")
        return protocol

    def path(self, run: Run) -> Path:
        """File of a run."""
        return self.folder / run.task / run.phase / f"{run.name}.json"

    def runs(self, task: str, phase: str) -> Iterator[Run]:
        """Runs of a phase, in the order in which they are made: seed after seed, so that what is cut off is whole.

        Raises:
            ValueError: A rate is to be taken that has not been chosen yet.
        """
        plan: Plan | None = getattr(self.tasks[task], phase)
        if plan is None:
            return
        for seed in plan.seeds:
            for fold in plan.folds:
                for variant in plan.variants:
                    rates = self.grid(task) if phase == "tune" else [self.chosen_rate(task, variant, fold)]
                    for rate in rates:
                        recipe = self.run_recipe(task, phase, variant, rate)
                        yield Run(task=task, phase=phase, variant=variant, fold=fold, seed=seed, recipe=recipe)

    def grid(self, task: str) -> list[float]:
        """Learning rates that a task tunes."""
        own = self.tasks[task].rates
        return self.rates if own is None else own

    def run_recipe(self, task: str, phase: str, variant: str, rate: float) -> Recipe:
        """Recipe of a run: the shared one, what the task changes, what the variant changes, and the rate."""
        settings, chosen = self.tasks[task], self.variants[variant]
        options = {**self.recipe, **settings.recipe, **chosen.recipe, "lr": rate}
        if phase != "claim" and settings.choice_epochs is not None:
            options["epochs"] = settings.choice_epochs
        if chosen.as_long:
            options["epochs"] = round(options["epochs"] * settings.time_ratio)
        return Recipe(**options)

    def chosen_rate(self, task: str, variant: str, fold: int) -> float:
        """The rate with the best first measure, on average over seeds, among the runs that tuned it for this fold.

        Raises:
            ValueError: They are not complete, or the best of three rates and more is an end of the grid: a better one
                may lie beyond.
        """
        task = self.tasks[task].rates_of or task
        variant = self.variants[variant].rate_of or variant
        plan = self.tasks[task].tune
        if plan is None or variant not in plan.variants:
            raise ValueError(f"{task}: the protocol tunes no rate for {variant}")
        # a tuning fold stands for all folds up to the next one
        fold = max(each for each in plan.folds if each <= fold)
        scores: dict[float, float] = {}
        grid = self.grid(task)
        for rate in grid:
            recipe = self.run_recipe(task, "tune", variant, rate)
            total = 0.0
            for seed in plan.seeds:
                run = Run(task=task, phase="tune", variant=variant, fold=fold, seed=seed, recipe=recipe)
                found = self.load(run)
                if found is None:
                    raise ValueError(f"{task}: the rate of {variant} is not chosen yet, {self.path(run)} is missing")
                total += next(iter(found["measures"].values()))
            scores[rate] = total / len(plan.seeds)
        best = max(scores, key=lambda rate: scores[rate])
        if len(grid) > 2 and best in (min(grid), max(grid)):
            raise ValueError(
                f"{task}: the best rate of {variant} is {best:g}, an end of the grid: give the task `rates` with one "
                "more beyond it and tune that for all variants (phase 1 of the protocol)"
            )
        return best

    def settings(self, run: Run) -> dict[str, Any]:
        """What a run's figures follow from, beside code and machine."""
        task, variant = self.tasks[run.task], self.variants[run.variant]
        return json.loads(
            json.dumps(
                {
                    **{key: getattr(run, key) for key in ("task", "phase", "variant", "fold", "seed")},
                    "data": task.data,
                    "options": task.options,
                    "layer": variant.layer,
                    "fourier": variant.fourier,
                    "recipe": asdict(run.recipe),
                }
            )
        )

    def load(self, run: Run) -> dict[str, Any] | None:
        """Results of a run, or None where it was not made yet.

        Raises:
            ValueError: The file is of other settings: of an older protocol.
        """
        path = self.path(run)
        if not path.exists():
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
        settings = self.settings(run)
        different = [key for key in settings if found["settings"].get(key) != settings[key]]
        if different:
            raise ValueError(f"{path} is of another protocol, it differs in {', '.join(different)}: remove it")
        return found
