import re
from typing import ClassVar

import pytest
import timm
import torch

from tests.compare import randomise_norms, relative_error
from tests.models.base import ModelTester


class TestConvNeXt(ModelTester):
    module = "fdconv_convnext"
    small: ClassVar = {
        "convnext_atto_fdconv": dict(depths=(1, 1, 2, 1)),
        "convnext_tiny_fdconv": dict(depths=(1, 1, 2, 1), dims=(24, 32, 48, 64)),
    }
    shallow: ClassVar = dict(depths=(1, 1, 1, 1))
    output_strides = (16, 8)


@pytest.mark.parametrize("name", ["convnext_atto_fdconv", "convnext_tiny_fdconv", "convnext_tiny_kw"])
def test_weights_by_the_original_names(name):
    options = dict(depths=(1, 1, 1, 1), dims=(24, 32, 40, 48), num_classes=7, conv_mlp=name != "convnext_tiny_fdconv")
    static = randomise_norms(timm.create_model("convnext_atto", **options)).eval()
    original = {}
    for key, value in static.state_dict().items():
        key = key.replace("stem.", "downsample_layers.0.").replace("head.fc", "head").replace("head.norm", "norm")
        key = re.sub(r"stages\.(\d)\.downsample\.(\d)", r"downsample_layers.\1.\2", key)
        key = re.sub(r"stages\.(\d)\.blocks\.(\d)", r"stages.\1.\2", key)
        key = key.replace("conv_dw", "dwconv").replace("mlp.fc1", "pwconv1").replace("mlp.fc2", "pwconv2")
        original[key] = value.flatten(1) if "pwconv" in key and value.dim() == 4 else value
    overlay = dict(state_dict=original, num_classes=7)
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **options).eval()
    x = torch.randn(2, 3, 64, 64)
    assert relative_error(model(x), static(x)) < 1e-5
