"""scripts/benchmark.py: order and arithmetic on fakes, memory against known sizes, real models; no timing."""

import importlib
import json
import multiprocessing
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn

import fdconv_zoo
from benchmarking import memory, models, report, timing
from common.gates import move_gates
from common.record import write_json
from fdconv_zoo.convert import named_fd_layers
from tests.compare import relative_error

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark.py"
MODEL = "mobilenetv2_100_fdconv"
PEAK_SIZE = 64 * 2**20  # bytes
SMALL = ["--model", MODEL, "--img-size", "32", "--repeats", "2", "--warmup", "1", "--threads", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def benchmark():
    torch.set_num_threads(1)
    return importlib.import_module("benchmark")


def tiny_pair(img_size=16, channels=20):
    static = nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3), nn.Flatten()
    )
    static.num_classes = channels * (img_size - 2) ** 2
    fdconv = nn.Sequential(
        static[0],
        nn.ReLU(),
        fdconv_zoo.FDConv2d.from_conv(static[2], num_bands=4),
        nn.Flatten(),
    )
    return models.Pair("tiny_fdconv", "tiny", move_gates(fdconv, 0), static, (3, img_size, img_size))


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


class FakeClock:
    """A clock that runs move: each call of a fake takes the next of its durations, the last one for good."""

    def __init__(self):
        self.now = 0.0
        self.calls = []

    def __call__(self):
        return self.now

    def run(self, name, *durations):
        left = list(durations)

        def call():
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


def time_fakes(repeats, warmup, **durations):
    clock = FakeClock()
    runs = {name: clock.run(name, *times) for name, times in durations.items()}
    times = timing.time_in_alternation(
        runs, dict.fromkeys(runs, 1) | repeats, dict.fromkeys(runs, warmup), lambda: None, clock
    )
    return clock.calls, times


def test_runs_take_turns_after_their_warm_ups():
    calls, times = time_fakes({"static": 3, "fdconv": 3}, 2, static=[9, 9, 1, 2, 3], fdconv=[9, 9, 4, 5, 6])
    assert calls == ["static"] * 2 + ["fdconv"] * 2 + ["static", "fdconv"] * 3
    assert times == {"static": [1, 2, 3], "fdconv": [4, 5, 6]}


def test_a_slow_run_sits_out_the_later_rounds():
    calls, times = time_fakes({"static": 3, "fdconv": 3, "literal": 1}, 0, static=[1], fdconv=[2], literal=[60])
    assert calls == ["static", "fdconv", "literal", "static", "fdconv", "static", "fdconv"]
    assert times == {"static": [1, 1, 1], "fdconv": [2, 2, 2], "literal": [60]}


def test_short_runs_are_called_often_enough_for_the_clock_and_counted_once():
    quick = timing.SHORTEST / 8
    calls, times = time_fakes({"static": 2, "fdconv": 2}, 1, static=[quick], fdconv=[1])
    assert calls == ["static", "fdconv"] + (["static"] * 8 + ["fdconv"]) * 2
    assert times["static"] == pytest.approx([quick, quick])


def test_the_device_is_waited_for_on_both_sides_of_every_measurement():
    events = []
    timing.time_in_alternation(
        {"static": lambda: events.append("run")},
        {"static": 2},
        {"static": 1},
        lambda: events.append("wait"),
        clock=iter(range(100)).__next__,
    )
    assert events == ["wait", "run", "wait"] * 3


def test_ratio_is_the_median_over_rounds():
    # the second round was disturbed as a whole, the third in one half only
    assert timing.median_ratio([2, 20, 9, 4, 2.2], [1, 10, 1, 2, 1]) == 2
    assert timing.median_ratio([30], [10, 1, 1]) == 3


def test_saved_bytes_count_each_storage_once_without_parameters():
    x = torch.randn(4, 8)
    # a Linear layer saves its input; the second one's is the ReLU's output, which the ReLU saves too
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    assert memory.saved_for_backward(model, x) == (4 * 8 + 4 * 16) * 4
    model.requires_grad_(False)
    assert memory.saved_for_backward(model, x) == 0


