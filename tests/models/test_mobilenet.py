from typing import ClassVar

from tests.models.base import ModelTester


class TestMobileNet(ModelTester):
    module = "fdconv_mobilenet"
    small: ClassVar = {"mobilenetv2_100_fdconv": {}}
    output_strides = (16, 8)
