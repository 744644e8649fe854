"""Tables and curves of the runs that there are."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from common.tables import markdown_table
from experiments.finetune.bootstrap import Difference, paired_difference
from experiments.finetune.protocol import Protocol, Run
from experiments.finetune.tasks import Task
from experiments.report import draw_curves

Results = dict[str, Any]
BASES = ("static", "fdconv")


def percent(difference: Difference) -> str:
    """A difference in points with its interval."""
    return f"{100 * difference.mean:+.2f} [{100 * difference.low:+.2f}, {100 * difference.high:+.2f}]"


def found_runs(protocol: Protocol, task: str, phase: str) -> dict[str, list[tuple[Run, Results]]]:
    """Finished runs of a phase by variant, and an empty list where a variant has none."""
    found: dict[str, list[tuple[Run, Results]]] = {}
    for run in protocol.runs(task, phase):
        results = protocol.load(run)
        group = found.setdefault(run.variant, [])
        if results is not None:
            group.append((run, results))
    return found


def tuning_table(protocol: Protocol, name: str) -> str:
    """First measure of each rate."""
    lines = []
    for run in protocol.runs(name, "tune"):
        results = protocol.load(run)
        if results is not None:
            measures = [f"{100 * value:.2f}" for value in results["measures"].values()]
            loss = f"{results['curve'][-1]['train_loss']:.4f}"
            lines.append([run.variant, str(run.fold), str(run.seed), f"{run.recipe.lr:g}", *measures, loss])
            header = list(results["measures"])
    if not lines:
        return "no runs yet"
    return markdown_table(["variant", "fold", "seed", "rate", *(f"{each} %" for each in header), "train loss"], lines)


def comparison_table(protocol: Protocol, task: Task, name: str, phase: str, averaged: bool = False) -> str:
    """Measures of each variant, and paired differences to `static` and `fdconv` with 95 % intervals.

    Args:
        protocol: Of the runs.
        task: What they were measured by.
        name: Of the task.
        phase: `search` or `claim`.
        averaged: Takes the averaged weights' figures instead of the last ones'.
    """
    prefix = "averaged_" if averaged else ""
    found = found_runs(protocol, name, phase)
    outcomes = {
        variant: {(run.fold, run.seed): results[f"{prefix}outcome"] for run, results in group}
        for variant, group in found.items()
    }
    bases = [base for base in BASES if outcomes.get(base)]
    header = ["variant", "runs", *(f"{each} %" for each in task.measures)]
    header += [f"{each} - {base}" for base in bases for each in task.measures]
    header += ["train loss", "parameters", "CPU s a run"]
    lines = []
    planned = len(list(protocol.runs(name, phase))) // len(found)
    for variant, group in found.items():
        if not group:
            continue
        line = [variant, f"{len(group)}/{planned}"]
        line += [
            f"{100 * mean(results[f'{prefix}measures'][each] for _, results in group):.2f}" for each in task.measures
        ]
        for base in bases:
            for each in task.measures:
                common = outcomes[variant].keys() & outcomes[base].keys()
                if variant == base or not common:
                    line.append("-")
                else:
                    line.append(percent(paired_difference(task, outcomes[variant], outcomes[base], each)))
        line.append(f"{mean(results['curve'][-1]['train_loss'] for _, results in group):.4f}")
        line.append(f"{group[0][1]['parameters']:,}")
        line.append(f"{mean(results['seconds']['cpu'] for _, results in group):.0f}")
        lines.append(line)
    return markdown_table(header, lines) if lines else "no runs yet"


def gates_table(protocol: Protocol, name: str, phase: str) -> str:
    """How far gates moved, |gate - 1| and the deviation over images, and what batch statistics change."""
    kinds = ("bands", "channels", "filters", "dense")
    lines = []
    for variant, group in found_runs(protocol, name, phase).items():
        moved = [results["gates"] for _, results in group if results["gates"]]
        if not moved:
            continue
        line = [variant]
        for kind in kinds:
            values = [gates[kind] for gates in moved if kind in gates]
            parts = [mean(value[key] for value in values) for key in ("from_one", "over_images")] if values else []
            line.append(" / ".join(f"{part:.3f}" for part in parts) or "-")
        changes = [results["ksm_disagreement"] for _, results in group]
        line += [f"{100 * mean(each[key] for each in changes):.2f}" for key in ("total_variation", "answers")]
        lines.append(line)
    header = ["variant", *(f"{kind}: from 1 / over images" for kind in kinds)]
    header += ["probability moved by batch statistics %", "answers changed %"]
    return markdown_table(header, lines) if lines else "no gates yet"


def draw(protocol: Protocol, task: Task, name: str, phase: str) -> Path | None:
    """Draw the curves of a phase, averaged over folds and seeds; None where there are no runs."""
    rows: list[dict[str, Any]] = [
        {"variant": variant, "seed": number, "epochs": results["curve"]}
        for variant, group in found_runs(protocol, name, phase).items()
        for number, (_, results) in enumerate(group)
    ]
    if not rows:
        return None
    path = protocol.folder / name / f"{phase}.png"
    draw_curves(rows, task.measures, path)
    return path


def sections(protocol: Protocol, task: Task, name: str, phases: Sequence[str]) -> list[str]:
    """Markdown of a task's tables."""
    parts = []
    for phase in phases:
        if getattr(protocol.tasks[name], phase) is None:
            continue
        parts.append(f"### {name}, {phase}")
        if phase == "tune":
            parts.append(tuning_table(protocol, name))
            continue
        parts.append(comparison_table(protocol, task, name, phase))
        parts.append("With averaged weights:")
        parts.append(comparison_table(protocol, task, name, phase, averaged=True))
        parts.append(gates_table(protocol, name, phase))
    return parts
