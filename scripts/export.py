#!/usr/bin/env python3
"""Export a model to ONNX, an exported program or TorchScript, and check the file against the model."""

import argparse
import copy
import importlib.util
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.command_line import fail
from common.images import channels_mode
from common.models import build_model, check_image_size, check_pretrained_classes, expand_names, takes_other_sizes
from common.onnx_file import free_dimensions, open_onnxruntime, open_openvino, write_onnx
from common.run_options import adopt_model_options, resolve_preprocessing
from common.weights import read_checkpoint
from exporting.args import FORMATS, check_args, parse_args
from exporting.calibration import calibrate
from fdconv_zoo import to_static
from fdconv_zoo.choice import named_dynamic_layers, named_fd_layers
from fdconv_zoo.layers.dynamic import KWConv2d
from validation.datasets import open_dataset


def create_model(args: argparse.Namespace) -> nn.Module:
    """Create the model with its weights, ready for inference.

    Raises:
        ValueError: The model or the checkpoint does not fit.
        RuntimeError: There are no pretrained weights to be had.
    """
    (name,) = expand_names([args.model], weights_needed=not (args.checkpoint or args.no_weights))
    kwargs = {"num_classes": args.num_classes, "features_only": args.features, **args.model_kwargs}
    checkpoint = read_checkpoint(args.checkpoint, args.use_ema) if args.checkpoint else None
    if not (checkpoint or args.no_weights or args.features):
        check_pretrained_classes(name, kwargs["num_classes"])
    model = build_model(name, checkpoint=checkpoint, pretrained=not args.no_weights, **kwargs).eval()
    methods = list(dict.fromkeys(layer.method for _, layer in named_dynamic_layers(model)))
    if args.static and not any(named_fd_layers(model)):
        reason = "is static as it is"
        if methods:
            reason = f"has layers of {', '.join(methods)}, and --static is for those of FDConv"
        raise ValueError(f"{args.model} {reason}: leave out --static")
    if KWConv2d.method in methods and args.output.suffix == ".torchscript":
        raise ValueError(f"{args.model}: {KWConv2d.method} is not for TorchScript: export to .onnx or .pt2")
    return model


def make_static(model: nn.Module, config: dict[str, Any], args: argparse.Namespace) -> nn.Module:
    """The static model, calibrated if that is asked for.

    Args:
        model: The dynamic one.
        config: Preprocessing, as timm's loader takes it.
        args: Arguments of export.py.

    Raises:
        ValueError: The data don't fit.
    """
    if not args.calibrate:
        return to_static(model)
    data = argparse.Namespace(
        data_dir=str(args.calibrate), dataset="", split=None, class_map=None, checkpoint=args.checkpoint
    )
    labelled = open_dataset(data, model, channels_mode(config["input_size"][0]), tell=True)
    return calibrate(model, args.calibrate, args.images, labelled, config)


def prepare_input(model: nn.Module, args: argparse.Namespace) -> dict[str, Any]:
    """Preprocessing, of which `input_size` has channels, height and width of the example input.

    Raises:
        ValueError: The options of the run that left the checkpoint can't be read.
    """
    config = resolve_preprocessing(model, {}, args.checkpoint, channels=args.model_kwargs.get("in_chans"))
    if args.img_size:
        config["input_size"] = (config["input_size"][0], args.img_size[0], args.img_size[-1])
    return config


