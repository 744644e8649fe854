"""The networks of the fine-tuning experiments, with the real weights: what they are cut to, that both are cut alike."""

import torch
from torch import nn

from experiments.finetune.landcover import LandCover
from experiments.finetune.tasks import create_classifier, load_trunk
from experiments.finetune.variants import make_variant
from fdconv_zoo.conversion import named_fd_layers

IMAGE = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def trunk():
    return create_classifier(2, seed=0, full=False).eval()


def test_the_trunk_is_the_whole_networks_features_of_stride_16():
    whole = load_trunk(full=True).eval()
    with torch.no_grad():
        features = trunk().forward_features(IMAGE)
        torch.testing.assert_close(features, whole.blocks[:5](whole.bn1(whole.conv_stem(IMAGE))))
    assert features.shape == (1, 96, 4, 4)


def test_both_networks_of_solar_cells_start_as_the_same_function():
    with torch.no_grad():
        converted = make_variant(trunk(), {}, fourier=False)
        torch.testing.assert_close(converted(IMAGE), trunk()(IMAGE), rtol=0, atol=1e-3)
    assert all(layer.fbm is None for _, layer in named_fd_layers(converted))


def test_the_unet_has_the_trunk_and_only_that_is_converted():
    model = LandCover.create_model(LandCover.__new__(LandCover), 0).eval()
    expected = trunk()
    with torch.no_grad():
        torch.testing.assert_close(model.encoder(IMAGE)[-1], expected.forward_features(IMAGE))
        logits = model(IMAGE)
        converted = make_variant(model, {}, fourier=False)
        torch.testing.assert_close(converted(IMAGE), logits, rtol=0, atol=1e-3)
    assert logits.shape == (1, 8, 64, 64)
    names = [name for name, _ in named_fd_layers(converted)]
    assert len(names) == len(list(named_fd_layers(make_variant(expected, {}, fourier=False))))
    assert all(name.startswith("encoder.") for name in names)
    assert not any(isinstance(module, nn.Conv2d) for name, module in converted.named_modules() if name in names)
