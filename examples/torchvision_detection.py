"""Faster R-CNN, Mask R-CNN or RetinaNet of torchvision with an FDConv backbone: a training step, then inference.

python examples/torchvision_detection.py --help
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from timm.layers import freeze_batch_norm_2d
from timm.utils import ParseKwargs
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision.transforms.functional import to_tensor

import fdconv_zoo  # noqa: F401  registers the models
from fdconv_zoo.dense import FeaturePyramid

EXAMPLES = """examples:
  torchvision_detection.py --head mask_rcnn
  torchvision_detection.py --head retinanet --model swin_tiny_fdconv --image street.jpg --size 480
  torchvision_detection.py --head faster_rcnn --pretrained      backbone's ImageNet weights, from the Hub"""


def create_detector(head: str, model: str, num_classes: int, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Return a detector that trains on one image at a time.

    Args:
        head: "faster_rcnn", "mask_rcnn" or "retinanet".
        model: timm's name of the backbone.
        num_classes: Classes, the background (0) included.
        pretrained: Load the backbone's ImageNet weights.
        **kwargs: Of the backbone.
    """
    levels = (-3, -2, -1) if head == "retinanet" else (-4, -3, -2, -1)
    backbone = timm.create_model(model, pretrained=pretrained, features_only=True, out_indices=levels, **kwargs)
    # With one image, KSM's BatchNorm has one value a channel and stays at its statistics. Detectors freeze it anyway.
    backbone = freeze_batch_norm_2d(backbone)
    if head == "retinanet":
        pyramid = FeaturePyramid(backbone, extra_blocks=LastLevelP6P7(256, 256))
        return RetinaNet(pyramid, num_classes)
    return {"faster_rcnn": FasterRCNN, "mask_rcnn": MaskRCNN}[head](FeaturePyramid(backbone), num_classes)


def make_target(image: Tensor) -> dict[str, Tensor]:
    """Return one made-up object of class 1 in the middle of an image (3, H, W)."""
    height, width = image.shape[1:]
    top, left, bottom, right = height // 4, width // 4, 3 * height // 4, 3 * width // 4
    mask = torch.zeros(1, height, width, dtype=torch.uint8)
    mask[:, top:bottom, left:right] = 1
    boxes = torch.tensor([[left, top, right, bottom]], dtype=torch.float)
    return {"boxes": boxes, "labels": torch.tensor([1]), "masks": mask}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--head", choices=("faster_rcnn", "mask_rcnn", "retinanet"), default="faster_rcnn")
    parser.add_argument("--model", default="resnet50_fdconv", metavar="NAME", help="default: %(default)s")
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="KEY=VALUE")
    parser.add_argument("--pretrained", action="store_true", help="ImageNet weights of the backbone")
    parser.add_argument("--image", type=Path, metavar="FILE", help="a photo (default: noise, 3 by 4)")
    parser.add_argument("--size", type=int, default=224, metavar="PIXELS", help="shorter side (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.image and not args.image.is_file():
        parser.error(f"--image {args.image} is not a file")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Train one step on one image, detect on it, and print shapes."""
    args = parse_args(argv)
    torch.manual_seed(0)
    detector = create_detector(args.head, args.model, 3, args.pretrained, **args.model_kwargs)
    # torchvision resizes inside the model, and pads to multiples of 32
    detector.transform.min_size, detector.transform.max_size = (args.size,), 2 * args.size
    if args.image:
        image = to_tensor(Image.open(args.image).convert("RGB"))
    else:
        image = torch.rand(3, args.size, args.size * 4 // 3)

    detector.train()
    optimizer = torch.optim.SGD(detector.parameters(), lr=1e-4, momentum=0.9)
    losses = detector([image], [make_target(image)])
    sum(losses.values()).backward()
    optimizer.step()
    print(f"{args.head}, {args.model}, image {tuple(image.shape)}")
    print("losses: " + ", ".join(f"{name} {loss.item():.3f}" for name, loss in losses.items()))

    detector.eval()
    with torch.inference_mode():
        (detections,) = detector([image])
    print("detections: " + ", ".join(f"{name} {tuple(value.shape)}" for name, value in detections.items()))


if __name__ == "__main__":
    main()