def sample_shapes(shape: tuple[int, int, int], batch: int | None, fixed_size: bool) -> Iterator[tuple[int, ...]]:
    """Input shapes that the file must take: several batches and image sizes, where they are free."""
    channels, height, width = shape
    sizes = [(height, width)]
    if not fixed_size:
        sizes += [(height + 32, width), (height, width + 61), (max(height // 2, 64), max(width // 2, 64))]
    for size in dict.fromkeys(sizes):
        for count in [batch] if batch else [1, 2, 5] if size == sizes[0] else [2]:
            yield count, channels, *size


def export_file(model: nn.Module, x: Tensor, path: Path, args: argparse.Namespace) -> None:
    """Write the file, with the dimensions that are not fixed left free."""
    free = free_dimensions(batch=not args.fixed_batch, size=not args.fixed_size)
    if path.suffix == ".torchscript":
        torch.jit.save(torch.jit.script(model), path)
    elif path.suffix == ".pt2":
        torch.export.save(torch.export.export(model, (x,), dynamic_shapes=(free,)), path)
    else:
        write_onnx(model, x, path, free, args.opset)


def load_file(path: Path) -> Callable[[Tensor], list[Tensor]]:
    """Read the file back as a function from an input to outputs."""
    if path.suffix == ".onnx":
        return open_onnxruntime(path, torch.get_num_threads())
    program = torch.jit.load(path) if path.suffix == ".torchscript" else torch.export.load(path).module()
    return lambda x: as_list(program(x))


def load_in_runtimes(path: Path) -> dict[str, Callable[[Tensor], list[Tensor]]]:
    """The file in each runtime that reads it here: an ONNX file in OpenVINO too, where that is installed."""
    runs = {"ONNX Runtime" if path.suffix == ".onnx" else "PyTorch": load_file(path)}
    if path.suffix == ".onnx" and importlib.util.find_spec("openvino"):
        runs["OpenVINO"] = open_openvino(path, torch.get_num_threads())
    return runs


def as_list(output: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else list(output)


@torch.inference_mode()
def check_file(model: nn.Module, path: Path, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> float:
    """Compare the file with the model on random inputs, and print a line for each shape and runtime.

    Args:
        model: In single precision.
        path: The file.
        shapes: Of the inputs.
        dtype: That the file takes.

    Returns:
        The largest difference, relative to the largest output.
    """
    runs = load_in_runtimes(path)
    generator = torch.Generator().manual_seed(0)
    differences = []
    print(f"{'input':<22}{'':<14}{'largest difference':>20}{'of outputs up to':>18}{'relative':>11}")
    for shape in shapes:
        x = torch.randn(shape, generator=generator).to(dtype)
        wanted = as_list(model(x.float()))
        largest = max(expected.abs().max().item() for expected in wanted)
        for name, run in runs.items():
            pairs = list(zip(run(x), wanted, strict=True))
            difference = max((actual - expected).abs().max().item() for actual, expected in pairs)
            relative = difference / largest
            differences.append(relative)
            print(
                f"{' x '.join(map(str, shape)):<22}{name:<14}{difference:>20.2e}{largest:>18.2f}{relative:>11.1e}",
                flush=True,
            )
    return torch.tensor(differences).max().item()  # NaN if one is


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    warnings.filterwarnings("ignore")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        check_args(args)
        adopt_model_options(args)
        model = create_model(args)
        config = prepare_input(model, args)
        shape = config["input_size"]
        check_image_size(model, shape[1:])
        if args.static:
            model = make_static(model, config, args)
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        raise fail("export.py", error) from error
    if not args.fixed_size and not takes_other_sizes(model, torch.zeros(1, *shape)):
        raise fail("export.py", f"{args.model} takes {shape[1]} x {shape[2]} images only: add --fixed-size")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    # A file that does not pass never takes the place of one that did.
    unchecked = args.output.with_stem(f"{args.output.stem}.unchecked")
    print(f"exporting {args.model} as {FORMATS[args.output.suffix]} ...", file=sys.stderr, flush=True)
    shapes = list(sample_shapes(shape, args.fixed_batch, args.fixed_size))
    doing = "export"
    try:
        dtype = torch.float16 if args.half else torch.float32
        exported = copy.deepcopy(model).half() if args.half else model
        export_file(exported, torch.randn(args.fixed_batch or 2, *shape).to(dtype), unchecked, args)
        doing = "run from the file at all sizes"
        worst = check_file(model, unchecked, shapes, dtype)
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
