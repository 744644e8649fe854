"""Options of the experiments: a recipe file under the command line, both checked by the one parser."""

import pytest

from common.training_recipe import Recipe
from experiments.runs import create_parser, parse_args


def parse(*argv):
    return parse_args(create_parser("fashion_mnist", "", "", ["static"]), list(map(str, argv)))


def test_command_line_overrides_the_recipe(tmp_path):
    recipe = Recipe.of(parse())
    assert (recipe.batch_size, recipe.opt, recipe.lr, recipe.epochs) == (32, "momentum", 0.05, 4)
    recipe = Recipe.of(parse("--lr", 0.1, "--epochs", 2, "--opt-kwargs", "dampening=0.5"))
    assert (recipe.batch_size, recipe.lr, recipe.epochs, recipe.opt_kwargs) == (32, 0.1, 2, {"dampening": 0.5})
    (tmp_path / "r.yaml").write_text("batch_size: 8\n")
    recipe = Recipe.of(parse("--config", tmp_path / "r.yaml", "--smoothing", 0.1))
    assert recipe == Recipe(batch_size=8, smoothing=0.1)


@pytest.mark.parametrize("key", ["learning_rate", "mixup", "synthetic", "model_ema"])
def test_unknown_keys_name_the_file_and_what_there_is(tmp_path, capsys, key):
    (tmp_path / "r.yaml").write_text(f"lr: 0.1\n{key}: 1\n")
    with pytest.raises(SystemExit):
        parse("--config", tmp_path / "r.yaml")
    error = capsys.readouterr().err
    assert f"{tmp_path / 'r.yaml'}: unknown options: {key}; there are batch_size, channels_last" in error
    assert "weight_decay" in error and "static_lr_scale" in error


@pytest.mark.parametrize("option", ["--synthetic", "--grad-accum-steps=2", "--mixup=0.1"])
def test_options_of_train_py_alone_are_refused(option):
    name = option.partition("=")[0].strip("-").replace("-", "_")
    with pytest.raises(ValueError, match=f"no use for: {name}$"):
        parse(option)


def test_bad_values_are_errors(capsys):
    with pytest.raises(SystemExit):
        parse("--sched", "cosin")
    assert "invalid choice: 'cosin'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="epochs is 0, it must be at least 1"):
        Recipe.of(parse("--epochs", 0))
