"""The table and the picture of experiments."""

from PIL import Image

from experiments.report import draw_curves, results_table


def run(variant, seed, *accuracies):
    epochs = [
        {"epoch": number, "train_loss": 1 / number, "accuracy": value} for number, value in enumerate(accuracies, 1)
    ]
    return {"variant": variant, "seed": seed, "parameters": 1234, "cpu_seconds": 60 * (seed + 1), "epochs": epochs}


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_table_has_means_spreads_and_differences_of_equal_seeds():
    runs = [
        run("static", 0, 0.1, 0.80),
        run("fdconv", 0, 0.1, 0.83),
        run("fdconv", 1, 0.2, 0.85),
        run("static", 1, 0.3, 0.82),
        run("fdw", 1, 0.1, 0.5),
    ]
    header, _, *lines = cells(results_table(runs, ["accuracy"]))
    found = {line[0]: dict(zip(header, line, strict=True)) for line in lines}
    assert list(found) == ["static", "fdconv", "fdw"]
    assert [line["accuracy %"] for line in found.values()] == ["81.00 ± 1.41", "84.00 ± 1.41", "50.00"]
    assert [line["accuracy - static"] for line in found.values()] == ["-", "+3.00", "-32.00"]
    assert found["fdconv"]["accuracy by seed"] == "0: 83.00, 1: 85.00"
    assert found["static"]["accuracy by seed"] == "0: 80.00, 1: 82.00"
    assert (found["fdw"]["parameters"], found["fdw"]["CPU s a run"]) == ("1,234", "120")


def test_table_without_the_static_model_has_no_differences():
    (*_, line) = cells(results_table([run("fdconv", 0, 0.5)], ["accuracy"]))
    assert line[2] == "-"


def test_curves_are_drawn(tmp_path):
    runs = [run("static", 0, 0.1, 0.8), run("static", 1, 0.2, 0.7), run("fdconv", 0, 0.3, 0.9)]
    draw_curves(runs, ["accuracy"], tmp_path / "folder" / "curves.png")
    with Image.open(tmp_path / "folder" / "curves.png") as picture:
        assert len(picture.convert("RGB").getcolors(maxcolors=1 << 24)) > 50
