"""scripts/benchmark.py: whole runs on small models, what a failure leaves, mistakes; nothing is timed."""

import importlib
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from benchmark_pairs import tiny_pair

from benchmarking import measure as measuring
from benchmarking import timing
from fdconv_zoo.conversion import named_fd_layers

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark.py"
MODEL = "mobilenetv2_100_fdconv"
SMALL = ["--model", MODEL, "--img-size", "32", "--repeats", "2", "--warmup", "1", "--threads", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def benchmark():
    torch.set_num_threads(1)
    return importlib.import_module("benchmark")


def run(main, tmp_path, *arguments):
    main([*SMALL, "--results-file", str(tmp_path / "results.json"), *arguments])
    return json.loads((tmp_path / "results.json").read_text())


def error_of(main, capsys, *arguments):
    with pytest.raises(SystemExit) as exit:
        main(list(arguments))
    message = str(exit.value.code)
    assert message.startswith("benchmark.py: error: ")
    assert "\n" not in message
    assert "Traceback" not in capsys.readouterr().err
    return message


def test_run_prints_a_table_and_writes_every_figure(benchmark, tmp_path, capsys):
    result = run(benchmark.main, tmp_path, "--mode", "eval", "train", "--batch-size", "1", "2", "--img-size", "64")
    output = capsys.readouterr()
    assert [(row["mode"], row["batch_size"]) for row in result["rows"]] == [
        ("eval", 1), ("eval", 2), ("train", 1), ("train", 2)
    ]  # fmt: skip
    assert len([line for line in output.out.splitlines() if line.startswith(f"| {MODEL} ")]) == 4
    assert {"torch", "timm", "python", "fdconv_zoo"} == result["versions"].keys()
    assert "--mode eval train" in result["command"]
    assert result["cpu"] and result["date"].endswith("+00:00")
    for row in result["rows"]:
        assert (row["model"], row["static_model"], row["engine"], row["threads"]) == (
            MODEL,
            "mobilenetv2_100",
            "eager",
            1,
        )
        for kind in ("static", "fdconv"):
            assert len(row[kind]["times"]) == 2
            assert row[kind]["process_bytes"] > row[kind]["peak_bytes"]
        assert row["ratio"] == pytest.approx(timing.median_ratio(row["fdconv"]["times"], row["static"]["times"]))
        assert row["fdconv"]["parameters"] > row["static"]["parameters"] == 3504872
        assert row["fdconv"]["macs"] > row["static"]["macs"]
        assert (row["static"]["saved_bytes"] is None) == (row["mode"] == "eval")
    assert result["rows"][3]["fdconv"]["saved_bytes"] >= result["rows"][3]["static"]["saved_bytes"] > 0


def test_picture_of_sizes_and_batches(benchmark, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "model_pair", lambda name, size, *arguments: tiny_pair(size))
    plot = tmp_path / "new folder" / "cost.png"
    run(benchmark.main, tmp_path, "--img-size", "32", "64", "--batch-size", "1", "2", "--plot", str(plot))
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_cpu_time_is_that_of_the_process(benchmark, tmp_path, monkeypatch):
    clocks = []
    original = measuring.time_in_alternation
    monkeypatch.setattr(measuring, "time_in_alternation", lambda *args: clocks.append(args[-1]) or original(*args))
    monkeypatch.setattr(benchmark, "model_pair", lambda *arguments: tiny_pair())
    run(benchmark.main, tmp_path, "--batch-size", "1")
    run(benchmark.main, tmp_path, "--batch-size", "1", "--cpu-time")
    assert clocks == [time.perf_counter, time.process_time]


def test_reference_is_timed_and_compared(benchmark, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "model_pair", lambda *arguments: tiny_pair())
    result = run(benchmark.main, tmp_path, "--reference", "--batch-size", "2", "--mode", "eval", "train")
    literal = result["rows"][0]["literal"]
    assert literal["relative_difference_of_fdconv"] < 1e-5
    assert len(literal["times"]) == 1
    assert literal["ratio_to_static"] == pytest.approx(literal["times"][0] / result["rows"][0]["static"]["times"][0])
    assert "literal" not in result["rows"][1], "its training step would not fit into memory"
    output = capsys.readouterr()
    assert "literal / FDConv" in output.out
    assert "literal equations" in output.err


def test_compiled_models_run_beside_eager_ones(benchmark, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model, **options: compiled.append((model, options)) or model)
    pair = tiny_pair()
    monkeypatch.setattr(benchmark, "model_pair", lambda *arguments: pair)
    rows = run(benchmark.main, tmp_path, "--compile", "--batch-size", "2", "--compile-mode", "reduce-overhead")["rows"]
    options = {"dynamic": False, "mode": "reduce-overhead"}
    assert compiled == [(pair.static, options), (pair.fdconv, options)]
    assert [row["engine"] for row in rows] == ["eager", "compile"]
    assert rows[1]["ratio_to_eager_static"] == pytest.approx(
        timing.median_ratio(rows[1]["fdconv"]["times"], rows[0]["static"]["times"])
    )


def test_failure_of_one_workload_leaves_the_others(benchmark, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "model_pair", lambda *arguments: tiny_pair())
    measure = benchmark.measure

    def fail_at_two(pair, batch_size, *arguments):
        if batch_size == 2:
            raise RuntimeError("out of memory\nand a long story")
        return measure(pair, batch_size, *arguments)

    monkeypatch.setattr(benchmark, "measure", fail_at_two)
    with pytest.raises(SystemExit) as exit:
        run(benchmark.main, tmp_path, "--batch-size", "1", "2", "3")
    assert exit.value.code == 1
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row.get("error") for row in rows] == [None, "out of memory\nand a long story", None]
    output = capsys.readouterr()
    assert "failed: out of memory\n" in output.err
    assert "failed" in output.out


