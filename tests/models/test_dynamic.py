from typing import ClassVar

import pytest

from tests.models.base import ModelTester

SMALL = dict(layers=(1, 1, 1, 1), channels=(20, 40, 40, 80))
# KernelWarehouse's layers take their cells from another layer, of which TorchScript knows nothing.
SCRIPTS = ("test_torchscript", "test_fx_graph_in_torchscript", "test_fx_features")


class WithoutScripts(ModelTester):
    @pytest.fixture(autouse=True)
    def scripted(self, request, case):
        if "_kw" in case[0] and request.node.originalname in SCRIPTS:
            pytest.skip("KernelWarehouse in TorchScript")


class TestDynamicResNet(WithoutScripts):
    module = "dynamic_resnet"
    small: ClassVar = {
        "resnet18_condconv": SMALL,
        "resnet18_dyconv": SMALL,
        "resnet18_dcd": SMALL,
        "resnet18_odconv": SMALL,
        "resnet50_kw": SMALL,
    }
    shallow: ClassVar = dict(layers=(1, 1, 1, 1))
    output_strides = (16, 8)


class TestDynamicConvNeXt(WithoutScripts):
    module = "dynamic_convnext"
    small: ClassVar = {"convnext_tiny_kw": dict(depths=(1, 1, 2, 1), dims=(24, 48, 48, 96))}
    shallow: ClassVar = dict(depths=(1, 1, 1, 1))
    output_strides = (16, 8)
