"""Networks of torchvision, segmentation-models-pytorch and transformers, and MaskDINO, on any timm backbone."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import segmentation_models_pytorch as smp
import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from common.optim import classifier_names
from common.weights import fit_checkpoint, read_checkpoint
from dense.backbones import LEVELS, create_backbone, swin_options
from dense.deeplab import UndilatedDeepLabV3Plus
from fdconv_zoo.checkpoint import strip_prefixes
from fdconv_zoo.dense import FeaturePyramid

DETECTORS = {"faster_rcnn": FasterRCNN, "mask_rcnn": MaskRCNN, "retinanet": RetinaNet}
PYRAMID = 256  # channels of every map


def backbone_options(args: argparse.Namespace, resumed: bool) -> dict[str, Any]:
    """Return the keyword arguments of `timm.create_model` that choose weights and size.

    Args:
        args: Arguments of train_dense.py.
        resumed: A checkpoint brings the weights, so that none are downloaded or read.

    Raises:
        ValueError: The file of initial weights can't be read, or is no backbone's like this one.
    """
    options = {**swin_options(args.backbone), **args.backbone_kwargs}
    if args.initial_checkpoint and not resumed:
        state = read_backbone(args.initial_checkpoint, args.backbone, args.backbone_kwargs)
        return {**options, "pretrained": True, "pretrained_cfg_overlay": {"state_dict": state}}
    return {**options, "pretrained": args.pretrained and not resumed}


def read_backbone(path: Path, name: str, kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights of a whole backbone; timm would take a file that fits in part, or not at all, and leave the rest random.

    Args:
        path: As :func:`~common.weights.read_checkpoint` takes it; a classifier in it is left out.
        name: Of the model.
        kwargs: Keyword arguments of `timm.create_model`.

    Raises:
        ValueError: The file can't be read or does not fit.
    """
    with torch.random.fork_rng(devices=[]):
        model = timm.create_model(name, num_classes=0, **kwargs)
    state = strip_prefixes(read_checkpoint(path), model)
    classifier = tuple(f"{name}." for name in classifier_names(model))
    try:
        return fit_checkpoint(model, {key: value for key, value in state.items() if not key.startswith(classifier)})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def normalization(backbone: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation of the images that a backbone's weights were trained with."""
    config = resolve_model_data_config(timm.create_model(backbone, num_classes=0), use_test_size=False)
    return config["mean"], config["std"]


def create_detector(args: argparse.Namespace, num_classes: int, resumed: bool) -> tuple[nn.Module, nn.Module]:
    """Return a detector that is called as torchvision's are, and the timm backbone in it.

    Args:
        args: Arguments of train_dense.py.
        num_classes: Classes without the background.
        resumed: A checkpoint brings the weights.
    """
    mean, std = normalization(args.backbone)
    if args.head == "maskdino_instance":
        from dense.maskdino import create_maskdino_detector  # needs transformers, which other heads do not

        return create_maskdino_detector(args, num_classes, backbone_options(args, resumed), mean, std)
    retina = args.head == "retinanet"
    levels = LEVELS[1:] if retina else LEVELS
    backbone = create_backbone(args.backbone, backbone_options(args, resumed), levels)
    pyramid = FeaturePyramid(backbone, PYRAMID, LastLevelP6P7(PYRAMID, PYRAMID) if retina else None)
    model = DETECTORS[args.head](
        pyramid,
        num_classes + 1,
        min_size=tuple(args.min_size),
        max_size=args.max_size,
        image_mean=list(mean),
        image_std=list(std),
        **args.head_kwargs,
    )
    # Boxes take the dtype of the maps and of what the heads say: in bfloat16 they would be whole 4 pixels above 512.
    heads = [model.head] if retina else [model.rpn.head, model.roi_heads.box_predictor]
    for part in (pyramid, *heads):
        part.register_forward_hook(lambda module, inputs, output: tree_map_only(Tensor, Tensor.float, output))
    return model, backbone


def create_segmenter(args: argparse.Namespace, resumed: bool) -> tuple[nn.Module, nn.Module]:
    """Return a network, scores (B, classes, H, W) of images (B, 3, H, W), and the backbone in it.

    Raises:
        ValueError: The head can't take the backbone.
    """
    options = backbone_options(args, resumed)
    if args.head == "mask2former":
        from dense.mask2former import create_mask2former  # needs transformers, which other heads do not

        return create_mask2former(args, options)
    if args.head == "maskdino":
        from dense.maskdino import create_maskdino_segmenter

        return create_maskdino_segmenter(args, options)
    pretrained = options.pop("pretrained")
    options.pop("feature_cls", None)  # smp turns the maps itself
    options |= {
        "encoder_name": f"tu-{args.backbone}",
        "encoder_weights": "imagenet" if pretrained else None,  # smp's word for timm's own weights
        "classes": args.num_classes,
        **args.head_kwargs,
    }
    if args.head == "deeplabv3plus" and not takes_output_stride(args.backbone, args.backbone_kwargs):
        fixed = {"encoder_output_stride", "encoder_depth"} & args.head_kwargs.keys()
        if fixed:
            raise ValueError(
                f"{args.backbone} can't be dilated, so that its strides are 4 to 32: no {', '.join(sorted(fixed))}"
            )
        model = UndilatedDeepLabV3Plus(**options)
    else:
        model = smp.create_model(args.head, **options)
    return model, model.encoder


def takes_output_stride(backbone: str, options: Mapping[str, Any]) -> bool:
    """Whether a timm model can be dilated to a last map of stride 16, as DeepLabV3+ wants it; Swin can't.

    Args:
        backbone: Its name.
        options: Its keyword arguments.
    """
    try:
        with torch.device("meta"):
            timm.create_model(backbone, features_only=True, output_stride=16, **options)
    except (TypeError, AssertionError) as error:  # asserted without a word
        if str(error) and "output_stride" not in str(error):
            raise
        return False
    return True


def predict_classes(model: nn.Module, image: Tensor, size: tuple[int, int], divisor: int = 32) -> Tensor:
    """Return the likeliest class of each pixel of one image.

    Args:
        model: Network with scores (1, classes, H, W).
        image: (1, 3, h, w), padded inside to multiples of `divisor`.
        size: H and W of the result.
        divisor: What height and width must be multiples of.
    """
    height, width = image.shape[-2:]
    padded = nn.functional.pad(image, (0, -width % divisor, 0, -height % divisor))
    scores = model(padded)[..., :height, :width]
    return nn.functional.interpolate(scores, size, mode="bilinear", align_corners=False).argmax(1)