def test_interruption_keeps_what_was_measured(benchmark, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "model_pair", lambda *arguments: tiny_pair())
    measure = benchmark.measure

    def interrupt_at_two(pair, batch_size, *arguments):
        if batch_size == 2:
            raise KeyboardInterrupt
        return measure(pair, batch_size, *arguments)

    monkeypatch.setattr(benchmark, "measure", interrupt_at_two)
    with pytest.raises(SystemExit) as exit:
        run(benchmark.main, tmp_path, "--batch-size", "1", "2", "3")
    assert exit.value.code == 130
    assert len(json.loads((tmp_path / "results.json").read_text())["rows"]) == 1
    output = capsys.readouterr()
    assert "| tiny_fdconv " in output.out
    assert "interrupted" in output.err


def test_size_that_does_not_work_loses_nothing(benchmark, tmp_path, capsys):
    model = ["--model", "convnext_atto_fdconv", "--img-size", "32", "8", "--batch-size", "1"]
    with pytest.raises(SystemExit, match=r"benchmark\.py: error: .*size"):
        run(benchmark.main, tmp_path, *model)
    assert len(json.loads((tmp_path / "results.json").read_text())["rows"]) == 1
    assert "| convnext_atto_fdconv " in capsys.readouterr().out


def test_preset_covers_the_issue(benchmark):
    args = importlib.import_module("benchmarking.args").parse_args(["--preset", "table"])
    plan = benchmark.make_plan(args)
    assert [list(workloads) for _, workloads in plan] == [
        [(1, "eval"), (8, "eval"), (4, "train")],
        [(1, "eval"), (8, "eval"), (4, "train")],
        [(1, "eval"), (8, "eval"), (4, "train")],
        [(8, "eval")],
        [(64, "train")],
    ]
    names = [build.args[0] for build, _ in plan[:3] if isinstance(build, partial)]
    assert names == ["resnet50_fdconv", "convnext_tiny_fdconv", "swin_tiny_fdconv"]


def test_preset_of_small_images(benchmark):
    args = importlib.import_module("benchmarking.args").parse_args(["--preset", "small-images"])
    plan = benchmark.make_plan(args)
    assert {tuple(workloads) for _, workloads in plan} == {((1, "eval"), (8, "eval"))}
    pairs = [build() for build, _ in plan]
    assert {pair.input_size for pair in pairs} == {(3, 64, 64)}
    converted = [dict(named_fd_layers(pair.fdconv)) for pair in pairs]
    assert converted[0].keys() == dict(named_fd_layers(timm.create_model("resnet18_fdconv", device="meta"))).keys()
    assert {layer.fdw.num_bands for layer in converted[1].values()} == {4}
    assert [sorted({name.partition(".")[0] for name in layers})[-1] for layers in converted[2:]] == ["layer3", "layer2"]
    assert len({pair.name for pair in pairs}) == 4 and "layer[123] converted" in pairs[2].name


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "--model NAME or --preset"),
        (["--model", MODEL, "--preset", "table"], "--model NAME or --preset"),
        (["--model", "resnet50_fdcon"], "did you mean resnet50_fdconv"),
        (["--model", "resnet50"], "resnet50 has no static twin: it is no FDConv model, did you mean resnet50_fdconv"),
        (["--model", "vgg16"], "vgg16 has no static twin"),
        (["--model", MODEL, "--plot", "cost.png", "--batch-size", "1"], "two or more of --img-size or --batch-size"),
        (["--model", MODEL, "--plot", "cost.pdf"], "--plot must end in .png"),
        (["--model", MODEL, "--results-file", "cost.csv"], "must end in .json"),
        (["--model", MODEL, "--reference", "--amp"], "--reference runs in full precision"),
        (["--model", MODEL, "--device", "tpu"], "--device tpu"),
        (["--model", MODEL, "--device", "meta", "--cpu-time"], "--cpu-time counts the processor's seconds"),
        (["--model", MODEL, "--model-kwargs", "bands=3"], "bands"),
        (["--model", MODEL, "--model-kwargs", "num_bands=0"], "num_bands=0"),
        (["--preset", "small-images", "--img-size", "32", "64"], "small-images takes one --img-size, got 32, 64"),
        (["--preset", "table", "--img-size", "64", "224"], "takes one --img-size, got 64, 224"),
    ],
)
def test_mistakes_are_told_in_one_line(benchmark, arguments, expected, capsys):
    assert expected in error_of(benchmark.main, capsys, *arguments)


@pytest.mark.parametrize("option", ["--batch-size", "--img-size", "--threads", "--repeats", "--warmup"])
def test_numbers_must_be_positive(benchmark, option, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--model", MODEL, option, "0"])
    assert f"argument {option}: invalid positive whole number value: '0'" in capsys.readouterr().err


def test_help_teaches():
    result = subprocess.run([sys.executable, SCRIPT, "--help"], capture_output=True, text=True, check=True)
    for heading in ("what to measure", "how to run it", "how to measure", "output", "examples:"):
        assert heading in result.stdout
