"""Dry runs of every recipe in scripts/configs: two updates on synthetic images."""

import csv

import pytest
from train_runs import SCRIPTS

from train import main

RECIPES = sorted((SCRIPTS / "configs").glob("*.yaml"))
# Small images and batches; the loss, optimiser, schedule and augmentation are the recipe's, and so is the model but for
# its size in the quick runs.
FIT = {
    "swin_tiny_300ep": ["--model-kwargs", "img_size=64", "window_size=2"],
    "finetune_converted": ["--no-pretrained"],  # the weights come from the Hub
}
NARROW = ["--model-kwargs", "channels=(16, 24, 32, 48)"]
SMALL = {
    "resnet50_a1_600ep": ["--model", "resnet18_fdconv", *NARROW],
    "resnet50_sgd_100ep": ["--model", "resnet18_fdconv", *NARROW],
    "resnet50_a2_300ep": ["--model", "resnet18_fdconv", *NARROW, "--aug-repeats", "0"],
    "finetune_converted": ["--model", "resnet18_fdconv", *NARROW],
    "convnext_tiny_300ep": ["--model", "convnext_atto_fdconv", "--grad-accum-steps", "2"],
    "dcd_resnet50_120ep": ["--model", "resnet18_dcd", *NARROW],
    "dyconv_resnet50_100ep": ["--model", "resnet18_dyconv", *NARROW],
    "kw_resnet50_300ep": ["--model", "resnet18_kw", *NARROW, "--grad-accum-steps", "2"],
    "odconv_resnet50_100ep": ["--model", "resnet18_odconv_1x", *NARROW],
    "swin_tiny_300ep": ["--model-kwargs", "img_size=64", "window_size=2", "embed_dim=48", "depths=(1, 1, 1, 1)"],
}


def dry_run(recipe, output, *options):
    size = ["-b", "2", "--img-size", "64", "-j", "0", "--device", "cpu"]
    main(["--config", str(recipe), "--synthetic", "--steps", "2", *size, *options, "--output", str(output)])
    (row,) = csv.DictReader((output / "summary.csv").open())
    assert 0 < float(row["train_loss"]) < 8
    assert (output / "model_best.safetensors").exists()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_runs(recipe, tmp_path):
    dry_run(recipe, tmp_path, *FIT.get(recipe.stem, []), *SMALL.get(recipe.stem, []))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [path for path in RECIPES if path.stem in SMALL], ids=lambda path: path.stem)
def test_recipe_runs_with_its_own_model(recipe, tmp_path):
    dry_run(recipe, tmp_path, *FIT.get(recipe.stem, []))


def test_each_recipe_says_why():
    for recipe in RECIPES:
        comments = [line for line in recipe.read_text().splitlines() if line.startswith("#")]
        assert any("batch size" in line for line in comments) and any("lr" in line for line in comments), recipe
