"""Arguments: recipe files and the command line go through the same checks."""

import pytest
import yaml

from common.recipes import save_args
from training.args import parse_args


def write(path, text):
    path.write_text(text)
    return str(path)


def test_command_line_overrides_the_recipe_and_the_recipe_the_defaults(tmp_path):
    recipe = write(tmp_path / "r.yaml", "lr: 5e-3\nbatch_size: 8\namp: true\nopt_betas: [0.9, 0.99]\nepochs: null\n")
    args = parse_args(["--config", recipe, "--synthetic", "-b", "4", "--no-amp"])
    assert (args.lr, args.batch_size, args.amp, args.opt_betas, args.epochs) == (5e-3, 4, False, [0.9, 0.99], 100)


def test_saved_arguments_are_a_recipe_that_gives_the_same_run(tmp_path):
    given = [
        "--synthetic",
        "--model-kwargs",
        "num_bands=16",
        "drop_rate=0.5",
        "name=x",
        "--no-aug",
        "--scale",
        "0.2",
        "1",
    ]
    args = parse_args([*given, "--opt-kwargs", "betas=[0.9, 0.95]", "--torchcompile", "--output", str(tmp_path / "o")])
    save_args(args, tmp_path / "args.yaml")
    again = parse_args(["--config", str(tmp_path / "args.yaml")])
    assert {**vars(again), "config": None} == vars(args)


def test_unknown_keys_are_named(tmp_path, capsys):
    recipe = write(tmp_path / "r.yaml", "batchsize: 8\nlr: 1\nmix_up: 0.1\n")
    with pytest.raises(SystemExit):
        parse_args(["--config", recipe])
    assert capsys.readouterr().err.endswith("unknown options: batchsize (batch_size?), mix_up (mixup?)\n")
    recipe = write(tmp_path / "r.yaml", "modle: 8\nnothing_like_it: 1\n")
    with pytest.raises(SystemExit):
        parse_args(["--config", recipe])
    assert "unknown options: modle (model?), nothing_like_it; there are aa, amp, " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "lost"),
    [
        (["num_bands=16"], "ksm=False, fbm=False"),
        (["num_bands=16", "ksm=True"], "fbm=False"),
        (["fbm=False", "ksm=False", "num_bands=4"], ""),
        ([], ""),  # a reset
        (None, ""),
    ],
)
def test_what_the_command_line_takes_out_of_a_recipe_is_told(tmp_path, capsys, monkeypatch, given, lost):
    recipe = write(tmp_path / "r.yaml", "model_kwargs: {ksm: false, fbm: false}\n")
    argv = ["--config", recipe, "--synthetic", *([] if given is None else ["--model-kwargs", *given])]
    expected = f"--model-kwargs replaces that of {recipe}, which had {lost}: give it again to keep it\n"
    assert parse_args(argv).model_kwargs.keys() == (
        {"ksm", "fbm"} if given is None else {pair.partition("=")[0] for pair in given}
    )
    assert capsys.readouterr().err == (expected if lost else "")
    monkeypatch.setenv("RANK", "1")  # the first process tells it
    parse_args(argv)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sched: cosin", "invalid choice: 'cosin'"),
        ("batch_size: many", "invalid int value: 'many'"),
        ("amp: maybe", "amp is 'maybe', allowed are true and false"),
        ("- lr", "not a mapping"),
        ("lr: [1", "while parsing"),
    ],
)
def test_bad_recipe_is_an_error(tmp_path, capsys, text, message):
    with pytest.raises(SystemExit):
        parse_args(["--config", write(tmp_path / "r.yaml", text), "--synthetic"])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--epochs", "3"], "no data: give --data-dir"),
        (["--synthetic", "-b", "0"], "--batch-size is 0, it must be at least 1"),
        (["--synthetic", "-b", "3", "--mixup", "0.1"], "need an even number"),
        (["--synthetic", "--aa", "rnd-m9"], "--aa rnd-m9: Unknown AutoAugment config section; for instance rand-m9"),
        (["--synthetic", "--aa", "rand-x9"], "--aa rand-x9: "),
        (["--synthetic", "--bce-target-thresh", "0.2"], "is an option of --bce-loss"),
    ],
)
def test_unusable_arguments_are_errors(capsys, options, message):
    with pytest.raises(SystemExit):
        parse_args(options)
    assert message in capsys.readouterr().err


def test_help_teaches(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse_args(["--help"])
    shown = capsys.readouterr().out
    assert "torchrun --nproc_per_node=8" in shown
    assert "optimiser:" in shown and "checkpoints and logs:" in shown


def test_saved_file_holds_plain_values_only(tmp_path):
    save_args(parse_args(["--synthetic", "--output", str(tmp_path)]), tmp_path / "args.yaml")
    saved = yaml.safe_load((tmp_path / "args.yaml").read_text())
    assert saved["output"] == str(tmp_path)
    assert "config" not in saved and "resume" not in saved


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "augmix-m3-w3", "original", "3a"])
def test_timms_policies_of_augmentation_are_taken(policy):
    assert parse_args(["--synthetic", "--aa", policy]).aa == policy
