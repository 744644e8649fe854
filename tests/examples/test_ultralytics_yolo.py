"""A YOLO with an FDConv backbone from training to exported files; needs the extra `ultralytics`, which no other has."""

import copy
import sys

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("ultralytics")

import ultralytics_yolo
from ultralytics.nn.tasks import DetectionModel

from fdconv_zoo import FDConv2d, convert_to_fdconv
from fdconv_zoo.choice import named_fd_layers
from tests.compare import randomise_norms, relative_error


@pytest.mark.parametrize("name", ["yolov8n.yaml", "yolo11n.yaml"])
@torch.no_grad()
def test_fuse_absorbs_batch_norm_exactly(name):
    model = DetectionModel(name, ch=3, nc=4, verbose=False)
    randomise_norms(model)
    ultralytics_yolo.convert_backbone(model)
    for _, layer in named_fd_layers(model):
        layer.ksm.heads.bias.normal_(std=0.1)
    model.eval()
    x = torch.rand(2, 3, 64, 64)
    expected = model(x)[0]
    fused = copy.deepcopy(model).fuse(verbose=False)
    assert relative_error(fused(x)[0], expected) < 1e-5
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.model[0].children())
    layers = [layer for _, layer in named_fd_layers(fused)]
    assert len(layers) == len(list(named_fd_layers(model))) > 15
    assert all(layer.filter_scale is not None for layer in layers)


def test_a_block_that_merges_branches_refuses():
    from ultralytics.nn.modules import RepConv

    block = convert_to_fdconv(RepConv(24, 24), num_bands=8).eval()
    with pytest.raises(RuntimeError, match="would drop FDConv"):
        block.fuse_convs()


@pytest.mark.slow
def test_the_example(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["yolo"])
    ultralytics_yolo.main(["--images", "8", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "trained: 23 FDConv layers" in printed
    assert "validated: mAP50" in printed
    exported = [line for line in printed.splitlines() if line.startswith("exported:")]
    assert len(exported) == 2
    assert all(float(line.rsplit(" ", 1)[1]) < 1e-4 for line in exported)


def test_a_converted_checkpoint_goes_on(tmp_path):
    """Its weights come back whole when the trainer builds the model anew."""
    model = DetectionModel("yolov8n.yaml", ch=3, nc=2, verbose=False)
    ultralytics_yolo.convert_backbone(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    trainer = object.__new__(ultralytics_yolo.FDConvTrainer)
    trainer.data = {"nc": 2, "channels": 3, "names": {0: "a", 1: "b"}}
    trainer.args = type("Args", (), {"pretrained": True})()
    again = trainer.get_model("yolov8n.yaml", model, verbose=False)
    assert sum(isinstance(module, FDConv2d) for module in again.modules()) == 23
    state = again.state_dict()
    assert all(np.array_equal(state[key], value) for key, value in model.state_dict().items())
