"""What is made of a static network: the same function, and the same steps where gates are frozen."""

import copy

import pytest
import torch
from finetune_net import SmallNet
from torch import nn

from common.optim import create_optimizer
from common.training_recipe import Recipe
from experiments.finetune.variants import CalibratedNorm, calibrate, make_variant
from fdconv_zoo import FDConv2d, modulation_parameters

IMAGES = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layer", [{}, {"ksm": False}, {"num_bands": 16}, {"norm_layer": "layer"}])
def test_a_converted_network_is_the_same_function(layer):
    expected = SmallNet()(IMAGES)
    model = make_variant(SmallNet(), layer, fourier=False)
    assert isinstance(model.blocks[0], FDConv2d) and type(model.head) is nn.Conv2d
    torch.testing.assert_close(model(IMAGES), expected)


def test_static_layers_in_the_fourier_domain_are_fdconv_with_frozen_gates():
    twin = make_variant(SmallNet(), None, fourier=True)
    frozen = make_variant(SmallNet(), {}, fourier=False)
    for _, parameter in modulation_parameters(frozen):
        parameter.requires_grad_(False)
    recipe = Recipe(opt="adamw", lr=1e-2, weight_decay=0.05, static_lr_scale=0.3)
    before = twin(IMAGES).detach()
    for model in (twin, frozen):
        optimizer = create_optimizer(model, recipe, global_batch=6)
        for _ in range(3):
            optimizer.zero_grad()
            model(IMAGES).square().mean().backward()
            optimizer.step()
    assert (twin(IMAGES) - before).abs().max() > 0.01
    torch.testing.assert_close(twin(IMAGES), frozen(IMAGES), rtol=1e-3, atol=1e-4)


def test_a_network_is_not_both():
    with pytest.raises(ValueError, match="not both"):
        make_variant(SmallNet(), {}, fourier=True)


def test_calibrated_norms_have_the_images_statistics_and_keep_them():
    model = make_variant(SmallNet(), {"norm_layer": "calibrated"}, fourier=False)
    calibrate(model, [IMAGES, IMAGES.flip(0)])
    norm = model.blocks[0].ksm.norm
    hidden = model.blocks[0].ksm.fc(model.stem(IMAGES).mean((2, 3)))
    torch.testing.assert_close(norm.running_mean, hidden.mean(0))
    torch.testing.assert_close(norm.running_var, hidden.var(0))
    kept = copy.deepcopy(norm.running_mean)
    model.train()
    assert isinstance(norm, CalibratedNorm) and not norm.training
    model(IMAGES + 1)
    torch.testing.assert_close(norm.running_mean, kept, rtol=0, atol=0)
