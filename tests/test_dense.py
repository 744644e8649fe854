"""Backbones in torchvision's detectors and transformers' models: real heads, small, on narrow backbones."""

import copy
import subprocess
import sys
from functools import partial

import pytest
import timm
import torch
import transformers
from timm.layers import freeze_batch_norm_2d
from torch import nn
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from transformers import (
    ConvNextConfig,
    DetrConfig,
    Mask2FormerConfig,
    MaskFormerConfig,
    TimmBackboneConfig,
    UperNetConfig,
)

import fdconv_zoo
from fdconv_zoo.conversion import named_fd_layers
from fdconv_zoo.dense import FeaturePyramid, build_transformers_head, load_transformers_head
from fdconv_zoo.layers import KSM, ksm
from tests.compare import relative_error
from tests.dense_models import MODELS, NARROW
from tests.models.stirring import stir

ALL = (-4, -3, -2, -1)
# Swin's patches are 4 by 4 pixels
ODD = {"resnet50_fdconv": (97, 131), "convnext_tiny_fdconv": (97, 131), "swin_tiny_fdconv": (100, 132)}


def pairs(heads, default):
    """Each head with each backbone; those that are not in `default` only in `make test-all`."""
    return [
        pytest.param(head, name, marks=[] if (head, name) in default else pytest.mark.slow)
        for head in heads
        for name in MODELS
    ]


def create_backbone(name, out_indices=ALL):
    return timm.create_model(name, features_only=True, out_indices=out_indices, **NARROW[name])


def make_target(image):
    height, width = image.shape[1:]
    mask = torch.zeros(1, height, width, dtype=torch.uint8)
    mask[:, 8:40, 4:60] = 1
    return {"boxes": torch.tensor([[4.0, 8.0, 60.0, 40.0]]), "labels": torch.tensor([1]), "masks": mask}


def assert_gradients(model):
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


# FeaturePyramid in torchvision's detectors


