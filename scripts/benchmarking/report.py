"""Results of ``benchmark.py`` as text: tables in Markdown, and a line for whoever waits."""

import math
from collections.abc import Sequence
from typing import Any

from common.tables import markdown_table
from fdconv_zoo.default_cfgs import is_zoo_model

Row = dict[str, Any]
MIB = 2**20


def format_seconds(seconds: float) -> str:
    """Three digits with a unit that suits."""
    value, unit = (
        (seconds, "s") if seconds >= 1 else (seconds * 1e3, "ms") if seconds >= 1e-3 else (seconds * 1e6, "us")
    )
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f} {unit}"


def format_mib(size: int | None) -> str:
    return "-" if size is None else f"{size / MIB:,.0f}"


def kind_of(name: str) -> str:
    """What a model's layers are, by its name: FDConv, or another dynamic convolution."""
    return "dynamic" if is_zoo_model(name) and not name.partition(".")[0].endswith("_fdconv") else "FDConv"


def describe(row: Row) -> str:
    """One line about a row, for whoever waits."""
    static, fdconv = format_seconds(row["static"]["seconds"]), format_seconds(row["fdconv"]["seconds"])
    text = f"  {row['engine']}: static {static}, {kind_of(row['model'])} {fdconv}, {row['ratio']:.2f}x"
    if "literal" in row:
        literal = row["literal"]
        text += f"; literal equations {format_seconds(literal['seconds'])}, {literal['ratio_to_fdconv']:.1f}x FDConv"
        text += f", relative difference {literal['relative_difference_of_fdconv']:.1e}"
    return text


def full_table(rows: Sequence[Row]) -> str:
    """Return a table of everything measured, a line for each workload of a pair."""
    header = ["model", "mode", "batch", "size", "threads", "engine", "static"]
    header += [" or ".join(dict.fromkeys(kind_of(row["model"]) for row in rows)), "ratio"]
    header += ["peak MiB", "saved MiB", "Mparams", "GMACs"]
    with_literal = any("literal" in row for row in rows)
    if with_literal:
        header += ["literal", "literal / FDConv"]
    lines = []
    for row in rows:
        line = [str(row[key]) for key in ("model", "mode", "batch_size", "img_size", "threads", "engine")]
        if "error" in row:
            line += ["failed"] + ["-"] * (len(header) - len(line) - 1)
            lines.append(line)
            continue
        static, fdconv = row["static"], row["fdconv"]
        line += [format_seconds(static["seconds"]), format_seconds(fdconv["seconds"]), f"{row['ratio']:.2f}"]
        for key in ("peak_bytes", "saved_bytes"):
            line.append(f"{format_mib(static[key])} -> {format_mib(fdconv[key])}")
        line.append(f"{static['parameters'] / 1e6:.2f} -> {fdconv['parameters'] / 1e6:.2f}")
        line.append(f"{static['macs'] / 1e9:.2f} -> {fdconv['macs'] / 1e9:.2f}")
        if with_literal:
            literal = row.get("literal")
            line += [format_seconds(literal["seconds"]), f"{literal['ratio_to_fdconv']:.1f}"] if literal else ["-", "-"]
        lines.append(line)
    return markdown_table(header, lines)


def _preset_lines(rows: Sequence[Row], workloads: Sequence[tuple[int, str]]) -> list[list[str]]:
    """Lines of one pair: its static twin, FDConv, both compiled, and the literal equations, as far as measured."""
    found = {(row["engine"], row["batch_size"], row["mode"]): row for row in rows if "error" not in row}
    first = rows[0]
    lines = []
    for engine in ("eager", "compile"):
        if not any(row["engine"] == engine for row in rows):
            continue
        suffix = "" if engine == "eager" else ", compiled"
        static, fdconv = [first["static_model"] + suffix], [first["model"] + suffix]
        for workload in workloads:
            row = found.get((engine, *workload))
            static.append(f"1x ({format_seconds(row['static']['seconds'])})" if row else "-")
            both = row is not None and "ratio_to_eager_static" in row
            of_eager = f" ({row['ratio_to_eager_static']:.2f}x)" if both else ""
            fdconv.append(f"{row['ratio']:.2f}x{of_eager}" if row else "-")
        for batch in [batch for batch, mode in workloads if mode == "train"][:1]:
            row = found.get((engine, batch, "train"))
            for line, kind in ((static, "static"), (fdconv, "fdconv")):
                saved = row[kind]["saved_bytes"] if row else None
                line.append("-" if saved is None else f"{format_mib(saved)} MiB")
        lines += [static, fdconv]
    if any("literal" in row for row in rows):
        literal = [f"{first['model']}, literal equations"]
        for workload in workloads:
            row = found.get(("eager", *workload), {})
            literal.append(f"{row['literal']['ratio_to_static']:.1f}x" if "literal" in row else "-")
        lines.append(literal + ["-"] * any(mode == "train" for _, mode in workloads))
    return lines


def preset_table(rows: Sequence[Row]) -> str:
    """Return the table of a preset: ratios to the static twin of the same engine, a table a set of workloads.

    A compiled model's ratio to the eager static twin follows in brackets.
    """
    tables: dict[tuple[str, ...], list[list[str]]] = {}
    pairs: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        pairs.setdefault((row["model"], row["threads"]), []).append(row)
    for pair in pairs.values():
        workloads = list(dict.fromkeys((row["batch_size"], row["mode"]) for row in pair))
        titles = [
            f"batch {batch} eval" if mode == "eval" else f"train step, batch {batch}" for batch, mode in workloads
        ]
        trained = [batch for batch, mode in workloads if mode == "train"]
        titles += [f"saved for backward, batch {batch}" for batch in trained[:1]]
        header = (f"{pair[0]['img_size']}x{pair[0]['img_size']}, threads: {pair[0]['threads']}", *titles)
        tables.setdefault(header, []).extend(_preset_lines(pair, workloads))
    return "\n\n".join(markdown_table(header, lines) for header, lines in tables.items())
