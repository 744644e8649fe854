"""What visualize.py draws of other methods' layers: how alike the weights are that they mix."""

import math

import pytest
import torch
from PIL import Image
from torch import nn

from fdconv_zoo.layers.dynamic import CondConv2d, DCDConv2d, DYConv2d, KWConv2d, ODConv2d
from pictures.parallel import mean_similarity, parallel_weights
from visualize import main


@pytest.mark.parametrize(
    ("cls", "shape"),
    [
        (CondConv2d, (8, 24 * 3, 20 * 3)),
        (DYConv2d, (4, 24 * 3, 20 * 3)),
        (ODConv2d, (4, 24 * 3, 20 * 3)),
        (KWConv2d, (9, 24, 20)),
        (DCDConv2d, (4, 24, 20)),
    ],
)
def test_what_each_method_mixes(cls, shape):
    assert parallel_weights(cls(20, 24, 3, padding=1)).matrices.shape == shape


def test_equal_kernels_have_a_similarity_of_one_and_random_ones_of_none():
    layer = ODConv2d.from_conv(nn.Conv2d(20, 24, 3))
    assert mean_similarity(parallel_weights(layer).matrices) == pytest.approx(1, abs=1e-5)
    layer.reset_parameters()
    assert abs(mean_similarity(parallel_weights(layer).matrices)) < 0.05
    assert math.isnan(mean_similarity(torch.ones(1, 2, 2)))


def test_page_of_another_method(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from safetensors.torch import save_file
    from timm import create_model

    kwargs = {"layers": (1, 1, 1, 1), "channels": (20, 20, 20, 20), "num_classes": 3}
    save_file(create_model("resnet18_odconv", **kwargs).state_dict(), tmp_path / "weights.safetensors")
    Image.new("RGB", (64, 64)).save(tmp_path / "photo.png")
    main(
        [
            "--model", "resnet18_odconv", "--checkpoint", str(tmp_path / "weights.safetensors"), "--num-classes", "3",
            "--model-kwargs", "layers=(1,1,1,1)", "channels=(20,20,20,20)", "--output", str(tmp_path / "page"),
            "--", str(tmp_path / "photo.png"),
        ]
    )  # fmt: skip
    assert "mean cosine between the weights of two kernels:" in capsys.readouterr().out
    assert (tmp_path / "page" / "similarity.png").exists()
