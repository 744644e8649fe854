#!/usr/bin/env python3
"""Export a model to ONNX, an exported program or TorchScript, and check the file against the model."""

import argparse
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import timm
import torch
from timm.utils import ParseKwargs
from torch import Tensor, nn

import fdconv_zoo  # noqa: F401, registers the models
from common.command_line import fail
from common.models import build_model, expand_names
from common.weights import read_checkpoint

DESCRIPTION = "Export a model to ONNX, an exported program or TorchScript, and check the file against the model."
EXAMPLES = """examples:
  export.py resnet50_fdconv resnet50.onnx                     weights from the Hub; any batch, height and width
  export.py resnet50_fdconv resnet50.pt2                      for torch.export.load and AOTInductor
  export.py resnet50_fdconv resnet50.torchscript              for torch.jit.load and libtorch
  export.py resnet50_fdconv flowers.onnx --checkpoint model_best.pth.tar --num-classes 102
  export.py swin_tiny_fdconv swin.onnx --fixed-size           Swin: any batch, one image size
  export.py resnet18_fdconv features.onnx --no-weights --features
"""
FORMATS = {".onnx": "ONNX", ".pt2": "exported program", ".torchscript": "TorchScript"}
# Differences of a float32 model from itself in another order of operations stay below it.
TOLERANCE = 1e-4


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a model's name, with or without a tag")
    parser.add_argument("output", type=Path, metavar="FILE", help=f"to write: {', '.join(FORMATS)}")

    add = parser.add_argument_group("model").add_argument
    add("--checkpoint", type=Path, metavar="FILE", help="instead of pretrained weights; a static model's is converted")
    add("--use-ema", action="store_true", help="the checkpoint's averaged weights")
    add("--no-weights", action="store_true", help="random weights: to see whether and how a model exports")
    add("--num-classes", type=int, help="outputs of the classifier, for --checkpoint")
    add("--features", action="store_true", help="the feature maps of a backbone instead of logits")
    add("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="KEY=VALUE")

    add = parser.add_argument_group("input").add_argument
    add("--img-size", type=int, nargs="+", metavar="N", help="one side or height and width (default: the model's own)")
    add("--fixed-batch", type=int, metavar="N", help="a file for batches of N only (default: any)")
    add("--fixed-size", action="store_true", help="a file for this image size only (default: any)")

    add = parser.add_argument_group("check").add_argument
    add("--tolerance", type=float, default=TOLERANCE, help="largest relative difference (default: %(default)g)")
    add("--opset", type=int, help="ONNX operator set (default: PyTorch's)")
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    """Refuse what can't work before any work starts.

    Raises:
        ValueError: Names the argument.
    """
    if args.output.suffix not in FORMATS:
        raise ValueError(f"{args.output} must end in one of {', '.join(FORMATS)}: the ending says what to write")
    if args.output.suffix == ".onnx":
        try:
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise ValueError(f"ONNX needs {error.name}: pip install onnx onnxscript onnxruntime") from error
    if args.opset and args.output.suffix != ".onnx":
        raise ValueError(f"--opset is for .onnx, not for {args.output.suffix}")
    if args.checkpoint and not args.checkpoint.is_file():
        raise ValueError(f"there is no checkpoint {args.checkpoint}")
    if args.use_ema and not args.checkpoint:
        raise ValueError("--use-ema needs --checkpoint")
    if args.no_weights and args.checkpoint:
        raise ValueError("--no-weights and --checkpoint exclude each other")
    if args.img_size and (len(args.img_size) > 2 or min(args.img_size) < 1):
        raise ValueError(f"--img-size takes one or two positive numbers, got {' '.join(map(str, args.img_size))}")
    if args.fixed_batch is not None and args.fixed_batch < 1:
        raise ValueError(f"--fixed-batch {args.fixed_batch}: at least 1")
    if not args.tolerance > 0:
        raise ValueError(f"--tolerance {args.tolerance}: above 0")


def create_model(args: argparse.Namespace) -> nn.Module:
    """Create the model with its weights, ready for inference.

    Raises:
        ValueError: The model or the checkpoint does not fit.
        RuntimeError: There are no pretrained weights to be had.
    """
    (name,) = expand_names([args.model], weights_needed=not (args.checkpoint or args.no_weights))
    kwargs = {"num_classes": args.num_classes, "features_only": args.features, **args.model_kwargs}
    checkpoint = read_checkpoint(args.checkpoint, args.use_ema) if args.checkpoint else None
    return build_model(name, checkpoint=checkpoint, pretrained=not args.no_weights, **kwargs).eval()


def input_shape(model: nn.Module, args: argparse.Namespace) -> tuple[int, int, int]:
    """Channels, height and width of the example input."""
    channels, height, width = timm.data.resolve_data_config({}, model=model)["input_size"]
    if args.img_size:
        height, width = args.img_size[0], args.img_size[-1]
    return args.model_kwargs.get("in_chans", channels), height, width


@torch.inference_mode()
def takes_other_sizes(model: nn.Module, shape: tuple[int, int, int]) -> bool:
    """Whether the model works beyond the size of its configuration; a Swin Transformer refuses by default."""
    channels, height, width = shape
    try:
        model(torch.zeros(1, channels, height + 32, width))
    except (AssertionError, RuntimeError, ValueError):
        return False
    return True


def sample_shapes(shape: tuple[int, int, int], batch: int | None, fixed_size: bool) -> Iterator[tuple[int, ...]]:
    """Input shapes that the file must take: several batches and image sizes, where they are free."""
    channels, height, width = shape
    sizes = [(height, width)]
    if not fixed_size:
        sizes += [(height + 32, width), (height, width + 61), (max(height // 2, 64), max(width // 2, 64))]
    for size in sizes:
        for count in [batch] if batch else [1, 2, 5] if size == sizes[0] else [2]:
            yield count, channels, *size


def export_file(model: nn.Module, x: Tensor, path: Path, args: argparse.Namespace) -> None:
    """Write the file, with the dimensions that are not fixed left free."""
    free = {} if args.fixed_batch else {0: torch.export.Dim.DYNAMIC}
    if not args.fixed_size:
        free |= {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    if path.suffix == ".torchscript":
        torch.jit.save(torch.jit.script(model), path)
    elif path.suffix == ".pt2":
        torch.export.save(torch.export.export(model, (x,), dynamic_shapes=(free,)), path)
    else:
        torch.onnx.export(
            model, (x,), path, dynamo=True, dynamic_shapes=(free,), input_names=["input"], opset_version=args.opset,
            external_data=False, verbose=False,
            # ONNX Runtime optimises the graph when it loads it; PyTorch's optimiser takes time quadratic in its size.
            optimize=False,
        )  # fmt: skip


def load_file(path: Path) -> Callable[[Tensor], list[Tensor]]:
    """Read the file back as a function from an input to outputs."""
    if path.suffix == ".onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors; it warns of every constant that it folds
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return lambda x: [torch.from_numpy(output) for output in session.run(None, {"input": x.numpy()})]
    program = torch.jit.load(path) if path.suffix == ".torchscript" else torch.export.load(path).module()
    return lambda x: as_list(program(x))


def as_list(output: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else list(output)


@torch.inference_mode()
def check_file(model: nn.Module, path: Path, shapes: Sequence[tuple[int, ...]]) -> float:
    """Compare the file with the model on random inputs, and print a line for each shape.

    Returns:
        The largest difference, relative to the largest output.
    """
    run = load_file(path)
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    print(f"{'input':<22}{'largest difference':>20}{'of outputs up to':>18}{'relative':>11}")
    for shape in shapes:
        x = torch.randn(shape, generator=generator)
        pairs = list(zip(run(x), as_list(model(x)), strict=True))
        difference = max((actual - expected).abs().max().item() for actual, expected in pairs)
        largest = max(expected.abs().max().item() for _, expected in pairs)
        relative = difference / largest
        worst = max(worst, relative)
        print(f"{' x '.join(map(str, shape)):<22}{difference:>20.2e}{largest:>18.2f}{relative:>11.1e}", flush=True)
    return worst


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    warnings.filterwarnings("ignore")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        check_args(args)
        model = create_model(args)
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        raise fail("export.py", error) from error
    shape = input_shape(model, args)
    if not args.fixed_size and not takes_other_sizes(model, shape):
        raise fail("export.py", f"{args.model} takes {shape[1]} x {shape[2]} images only: add --fixed-size")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    # A file that does not pass never takes the place of one that did.
    unchecked = args.output.with_stem(f"{args.output.stem}.unchecked")
    print(f"exporting {args.model} as {FORMATS[args.output.suffix]} ...", file=sys.stderr, flush=True)
    shapes = list(sample_shapes(shape, args.fixed_batch, args.fixed_size))
    doing = "export"
    try:
        export_file(model, torch.randn(args.fixed_batch or 2, *shape), unchecked, args)
        doing = "run from the file at all sizes"
        worst = check_file(model, unchecked, shapes)
    except BaseException as error:  # the exporters and runtimes share no base class; Ctrl-C leaves no file either
        unchecked.unlink(missing_ok=True)
        if not isinstance(error, Exception):
            raise
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        if min(shape[1:]) < 64 and not args.fixed_size:
            reason += "; maps of one pixel have no free size: give a larger --img-size, or --fixed-size"
        raise fail("export.py", f"{args.model} does not {doing}: {reason}") from error
    if not worst <= args.tolerance:
        raise fail(
            "export.py",
            f"largest relative difference {worst:.1e}, above the tolerance of {args.tolerance:g}: "
            f"{args.output} is not written, see {unchecked}",
        )
    unchecked.replace(args.output)
    print(
        f"{args.output} ({args.output.stat().st_size / 1e6:.1f} MB): largest relative difference {worst:.1e}, "
        f"within {args.tolerance:g}"
    )


if __name__ == "__main__":
    main()
