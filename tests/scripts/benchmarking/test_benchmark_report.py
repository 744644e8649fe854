"""Tables and pictures of scripts/benchmark.py, from rows made up."""

import pytest

from benchmarking import picture, report


def fake_row(mode, batch, engine="eager", ratio=2.0, **more):
    saved = {"static": 328 * 2**20, "fdconv": 500 * 2**20} if mode == "train" and engine == "eager" else {}
    costs = {"peak_bytes": 2**20, "parameters": 25_557_032, "macs": 4_089_184_256}
    row = {
        "model": "resnet50_fdconv",
        "static_model": "resnet50",
        "mode": mode,
        "batch_size": batch,
        "img_size": 224,
        "threads": 2,
        "engine": engine,
        "ratio": ratio,
    }
    for kind, factor in (("static", 1), ("fdconv", ratio)):
        row[kind] = {"seconds": 0.08 * batch * factor, "saved_bytes": saved.get(kind), **costs}
    return row | more


def test_preset_table_is_that_of_the_issue():
    rows = []
    for mode, batch in (("eval", 1), ("eval", 8), ("train", 4)):
        literal = {"literal": {"seconds": 3.2, "ratio_to_static": 40.0, "ratio_to_fdconv": 20.0}}
        rows.append(fake_row(mode, batch, **(literal if mode == "eval" else {})))
        rows.append(fake_row(mode, batch, "compile", 1.9, ratio_to_eager_static=1.8))
    rows.append(fake_row("eval", 8) | {"model": "layer", "static_model": "conv", "img_size": 7})
    table = report.preset_table(rows)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line]
    assert lines[0] == [
        "224x224, threads: 2",
        "batch 1 eval",
        "batch 8 eval",
        "train step, batch 4",
        "saved for backward, batch 4",
    ]
    assert lines[2:7] == [
        ["resnet50", "1x (80.0 ms)", "1x (640 ms)", "1x (320 ms)", "328 MiB"],
        ["resnet50_fdconv", "2.00x", "2.00x", "2.00x", "500 MiB"],
        ["resnet50, compiled", "1x (80.0 ms)", "1x (640 ms)", "1x (320 ms)", "-"],
        ["resnet50_fdconv, compiled", "1.90x (1.80x)", "1.90x (1.80x)", "1.90x (1.80x)", "-"],
        ["resnet50_fdconv, literal equations", "40.0x", "40.0x", "-", "-"],
    ]
    assert lines[7] == ["7x7, threads: 2", "batch 8 eval"]
    assert lines[9:] == [["conv", "1x (640 ms)"], ["layer", "2.00x"]]


def test_lines_of_a_picture():
    rows = [fake_row("eval", 8), fake_row("eval", 1), fake_row("train", 4), fake_row("eval", 1) | {"img_size": 448}]
    rows.append({"model": "resnet50_fdconv", "error": "x", "mode": "eval", "batch_size": 1, "img_size": 1})
    rows[-1] |= {"engine": "-", "threads": 2}
    by_batch = picture.lines_against(rows, "batch_size")
    workload = "resnet50_fdconv, eval, eager, 224 px, threads: 2"
    assert by_batch[workload, "static"] == [(1, 0.08), (8, 0.64)]
    assert by_batch.keys() == {(workload, "static"), (workload, "fdconv")}
    by_size = picture.lines_against(rows, "img_size")
    assert [points for (_, kind), points in by_size.items() if kind == "fdconv"] == [[(224, 0.16), (448, 0.16)]]


@pytest.mark.parametrize(
    ("seconds", "text"), [(123.4, "123 s"), (1.234, "1.23 s"), (0.0801, "80.1 ms"), (0.000012, "12.0 us")]
)
def test_seconds_have_three_digits(seconds, text):
    assert report.format_seconds(seconds) == text
