"""Backbones of scripts/train_dense.py: a static Swin Transformer takes images of any size, as the zoo's does."""

import pytest
import torch
from dense_data import SMALL, SMALL_DETECTOR, SMALL_MASK2FORMER, boxes, masks, write_data

from dense.backbones import create_backbone, swin_options
from train_dense import main

SWIN = ["swin_tiny_patch4_window7_224", "--backbone-kwargs", "embed_dim=12", "depths=(1,1,1,1)", "num_heads=(1,2,2,2)"]


@pytest.mark.parametrize(
    ("head", "options"), [("unet", []), ("faster_rcnn", SMALL_DETECTOR), ("mask2former", SMALL_MASK2FORMER)]
)
def test_the_static_twin_trains(tmp_path, capsys, head, options):
    data = write_data(tmp_path, train=2, val=1)
    data_options = boxes(data) if head == "faster_rcnn" else masks(data)
    main(["--head", head, *SMALL, *data_options, *options, "--output", str(tmp_path / "run"), "--backbone", *SWIN])
    assert "done: " in capsys.readouterr().out


def test_other_models_need_no_options():
    assert swin_options("swin_tiny_fdconv") == swin_options("resnet18.a1_in1k") == {}


def test_what_follows_a_backbone_draws_the_same_numbers():
    """So a head starts alike on the static model and on FDConv, which draw different amounts."""
    drawn = []
    for name in ("resnet18", "resnet18_fdconv"):
        torch.manual_seed(3)
        create_backbone(name, {"layers": (1, 1, 1, 1), "channels": (20, 24, 28, 32)})
        drawn.append(torch.rand(4))
    assert torch.equal(*drawn)
