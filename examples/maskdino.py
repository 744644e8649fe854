"""MaskDINO with an FDConv backbone: a training step on rectangles, then what is in each image.

python examples/maskdino.py --help
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from PIL import Image
from timm.utils import ParseKwargs
from torchvision.transforms.functional import resize, to_tensor

import fdconv_zoo  # noqa: F401  registers the models

try:
    from fdconv_zoo.maskdino import (
        MaskDino,
        MaskDinoConfig,
        MaskDinoLoss,
        Target,
        instances,
        noise_targets,
        one_image,
        panoptic,
        semantic,
    )
except ImportError as error:
    raise SystemExit(f"maskdino.py: error: {error} (pip install -e '.[dense]')") from error

EXAMPLES = """examples:
  maskdino.py --task semantic --model swin_tiny_fdconv
  maskdino.py --task panoptic --image street.jpg --size 480
  maskdino.py --task instance --pretrained      backbone's ImageNet weights, from the Hub

The heads are small ones, so that this takes seconds: leave out `SMALL` for those of the paper."""

CLASSES = 3
SELECTED = {"select_queries": True, "softmax_classes": False, "extra_levels": 1, "coarse_first": False}
TASKS = {"semantic": {}, "instance": {**SELECTED, "initial_boxes": "bitmask"}, "panoptic": SELECTED}
SMALL = {"hidden_dim": 32, "mask_dim": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_points": 256}
SMALL |= {"encoder_layers": 1, "decoder_layers": 2, "num_queries": 5, "denoising_queries": 10}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=tuple(TASKS), default="semantic")
    parser.add_argument("--model", default="resnet50_fdconv", metavar="NAME", help="default: %(default)s")
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="KEY=VALUE")
    parser.add_argument("--pretrained", action="store_true", help="ImageNet weights of the backbone")
    parser.add_argument("--image", type=Path, metavar="FILE", help="a photo (default: noise)")
    parser.add_argument("--size", type=int, default=224, metavar="PIXELS", help="multiple of 32 (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.image and not args.image.is_file():
        parser.error(f"--image {args.image} is not a file")
    if args.size < 32 or args.size % 32:
        parser.error(f"--size must be a multiple of 32, got {args.size}")
    return args


def rectangle(size: int, left: float, label: int) -> Target:
    """Return one object: a quarter of the image's height and width, in its middle row."""
    mask = torch.zeros(1, size, size)
    mask[:, size * 3 // 8 : size * 5 // 8, int(left * size) : int(left * size) + size // 4] = 1
    return Target(torch.tensor([label]), torch.tensor([[left + 0.125, 0.5, 0.25, 0.25]]), mask)


def main(argv: Sequence[str] | None = None) -> None:
    """Train one step on two images, predict on them, and print what was found."""
    args = parse_args(argv)
    torch.manual_seed(0)
    backbone = timm.create_model(args.model, pretrained=args.pretrained, features_only=True, **args.model_kwargs)
    config = MaskDinoConfig(
        num_classes=CLASSES, in_channels=tuple(backbone.feature_info.channels()[-4:]), **TASKS[args.task], **SMALL
    )
    head, criterion = MaskDino(config), MaskDinoLoss(config)
    if args.image:
        photo = resize(to_tensor(Image.open(args.image).convert("RGB")), [args.size, args.size])
        images = torch.stack([photo, photo.flip(-1)])
    else:
        images = torch.rand(2, 3, args.size, args.size)
    targets = [rectangle(args.size, 0.125, 0), rectangle(args.size, 0.5, 2)]

    optimizer = torch.optim.AdamW([*backbone.parameters(), *head.parameters()], lr=1e-4)
    noised = noise_targets(targets, config)
    outputs = head(backbone(images)[-4:], noised)
    loss = criterion.total(criterion(outputs, targets, noised))
    loss.backward()
    optimizer.step()
    print(f"{args.task}, {args.model}, images {tuple(images.shape)}")
    print(f"loss: {loss.item():.3f}")

    backbone.eval()
    head.eval()
    size = (args.size, args.size)
    with torch.inference_mode():
        (prediction,) = head(backbone(images)[-4:]).predictions
        if args.task == "semantic":
            print(f"scores: {tuple(semantic(prediction, config, size).shape)}")
            return
        for index in range(len(images)):
            alone = one_image(prediction, index, size, size, size)
            if args.task == "instance":
                found = instances(alone, config, top=10)
                print(f"instances: boxes {tuple(found.boxes.shape)}, masks {tuple(found.masks.shape)}")
            else:
                segments, classes = panoptic(alone, config, things={0, 1})
                print(f"segments: {tuple(segments.shape)}, classes {classes}")


if __name__ == "__main__":
    main()
