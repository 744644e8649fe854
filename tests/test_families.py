"""Every family of timm and of torchvision: the same function after conversion, layers that matter, a step of training.

    pytest -m slow tests/test_families.py -rP | grep layers

prints a line for each. timm's families are its modules; of each there is the smallest model.
"""

import copy
import resource
import time

import pytest
import timm
import torch
import torchvision

from fdconv_zoo import convert_to_fdconv, modulation_parameters
from fdconv_zoo.conversion import named_fd_layers
from tests.compare import randomise_norms, relative_error

TIMM = {
    "beit": "beit_base_patch16_224",
    "byoanet": "halonet_h1",
    "byobnet": "test_byobnet",
    "cait": "cait_xxs24_224",
    "coat": "coat_tiny",
    "convit": "convit_tiny",
    "convmixer": "convmixer_768_32",
    "convnext": "test_convnext",
    "cpubone": "cpubone_nano",
    "crossvit": "crossvit_tiny_240",
    "csatv2": "csatv2",
    "cspnet": "cs3darknet_focus_s",
    "cspnext": "cspnext_tiny",
    "davit": "davit_tiny",
    "deepseek_vit": "deepseek_vit_412m",
    "deit": "deit_tiny_patch16_224",
    "densenet": "densenet121",
    "dla": "dla46x_c",
    "dpn": "dpn48b",
    "edgenext": "edgenext_xx_small",
    "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0",
    "efficientnet": "test_efficientnet",
    "efficientvim": "efficientvim_m1",
    "efficientvit_mit": "efficientvit_b0",
    "efficientvit_msra": "efficientvit_m0",
    "eva": "vit_tiny_patch16_dinov3_qkvb",
    "fasternet": "fasternet_t0",
    "fastvit": "fastvit_t8",
    "focalnet": "focalnet_tiny_srf",
    "gcvit": "gcvit_xxtiny",
    "gemma4_vit": "gemma4_vit_167m",
    "ghostnet": "ghostnet_050",
    "hardcorenas": "hardcorenas_b",
    "hgnet": "hgnetv2_b0",
    "hiera": "hiera_tiny_224",
    "hieradet_sam2": "sam2_hiera_tiny",
    "hrnet": "hrnet_w18_small",
    "iformer": "iformer_t",
    "inception_next": "inception_next_atto",
    "inception_resnet_v2": "inception_resnet_v2",
    "inception_v3": "inception_v3",
    "inception_v4": "inception_v4",
    "lcnetv2": "lcnetv2_small",
    "levit": "levit_128s",
    "lowformer": "lowformer_b0",
    "mambaout": "test_mambaout",
    "maxxvit": "test_maxvit",
    "metaformer": "poolformerv2_s12",
    "mlp_mixer": "gmlp_ti16_224",
    "mobilenetv3": "mobilenetv3_small_050",
    "mobilenetv5": "mobilenetv5_300m",
    "mobilevit": "mobilevit_xxs",
    "mvitv2": "mvitv2_tiny",
    "naflexvit": "naflexvit_base_patch16_gap",
    "nasnet": "nasnetalarge",
    "nest": "nest_tiny",
    "nextvit": "nextvit_small",
    "nfnet": "test_nfnet",
    "pit": "pit_ti_224",
    "pnasnet": "pnasnet5large",
    "pvt_v2": "pvt_v2_b0",
    "qwen3_vit": "qwen3_vit_88m",
    "rdnet": "rdnet_tiny",
    "regnet": "regnetx_002",
    "repghost": "repghostnet_050",
    "repvit": "repvit_m1",
    "res2net": "res2next50",
    "resnest": "resnest14d",
    "resnet": "test_resnet",
    "resnetv2": "resnetv2_18",
    "rexnet": "rexnet_100",
    "selecsls": "selecsls60",
    "senet": "legacy_seresnet18",
    "sequencer": "sequencer2d_s",
    "shvit": "shvit_s1",
    "sknet": "skresnet18",
    "starnet": "starnet_s050",
    "swiftformer": "swiftformer_xs",
    "swin_transformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2": "swinv2_tiny_window8_256",
    "swin_transformer_v2_cr": "swinv2_cr_tiny_224",
    "tiny_vit": "tiny_vit_5m_224",
    "tnt": "tnt_s_patch16_224",
    "tresnet": "tresnet_m",
    "twins": "twins_svt_small",
    "vgg": "vgg11",
    "visformer": "visformer_tiny",
    "vision_transformer": "test_vit",
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224",
    "vision_transformer_relpos": "test_vit_relpos",
    "vision_transformer_sam": "samvit_base_patch16_224",
    "vitamin": "vitamin_small_224",
    "volo": "volo_d1_224",
    "vovnet": "ese_vovnet19b_slim_dw",
    "xception": "legacy_xception",
    "xception_aligned": "xception41",
    "xcit": "xcit_nano_12_p8_224",
}
TORCHVISION = [
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "inception_v3",
    "maxvit_t",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_x_400mf",
    "resnet18",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "swin_t",
    "swin_v2_t",
    "vgg11",
    "vit_b_32",
    "deeplabv3_mobilenet_v3_large",
    "fcn_resnet50",
    "lraspp_mobilenet_v3_large",
    "mvit_v2_s",
    "r3d_18",
    "r2plus1d_18",
    "s3d",
    "swin3d_t",
]
REFUSED = {
    "nfnet": r"nothing to replace .*a subclass \(ScaledStdConv2d\)",
    "r3d_18": r"nothing to replace .*a subclass \(Conv3DSimple\)",
}
# What a pass on images of 96 pixels does not fit.
SIDES = {"byoanet": 256, "deepseek_vit": 98, "inception_v3": 160}
SIDES |= {"alexnet": 224, "vgg11": 64, "maxvit_t": 224, "vit_b_32": 224}
SIDES |= {"mvit_v2_s": 224, "r3d_18": 64, "r2plus1d_18": 64, "s3d": 224}
# Random weights without residual branches: signals grow to 5e11, more than gates take.
GROWING = {"inception_v3"}
# Residual branches that tell little of a small step of the gates.
STEPS = {"mambaout": 0.02}
CLIPS = {"mvit_v2_s": 16, "r3d_18": 8, "r2plus1d_18": 8, "s3d": 14, "swin3d_t": 8}


