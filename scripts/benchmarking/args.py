"""Command line of ``benchmark.py``."""

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from timm.utils import ParseKwargs

from benchmarking.engines import ENGINES
from common.command_line import check_device
from common.onnx_file import check_packages
from fdconv_zoo.layers.ops import triton

DESCRIPTION = """Measure what FDConv models cost beside their static twins: time, memory, parameters and MACs.

The two run in alternation in one process, so that a busy machine slows both alike, and a ratio can be trusted more
than a time. Each figure is a median after a warm-up. Weights are random, gates are not at 1, images are noise."""
EXAMPLES = """examples:
  benchmark.py --model resnet18_fdconv --img-size 64             a first look, in a few seconds
  benchmark.py --preset table --repeats 8                        the table of docs/performance.md
  benchmark.py --preset small-images --threads 1                 64 pixels, and what static stages save there
  benchmark.py --model resnet50_fdconv --mode eval train --batch-size 2 4 8 --threads 1 2
  benchmark.py --model resnet50_fdconv --engines eager compile aotinductor onnxruntime openvino      docs/deploy.md
  benchmark.py --model convnext_tiny_fdconv --img-size 112 224 448 --batch-size 1 2 4 --plot cost.png
  benchmark.py --model resnet18_fdconv --batch-size 1 --reference    the gain over the paper's equations as written
  benchmark.py --preset table --traffic bfloat16 --batch-size 64     kernels and bytes on a GPU, counted without one
  TRITON_INTERPRET=1 benchmark.py --preset table --traffic bfloat16 --batch-size 64 --mode train   a step
  benchmark.py --model resnet50_odconv resnet50_kw               other dynamic convolutions of the zoo
  benchmark.py --model 'resnet*_fdconv' --device cuda --amp --channels-last --compile --compile-mode reduce-overhead

A train step is forward, backward, a step of plain SGD, and zero_grad; at batch 1 KSM's BatchNorm takes its running
statistics.
Ctrl-C ends the measuring and keeps what has been measured. The CUDA path is written by the same rules (synchronised,
CUDA's own memory statistics), but this project's figures of a GPU come from gpu_check.py."""


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


