"""scripts/experiment_finetune.py on a task of four pixels: phases, resuming, refusal of other settings, tables."""

import json

import pytest
import torch
import yaml
from finetune_net import SmallNet
from torch.utils.data import TensorDataset

import experiment_finetune
from experiment_finetune import main
from experiments.finetune.elpv import SolarCells
from experiments.finetune.tasks import Data


class TwoShades(SolarCells):
    """Bright images and dark ones, tested as solar cells are."""

    def __init__(self):
        self.facts = {"none": "0"}

    def data(self, phase, fold, seed):
        generator = torch.Generator().manual_seed(10 * fold + len(phase))
        labels = torch.arange(24) % 2
        images = torch.randn(24, 3, 8, 8, generator=generator) + labels[:, None, None, None]
        dataset = TensorDataset(images, labels)
        return Data(dataset, dataset, dataset, dataset, {"modules": [i // 4 for i in range(24)]})

    def create_model(self, seed):
        model = SmallNet()
        torch.manual_seed(seed)
        model.head = torch.nn.Conv2d(24, 2, 1)
        return model


@pytest.fixture
def command(tmp_path, monkeypatch):
    monkeypatch.setitem(experiment_finetune.DATA, "shades", TwoShades)
    plan = {"variants": ["static", "fdconv"], "seeds": [100], "folds": [0]}
    protocol = {
        "recipe": {"batch_size": 8, "opt": "adamw", "epochs": 1, "warmup_epochs": 0, "static_lr_scale": 0.3},
        "rates": [1e-3, 1e-2],
        "variants": {
            "static": {},
            "static_long": {"as_long": True, "rate_of": "static"},
            "fourier": {"fourier": True, "rate_of": "static"},
            "fdconv": {"layer": {}},
        },
        "tasks": {
            "two": {
                "data": "shades",
                "options": {},
                "recipe": {},
                "time_ratio": 2,
                "tune": plan,
                "claim": {"variants": ["static", "static_long", "fourier", "fdconv"], "seeds": [0, 1], "folds": [0, 1]},
            }
        },
    }

    def run(*options, **changes):
        (tmp_path / "p.yaml").write_text(yaml.safe_dump({**protocol, **changes}))
        main(["--config", str(tmp_path / "p.yaml"), "--results", str(tmp_path / "r"), "--device", "cpu", *options])

    return run


def files(folder):
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in folder.rglob("*.json")}


def test_phases_are_made_once_and_told(command, tmp_path, capsys):
    command("--phases", "tune")
    tuned = files(tmp_path / "r")
    assert set(tuned) == {f"two/tune/{variant}-lr{rate}-fold0-seed100.json"
                          for variant in ("static", "fdconv") for rate in ("0.001", "0.01")}  # fmt: skip
    command("--seeds", "100", "0", "--part", "0/2")
    command("--part", "1/2", "--phases", "claim")
    command("--phases", "claim")
    made = files(tmp_path / "r")
    assert len(made) == 4 + 16
    assert {path: made[path] for path in tuned} == tuned
    capsys.readouterr()
    command("--report")
    report = capsys.readouterr().out
    assert (tmp_path / "r" / "two" / "claim.png").exists()
    row = next(line for line in report.splitlines() if line.startswith("| fdconv") and "4/4" in line)
    assert row.count("[") == 3  # differences to static with intervals
    command("--plan")
    assert "fdconv             4/4\n" in capsys.readouterr().out

    found = json.loads((tmp_path / "r" / "two" / "claim" / "fdconv-fold1-seed0.json").read_text())
    assert found["settings"]["recipe"]["lr"] in (1e-3, 1e-2)
    assert found["updates"] == 3 and len(found["outcome"]["scores"]) == 24
    assert 0 < found["gates"]["dense"]["from_one"] < 0.1
    assert found["ksm_disagreement"]["total_variation"] > 0
    longer = json.loads((tmp_path / "r" / "two" / "claim" / "static_long-fold1-seed0.json").read_text())
    assert longer["updates"] == 6 and longer["gates"] == {}


def test_a_claim_wants_its_rates(command):
    with pytest.raises(SystemExit, match="rate of static is not chosen yet"):
        command("--phases", "claim")


def test_the_best_rate_may_not_be_an_end_of_the_grid(command, tmp_path, monkeypatch):
    """Nobody knows then what lies beyond: it is to be tuned too, for this task."""
    quality = {1e-3: 0.1, 1e-2: 0.2, 1e-1: 0.3, 1.0: 0.2}

    def make_run(task, run, *others):
        return {"measures": {"AUROC": quality[run.recipe.lr]}, "seconds": {"cpu": 1}}

    monkeypatch.setattr(experiment_finetune, "make_run", make_run)
    grid = [1e-3, 1e-2, 1e-1]
    with pytest.raises(SystemExit, match=r"best rate of static is 0\.1, an end of the grid: give the task `rates`"):
        command(rates=grid)
    tasks = yaml.safe_load((tmp_path / "p.yaml").read_text())["tasks"]
    command(rates=grid, tasks={"two": {**tasks["two"], "rates": [*grid, 1.0]}})
    assert json.loads((tmp_path / "r/two/claim/static-fold0-seed0.json").read_text())["settings"]["recipe"]["lr"] == 0.1


def test_runs_of_another_protocol_are_refused(command):
    command("--phases", "tune", "--variants", "static")
    with pytest.raises(
        SystemExit, match=r"static-lr0\.001-fold0-seed100\.json is of another protocol, it differs in recipe"
    ):
        command("--phases", "tune", recipe={"batch_size": 4, "opt": "adamw", "epochs": 1, "warmup_epochs": 0})


def test_unknown_names_are_refused(command):
    with pytest.raises(SystemExit, match=r"has no three; tasks are two, variants fdconv, fourier, static, static_long"):
        command("--tasks", "three")
    with pytest.raises(SystemExit, match="has no odconv"):
        command("--variants", "odconv")


def test_no_run_is_started_after_the_time(command, tmp_path, capsys):
    command("--minutes", "0", "--phases", "tune")
    assert not files(tmp_path) and "no time left" in capsys.readouterr().err
