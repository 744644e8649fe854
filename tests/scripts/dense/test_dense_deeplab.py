"""DeepLabV3+ in scripts/train_dense.py: which backbones it dilates, and how it takes the others."""

import pytest
import torch
from dense_data import SMALL, masks, write_data

from dense.deeplab import UndilatedDeepLabV3Plus
from dense.models import takes_output_stride
from train_dense import main

SWIN = {"window_size": 4, "embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (2, 2, 4, 4), "num_bands": 8}


def test_swin_trains(tmp_path, capsys):
    data = write_data(tmp_path, train=2, val=1)
    kwargs = [f"{key}={str(value).replace(' ', '')}" for key, value in SWIN.items()]
    options = ["--head", "deeplabv3plus", *SMALL, *masks(data), "--backbone", "swin_tiny_fdconv"]
    options += ["--backbone-kwargs", *kwargs, "--output", str(tmp_path / "run"), "--head-kwargs"]
    main([*options, "decoder_channels=32"])
    assert "val/mIoU" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"swin_tiny_fdconv can't be dilated, .*: no encoder_output_stride") as stop:
        main([*options, "encoder_output_stride=8", "--output", str(tmp_path / "other")])
    assert "\n" not in stop.value.code


@pytest.mark.parametrize(
    ("backbone", "dilated"),
    [("resnet18_fdconv", True), ("convnext_atto_fdconv", True), ("swin_tiny_fdconv", False), ("vgg11", False)],
)
def test_what_is_dilated(backbone, dilated):
    assert takes_output_stride(backbone, {}) == dilated


@torch.no_grad()
def test_scores_have_the_size_of_the_image_and_depend_on_all_stages():
    torch.manual_seed(0)
    model = UndilatedDeepLabV3Plus("tu-swin_tiny_fdconv", None, classes=3, decoder_channels=32, **SWIN).eval()
    image = torch.randn(1, 3, 96, 64)
    scores = model(image)
    assert scores.shape == (1, 3, 96, 64)
    features = model.encoder(image)
    assert [feature.shape[-2:] for feature in features[2:]] == [(24, 16), (12, 8), (6, 4), (3, 2)]
    features[-1] = features[-1] + 1
    assert not torch.allclose(model.segmentation_head(model.decoder(features)), scores)
