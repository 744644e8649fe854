"""Heads of segmentation-models-pytorch on every backbone."""

import pytest
import segmentation_models_pytorch as smp
import torch
from smp_segmentation import CLASSES, HEADS, main
from timm.layers import freeze_batch_norm_2d

from fdconv_zoo.conversion import named_fd_layers
from tests.dense_models import MODELS, NARROW
from tests.models.stirring import stir

QUICK = {("upernet", "convnext_tiny_fdconv"), ("unet", "swin_tiny_fdconv"), ("deeplabv3plus", "resnet50_fdconv")}
PAIRS = [
    pytest.param(head, name, marks=[] if (head, name) in QUICK else pytest.mark.slow)
    for head in HEADS
    for name in MODELS
    if (head, name) != ("deeplabv3plus", "swin_tiny_fdconv")
]


def create(head, name):
    model = HEADS[head](f"tu-{name}", encoder_weights=None, classes=CLASSES, **NARROW[name])
    stir(model.encoder)
    for module in model.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0  # a dropped layer gets no gradient
    return model.train()


@pytest.mark.parametrize(("head", "name"), PAIRS)
def test_every_parameter_gets_a_gradient_and_sizes_vary(head, name):
    model = create(head, name)
    output = model(torch.randn(2, 3, 96, 128))
    assert output.shape == (2, CLASSES, 96, 128)
    output.square().mean().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
    assert all(layer.fdw.spectrum.grad.any() for _, layer in named_fd_layers(model))
    model.eval()
    with torch.no_grad():
        for size in ((1, 3, 160, 64), (1, 3, 64, 224)):
            assert model(torch.randn(size)).shape == (1, CLASSES, *size[2:])


@pytest.mark.parametrize("name", MODELS)
def test_unet_trains_on_one_image(name):
    model = create("unet", name)
    model.encoder = freeze_batch_norm_2d(model.encoder)
    model(torch.randn(1, 3, 96, 128)).square().mean().backward()
    assert all(layer.fdw.spectrum.grad.any() for _, layer in named_fd_layers(model))


@pytest.mark.parametrize("name", ["resnet50_fdconv", "convnext_tiny_fdconv"])
def test_unet_of_odd_sizes(name):
    model = create("unet", name).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 97, 131)).shape == (1, CLASSES, 97, 131)


def test_swin_has_no_dilation():
    with pytest.raises(TypeError, match="output_stride"):
        smp.DeepLabV3Plus("tu-swin_tiny_fdconv", encoder_weights=None, **NARROW["swin_tiny_fdconv"])


def test_size_that_does_not_fit_is_one_line(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--size", "100"])
    assert capsys.readouterr().err.splitlines()[-1].endswith("error: --size must be a multiple of 32, got 100")
