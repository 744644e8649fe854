"""What the experiments share: a results file that survives kills, a table of means and spreads, a picture of curves."""

import hashlib
import json
import os
import subprocess
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from benchmark_report import cpu_name, markdown, versions, write_json

Run = dict[str, Any]


def sha256(path: Path) -> str:
    """Return the digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def git_commit() -> str:
    """Return the commit of this checkout, marked if tracked files have changed since; "unknown" outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


class Results:
    """Results file of an experiment, written after each run; one that exists is continued.

    A run is a dictionary with ``variant``, ``seed``, ``curves`` (a row of numbers for each epoch), ``seconds`` and the
    final metrics.

    Args:
        path: The .json file.
        settings: What all runs of the file have in common: recipe, model, data options. No machine paths.
        data: sha256 of each data file, by name.

    Raises:
        ValueError: The file can't be read, or its runs were made with other settings or data.
    """

    def __init__(self, path: Path, settings: dict[str, Any], data: dict[str, str]) -> None:
        self.path = path
        # through JSON, so that tuples compare equal to the lists they are read back as
        common = json.loads(json.dumps({"settings": settings, "data_sha256": data}))
        self.content: dict[str, Any] = {"commands": [], **common, "runs": []}
        if not path.exists():
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            self.content["commands"], self.content["runs"] = found["commands"], found["runs"]
            before = {key: found[key] for key in common}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no results file: {error!r}") from error
        others = [
            f"{name} {before[part].get(name)}, not {common[part].get(name)}"
            for part in common
            for name in {**before[part], **common[part]}
            if before[part].get(name) != common[part].get(name)
        ]
        if others:
            raise ValueError(f"{path} has runs with {'; '.join(others)}: choose another --results-file")

    @property
    def runs(self) -> list[Run]:
        return self.content["runs"]

    def missing(self, variants: Iterable[str], seeds: Sequence[int]) -> list[tuple[str, int]]:
        """Return the (variant, seed) that are not there yet, seed by seed: a killed one can be compared."""
        done = {(run["variant"], run["seed"]) for run in self.runs}
        names = list(variants)
        return [(name, seed) for seed in seeds for name in names if (name, seed) not in done]

    def add(self, command: str, run: Run) -> None:
        """Write one more run, with what it was made with."""
        if command not in self.content["commands"]:
            self.content["commands"].append(command)
        facts = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "versions": {**versions(), "commit": git_commit()},
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        }
        self.runs.append({**run, **facts})
        write_json(self.path, self.content)


def mean_and_spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation (n - 1) of several values, the value of one."""
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def results_table(runs: Sequence[Run], metrics: dict[str, str], scale: float = 100) -> str:
    """Return a Markdown table, a line for each variant in the order of its first run.

    Args:
        runs: The runs.
        metrics: Key in a run and its title; the first one is given for each seed too.
        scale: Factor of the metrics, 100 for percent.
    """
    variants: dict[str, list[Run]] = {}
    for run in runs:
        variants.setdefault(run["variant"], []).append(run)
    first, *_ = metrics
    header = ["variant", "parameters", *metrics.values(), f"{metrics[first]} of seeds", "seconds a run"]
    lines = []
    for name, group in variants.items():
        group = sorted(group, key=lambda run: run["seed"])
        line = [name, f"{group[0]['parameters']:,}"]
        line += [mean_and_spread([run[key] * scale for run in group]) for key in metrics]
        line.append(", ".join(f"{run['seed']}: {run[first] * scale:.2f}" for run in group))
        line.append(f"{mean(run['seconds'] for run in group):.0f}")
        lines.append(line)
    return markdown(header, lines)


def draw_curves(runs: Sequence[Run], metrics: dict[str, str], path: Path, title: str) -> None:
    """Draw metrics against epochs, a panel each: for each variant the mean of the seeds and their range.

    Args:
        runs: The runs.
        metrics: Key in a row of the curves and its title.
        path: The .png to write.
        title: Title of the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, all_axes = plt.subplots(
        1, len(metrics), figsize=(6 * len(metrics), 4.5), squeeze=False, layout="constrained"
    )
    variants = list(dict.fromkeys(run["variant"] for run in runs))
    for axes, (key, label) in zip(all_axes[0], metrics.items(), strict=True):
        for number, name in enumerate(variants):
            seeds = [[row[key] for row in run["curves"]] for run in runs if run["variant"] == name]
            points = list(zip(*seeds, strict=True))
            epochs = range(1, len(points) + 1)
            axes.plot(epochs, [mean(p) for p in points], color=f"C{number}", label=f"{name} (n={len(seeds)})")
            axes.fill_between(epochs, [min(p) for p in points], [max(p) for p in points], color=f"C{number}", alpha=0.2)
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