def test_saved_bytes_count_whole_storages_of_views():
    class Half(nn.Module):
        def forward(self, x):
            wide = x * 2
            return wide[:, :2].square().sum() + wide[:, 2:].square().sum()

    assert memory.saved_for_backward(Half(), torch.randn(3, 8, requires_grad=True)) == 3 * 8 * 4


def test_saved_bytes_of_resnet50_are_those_of_the_published_table():
    model = timm.create_model("resnet50").train()
    half = memory.saved_for_backward(model, torch.randn(2, 3, 224, 224))  # the table's batch is 4
    assert 2 * half / 2**20 == pytest.approx(328, abs=0.5)


def allocate_thrice():
    for _ in range(3):
        torch.ones(PEAK_SIZE // 4).add_(1)


def test_peak_is_what_was_in_use_at_once():
    # In a process of its own: the peak is that of a process, and earlier tests leave threads and memory in this one.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        peak = pool.apply(memory.measure_peak, (allocate_thrice, torch.device("cpu")))
    if memory.RESET_PEAK.exists():
        assert PEAK_SIZE * 0.95 < peak.growth < PEAK_SIZE * 1.5
        assert peak.total > peak.growth
    else:
        assert peak is None


def test_no_gate_is_one_after_the_gates_were_moved_and_the_seed_decides():
    pairs = [models.model_pair(MODEL, 32, seed, {}) for seed in (0, 0, 1)]
    states = [pair.fdconv.state_dict() for pair in pairs]
    moved = [name for name in states[0] if ".ksm.heads." in name or ".ksm.local_conv." in name or ".fbm." in name]
    assert len(moved) == 3 * 32
    for name in moved:
        assert states[0][name].count_nonzero() == states[0][name].numel()
        assert torch.equal(states[0][name], states[1][name])
        assert not torch.equal(states[0][name], states[2][name])


@pytest.mark.parametrize("name", ["resnet18_fdconv", "convnext_atto_fdconv"])
@torch.no_grad()
def test_outputs_depend_on_layers_in_branches_that_start_at_zero(name):
    model = models.model_pair(name, 64, 0, {"num_bands": 8}).fdconv.eval()
    x = torch.randn(2, 3, 64, 64)
    before = model(x)
    for _, layer in named_fd_layers(model):
        layer.reset_modulation()
    assert relative_error(model(x), before) > 1e-4


def test_pairs_are_a_model_and_its_twin():
    pair = models.model_pair("resnet18_fdconv", 64, 0, {"num_bands": 8})
    assert pair.static_name == "resnet18"
    assert {layer.fdw.num_bands for _, layer in named_fd_layers(pair.fdconv)} == {8}
    assert not list(named_fd_layers(pair.static))
    layer = models.layer_pair(0)
    assert layer.fdconv.static_shape == tuple(layer.static.weight.shape) == (512, 512, 3, 3)
    net = models.small_net_pair(0)
    x = torch.randn(2, *net.input_size)
    assert [feature.shape[-1] for feature in net.static.forward_intermediates(x, intermediates_only=True)][1:] == [
        28,
        14,
        7,
        4,
    ]
    assert [layer.fdw.num_bands for _, layer in named_fd_layers(net.fdconv)] == [16] * 8


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_literal_model_computes_what_the_model_computes(training):
    pair = tiny_pair()
    literal = models.literal_model(pair.fdconv.train(training))
    x = torch.randn(2, *pair.input_size)
    assert relative_error(pair.fdconv(x), literal(x)) < 1e-5
    assert "forward" not in vars(pair.fdconv[2]), "the model itself was changed"


def test_literal_model_of_linear_layers():
    model = move_gates(nn.Sequential(fdconv_zoo.FDLinear(20, 24, num_bands=4)), 0).eval()
    x = torch.randn(2, 5, 20)
    assert relative_error(model(x), models.literal_model(model)(x)) < 1e-5


def test_literal_model_refuses_official_masks():
    layer = fdconv_zoo.FDConv2d(20, 20, 3, num_bands=4, mask_grid=64)
    with pytest.raises(ValueError, match="mask_grid"):
        models.literal_model(layer)


def test_run_prints_a_table_and_writes_every_figure(benchmark, tmp_path, capsys):
    result = run(benchmark.main, tmp_path, "--mode", "eval", "train", "--batch-size", "1", "2")
    output = capsys.readouterr()
    assert [(row["mode"], row["batch_size"]) for row in result["rows"]] == [("eval", 1), ("eval", 2), ("train", 2)]
    assert "training at batch 1 is left out" in output.err
    assert len([line for line in output.out.splitlines() if line.startswith(f"| {MODEL} ")]) == 3
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
    assert result["rows"][2]["fdconv"]["saved_bytes"] >= result["rows"][2]["static"]["saved_bytes"] > 0


def test_picture_of_sizes_and_batches(benchmark, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "model_pair", lambda name, size, *arguments: tiny_pair(size))
    plot = tmp_path / "new folder" / "cost.png"
    run(benchmark.main, tmp_path, "--img-size", "32", "64", "--batch-size", "1", "2", "--plot", str(plot))
    assert plot.read_bytes().startswith(b"\x89PNG")


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


def test_results_are_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_json(path, {"rows": [1]})
    with pytest.raises(TypeError):
        write_json(path, {"rows": object()})
    assert json.loads(path.read_text()) == {"rows": [1]}
    assert list(tmp_path.iterdir()) == [path]


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


def test_lines_of_a_picture():
    rows = [fake_row("eval", 8), fake_row("eval", 1), fake_row("train", 4), fake_row("eval", 1) | {"img_size": 448}]
    rows.append({"model": "resnet50_fdconv", "error": "x", "mode": "eval", "batch_size": 1, "img_size": 1})
    rows[-1] |= {"engine": "-", "threads": 2}
    by_batch = report.lines_against(rows, "batch_size")
    workload = "resnet50_fdconv, eval, eager, 224 px, threads: 2"
    assert by_batch[workload, "static"] == [(1, 0.08), (8, 0.64)]
    assert by_batch.keys() == {(workload, "static"), (workload, "fdconv")}
    by_size = report.lines_against(rows, "img_size")
    assert [points for (_, kind), points in by_size.items() if kind == "fdconv"] == [[(224, 0.16), (448, 0.16)]]


@pytest.mark.parametrize(
    ("seconds", "text"), [(123.4, "123 s"), (1.234, "1.23 s"), (0.0801, "80.1 ms"), (0.000012, "12.0 us")]
)
def test_seconds_have_three_digits(seconds, text):
    assert report.format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "--model NAME or --preset"),
        (["--model", MODEL, "--preset", "table"], "--model NAME or --preset"),
        (["--model", "resnet50_fdcon"], "did you mean resnet50_fdconv"),
        (["--model", "resnet50"], "resnet50 has no static twin: it is no FDConv model, did you mean resnet50_fdconv"),
        (["--model", "vgg16"], "vgg16 has no static twin"),
        (["--model", MODEL, "--mode", "train", "--batch-size", "1"], "--batch-size 2 or more"),
        (["--model", MODEL, "--plot", "cost.png", "--batch-size", "1"], "two or more of --img-size or --batch-size"),
        (["--model", MODEL, "--plot", "cost.pdf"], "--plot must end in .png"),
        (["--model", MODEL, "--results-file", "cost.csv"], "must end in .json"),
        (["--model", MODEL, "--reference", "--amp"], "--reference runs in full precision"),
        (["--model", MODEL, "--device", "tpu"], "--device tpu"),
        (["--model", MODEL, "--model-kwargs", "bands=3"], "bands"),
        (["--model", MODEL, "--model-kwargs", "num_bands=0"], "num_bands=0"),
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


def test_reference_needs_the_repository(benchmark, monkeypatch, tmp_path, capsys):
    models.load_reference.cache_clear()
    monkeypatch.setattr(models, "REFERENCE", tmp_path / "reference.py")
    assert "clone of the repository" in error_of(benchmark.main, capsys, "--model", MODEL, "--reference")


def test_cuda_memory_is_that_of_its_allocator(monkeypatch):
    in_use = SimpleNamespace(now=100, peak=0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: in_use.now)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: in_use.peak)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    peak = memory.measure_peak(lambda: setattr(in_use, "peak", 170), torch.device("cuda"))
    assert peak == (70, 170)


def test_help_teaches():
    result = subprocess.run([sys.executable, SCRIPT, "--help"], capture_output=True, text=True, check=True)
    for heading in ("what to measure", "how to run it", "how to measure", "output", "examples:"):
        assert heading in result.stdout
