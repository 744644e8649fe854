"""Results of an experiment: a table in Markdown and a picture of the curves."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from common.tables import markdown_table

Run = dict[str, Any]
BASE = "static"


def runs_by_variant(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs of each variant in the order of their seeds; variants in the order of their first run."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run["variant"], []).append(run)
    return {variant: sorted(group, key=lambda run: run["seed"]) for variant, group in found.items()}


def mean_and_spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean and standard deviation over seeds (of the sample, n-1); a lone value has no spread."""
    text = f"{mean(values):.{digits}f}"
    return f"{text} ± {stdev(values):.{digits}f}" if len(values) > 1 else text


def results_table(runs: Sequence[Run], metrics: Sequence[str]) -> str:
    """Table of the last epoch: mean and spread of each metric in percent, and the first metric seed by seed.

    The difference to `static` is that of runs with the same seed, which share order and augmentation.
    """
    first = metrics[0]
    groups = runs_by_variant(runs)
    base = {run["seed"]: run["epochs"][-1][first] for run in groups.get(BASE, [])}
    header = ["variant", *(f"{metric} %" for metric in metrics), f"{first} - {BASE}", f"{first} by seed"]
    header += ["train loss", "parameters", "CPU s a run"]
    lines = []
    for variant, group in groups.items():
        last = [run["epochs"][-1] for run in group]
        gains = [100 * (run["epochs"][-1][first] - base[run["seed"]]) for run in group if run["seed"] in base]
        lines.append(
            [
                variant,
                *(mean_and_spread([100 * epoch[metric] for epoch in last]) for metric in metrics),
                f"{mean(gains):+.2f}" if gains and variant != BASE else "-",
                ", ".join(f"{run['seed']}: {100 * run['epochs'][-1][first]:.2f}" for run in group),
                mean_and_spread([epoch["train_loss"] for epoch in last], 3),
                f"{group[0]['parameters']:,}",
                f"{mean(run['cpu_seconds'] for run in group):.0f}",
            ]
        )
    return markdown_table(header, lines)


def draw_curves(runs: Sequence[Run], metrics: Sequence[str], path: Path) -> None:
    """Draw metrics and training loss against epochs: a line of means, a band from the lowest to the highest seed.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = [*metrics, "train_loss"]
    figure, all_axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 5), layout="constrained")
    for axes, key in zip(all_axes, panels, strict=True):
        for variant, group in runs_by_variant(runs).items():
            epochs = [epoch["epoch"] for epoch in group[0]["epochs"]]
            scale = 1 if key == "train_loss" else 100
            curves = [[scale * epoch[key] for epoch in run["epochs"]] for run in group]
            points = list(zip(*curves, strict=True))
            count = f"{len(group)} run{'s' if len(group) > 1 else ''}"
            (line,) = axes.plot(epochs, [mean(point) for point in points], marker="o", label=f"{variant} ({count})")
            axes.fill_between(epochs, [*map(min, points)], [*map(max, points)], color=line.get_color(), alpha=0.15)
        axes.set_title("training loss" if key == "train_loss" else f"test {key} (%)")
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    all_axes[0].legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
