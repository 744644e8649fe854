"""Swin Transformer: fixed input size by design, any size as a backbone."""

from typing import ClassVar

import pytest
import timm
import torch

from tests.compare import relative_error
from tests.models.base import ModelTester
from tests.models.stirring import stir

SMALL = dict(img_size=64, window_size=4, embed_dim=24, depths=(2, 2, 2, 1), num_heads=(2, 2, 4, 4), drop_path_rate=0)


class TestSwin(ModelTester):
    module = "fdconv_swin"
    small: ClassVar = {"swin_tiny_fdconv": SMALL}
    other_sizes = ()
    large: ClassVar = dict(img_size=64, drop_path_rate=0)
    # Windows are shifted in the second block of a stage.
    shallow: ClassVar = dict(depths=(2, 1, 1, 1))
    pool_types = ("avg", "max")
    output_fmt = "NHWC"


@pytest.mark.parametrize("size", [(256, 320), (228, 292)])
def test_features_at_any_size_are_those_of_a_model_built_for_it(size):
    """A backbone for dense heads: any height and width, NCHW out."""
    kwargs = SMALL | dict(img_size=224, window_size=7)
    net = stir(timm.create_model("swin_tiny_fdconv", features_only=True, **kwargs)).eval()
    fixed = timm.create_model("swin_tiny_fdconv", **(kwargs | dict(img_size=size))).eval()
    missing, _ = fixed.load_state_dict(net.model.state_dict(), strict=False)
    assert all(key.startswith(("norm.", "head.")) for key in missing)
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        outputs = net(x)
        expected = fixed.forward_intermediates(x, intermediates_only=True, output_fmt="NCHW")
    for output, reference, channels, reduction in zip(
        outputs, expected, net.feature_info.channels(), net.feature_info.reduction(), strict=True
    ):
        assert output.shape == (2, channels, -(-size[0] // reduction), -(-size[1] // reduction))
        assert relative_error(output, reference) < 1e-5


@pytest.mark.parametrize("shifted", [True, False])
@torch.no_grad()
def test_features_where_the_last_stage_is_one_window(shifted):
    """Shifted there or not, as timm's own features with the same option; not shifted they are the classifier's."""
    kwargs = SMALL | dict(img_size=64, window_size=2, depths=(2, 1, 1, 2))
    options = {} if shifted else {"always_partition": False}
    net = stir(timm.create_model("swin_tiny_fdconv", features_only=True, **kwargs, **options)).eval()
    full = timm.create_model("swin_tiny_fdconv", **kwargs).eval()
    full.load_state_dict(net.model.state_dict(), strict=False)
    x = torch.randn(2, 3, 64, 64)
    outputs, expected = net(x), full.forward_intermediates(x, intermediates_only=True)
    for output, reference in zip(outputs[:3], expected, strict=False):
        assert relative_error(output, reference) < 1e-5
    assert (relative_error(outputs[3], expected[3]) < 1e-5) == (not shifted)
    full.set_input_size(always_partition=shifted)
    assert relative_error(outputs[3], full.forward_intermediates(x, intermediates_only=True)[3]) < 1e-5
