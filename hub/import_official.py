"""Turn a checkpoint of the official FDConv code into safetensors for a model of the zoo."""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
from safetensors.torch import save_file
from timm.models import load_state_dict
from torch import Tensor

import fdconv_zoo  # noqa: F401  (registers the models)
from fdconv_zoo.conversion import convert_official_state_dict

MASK_GRID = 64  # the official masks are made on a grid of this size, whatever the feature map
EPILOG = """\
example:
  python -m hub.import_official fdconv_resnet50.pth --model resnet50_fdconv --output resnet50_fdconv.safetensors

Accepted are backbone and detector checkpoints (of a detector, what lies below `backbone.`). The file is read with
weights_only=True: no code in it is run. Training checkpoints of mmengine hold more than weights; where you trust one,
strip it first:
  python -c "import torch; c = torch.load('in.pth', weights_only=False); torch.save(c['state_dict'], 'out.pth')"
"""


def read_official(path: Path) -> tuple[dict[str, Tensor], bool]:
    """The tensors of an official checkpoint, and whether it is a detector's.

    Raises:
        ValueError: There is no such file, it can't be read without running code in it, or is no FDConv checkpoint.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        state = load_state_dict(str(path), use_ema=False)
    except (OSError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} can't be read: {str(error) or type(error).__name__}") from error
    if not any(key.endswith("dft_weight") for key in state):
        raise ValueError(f"{path} is no checkpoint of the official FDConv code: it has no dft_weight")
    return state, any(key.startswith("backbone.") for key in state)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m hub.import_official",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, help="local file of the official code (.pth or .safetensors)")
    parser.add_argument("--model", required=True, help="model of the zoo that it fits, such as resnet50_fdconv")
    parser.add_argument("--output", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--num-classes", type=int, help="classes (default: 0 for a detector, else the model's)")
    parser.add_argument("--dry-run", action="store_true", help="convert and check, write nothing")
    args = parser.parse_args(argv)
    if args.output.exists():
        parser.error(f"--output {args.output} exists")

    try:
        state, detector = read_official(args.checkpoint)
        num_classes = 0 if detector and args.num_classes is None else args.num_classes
        model = timm.create_model(args.model, num_classes=num_classes, mask_grid=MASK_GRID)
        converted = convert_official_state_dict(state, model)
        model.load_state_dict(converted)
    except (ValueError, RuntimeError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    print(f"{len(state)} tensors of {args.checkpoint} fit {args.model}")
    if args.dry_run:
        return
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, args.output, {"format": "pt", "model": args.model, "mask_grid": str(MASK_GRID)})
    kwargs = f"mask_grid={MASK_GRID}" + ("" if num_classes is None else f" num_classes={num_classes}")
    print(
        f"{args.output} written; the official masks lie on a grid of {MASK_GRID}, so build the model with it:\n"
        f"  timm.create_model({args.model!r}, pretrained=True, {kwargs.replace(' ', ', ')},\n"
        f"                    pretrained_cfg_overlay=dict(file={str(args.output)!r}))\n"
        f"and publish it with --model {args.model} --model-kwargs {kwargs}"
    )


if __name__ == "__main__":
    main()
