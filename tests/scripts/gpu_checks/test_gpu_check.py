"""scripts/gpu_check.py: its parts in small on the CPU, failures, budgets, mistakes. No figure is looked at."""

import importlib
import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from fdconv_zoo.conversion import named_fd_layers
from gpu_checks import builds, commands, shapes, speed
from gpu_checks.parts import PARTS, Part
from gpu_checks.runner import Runner
from gpu_checks.setup import DeviceLostError, Setup, UnavailableError, is_good, largest_error, norm_error

SCRIPT = Path(__file__).parents[3] / "scripts" / "gpu_check.py"
SMALL = ["--device", "cpu", "--small"]
PATIENT = [*SMALL, "--minutes", "60"]  # no part is cut on a busy machine


def only(*names):
    return [word for name in names for word in ("--only", name)]


def read(path):
    return json.loads(path.read_text())


def faults(result):
    return {
        name: [row for row in part["rows"] if not is_good(row)] + [part.get("fault")]
        for name, part in result["parts"].items()
        if part["status"] == "failed"
    }


def test_parts_without_kernels_run_in_small_on_the_cpu(tmp_path, capsys):
    names = [name for name in PARTS if name != "commands"]
    path = tmp_path / "new" / "cpu.json"
    importlib.import_module("gpu_check").main([*PATIENT, *only(*names), "--output", str(path)])
    result = read(path)
    assert faults(result) == {}
    without_kernels = {"kernels", "layers", "shapes"}
    for name in names:
        assert result["parts"][name]["status"] == ("unavailable" if name in without_kernels else "passed"), name
    assert [len(result["parts"][name]["rows"]) for name in ("golden", "models", "profile", "training")] == [1, 4, 2, 1]
    first = result["parts"]["speed"]["rows"][0]
    assert {"static", "fdconv", "unfused", "kept"} < first.keys()
    assert first["fdconv"]["moved_bytes"] > first["static"]["moved_bytes"] > 0
    assert len(result["parts"]["profile"]["rows"][0]["longest"]) == 10
    table = capsys.readouterr().out
    assert all(f"| {name} " in table for name in names)


