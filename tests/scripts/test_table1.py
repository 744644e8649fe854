"""table1.py: the paper's figures beside those counted, and errors."""

import json

import pytest
import torch
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from fdconv_zoo.cost import count_parameters
from table1 import PAPER, PAPER_ADDED, build_detector, count_elementwise, main


def test_paper_figures_are_met(capsys, tmp_path):
    main(["--heads", "mask_rcnn", "--json", str(tmp_path / "made" / "t1.json")])
    report = json.loads((tmp_path / "made" / "t1.json").read_text())
    counted = report["counted"]["mask_rcnn"]
    assert report["input_size"] == [800, 1280]
    # ImageNet's classifier is in the paper's figure
    assert (counted["static_params"] + 2_049_000) / 1e6 == pytest.approx(PAPER["mask_rcnn"]["params"], abs=0.1)
    assert counted["added_params"] == 3_647_120
    static = (counted["static_macs"] + counted["static_elementwise"]) / 1e9
    assert static == pytest.approx(PAPER["mask_rcnn"]["flops"], abs=0.1)
    added = (counted["added_fdw"] + counted["added_ksm"] + counted["added_fbm_maps"]) / 1e9
    assert added == pytest.approx(PAPER_ADDED["flops"], abs=0.05)
    methods = counted["methods"]
    added_params = {name: found["added_params"] for name, found in methods.items()}
    assert added_params == {
        "resnet50_dyconv": 75_338_144,
        "resnet50_odconv": 65_113_856,
        "resnet50_kw": 2_495_278,
        "resnet50_kw_4x": 76_458_112,
    }
    # a cell for each static weight, mixed from as many as its warehouse has
    assert methods["resnet50_kw"]["added_macs"] / 1e9 == pytest.approx(2.0, abs=0.05)
    assert methods["resnet50_kw_4x"]["added_macs"] / 1e9 == pytest.approx(8.1, abs=0.1)
    table = capsys.readouterr().out
    assert "| parameters, FDConv adds | +3.6 M | +3.647 M |" in table
    assert "| parameters, ODConv (4x) adds | +65.1 M | +65.114 M |" in table
    assert f"| FLOPs, FDConv adds without FBM's filters | +1.8 G | +{added:.2f} G |" in table


def test_static_detector_is_torchvision_s():
    weights = FasterRCNN_ResNet50_FPN_Weights.COCO_V1
    detector = build_detector("faster_rcnn", "resnet50")
    # 91 classes there, 81 here, of 1024 inputs and 5 outputs each; BatchNorm is frozen there, and has buffers
    extra = 10 * 5 * 1025
    norms = sum(
        parameter.numel()
        for module in detector.modules()
        if isinstance(module, torch.nn.BatchNorm2d)
        for parameter in module.parameters()
    )
    assert count_parameters(detector) - norms + extra == weights.meta["num_params"]


def test_elementwise_operations_grow_with_the_image():
    detector = build_detector("faster_rcnn", "resnet50")
    assert count_elementwise(detector, (64, 128)) == 2 * count_elementwise(detector, (64, 64)) > 0


def test_size_that_does_not_fit_is_one_line(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--input-size", "100", "128"])
    assert capsys.readouterr().err.splitlines()[-1].endswith("error: --input-size must be multiples of 32, got 100 128")
