from typing import ClassVar

import timm
from torch import nn

from tests.models.base import ModelTester


class TestMobileNet(ModelTester):
    module = "fdconv_mobilenet"
    small: ClassVar = {"mobilenetv2_100_fdconv": {}}
    output_strides = (16, 8)


def test_takes_timm_s_options_of_batch_norm():
    model = timm.create_model("mobilenetv2_100_fdconv", bn_eps=1e-3, bn_momentum=0.3)
    norms = [
        module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d) and "ksm" not in name
    ]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, 0.3)}