_positive.__name__ = "positive whole number"  # argparse: "invalid positive whole number value: '0'"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument_group("what to measure (every combination)").add_argument
    add("--model", nargs="+", metavar="NAME", help="models of the zoo, or quoted wildcards: 'resnet*_fdconv'")
    add(
        "--preset",
        choices=("table", "small-images"),
        help="instead of --model, --batch-size and --mode. table: resnet50, convnext_tiny and swin_tiny in eval at "
        "batch 1 and 8 and in training at batch 4, a 512-channel layer on 7x7 maps, a small net in training; printed "
        "as one table. small-images: resnet18 at 64 pixels, all of its stages converted or the first three or two, in "
        "eval at batch 1 and 8",
    )
    add("--batch-size", nargs="+", type=_positive, default=[1, 8], metavar="N", help="default: 1 8")
    add("--img-size", nargs="+", type=_positive, metavar="PIXELS", help="default: 224, of small-images 64")
    add("--mode", nargs="+", choices=("eval", "train"), default=["eval"], help="default: eval")
    add(
        "--threads",
        nargs="+",
        type=_positive,
        default=[torch.get_num_threads()],
        metavar="N",
        help="of the CPU, for one operation (default: %(default)s)",
    )
    add(
        "--model-kwargs",
        nargs="*",
        default={},
        action=ParseKwargs,
        metavar="KEY=VALUE",
        help="for the FDConv models: num_bands=16 recompute=False",
    )

    add = parser.add_argument_group("how to run it").add_argument
    add(
        "--traffic",
        choices=("bfloat16", "float16", "float32"),
        help="no times: count the kernels that one pass would launch on a GPU, and the bytes that they would move, "
        "with models and images of this dtype; needs no GPU. For --mode train set TRITON_INTERPRET=1",
    )
    add("--compile", action="store_true", help="torch.compile too, beside eager, for both models of a pair")
    add(
        "--engines",
        nargs="+",
        choices=ENGINES,
        default=[],
        help="what else runs both models of a pair in eval on a CPU, all in the same alternation: "
        f"{', '.join(ENGINES)}. The file for ONNX Runtime and OpenVINO takes any batch and size of image",
    )
    add(
        "--compile-mode",
        default="default",
        choices=("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
        help="default: %(default)s",
    )
    add(
        "--reference",
        action="store_true",
        help="time layers/ops/literal.py too, the paper's equations as literally written (not the authors' code), and "
        "its difference from the model's output; CPU, eager, eval only: it is slow, minutes at the first pass, and "
        "its training step would keep every group of every weight",
    )
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    add("--amp", action="store_true", help="autocast")
    add("--amp-dtype", choices=("float16", "bfloat16"), default="bfloat16", help="default: %(default)s")
    add("--channels-last", action="store_true")

    add = parser.add_argument_group("how to measure").add_argument
    add("--repeats", type=_positive, default=10, metavar="N", help="rounds (default: %(default)s)")
    add("--warmup", type=_positive, default=2, metavar="N", help="calls before them (default: %(default)s)")
    add("--reference-repeats", type=_positive, default=1, metavar="N", help="default: %(default)s, after one warm-up")
    add(
        "--cpu-time",
        action="store_true",
        help="seconds of the processor instead of the clock's, of all threads together: for a busy machine",
    )
    add("--seed", type=int, default=0, help="of weights, gates and images (default: %(default)s)")

    add = parser.add_argument_group("output").add_argument
    add(
        "--results-file",
        type=Path,
        default=Path("outputs/benchmark.json"),
        metavar="FILE",
        help="every figure, as JSON, written anew after every measurement (default: %(default)s)",
    )
    add(
        "--plot",
        type=Path,
        metavar="FILE",
        help="PNG: time against image size and batch, logarithmic; give two or more of --img-size or --batch-size",
    )
    args = parser.parse_args(argv)
    args.img_size = args.img_size or [64 if args.preset == "small-images" else 224]
    return args


def check_args(args: argparse.Namespace) -> None:
    """Refuse what can't work before any work starts.

    Raises:
        ValueError: Names the argument.
    """
    if bool(args.model) == bool(args.preset):
        raise ValueError("say what to measure: --model NAME or --preset table or small-images, one of them")
    if args.preset and len(args.img_size) > 1:
        raise ValueError(f"--preset {args.preset} takes one --img-size, got {', '.join(map(str, args.img_size))}")
    if args.traffic and (len(args.batch_size) > 1 or len(args.img_size) > 1 or len(args.mode) > 1 or args.plot):
        raise ValueError("--traffic counts one pass: give one --batch-size, one --img-size, one --mode and no --plot")
    if args.traffic and (args.mode == ["train"]) != triton.IS_INTERPRETED:
        raise ValueError(
            "--traffic counts training where TRITON_INTERPRET=1 is set in the environment, and eval where it is not: "
            "autograd has no fake GPU"
        )
    if args.results_file.suffix != ".json":
        raise ValueError(f"--results-file must end in .json, got {args.results_file}")
    if set(args.engines) - {"eager", "compile"} and (args.mode != ["eval"] or args.device != "cpu" or args.amp):
        raise ValueError("--engines are for --mode eval on --device cpu without --amp")
    if runtimes := [name for name in ("onnxruntime", "openvino") if name in args.engines]:
        check_packages(*runtimes)
    if args.reference and (args.device != "cpu" or args.amp):
        raise ValueError("--reference runs in full precision on the CPU: give --device cpu and no --amp")
    if args.cpu_time and args.device != "cpu":
        raise ValueError("--cpu-time counts the processor's seconds: give --device cpu")
    if args.plot:
        if args.plot.suffix != ".png":
            raise ValueError(f"--plot must end in .png, got {args.plot}")
        if not args.preset and len(args.img_size) < 2 and len(args.batch_size) < 2:
            raise ValueError("--plot needs two or more of --img-size or --batch-size")
        if importlib.util.find_spec("matplotlib") is None:
            raise ValueError("--plot needs matplotlib: pip install -e '.[demo]'")
    check_device(args.device)
