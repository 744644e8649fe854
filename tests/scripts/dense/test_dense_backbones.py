"""Backbones of scripts/train_dense.py: a static Swin Transformer takes images of any size, as the zoo's does."""

import pytest
import timm
import torch
from dense_data import SMALL, SMALL_DETECTOR, SMALL_MASK2FORMER, boxes, masks, write_data

from dense.args import parse_args
from dense.backbones import create_backbone, swin_options
from dense.models import create_detector, create_segmenter
from tests.compare import relative_error
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


TINY = ["--backbone-kwargs", "channels=(20,24,28,32)", "layers=(1,1,1,1)", "--train-images", "a", "--train-masks", "a"]
TINY += ["--val-images", "a", "--val-masks", "a", "--num-classes", "2"]
STATES = {
    "bare": lambda state: state,
    "state of train.py": lambda state: {"weights": {"last": state}, "progress": {}},
    "backbone of another head": lambda state: {f"backbone.{key}": value for key, value in state.items()},
    "without a classifier": lambda state: {key: value for key, value in state.items() if not key.startswith("fc")},
    "of fewer layers": lambda state: {key: value for key, value in state.items() if "layer3" not in key},
    "of another width": lambda state: {**state, "conv1.weight": state["conv1.weight"][:8]},
}


@pytest.mark.parametrize("kind", STATES)
@pytest.mark.parametrize("backbone", ["resnet18", "resnet18_fdconv"])
def test_initial_weights_are_all_the_backbones_or_refused(tmp_path, backbone, kind):
    model = timm.create_model("resnet18", channels=(20, 24, 28, 32), layers=(1, 1, 1, 1), num_classes=5).eval()
    torch.save(STATES[kind](model.state_dict()), tmp_path / "initial.pth")
    given = [*TINY, "--backbone", backbone, "--head", "unet", "--initial-checkpoint", str(tmp_path / "initial.pth")]
    args = parse_args(given)
    if kind.startswith("of "):
        with pytest.raises(ValueError, match=r"initial\.pth: the checkpoint does not fit"):
            create_segmenter(args, resumed=False)
        return
    found = create_segmenter(args, resumed=False)[1].eval()
    x = torch.randn(1, 3, 64, 64)
    assert relative_error(found(x)[-1], model.forward_features(x)) < 1e-5


@pytest.mark.parametrize("head", ["faster_rcnn", "retinanet", pytest.param("mask_rcnn", marks=pytest.mark.slow)])
def test_boxes_are_of_single_precision_under_autocast(head):
    given = ["--head", head, "--backbone", "resnet18", *TINY[:3], "--min-size", "128", "--train-images", "a"]
    for split in ("train", "val"):
        given += [f"--{split}-images", "a", f"--{split}-annotations", "a"]
    torch.manual_seed(0)
    model = create_detector(parse_args(given), 2, resumed=True)[0].eval()
    if head == "retinanet":
        model.score_thresh = 0.0
    else:
        model.roi_heads.score_thresh = 0.0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        (found,) = model([torch.rand(3, 128, 160)])
    assert len(found["boxes"]) and found["boxes"].dtype == found["scores"].dtype == torch.float32
    assert (found["boxes"] != found["boxes"].bfloat16()).any()


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