@pytest.mark.parametrize("name", MODELS)
def test_pyramid_of_odd_sizes(name):
    size = ODD[name]
    maps = FeaturePyramid(create_backbone(name), out_channels=16)(torch.randn(2, 3, *size))
    assert list(maps) == ["0", "1", "2", "3", "pool"]
    for level, features in enumerate(maps.values()):
        assert features.shape[:2] == (2, 16)
        # each stage, and the pooling, rounds up, but ConvNeXt's stages down
        for side, pixels in zip(features.shape[2:], size, strict=True):
            stride = 4 * 2**level
            assert side in (pixels // stride, -(-pixels // stride))


def test_model_without_feature_maps_is_named():
    with pytest.raises(ValueError, match=r"FDConvResNet gives no feature maps.*features_only=True"):
        FeaturePyramid(timm.create_model("resnet50_fdconv", **NARROW["resnet50_fdconv"]))


def create_detector(head, backbone):
    if head is RetinaNet:
        return RetinaNet(FeaturePyramid(backbone, 32, LastLevelP6P7(32, 32)), 3, min_size=96, max_size=160)
    few = dict(rpn_post_nms_top_n_train=50, box_batch_size_per_image=16, box_detections_per_img=5)
    return head(FeaturePyramid(backbone, 32), 3, min_size=96, max_size=160, **few)


DETECTORS = FasterRCNN, MaskRCNN, RetinaNet


@pytest.mark.parametrize(("head", "name"), pairs(DETECTORS, set(zip(DETECTORS, MODELS, strict=True))))
def test_detector_trains_on_one_image_and_detects_in_images_of_other_sizes(head, name):
    backbone = freeze_batch_norm_2d(stir(create_backbone(name, ALL[1:] if head is RetinaNet else ALL)))
    detector = create_detector(head, backbone)
    image = torch.rand(3, 97, 131)
    losses = detector([image], [make_target(image)])
    sum(losses.values()).backward()
    assert_gradients(detector)
    detector.eval()
    with torch.no_grad():
        detections = detector([torch.rand(3, 65, 90), torch.rand(3, 120, 77)])
    assert len(detections) == 2
    assert all(detection["boxes"].shape[1:] == (4,) for detection in detections)


def test_one_image_trains_by_running_statistics_with_a_warning():
    """Without frozen norms: KSM's, which have one value a channel, leave theirs as they are."""
    ksm._warn_once.cache_clear()
    image, detector = torch.rand(3, 96, 96), create_detector(FasterRCNN, create_backbone("resnet50_fdconv")).train()
    norm = next(module for module in detector.modules() if isinstance(module, KSM)).norm
    before = norm.running_var.clone()
    with pytest.warns(UserWarning, match=r"batch of one sample in training.*GroupNorm.*drop_last"):
        losses = detector([image], [make_target(image)])
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert torch.equal(norm.running_var, before)


def test_one_image_with_group_norm_in_ksm():
    """A converted backbone whose KSM takes another norm by keyword: nothing in KSM is frozen."""
    static = timm.create_model("resnet18", features_only=True, out_indices=ALL, channels=(20, 24, 32, 40)).eval()
    x = torch.randn(1, 3, 97, 131)
    with torch.no_grad():
        expected = static(x)
    backbone = fdconv_zoo.convert_to_fdconv(
        static, include=lambda name, _: None if name.startswith("layer") else False, norm_layer=partial(nn.GroupNorm, 1)
    )
    with torch.no_grad():
        assert all(relative_error(a, b) < 1e-5 for a, b in zip(backbone(x), expected, strict=True))
    detector = create_detector(FasterRCNN, freeze_batch_norm_2d(stir(backbone))).train()
    image = torch.rand(3, 96, 96)
    sum(detector([image], [make_target(image)]).values()).backward()
    assert_gradients(detector)
    norms = [layer.ksm.norm for _, layer in named_fd_layers(detector)]
    assert norms
    assert all(norm.weight.grad.any() for norm in norms)


# transformers

SMALL_DETR = dict(
    d_model=32,
    num_queries=5,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=32,
    decoder_ffn_dim=32,
)
HEADS = {
    "mask2former": (
        transformers.Mask2FormerForUniversalSegmentation,
        partial(
            Mask2FormerConfig,
            feature_size=32,
            mask_feature_size=32,
            hidden_dim=32,
            encoder_feedforward_dim=32,
            dim_feedforward=32,
            encoder_layers=1,
            decoder_layers=2,
            num_attention_heads=4,
            num_queries=5,
            train_num_points=64,
        ),
    ),
    "maskformer": (
        transformers.MaskFormerForInstanceSegmentation,
        partial(MaskFormerConfig, fpn_feature_size=32, mask_feature_size=32, decoder_config=DetrConfig(**SMALL_DETR)),
    ),
    "upernet": (
        transformers.UperNetForSemanticSegmentation,
        partial(UperNetConfig, hidden_size=32, auxiliary_channels=16),
    ),
    "detr": (transformers.DetrForObjectDetection, partial(DetrConfig, **SMALL_DETR)),
}


def create_config(head, name, **kwargs):
    levels = [-1] if head == "detr" else list(ALL)
    backbone = TimmBackboneConfig(backbone=f"narrow_{name}", out_indices=levels, **kwargs)
    return HEADS[head][1](backbone_config=backbone, num_labels=3)


def find_backbone(model):
    return next(module for module in model.modules() if hasattr(getattr(module, "feature_info", None), "channels"))


def make_labels(head, batch, height, width):
    masks = torch.zeros(2, height, width)
    masks[0, :, : width // 2] = masks[1, :, width // 2 :] = 1
    if head == "upernet":
        return {"labels": masks[1].long().expand(batch, height, width)}
    if head == "detr":
        target = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]])}
        return {"labels": [target] * batch}
    return {"mask_labels": [masks] * batch, "class_labels": [torch.tensor([0, 2])] * batch}


