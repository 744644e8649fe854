from typing import ClassVar

from tests.models.base import ModelTester


class TestConvNeXt(ModelTester):
    module = "fdconv_convnext"
    small: ClassVar = {
        "convnext_atto_fdconv": dict(depths=(1, 1, 2, 1)),
        "convnext_tiny_fdconv": dict(depths=(1, 1, 2, 1), dims=(24, 32, 48, 64)),
    }
    shallow: ClassVar = dict(depths=(1, 1, 1, 1))
    output_strides = (16, 8)
