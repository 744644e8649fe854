"""Mask2Former, MaskFormer, UperNet or DETR of transformers with an FDConv backbone: a training step, then inference.

python examples/transformers_heads.py --help
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import resize, to_tensor

import fdconv_zoo  # noqa: F401  registers the models
from fdconv_zoo.dense import build_transformers_head, load_transformers_head

try:
    import transformers
    from transformers import DetrConfig, Mask2FormerConfig, MaskFormerConfig, TimmBackboneConfig, UperNetConfig
except ModuleNotFoundError as error:
    raise SystemExit(f"transformers_heads.py: error: needs {error.name}: pip install -e '.[dense]'") from error

EXAMPLES = """examples:
  transformers_heads.py --head mask2former --model swin_tiny_fdconv
  transformers_heads.py --head detr --image street.jpg --size 480 --save outputs/detr
  transformers_heads.py --head upernet --pretrained      backbone's ImageNet weights, from the Hub

The heads are small ones, so that this takes seconds: leave out `SMALL` for those of the papers."""

CLASSES = 3
HEADS = {
    "mask2former": (transformers.Mask2FormerForUniversalSegmentation, Mask2FormerConfig),
    "maskformer": (transformers.MaskFormerForInstanceSegmentation, MaskFormerConfig),
    "upernet": (transformers.UperNetForSemanticSegmentation, UperNetConfig),
    "detr": (transformers.DetrForObjectDetection, DetrConfig),
}
SMALL_DETR = {
    "d_model": 32,
    "num_queries": 5,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}
SMALL = {
    "mask2former": {
        "feature_size": 32,
        "mask_feature_size": 32,
        "hidden_dim": 32,
        "encoder_feedforward_dim": 32,
        "dim_feedforward": 32,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "num_attention_heads": 4,
        "num_queries": 5,
        "train_num_points": 256,
    },
    "maskformer": {"fpn_feature_size": 32, "mask_feature_size": 32, "decoder_config": DetrConfig(**SMALL_DETR)},
    "upernet": {"hidden_size": 32, "auxiliary_channels": 16},
    "detr": SMALL_DETR,
}


def create_head(head: str, model: str, pretrained: bool = False) -> transformers.PreTrainedModel:
    """Return a small head on a timm backbone.

    Args:
        head: Key of `HEADS`.
        model: timm's name of the backbone.
        pretrained: Load the backbone's ImageNet weights.
    """
    head_class, config_class = HEADS[head]
    # DETR takes the coarsest map, the others four
    levels = [-1] if head == "detr" else [-4, -3, -2, -1]
    config = config_class(
        backbone_config=TimmBackboneConfig(backbone=model, out_indices=levels), num_labels=CLASSES, **SMALL[head]
    )
    backbone = timm.create_model(model, pretrained=pretrained, features_only=True)
    return build_transformers_head(head_class, config, backbone)


def make_targets(head: str, images: Tensor) -> dict[str, Tensor | list]:
    """Return made-up targets for images (B, 3, H, W): classes side by side, or a box in the middle."""
    batch, _, height, width = images.shape
    classes = (torch.arange(width) * CLASSES // width).expand(batch, height, width)
    if head == "upernet":
        return {"labels": classes}
    if head == "detr":
        target = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]])}
        return {"labels": [target] * batch}
    masks = torch.stack([(classes[0] == label).float() for label in range(CLASSES)])
    return {"mask_labels": [masks] * batch, "class_labels": [torch.arange(CLASSES)] * batch}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--head", choices=tuple(HEADS), default="mask2former")
    parser.add_argument("--model", default="resnet50_fdconv", metavar="NAME", help="default: %(default)s")
    parser.add_argument("--pretrained", action="store_true", help="ImageNet weights of the backbone")
    parser.add_argument("--image", type=Path, metavar="FILE", help="a photo (default: noise)")
    parser.add_argument("--size", type=int, default=224, metavar="PIXELS", help="multiple of 32 (default: %(default)s)")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="save_pretrained there, and load it again")
    args = parser.parse_args(argv)
    if args.image and not args.image.is_file():
        parser.error(f"--image {args.image} is not a file")
    if args.size < 32 or args.size % 32:
        parser.error(f"--size must be a multiple of 32, got {args.size}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Train one step on two images, predict on them, and print shapes."""
    args = parse_args(argv)
    torch.manual_seed(0)
    model = create_head(args.head, args.model, args.pretrained)
    if args.image:
        photo = resize(to_tensor(Image.open(args.image).convert("RGB")), [args.size, args.size])
        images = torch.stack([photo, photo.flip(-1)])
    else:
        images = torch.rand(2, 3, args.size, args.size)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    loss = model(pixel_values=images, **make_targets(args.head, images)).loss
    loss.backward()
    optimizer.step()
    print(f"{args.head}, {args.model}, images {tuple(images.shape)}")
    print(f"loss: {loss.item():.3f}")

    if args.save:
        model.save_pretrained(args.save)
        model = load_transformers_head(HEADS[args.head][0], args.save)
    model.eval()
    with torch.inference_mode():
        outputs = model(pixel_values=images)
    shapes = {name: tuple(value.shape) for name, value in outputs.items() if isinstance(value, Tensor)}
    print("outputs: " + ", ".join(f"{name} {shape}" for name, shape in shapes.items()))


if __name__ == "__main__":
    main()
