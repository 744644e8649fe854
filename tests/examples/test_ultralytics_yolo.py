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


@torch.no_grad()
def lively(name):
    """A converted model whose gates are off 1, and every layer of which counts."""
    model = DetectionModel(name, ch=3, nc=4, verbose=False)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.requires_grad:
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    ultralytics_yolo.convert_backbone(model)
    for _, layer in named_fd_layers(model):
        layer.ksm.heads.bias.normal_(std=0.3)
        layer.ksm.local_conv.weight.normal_(std=0.3)
    for module in randomise_norms(model).modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    model.train()(torch.rand(8, 3, 64, 64))
    return model.eval()


def scores(model, x):
    """Logits of the classes: boxes depend on little but their places."""
    return model(x)[0][:, 4:].logit(1e-6)


@pytest.mark.parametrize("name", ["yolov8n.yaml", "yolo11n.yaml"])
@torch.no_grad()
def test_fuse_absorbs_batch_norm_exactly(name):
    model = lively(name)
    x = torch.rand(2, 3, 64, 64)
    expected = scores(model, x)
    fused = copy.deepcopy(model).fuse(verbose=False)
    assert relative_error(scores(fused, x), expected) < 1e-4
    # The comparison would say nothing if gates did not matter.
    for layer in [layer for _, layer in named_fd_layers(model)]:
        layer.reset_modulation()
    assert relative_error(scores(model, x), expected) > 0.01
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
