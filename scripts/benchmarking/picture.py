"""Picture of ``benchmark.py``: seconds against image size and against batch."""

from collections.abc import Sequence
from pathlib import Path

from benchmarking.report import Row

TITLES = {"static": "static", "fdconv": "FDConv", "literal": "literal equations"}


def lines_against(rows: Sequence[Row], axis: str) -> dict[tuple[str, str], list[tuple[int, float]]]:
    """Collect the lines of a picture of seconds against `axis`, "img_size" or "batch_size", everything else fixed.

    Returns:
        Points (value on the axis, seconds) in rising order, by (workload, kind); lines of one point are left out.
    """
    lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in rows:
        fixed = f"batch {row['batch_size']}" if axis == "img_size" else f"{row['img_size']} px"
        workload = f"{row['model']}, {row['mode']}, {row['engine']}, {fixed}, threads: {row['threads']}"
        for kind in TITLES:
            if kind in row:
                lines.setdefault((workload, kind), []).append((row[axis], row[kind]["seconds"]))
    return {key: sorted(points) for key, points in lines.items() if len(points) > 1}


def draw(rows: Sequence[Row], path: Path, title: str) -> bool:
    """Draw seconds against image size and against batch, both axes logarithmic.

    Returns:
        False if no line has two points, and nothing is drawn.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import ScalarFormatter

    labels = {"img_size": "image size in pixels a side", "batch_size": "batch size"}
    panels = {axis: lines for axis in labels if (lines := lines_against(rows, axis))}
    if not panels:
        return False
    styles = {"static": "--", "fdconv": "-", "literal": ":"}
    markers = {"static": "s", "fdconv": "o", "literal": "^"}
    figure, all_axes = plt.subplots(1, len(panels), figsize=(8 * len(panels), 8), squeeze=False, layout="constrained")
    for axes, (axis, lines) in zip(all_axes[0], panels.items(), strict=True):
        workloads = list(dict.fromkeys(workload for workload, _ in lines))
        for (workload, kind), points in lines.items():
            color = f"C{workloads.index(workload)}"
            x, y = zip(*points, strict=True)
            label = f"{workload}: {TITLES[kind]}"
            axes.loglog(x, y, styles[kind], marker=markers[kind], color=color, label=label)
        ticks = sorted({value for points in lines.values() for value, _ in points})
        axes.set_xticks(ticks, minor=False)
        axes.set_xticks([], minor=True)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.set_xlabel(labels[axis])
        axes.set_ylabel("seconds a pass")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.08))
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True
