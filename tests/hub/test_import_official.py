import json
import os
import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from fdconv_zoo.layers import FDConv2d
from hub import import_official

GOLDEN = Path(__file__).parents[1] / "golden" / "conv3x3_32_to_64_stride2.safetensors"
default_cfgs = generate_default_cfgs({"golden_net": {"input_size": (32, 14, 10), "first_conv": None}})


class GoldenNet(nn.Module):
    """The golden layer as a network of its own."""

    def __init__(self, num_classes: int = 1000, in_chans: int = 32, mask_grid: int | None = None):
        super().__init__()
        config = json.loads(safe_open(GOLDEN, "pt").metadata()["config"])
        layer = {key: value for key, value in config.items() if key not in ("mode", "fbm")}
        self.conv = FDConv2d(**layer, mask_grid=mask_grid)
        self.num_classes = num_classes
        self.fc = nn.Linear(64, num_classes) if num_classes else nn.Identity()

    def forward(self, x):
        return self.conv(x)


@register_model
def golden_net(pretrained: bool = False, **kwargs) -> GoldenNet:
    return build_model_with_cfg(GoldenNet, "golden_net", pretrained, **kwargs)


@pytest.fixture
def golden():
    return load_file(GOLDEN)


@pytest.fixture
def official(golden):
    """State dict as the official code has it, below `conv.`."""
    return {f"conv.{key.removeprefix('state.')}": value for key, value in golden.items() if key.startswith("state.")}


def load(path, **kwargs):
    overlay = {"file": str(path)}
    return timm.create_model(
        "golden_net", pretrained=True, pretrained_cfg_overlay=overlay, mask_grid=64, **kwargs
    ).eval()


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        import_official.main([str(argument) for argument in arguments])
    assert caught.value.code
    return capsys.readouterr().err


def test_detector_checkpoint_computes_what_the_official_code_does(golden, official, tmp_path, capsys):
    state = {f"backbone.{key}": value for key, value in official.items()}
    torch.save(
        {"state_dict": {**state, "roi_head.fc.weight": torch.ones(2)}, "meta": {"epoch": 12}}, tmp_path / "in.pth"
    )
    output = tmp_path / "out.safetensors"
    import_official.main([str(tmp_path / "in.pth"), "--model", "golden_net", "--output", str(output)])
    assert "mask_grid=64, num_classes=0" in capsys.readouterr().out
    with torch.no_grad():
        result = load(output, num_classes=0)(golden["input"])
    assert (result - golden["output"]).abs().max() <= 1e-4 * golden["output"].abs().max()


def test_classifier_checkpoint_keeps_its_head(official, tmp_path, capsys):
    head = {"fc.weight": torch.ones(5, 64), "fc.bias": torch.ones(5)}
    torch.save({**official, **head}, tmp_path / "in.pth")
    arguments = [str(tmp_path / "in.pth"), "--model", "golden_net", "--num-classes", "5"]
    import_official.main([*arguments, "--output", str(tmp_path / "out.safetensors")])
    assert torch.equal(load_file(tmp_path / "out.safetensors")["fc.weight"], head["fc.weight"])
    (told,) = re.findall(r"timm\.create_model\(.*?\)\)", capsys.readouterr().out, re.DOTALL)
    model = eval(told, {"timm": timm})
    assert torch.equal(model.fc.weight, head["fc.weight"]) and torch.equal(model.fc.bias, head["fc.bias"])


def test_dry_run_writes_nothing(official, tmp_path, capsys):
    torch.save({f"backbone.{key}": value for key, value in official.items()}, tmp_path / "in.pth")
    arguments = [str(tmp_path / "in.pth"), "--model", "golden_net", "--output", str(tmp_path / "out.safetensors")]
    import_official.main([*arguments, "--dry-run"])
    assert "fit golden_net" in capsys.readouterr().out
    assert not (tmp_path / "out.safetensors").exists()


def test_what_does_not_fit_is_named(official, tmp_path, capsys):
    torch.save({f"backbone.{key}": value for key, value in official.items()}, tmp_path / "in.pth")
    torch.save({**official, "layer9.weight": torch.ones(1)}, tmp_path / "strange.pth")
    torch.save({"conv.weight": torch.ones(1)}, tmp_path / "static.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "in.pth").read_bytes()[:500])
    output = ["--model", "golden_net", "--output", tmp_path / "out.safetensors"]
    assert "layer9.weight" in fails(capsys, tmp_path / "strange.pth", *output)
    assert "no dft_weight" in fails(capsys, tmp_path / "static.pth", *output)
    assert "cut.pth can't be read" in fails(capsys, tmp_path / "cut.pth", *output)
    absent = tmp_path / "absent.pth"
    assert fails(capsys, absent, *output) == f"python -m hub.import_official: there is no file {absent}\n"
    assert "exists" in fails(capsys, tmp_path / "in.pth", "--model", "golden_net", "--output", tmp_path / "in.pth")
    assert not (tmp_path / "out.safetensors").exists()


class Boom:
    def __reduce__(self):
        return (exec, ("import os; os.environ['FDCONV_ZOO_PWNED'] = '1'",))


def test_no_code_in_the_checkpoint_is_run(official, tmp_path, capsys):
    torch.save({"state_dict": official, "hook": Boom()}, tmp_path / "in.pth")
    output = ["--model", "golden_net", "--output", tmp_path / "out.safetensors"]
    assert "weights_only" in fails(capsys, tmp_path / "in.pth", *output)
    assert "FDCONV_ZOO_PWNED" not in os.environ
