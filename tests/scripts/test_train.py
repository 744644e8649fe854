"""Runs of train.py that are killed, stopped, resumed, fed with bad data and out of disk."""

import csv
import re
import resource
import signal
import subprocess
import sys

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timm.models import load_checkpoint
from timm.utils import random_seed
from train_runs import ENVIRONMENT, SCRIPTS, assert_same_weights, command, photo_folder, run, run_until

from common.checkpoint import load_state
from common.signals import StopSignals
from fdconv_zoo.layers import ksm
from train import load_initial_weights, main

# Everything random that a run can have: dropout, stochastic depth, augmentation in the loader workers, random erasing
# and mixup in the main process; and everything stateful: momentum, schedule, EMA, accumulated passes.
RECIPE = [
    "--model", "test_resnet", "--num-classes", 2, "--img-size", 64, "-b", 2, "--grad-accum-steps", 2, "-j", 2,
    "--epochs", 3, "--opt", "adamw", "--lr", 2e-3, "--warmup-epochs", 1, "--drop", 0.2, "--drop-path", 0.1,
    "--aa", "rand-m9-mstd0.5", "--reprob", 0.5, "--mixup", 0.2, "--cutmix", 1, "--smoothing", 0.1, "--clip-grad", 1,
    "--model-ema", "--model-ema-decay", 0.9, "--device", "cpu", "--log-interval", 1,
]  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return photo_folder(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def uninterrupted(photos, tmp_path_factory):
    output = tmp_path_factory.mktemp("uninterrupted") / "run"
    run(*RECIPE, "--data-dir", photos, "--output", output)
    return output


def test_killed_run_resumes_to_the_same_weights(photos, uninterrupted, tmp_path):
    args = [*RECIPE, "--data-dir", photos, "--output", tmp_path, "--save-every-steps", 3]
    code, output = run_until("update 8/15", signal.SIGKILL, *args)
    assert code == -signal.SIGKILL
    assert "update 15/15" not in output
    resumed = run(*args, "--resume")
    assert "resumed" in resumed and "epoch 1 after update 6" in resumed
    assert_same_weights(uninterrupted, tmp_path)
    assert (tmp_path / "summary.csv").read_text() == (uninterrupted / "summary.csv").read_text()


@pytest.mark.parametrize("signum", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_stopped_run_saves_leaves_and_resumes_to_the_same_weights(photos, uninterrupted, tmp_path, signum):
    args = [*RECIPE, "--data-dir", photos, "--output", tmp_path]
    code, output = run_until("update 7/15", signum, *args)
    assert code == 128 + signum
    assert output.splitlines()[-1] == f"stopped by {signum.name} and saved; go on with --resume"
    run(*args, "--resume", "-j", 1)  # the number of workers changes nothing
    assert_same_weights(uninterrupted, tmp_path)


KILL_BETWEEN_WRITES = """
import os, signal, sys
sys.path.insert(0, {scripts!r})
import train
from training import run
save_weights = run.save_weights
def killed_on_second_save(weights, path, metadata):
    if metadata["update"] == "6":
        os.kill(os.getpid(), signal.SIGKILL)
    save_weights(weights, path, metadata)
run.save_weights = killed_on_second_save
train.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_kill_between_state_and_weights_does_not_mix_steps(photos, uninterrupted, tmp_path):
    args = [*RECIPE, "--data-dir", photos, "--output", tmp_path, "--save-every-steps", 3]
    code = KILL_BETWEEN_WRITES.format(scripts=str(SCRIPTS))
    killed = subprocess.run([sys.executable, "-c", code, *map(str, args)], env=ENVIRONMENT, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    with safe_open(tmp_path / "last.safetensors", "pt") as weights:
        assert weights.metadata()["update"] == "5"  # the state is already the one after update 6
    assert "after update 6" in run(*args, "--resume")
    assert_same_weights(uninterrupted, tmp_path)


def test_two_processes_have_the_gradient_of_one_on_the_same_global_batch(photos, tmp_path):
    # One SGD update without momentum and decay moves the weights by lr times the gradient. A model without batch norm,
    # whose statistics would be those of each process's part of the batch; without dropout, whose masks would differ.
    args = [
        "--model", "test_vit", "--num-classes", 2, "--img-size", 64, "--model-kwargs", "img_size=64",
        "--data-dir", photos, "-j", 0, "--aa", "rand-m9-mstd0.5", "--device", "cpu", "--steps", 1,
        "--opt", "momentum", "--momentum", 0, "--weight-decay", 0, "--lr", 1,
        "--sched", "constant", "--warmup-epochs", 0,
    ]  # fmt: skip
    main([str(arg) for arg in (*args, "-b", 8, "--output", tmp_path / "one")])
    main([str(arg) for arg in (*args, "-b", 4, "--grad-accum-steps", 2, "--output", tmp_path / "accumulated")])
    run(*args, "-b", 4, "--output", tmp_path / "two", processes=2)
    one, two, accumulated = (load_file(tmp_path / name / "last.safetensors") for name in ("one", "two", "accumulated"))
    random_seed(42)
    start = timm.create_model("test_vit", num_classes=2, img_size=64).state_dict()
    for name in one:
        gradient = start[name] - one[name]
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(start[name] - two[name], gradient, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(start[name] - accumulated[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_two_processes_stopped_in_fdconv_training_resume_to_the_same_weights(photos, tmp_path):
    args = [*RECIPE, "--model", "resnet18_fdconv", "--epochs", 2, "--data-dir", photos, "-j", 1]
    run(*args, "--output", tmp_path / "whole", processes=2)
    code, output = run_until("update 4/6", signal.SIGTERM, *args, "--output", tmp_path / "stopped", processes=2)
    assert code != 0
    assert "stopped by SIGTERM and saved" in output
    run(*args, "--output", tmp_path / "stopped", "--resume", processes=2)
    assert_same_weights(tmp_path / "whole", tmp_path / "stopped")


def small_run(photos, output, *options):
    """A short run in this process."""
    args = ["--model", "test_resnet", "--num-classes", 2, "--img-size", 64, "-b", 4, "-j", 0, "--data-dir", photos]
    main([str(arg) for arg in (*args, "--device", "cpu", "--log-interval", 1, "--output", output, *options)])


def test_divergence_stops_with_advice_and_keeps_the_last_good_checkpoint(photos, tmp_path):
    options = ["--lr", 1e30, "--sched", "constant", "--warmup-epochs", 0, "--save-every-steps", 1]
    with pytest.raises(SystemExit, match=r"not finite .*last.state.pt is from before; try a lower --lr"):
        small_run(photos, tmp_path, *options)
    state = load_state(tmp_path / "last.state.pt")
    assert all(weight.isfinite().all() for weight in state["weights"]["last"].values())


def test_corrupt_images_are_skipped_counted_and_listed(tmp_path, caplog):
    data = photo_folder(tmp_path / "data")
    photo = (data / "train" / "class0" / "imagenet_00_243.jpg").read_bytes()
    (data / "train" / "class0" / "truncated.jpg").write_bytes(photo[: len(photo) // 2])
    (data / "train" / "class1" / "no_image.jpg").write_text("not an image")
    small_run(data, tmp_path / "run", "-b", 2, "-j", 2, "--epochs", 2)
    assert caplog.text.count("skipped 2 corrupt images so far") == 2
    listed = (tmp_path / "run" / "corrupt_images.txt").read_text().split()
    assert listed == ["class0/truncated.jpg", "class1/no_image.jpg"]


@pytest.mark.slow
def test_full_disk_ends_in_one_line_and_keeps_the_checkpoint(photos, tmp_path):
    args = ["--model", "test_resnet", "--num-classes", 2, "--img-size", 64, "-b", 4, "-j", 0, "--data-dir", photos]
    args += ["--device", "cpu", "--epochs", 3, "--output", tmp_path]
    run(*args, "--steps", 2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.suffix in (".pt", ".safetensors")}
    full = subprocess.run(
        command(*args, "--resume"), env=ENVIRONMENT, text=True, capture_output=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)),
    )  # fmt: skip
    assert full.returncode == 1
    line = full.stderr.splitlines()[-1]
    assert "can't write" in line and "the previous last.state.pt is intact" in line
    assert "Traceback" not in full.stderr
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name in before}
    assert not list(tmp_path.glob(".*.tmp"))
    run(*args, "--resume")


def test_resume_refuses_what_it_cannot_go_on_with(photos, tmp_path):
    small_run(photos, tmp_path, "--steps", 1)
    with pytest.raises(SystemExit, match="holds a run: add --resume"):
        small_run(photos, tmp_path, "--steps", 1)
    with pytest.raises(SystemExit, match="made with batch_size 4, not 2; batches an epoch 5, not 10"):
        small_run(photos, tmp_path, "--resume", "-b", 2)
    with pytest.raises(SystemExit, match=r"can't resume from .*nowhere.pt"):
        small_run(photos, tmp_path, "--resume", tmp_path / "nowhere.pt")
    torch.save({"weights": {}}, tmp_path / "other.pt")
    with pytest.raises(SystemExit, match="not a state file"):
        small_run(photos, tmp_path, "--resume", tmp_path / "other.pt")


def test_resume_takes_the_rate_of_now(photos, tmp_path):
    options = ["--sched", "constant", "--warmup-epochs", 0]
    small_run(photos, tmp_path, *options, "--steps", 1, "--lr", 0.1)
    small_run(photos, tmp_path, *options, "--steps", 2, "--lr", 0.01, "--resume")
    groups = load_state(tmp_path / "last.state.pt")["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == [0.01, 0.01]


def test_lookahead_goes_on_counting(photos, tmp_path):
    options = ["--opt", "lookahead_momentum", "--lr", 0.05, "--epochs", 2]
    small_run(photos, tmp_path / "whole", *options)
    small_run(photos, tmp_path / "stopped", *options, "--steps", 4)
    small_run(photos, tmp_path / "stopped", *options, "--resume")
    assert_same_weights(tmp_path / "whole", tmp_path / "stopped", names=["last"])


def test_the_best_is_of_the_metric_of_now_and_columns_are_kept(photos, tmp_path):
    small_run(photos, tmp_path, "--epochs", 3, "--steps", 7, "--eval-metric", "top5", "--lr", 0.1)
    with (tmp_path / "summary.csv").open("a") as file:
        file.write("0,1,2,3,4,0.05,6,7\n")  # a row longer than the columns, as a resume with an average once left it
    state = load_state(tmp_path / "last.state.pt")
    assert (state["progress"]["best_metric"], state["progress"]["updates"]) == (100, 7)  # of an epoch's middle too
    small_run(photos, tmp_path, "--epochs", 3, "--eval-metric", "top1", "--lr", 0.1, "--model-ema", "--resume")
    with (tmp_path / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "0", "1", "2"] and all(None not in row for row in rows)
    assert [bool(row["eval_ema_loss"]) for row in rows] == [False, False, True, True]
    assert all(float(row["lr"]) <= 0.1 for row in rows)
    best = load_state(tmp_path / "last.state.pt")["progress"]["best_metric"]
    assert best == max(float(row["eval_ema_top1"]) for row in rows[2:])


def test_options_for_speed_leave_plain_checkpoints_and_resume(photos, tmp_path, caplog):
    caplog.set_level("INFO", "train")
    options = ["--torchcompile", "eager", "--channels-last", "--amp", "--amp-dtype", "float16", "--model-ema"]
    options += ["--layer-decay", 0.8, "--opt", "lamb", "--grad-accum-steps", 2, "--clip-grad", 1, "--clip-mode", "agc"]
    options += ["--drop", 0.2, "--mixup", 0.2, "--reprob", 0.5]
    small_run(photos, tmp_path / "whole", *options, "--steps", 4)
    assert "compiling with eager" in caplog.text
    small_run(photos, tmp_path / "run", *options, "--steps", 2)
    model = timm.create_model("test_resnet", num_classes=2)
    for name in ("last", "last_ema", "model_best"):
        load_checkpoint(model, tmp_path / "run" / f"{name}.safetensors")
    state = load_state(tmp_path / "run" / "last.state.pt")
    assert state["scaler"]["scale"] > 1
    small_run(photos, tmp_path / "run", *options, "--steps", 4, "--resume")
    state = load_state(tmp_path / "run" / "last.state.pt")
    assert state["progress"]["updates"] == 4
    assert {int(group["step"]) for group in state["optimizer"]["param_groups"]} == {4}
    assert_same_weights(tmp_path / "whole", tmp_path / "run")


def test_initial_weights_of_a_static_model_with_other_classes(tmp_path):
    static = timm.create_model("resnet18", num_classes=5)
    save_file(static.state_dict(), tmp_path / "static.safetensors")
    model = timm.create_model("resnet18_fdconv", num_classes=2)
    load_initial_weights(model, tmp_path / "static.safetensors")
    images = torch.rand(2, 3, 64, 64)
    features = static.eval().forward_features(images)
    torch.testing.assert_close(model.eval().forward_features(images), features, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="does not fit"):
        load_initial_weights(timm.create_model("resnet34_fdconv"), tmp_path / "static.safetensors")
    save_file(model.state_dict(), tmp_path / "own.safetensors")
    with pytest.raises(ValueError, match=r"does not fit: .*\n.*was saved, which has mask_grid=None"):
        load_initial_weights(
            timm.create_model("resnet18_fdconv", num_classes=2, mask_grid=64), tmp_path / "own.safetensors"
        )


def test_logs(photos, tmp_path, caplog):
    caplog.set_level("INFO", "train")
    small_run(photos, tmp_path, "--epochs", 2, "--tensorboard")
    assert re.search(r"epoch 1 \(100%\)  update 10/10  loss \d\.\d+  lr .*images/s  ETA 0:00:00", caplog.text)
    assert (tmp_path / "summary.csv").read_text().startswith("epoch,train_loss,eval_loss,eval_top1,eval_top5,lr\n0,")
    with safe_open(tmp_path / "last.safetensors", "pt") as weights:
        assert weights.metadata() == {"model": "test_resnet", "epoch": "1", "update": "10"}
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 11))
    assert [event.step for event in events.Scalars("eval/top1")] == [5, 10]


def test_missing_tensorboard_is_an_error_that_says_what_to_install(photos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(SystemExit, match="pip install tensorboard"):
        small_run(photos, tmp_path, "--tensorboard")


def test_batch_of_one_explains_itself(photos, tmp_path):
    ksm._warn_once.cache_clear()
    with pytest.warns(UserWarning, match=r"batch of one sample in training.*drop_last"):
        small_run(photos, tmp_path, "--model", "resnet18_fdconv", "-b", 1, "--steps", 1)


def test_stop_signals_are_given_back(photos, tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    small_run(photos, tmp_path, "--steps", 1)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_first_interrupt_asks_and_a_second_one_ends():
    with StopSignals() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.any_process() == signal.SIGINT
        signal.raise_signal(signal.SIGTERM)  # torchrun sends one after Ctrl-C
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
