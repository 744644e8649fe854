"""scripts/experiment_elpv.py on a small folder of photos, with the real weights; how cells are split."""

import json

import pytest
import torch
from PIL import Image

from experiment_elpv import create_model, main, split_modules
from experiments.elpv_data import guess_modules, read_cells

# Runs of one cell type in the file order of elpv-dataset.
RUNS = [("mono", 60), ("poly", 300), ("mono", 180), ("poly", 360), ("mono", 714), ("poly", 530), ("mono", 72)]
RUNS += [("poly", 180), ("mono", 48), ("poly", 180)]
TYPES = [cell_type for cell_type, count in RUNS for _ in range(count)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four runs of three cells each; the defective are dark."""
    folder = tmp_path_factory.mktemp("elpv")
    (folder / "images").mkdir()
    lines = []
    for number in range(12):
        defective = number % 3 == 0
        name = f"images/cell{number:04}.png"
        Image.effect_noise((40, 40), 30).point(lambda v, dark=defective: v // (3 if dark else 1)).save(folder / name)
        lines.append(f"{name}  {(0.0, 0.6666666666666666)[defective]}  {('mono', 'poly')[number // 3 % 2]}\n")
    (folder / "labels.csv").write_text("".join(lines))
    return folder


def test_both_models_are_fine_tuned(data, tmp_path, capsys):
    results = tmp_path / "results.json"
    main(
        ["--data-dir", str(data), "--results-file", str(results), "--seeds", "0", "--epochs", "1", "--threads", "1"]
        + ["--img-size", "32", "--batch-size", "3", "--device", "cpu"]
    )
    found = json.loads(results.read_text())
    assert [run["variant"] for run in found["runs"]] == ["static", "fdconv"]
    for run in found["runs"]:
        (epoch,) = run["epochs"]
        assert epoch.keys() == {"epoch", "train_loss", "accuracy", "AUROC", "macro F1"}
        assert all(0 <= epoch[name] <= 1 for name in ("accuracy", "AUROC", "macro F1"))
    assert (found["settings"]["train_photos"], found["settings"]["test_photos"]) == (6, 6)
    assert "macro F1 %" in capsys.readouterr().out
    assert results.with_suffix(".png").exists()


def test_cells_are_read_with_their_labels(data):
    photos, labels, types, digest = read_cells(data)
    assert (photos.shape, photos.dtype) == ((12, 1, 40, 40), torch.uint8)
    assert labels.tolist() == [1, 0, 0] * 4
    assert types == (["mono"] * 3 + ["poly"] * 3) * 2
    assert len(digest) == 64


def test_modules_are_as_many_as_the_authors_name():
    sizes = guess_modules(TYPES).bincount()
    assert len(TYPES) == 2624 and len(sizes) == 44
    assert sizes.min() == 48 and sizes.max() == 72


def test_no_module_is_on_both_sides():
    modules = guess_modules(TYPES)
    test = split_modules(modules, TYPES, seed=0)
    assert not set(modules[test].tolist()) & set(modules[~test].tolist())
    assert {cell_type for cell_type, chosen in zip(TYPES, test, strict=True) if chosen} == {"mono", "poly"}
    assert 0.2 < test.float().mean() < 0.3
    assert torch.equal(test, split_modules(modules, TYPES, seed=0))
    assert not torch.equal(test, split_modules(modules, TYPES, seed=1))


def test_both_variants_start_as_the_same_function():
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        static, fdconv = (create_model(variant, 5).eval()(image) for variant in ("static", "fdconv"))
    torch.testing.assert_close(fdconv, static, rtol=0, atol=1e-3)


def test_missing_data_names_the_wheel(tmp_path):
    with pytest.raises(SystemExit, match=r"^experiment_elpv.py: error: no .*labels.csv: run `pip install elpv-dataset"):
        main(["--data-dir", str(tmp_path)])


@pytest.mark.parametrize(
    "line", ["images/absent.png 0.0 mono", "images/cell0000.png often mono", "images/cell0000.png"]
)
def test_bad_lines_are_named(line, data, tmp_path):
    (tmp_path / "images").symlink_to(data / "images")
    (tmp_path / "labels.csv").write_text(f"images/cell0001.png 0.0 mono\n{line}\n")
    with pytest.raises(ValueError, match=r"labels.csv, line 2: "):
        read_cells(tmp_path)