@torch.no_grad()
def assert_same_maps(inner, backbone, tol):
    """In double: gates amplify rounding."""
    x = torch.randn(2, 3, 100, 132, dtype=torch.float64)
    maps, expected = (copy.deepcopy(model).double().eval()(x) for model in (inner, backbone))
    for features, reference in zip(maps, expected[-len(maps) :], strict=True):
        assert relative_error(features, reference) <= tol


@pytest.mark.parametrize(("head", "name"), pairs(HEADS, set(zip(HEADS, (*MODELS, MODELS[0]), strict=True))))
def test_transformers_head_has_the_backbone_s_weights_and_trains(head, name):
    backbone = stir(create_backbone(name))
    model = build_transformers_head(HEADS[head][0], create_config(head, name), backbone)
    # DETR writes BatchNorm as a product and a sum; the others keep the module
    assert_same_maps(find_backbone(model), backbone, 1e-9 if head == "detr" else 0)
    model.train()
    size = (2, 3, *ODD[name])
    outputs = model(pixel_values=torch.randn(size), **make_labels(head, 2, *size[2:]))
    outputs.loss.backward()
    assert outputs.loss.isfinite()
    for _, layer in named_fd_layers(model):
        assert layer.fdw.spectrum.grad.isfinite().all()
        assert layer.fdw.spectrum.grad.any()
    with torch.no_grad():
        model.eval()(pixel_values=torch.randn(1, 3, 128, 64))


@pytest.mark.parametrize(("head", "name"), pairs(HEADS, {("detr", "resnet50_fdconv"), ("upernet", "swin_tiny_fdconv")}))
def test_saved_transformers_head_is_loaded_whole(head, name, tmp_path):
    backbone = stir(create_backbone(name))
    model = build_transformers_head(HEADS[head][0], create_config(head, name), backbone).eval()
    model.save_pretrained(tmp_path)
    loaded = load_transformers_head(HEADS[head][0], tmp_path).eval()
    state = loaded.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert_same_maps(find_backbone(loaded), find_backbone(model), 0)
    x = torch.randn(2, 3, 96, 128)
    with torch.no_grad():
        for ours, theirs in zip(model(x).to_tuple(), loaded(x).to_tuple(), strict=True):
            if isinstance(ours, torch.Tensor):
                # equal weights round differently where files leave them at other addresses
                assert relative_error(theirs, ours) < 1e-5


@pytest.mark.parametrize("head", ["mask2former", "maskformer", "detr"])
def test_transformers_head_trains_on_one_image(head):
    backbone = stir(create_backbone("resnet50_fdconv"))
    config = create_config(head, "resnet50_fdconv", freeze_batch_norm_2d=True)
    model = build_transformers_head(HEADS[head][0], config, backbone)
    assert_same_maps(find_backbone(model), backbone, 1e-9)
    model.train()
    model(pixel_values=torch.randn(1, 3, 96, 96), **make_labels(head, 1, 96, 96)).loss.backward()
    assert all(layer.fdw.spectrum.grad.any() for _, layer in named_fd_layers(model))


def test_weights_of_another_backbone_are_named():
    other = timm.create_model("resnet50_fdconv", features_only=True, layers=(1, 1, 1, 1), channels=(20, 24, 32, 40))
    with pytest.raises(ValueError, match=r"not those of narrow_resnet50_fdconv.*[\s\S]*layer3_1|layer3.1"):
        build_transformers_head(HEADS["upernet"][0], create_config("upernet", "resnet50_fdconv"), other)


def test_backbone_that_is_not_timm_s_is_named():
    backbone = ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], out_indices=[1, 2, 3, 4])
    config = UperNetConfig(backbone_config=backbone, hidden_size=8, auxiliary_channels=8)
    with pytest.raises(ValueError, match="UperNetForSemanticSegmentation has no timm backbone"):
        build_transformers_head(HEADS["upernet"][0], config, create_backbone("resnet50_fdconv"))


def test_the_module_imports_no_head_library():
    code = "import fdconv_zoo.dense, sys; print({'transformers', 'segmentation_models_pytorch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "set()\n", done.stderr
