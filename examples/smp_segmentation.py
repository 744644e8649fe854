"""UPerNet, U-Net or DeepLabV3+ of segmentation-models-pytorch with an FDConv encoder: a training step, then inference.

python examples/smp_segmentation.py --help
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from timm.utils import ParseKwargs
from torch.nn.functional import cross_entropy
from torchvision.transforms.functional import resize, to_tensor

import fdconv_zoo  # noqa: F401  registers the models

try:
    import segmentation_models_pytorch as smp
except ModuleNotFoundError as error:
    raise SystemExit(f"smp_segmentation.py: error: needs {error.name}: pip install -e '.[dense]'") from error

EXAMPLES = """examples:
  smp_segmentation.py --head upernet --model convnext_tiny_fdconv
  smp_segmentation.py --head unet --image street.jpg --size 512
  smp_segmentation.py --head deeplabv3plus --pretrained      encoder's ImageNet weights, from the Hub

DeepLabV3+ of smp wants a dilated encoder, which Swin has not: scripts/train_dense.py takes it at stride 32."""

HEADS = {"unet": smp.Unet, "upernet": smp.UPerNet, "deeplabv3plus": smp.DeepLabV3Plus}
CLASSES = 5


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--head", choices=tuple(HEADS), default="upernet")
    parser.add_argument("--model", default="resnet50_fdconv", metavar="NAME", help="default: %(default)s")
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="KEY=VALUE")
    parser.add_argument("--pretrained", action="store_true", help="ImageNet weights of the encoder")
    parser.add_argument("--image", type=Path, metavar="FILE", help="a photo (default: noise)")
    parser.add_argument("--size", type=int, default=224, metavar="PIXELS", help="multiple of 32 (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.image and not args.image.is_file():
        parser.error(f"--image {args.image} is not a file")
    if args.size < 32 or args.size % 32:
        parser.error(f"--size must be a multiple of 32, got {args.size}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Train one step on two images, segment them, and print shapes."""
    args = parse_args(argv)
    torch.manual_seed(0)
    # None is random weights; left out, it is "imagenet", and the weights are downloaded
    weights = True if args.pretrained else None
    model = HEADS[args.head](f"tu-{args.model}", encoder_weights=weights, classes=CLASSES, **args.model_kwargs)
    if args.image:
        photo = resize(to_tensor(Image.open(args.image).convert("RGB")), [args.size, args.size])
        images = torch.stack([photo, photo.flip(-1)])
    else:
        images = torch.rand(2, 3, args.size, args.size)
    labels = torch.randint(0, CLASSES, images[:, 0].shape)

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    loss = cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    print(f"{args.head}, {args.model}, images {tuple(images.shape)}")
    print(f"loss: {loss.item():.3f}")

    model.eval()
    with torch.inference_mode():
        print(f"logits: {tuple(model(images).shape)}")


if __name__ == "__main__":
    main()
