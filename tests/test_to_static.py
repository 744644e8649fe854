"""Back to a static model: exact where gates are at one or all alike, the mean of what differs, a model of timm's."""

import copy

import pytest
import timm
import torch
import torch.distributed as dist
from torch import nn

from fdconv_zoo import (
    FDConv1d,
    FDConv2d,
    FDConv3d,
    FDLinear,
    convert_to_fdconv,
    to_static,
)
from fdconv_zoo.conversion import named_fd_layers
from fdconv_zoo.fdconv_resnet import FDConvResNet
from tests.compare import randomise, randomise_norms, relative_error
from tests.models.stirring import stir

NARROW = dict(channels=(20, 24, 32, 40), layers=(1, 1, 1, 1), num_classes=7)
MODELS = {
    "resnet18": NARROW,
    "convnext_atto": dict(depths=(1, 1, 1, 1), dims=(24, 32, 40, 48), num_classes=7),
    "swin_tiny_patch4_window7_224": dict(
        img_size=64, window_size=4, embed_dim=24, depths=(1, 1, 1, 1), num_heads=(2, 2, 4, 4), num_classes=7
    ),
}


@pytest.mark.parametrize("calibrate", [False, True])
@pytest.mark.parametrize(("name", "kwargs"), MODELS.items(), ids=MODELS)
@torch.no_grad()
def test_there_and_back_is_the_same_function(name, kwargs, calibrate):
    static = randomise_norms(timm.create_model(name, **kwargs)).eval()
    model = convert_to_fdconv(copy.deepcopy(static))
    batches = [torch.randn(2, 3, 64, 64), (torch.randn(1, 3, 64, 64), torch.zeros(1))]
    back = to_static(model, batches if calibrate else None)
    assert back is model
    assert not list(named_fd_layers(back))
    assert list(back.state_dict()) == list(static.state_dict())
    for key, value in static.state_dict().items():
        assert relative_error(back.state_dict()[key], value) < 1e-6
    x = torch.randn(2, 3, 64, 64)
    assert relative_error(back(x), static(x)) < 1e-5


def test_a_wrapper_that_holds_the_parameters_is_refused(tmp_path):
    """It would go on to average the gradients of layers that are no longer there."""
    model = convert_to_fdconv(timm.create_model("resnet18", **NARROW))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        with pytest.raises(ValueError, match=r"^DistributedDataParallel holds a parameter .* make the \.module static"):
            to_static(wrapped, [])
    finally:
        dist.destroy_process_group()
    assert list(named_fd_layers(model))
    assert not list(named_fd_layers(to_static(wrapped.module)))


@pytest.mark.parametrize(
    "hold",
    [
        lambda model: setattr(model, "optimizer", torch.optim.SGD(model.parameters(), lr=0.1)),
        lambda model: setattr(model, "by_name", dict(model.named_parameters())),
        lambda model: setattr(model, "kept", nn.ParameterList([model[0].fdw.spectrum])),
        lambda model: model.register_parameter("kept", model[0].fdw.spectrum),
    ],
    ids=["optimizer", "dict", "ParameterList", "parameter"],
)
def test_parameters_that_others_hold_are_refused(hold):
    model = nn.Sequential(FDConv2d(5, 4, 1, num_bands=2), nn.ReLU())
    hold(model)
    with pytest.raises(ValueError, match="holds a parameter of an FDConv layer in its"):
        to_static(model)
    assert list(named_fd_layers(model))


LAYERS = {
    "maps": (lambda: FDConv2d(18, 20, 3, padding=1, stride=2, num_bands=8, fbm=False), (18, 9, 8)),
    "pointwise": (lambda: FDConv2d(18, 20, 1, num_bands=8, bias=False), (18, 5, 4)),
    "gains alone": (lambda: FDConv2d(18, 20, 3, num_bands=8, ksm=False, fbm=False), (18, 9, 8)),
    "tokens": (lambda: FDLinear(18, 20, num_bands=8), (7, 18)),
    "sequences": (lambda: FDConv1d(18, 20, 5, num_bands=8, fbm=False), (18, 11)),
    "volumes": (lambda: FDConv3d(18, 20, (2, 3, 1), num_bands=8, fbm=False), (18, 4, 5, 6)),
}


@pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)
@torch.no_grad()
def test_on_the_one_sample_that_it_was_made_from_a_layer_is_exact(make, shape):
    layer, x = randomise(make()).eval(), torch.randn(1, *shape)
    expected = layer(x)
    static = to_static(layer, [x])
    assert type(static) in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    assert relative_error(static(x), expected) < 1e-5


@torch.no_grad()
def test_the_weight_is_the_mean_of_the_samples_weights():
    layer = randomise(FDConv2d(18, 20, 3, padding=1, num_bands=8, fbm=False)).eval()
    samples = torch.randn(5, 18, 6, 7)
    weights = []
    for sample in samples:
        weights.append(to_static(copy.deepcopy(layer), [sample[None]]).weight)
    mean = to_static(layer, [samples[:2], [samples[2:], "labels"]])
    assert relative_error(mean.weight, torch.stack(weights).mean(0)) < 1e-6


