"""Photos of solar cells: how they are read, and which modules and folds they belong to."""

import pytest
import torch
from PIL import Image

from experiments.elpv_data import fold_modules, guess_modules, read_cells

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


def test_a_module_is_in_one_fold_and_folds_have_equally_many_of_each_type():
    modules = guess_modules(TYPES)
    folds = fold_modules(modules, TYPES, folds=4)
    for cell_type in ("mono", "poly"):
        chosen = torch.tensor([each == cell_type for each in TYPES])
        counts = torch.tensor([len(modules[chosen & (folds == fold)].unique()) for fold in range(4)])
        assert counts.max() - counts.min() <= 1
    assert all(len(folds[modules == module].unique()) == 1 for module in range(44))
    assert torch.equal(folds, fold_modules(modules, TYPES, folds=4))
    assert not torch.equal(folds, fold_modules(modules, TYPES, folds=4, seed=1))


def test_missing_data_names_the_wheel(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no .*labels.csv: run `pip install elpv-dataset"):
        read_cells(tmp_path)


@pytest.mark.parametrize(
    "line", ["images/absent.png 0.0 mono", "images/cell0000.png often mono", "images/cell0000.png"]
)
def test_bad_lines_are_named(line, data, tmp_path):
    (tmp_path / "images").symlink_to(data / "images")
    (tmp_path / "labels.csv").write_text(f"images/cell0001.png 0.0 mono\n{line}\n")
    with pytest.raises(ValueError, match=r"labels.csv, line 2: "):
        read_cells(tmp_path)
