from typing import ClassVar

from tests.models.base import ModelTester

NARROW = dict(channels=(20, 24, 32, 40))


class TestResNet(ModelTester):
    module = "fdconv_resnet"
    small: ClassVar = {
        "resnet18_fdconv": NARROW,
        "resnet50_fdconv": dict(layers=(1, 1, 2, 1), **NARROW),
        "wide_resnet50_2_fdconv": dict(layers=(1, 1, 1, 1), **NARROW),
    }
    shallow: ClassVar = dict(layers=(1, 1, 1, 1))
    output_strides = (16, 8)