@torch.no_grad()
def test_bands_become_the_factor_of_each_channel_that_fits_best():
    layer = FDConv2d(18, 20, 3, padding=1, num_bands=8).eval()
    nn.init.normal_(layer.fbm.weight, std=0.2)
    nn.init.normal_(layer.fbm.bias)
    weight, x = layer.static_weight(), torch.randn(3, 18, 12, 10)
    made = layer.fbm(x)
    static = to_static(layer, x.split(2))
    ratio = static.weight / weight
    assert relative_error(ratio, ratio.mean((0, 2, 3))[None, :, None, None].expand_as(ratio)) < 1e-4
    rest = made - ratio.mean((0, 2, 3))[None, :, None, None] * x
    # Least squares: what is left has no part of the input in it.
    assert ((rest * x).sum((0, 2, 3)).abs() / (x * x).sum((0, 2, 3))).max() < 1e-5
    assert rest.norm() < (made - x).norm()


@torch.no_grad()
def test_absorbed_norms_and_what_no_image_reached():
    layer, norm = randomise(FDConv2d(18, 20, 3, num_bands=8, fbm=False)).eval(), nn.BatchNorm2d(20)
    randomise_norms(norm)
    layer.absorb_batch_norm(norm.eval())
    x = torch.randn(1, 18, 6, 6)
    expected = layer(x)
    unused = randomise(FDConv2d(18, 20, 1, num_bands=8)).eval()
    weight = unused.static_weight()
    model = nn.ModuleDict({"used": layer, "unused": unused})
    model.forward = lambda x: model["used"](x)
    to_static(model, [x])
    assert relative_error(model["used"](x), expected) < 1e-5
    assert relative_error(model["unused"].weight, weight) < 1e-6


def test_a_registered_model_becomes_timms(tmp_path):
    model = stir(timm.create_model("resnet18_fdconv", **NARROW)).train()
    model.layer1[0].conv1.register_forward_hook(lambda *_: seen.append(1))
    model.layers_of_interest = [model.layer1[0].conv1]
    model.layer1[0].conv2.eval()
    seen = []
    static = to_static(model, [torch.randn(2, 3, 64, 64)])
    assert type(static) is timm.models.resnet.ResNet
    assert static.pretrained_cfg["architecture"] == "resnet18"
    assert static.training and static.layer1[0].conv1.training and not static.layer1[0].conv2.training
    assert static.layers_of_interest == [static.layer1[0].conv1] and len(seen) == 1
    static.eval()(torch.randn(1, 3, 64, 64))
    assert len(seen) == 2
    twin = timm.create_model("resnet18", **NARROW).eval()
    twin.load_state_dict(static.state_dict())
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(twin(x), static(x))


class Doubled(FDConvResNet):
    """A user's own class, with a method of its own."""

    def forward_head(self, x, pre_logits=False):
        return 2 * super().forward_head(x, pre_logits)


@pytest.mark.parametrize("cls", [FDConvResNet, Doubled])
def test_a_model_that_timm_did_not_make(cls):
    model = stir(cls(timm.models.resnet.BasicBlock, (1, 1, 1, 1), channels=(20, 24, 32, 40), num_classes=7)).eval()
    x = torch.randn(1, 3, 64, 64)
    expected = model(x)
    static = to_static(model, [x])
    assert type(static) is (timm.models.resnet.ResNet if cls is FDConvResNet else Doubled)
    assert not any(named_fd_layers(static))
    assert 0.5 < (static(x) / expected).median() < 1.5


def test_blocks_may_be_fused_again():
    model = convert_to_fdconv(timm.create_model("repvgg_a0", num_classes=7).eval())
    blocks = len([block for block in model.modules() if "reparameterize" in vars(block)])
    assert blocks
    static = timm.utils.reparameterize_model(to_static(model))
    assert not any("reparameterize" in vars(block) for block in static.modules())


def test_mistakes_are_told():
    with pytest.raises(ValueError, match="Conv2d has no FDConv layer"):
        to_static(nn.Conv2d(18, 20, 3))
    layer = FDConv2d(18, 20, 3)
    with pytest.raises(ValueError, match="batches is empty"):
        to_static(layer, [])
    x = torch.randn(2, 18, 5, 5)
    with pytest.raises(ValueError, match=r"batches is a tensor.*\[x\]"):
        to_static(layer, x)
    with pytest.raises(ValueError, match="batches gives a dict, not a tensor"):
        to_static(layer, [{"image": x}])
    with pytest.raises(ValueError, match="batches gives a tuple of dict, not a tensor"):
        to_static(layer, [({"image": x}, 0)])
    assert not layer.ksm._forward_hooks and not layer.fbm._forward_hooks