def interpreted(path, *names):
    command = [sys.executable, str(SCRIPT), *PATIENT, *only(*names), "--output", str(path)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=path.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    result = read(path)
    assert {name: part["status"] for name, part in result["parts"].items()} == dict.fromkeys(names, "passed")
    return result


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is for Linux")
def test_kernels_in_the_interpreter(tmp_path):
    """In a folder without the package: the command finds the tree that it lies in."""
    result = interpreted(tmp_path / "kernels.json", "kernels")
    names = {name for row in result["parts"]["kernels"]["rows"] for name in row["results"]}
    assert names >= {"bank", "gated_weights", "ungate weights", "convolve", "grad_input", "grad_weight"}
    assert names >= {"gate_bands", "adjoint", "grad_factors", "grad_logits", "bank_backward", "without gates"}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is for Linux")
def test_shapes_and_a_golden_layer_in_the_interpreter(tmp_path):
    interpreted(tmp_path / "all.json", "shapes", "golden")


@pytest.mark.slow
def test_commands_in_processes_of_their_own(tmp_path):
    importlib.import_module("gpu_check").main([*PATIENT, *only("commands"), "--output", str(tmp_path / "cpu.json")])
    part = read(tmp_path / "cpu.json")["parts"]["commands"]
    assert [row["case"] for row in part["rows"]] == ["train.py", "validate.py", "train_dense.py"]
    assert all("last line" in row for row in part["rows"])


def arguments(tmp_path, **changes):
    values = {"only": None, "minutes": 1.0, "output": tmp_path / "x.json", "keep": False, "device": "cpu"}
    return Namespace(**{**values, "small": True, **changes})


def part(*rows, share=1.0):
    def run(setup):
        for row in rows:
            if isinstance(row, Exception):
                raise row
            if callable(row):
                row = setup.attempt(row.__name__, row)
            yield row

    return Part(run, share, "")


def broken():
    raise ValueError("a wrong\nnumber of lines")


def test_what_fails_is_reported_and_the_others_go_on(tmp_path, capsys):
    parts = {
        "raises": part({"case": "before"}, KeyError("lost")),
        "case": part(broken, {"case": "after", "error": 1.0, "limit": 2.0}),
        "beyond": part({"case": "far", "error": 3.0, "limit": 2.0}, {"case": "nan", "error": float("nan"), "limit": 1}),
        "absent": part(UnavailableError("no such package")),
        "fine": part({"case": "good", "error": 1.0, "limit": 2.0}),
    }
    assert not Runner(arguments(tmp_path), parts, SCRIPT).run()
    result = read(tmp_path / "x.json")["parts"]
    assert [result[name]["status"] for name in parts] == ["failed", "failed", "failed", "unavailable", "passed"]
    assert "KeyError: 'lost'" in result["raises"]["fault"]
    assert "in broken" in result["case"]["rows"][0]["fault"]
    assert [row["case"] for row in result["case"]["rows"]] == ["broken", "after"]
    table = capsys.readouterr().out
    assert "bad: far; bad: nan" in table
    assert "no such package" in table
    assert "50 % of its limit" in table


def test_budget_skips_by_name_and_cuts_between_cases(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("gpu_checks.runner.LEAST_SECONDS", 0.2)

    def slow():
        time.sleep(0.4)
        return {}

    parts = {"long": part(slow, slow, slow), "late": part({"case": "never"})}
    assert Runner(arguments(tmp_path, minutes=0.5 / 60), parts, SCRIPT).run()
    result = read(tmp_path / "x.json")["parts"]
    assert (result["long"]["status"], len(result["long"]["rows"])) == ("cut", 1)
    assert result["late"]["status"] == "skipped"
    assert "were left" in capsys.readouterr().out


def test_every_row_is_written_before_the_next(tmp_path):
    seen = []

    def look(setup):
        yield {"case": "first"}
        seen.append(read(tmp_path / "x.json")["parts"]["one"])
        yield {"case": "second"}

    Runner(arguments(tmp_path), {"one": Part(look, 1, "")}, SCRIPT).run()
    assert seen[0]["status"] == "running"
    assert [row["case"] for row in seen[0]["rows"]] == ["first"]


def test_only_runs_what_is_asked_for_and_keep_keeps_the_rest(tmp_path):
    parts = {"one": part({"case": "old"}), "two": part({"case": "other"})}
    Runner(arguments(tmp_path), parts, SCRIPT).run()
    again = {"one": part({"case": "new"}), "two": part(KeyError("not run"))}
    assert Runner(arguments(tmp_path, only=["one"], keep=True), again, SCRIPT).run()
    result = read(tmp_path / "x.json")["parts"]
    assert [part["rows"][0]["case"] for part in result.values()] == ["new", "other"]
    Runner(arguments(tmp_path, only=["one"]), again, SCRIPT).run()
    assert list(read(tmp_path / "x.json")["parts"]) == ["one"]


def test_events_and_captures_are_on_the_gpu_that_is_checked(tmp_path, monkeypatch):
    current = []
    monkeypatch.setattr("torch.cuda.set_device", lambda device: current.append(device))
    monkeypatch.setattr("gpu_checks.runner.card_name", lambda device: "card")
    assert Runner(arguments(tmp_path, device="cuda:1"), {}, SCRIPT).setup.device == torch.device("cuda:1")
    assert current == [torch.device("cuda:1")]


def test_a_lost_device_is_left_to_a_new_process(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(os, "execv", lambda program, command: started.append(command))
    parts = {"kernels": part({"case": "good"}, DeviceLostError("illegal access")), "facts": part({"case": "x"})}
    assert not Runner(arguments(tmp_path), parts, SCRIPT).run()
    assert [part["status"] for part in read(tmp_path / "x.json")["parts"].values()] == ["failed", "waiting"]
    subprocess.run(started[0], check=False, capture_output=True)
    result = read(tmp_path / "x.json")["parts"]
    assert (result["kernels"]["status"], result["facts"]["status"]) == ("failed", "passed")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "kernel", *SMALL], "--only kernel: the parts are facts, kernels, layers, golden"),
        (["--device", "cpu"], "--device cpu is no GPU: add --small"),
        (["--minutes", "0", *SMALL], "--minutes 0 must be above 0"),
        (["--output", "x.txt", *SMALL], "--output must end in .json, got x.txt"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        importlib.import_module("gpu_check").main(arguments)
    assert str(exit.value.code).startswith(f"gpu_check.py: error: {message}")
    assert "\n" not in str(exit.value.code)


def test_missing_packages_are_one_line(monkeypatch):
    module = importlib.import_module("gpu_check")
    monkeypatch.setattr(module, "NEEDED", ("torch", "no_such_package", "timm"))
    with pytest.raises(SystemExit, match=r"error: this machine has no no_such_package$"):
        module.main([])


def test_output_goes_to_the_folder_that_comes_back(monkeypatch, tmp_path):
    monkeypatch.setenv("OUT", str(tmp_path))
    importlib.import_module("gpu_check").main([*SMALL, *only("facts")])
    assert read(tmp_path / "cpu.json")["parts"]["facts"]["status"] == "passed"


def test_help_teaches():
    done = subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, check=True)
    assert "examples:" in done.stdout
    assert all(f"\n  {name} " in done.stdout for name in PARTS)


def test_a_command_that_lacks_a_package_says_which(tmp_path):
    log = tmp_path / "log"
    with log.open("wb") as file:
        process = subprocess.Popen([sys.executable, "-c", "import no_such_package"], stderr=file)
    row = commands.result("train.py", process, log, time.monotonic(), time.monotonic() + 60)
    assert row == {"case": "train.py", "not run": "this machine has no no_such_package"}
    with log.open("wb") as file:
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], stderr=file)
    row = commands.result("train.py", process, log, time.monotonic(), time.monotonic())
    assert "still running" in row["fault"]
    assert process.poll() is not None