def tensor_of(output):
    """The first tensor of what a model returns: logits, or logits in a dictionary, or one of several."""
    while not isinstance(output, torch.Tensor):
        output = next(iter(output.values())) if isinstance(output, dict) else output[0]
    return output


@torch.no_grad()
def roughen(model):
    """Random norms, and numbers for the zeros that residual branches and heads start at."""
    randomise_norms(model)
    for name, parameter in model.named_parameters():
        if parameter.abs().max() < 1e-3 and not name.endswith("bias"):
            if parameter.dim() > 1 and parameter.numel() > max(parameter.shape):
                parameter.normal_(std=0.02)
            else:
                parameter.uniform_(0.3, 0.9)
    return model.eval()


@torch.no_grad()
def conversion_error(model, x):
    """Converts a model; how far its function moved, and its output before."""
    static = tensor_of(model(x))
    return relative_error(tensor_of(convert_to_fdconv(model, num_bands=8)(x)), static), static


@torch.no_grad()
def settle(model, x):
    """Running statistics as of trained networks: those of its inputs."""
    for norm in (module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        norm.momentum = 1.0
    model.train()(x)
    return model.eval()


def check(family, name, model, x):
    start = time.monotonic()
    roughen(model)
    if family in GROWING:
        settle(model, x)
    reference = copy.deepcopy(model)
    error, static = conversion_error(model, x)
    if error > 1e-5:  # random weights may magnify a rounding 30,000 times
        error, _ = conversion_error(reference.double(), x.double())
    with torch.no_grad():
        for _, parameter in modulation_parameters(model):
            parameter.add_(torch.randn_like(parameter), alpha=STEPS.get(family, 0.002))
        moved = relative_error(tensor_of(model(x)), static)
    layers = dict(named_fd_layers(model))
    model.train()
    tensor_of(model(x)).float().square().mean().backward()
    untouched = [layer for layer, module in layers.items() if module.fdw.spectrum.grad is None]
    finite = all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    # Linux counts in kilobytes.
    memory, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, time.monotonic() - start
    print(f"{name}: {len(layers)} layers, error {error:.1e}, moved {moved:.1e}, {seconds:.0f} s, {memory:.1f} GB")
    assert static.isfinite().all()
    assert error < 1e-5
    assert moved > 100 * max(error, 1e-7)
    assert not untouched
    assert finite


def timm_model(family):
    name = TIMM[family]
    model = timm.create_model(name, num_classes=4)
    size = model.default_cfg["input_size"]
    side = size[1] if model.default_cfg.get("fixed_input_size") else SIDES.get(family, 96)
    return f"timm {family} {name}", model, torch.randn(2, size[0], side, side)


def torchvision_model(name):
    options = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    if name in torchvision.models.list_models(torchvision.models.segmentation):
        options = {"weights_backbone": None}
    model = torchvision.models.get_model(name, weights=None, num_classes=4, **options)
    side = SIDES.get(name, 96)
    return f"torchvision {name}", model, torch.randn(2, 3, *([CLIPS[name]] if name in CLIPS else []), side, side)


@pytest.mark.slow
@pytest.mark.parametrize("family", TIMM)
def test_a_family_of_timm(family):
    if family in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[family]):
            convert_to_fdconv(timm_model(family)[1])
    else:
        check(family, *timm_model(family))


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHVISION)
def test_a_family_of_torchvision(name):
    if name in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name]):
            convert_to_fdconv(torchvision_model(name)[1])
    else:
        check(name, *torchvision_model(name))