def test_shapes_are_those_of_every_layer():
    spec = builds.specs(small=True)[0]
    model = builds.fdconv_model(spec)
    found = shapes.shapes_of(model, spec.size, torch.device("cpu"))
    assert sum(found.values()) == len(list(named_fd_layers(model))) == 8
    assert {shape.kernel for shape in found} == {(3, 3)}
    assert {shape.stride for shape in found} == {(1, 1), (2, 2)}


def test_speed_begins_with_what_matters_most():
    cases = speed.cases(Setup(torch.device("cuda"), small=False))
    assert str(cases[0]) == "resnet50_fdconv eval 64 bfloat16 eager"
    assert str(cases[1]) == "resnet50_fdconv train 64 bfloat16 eager"
    assert len({str(case) for case in cases}) == len(cases) == 3 * 2 * (4 * 4 + 2 * 3)
    assert cases[0].kinds == ("static", "fdconv", "unfused", "kept")


def test_errors_of_other_shapes_and_of_numbers_that_are_none():
    one = torch.ones(3)
    for error in (largest_error, norm_error):
        assert error(one, one) == 0
        assert error(torch.ones(2), one) == float("inf")
        assert not is_good({"error": error(one * float("nan"), one), "limit": 1.0})
        assert error(one * 1.5, one.double()) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("index", "visible", "card"), [(0, None, "0"), (1, None, "1"), (1, "3,5", "5"), (0, "GPU-8f2, GPU-a1", "GPU-8f2")]
)
def test_commands_see_the_card_that_is_checked(index, visible, card):
    assert commands.card_for_children(index, visible) == card
