"""Reproduce the cost columns of the paper's Table 1: parameters and FLOPs of Faster and Mask R-CNN with ResNet-50.

python scripts/table1.py --help
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from common.record import versions, write_json
from costs.detectors import HEADS, MASKS, PROPOSALS, DummyForward, build_detector, count_detector_macs
from costs.methods import METHOD_NOTES, METHODS, describe_methods, measure_methods
from fdconv_zoo.cost import count_parameters
from fdconv_zoo.layers.fbm import FBM

DESCRIPTION = """Print parameters and FLOPs of Faster R-CNN and Mask R-CNN with a static and an FDConv ResNet-50 beside
those of the paper's Table 1, where the FLOPs that FDConv adds go, and what the table's other dynamic convolutions add.
Nothing is computed: shapes go through torch's meta device."""
EXAMPLES = """examples:
  table1.py                                     both detectors at 1280x800, some seconds
  table1.py --heads mask_rcnn --json t1.json    one of them, and every figure in a file
  table1.py --input-size 512 512                another height and width"""

# arXiv 2503.18783v2, Table 1, without the accuracies: millions of parameters, billions of FLOPs.
PAPER = {
    "faster_rcnn": {"params": 43.80, "flops": 207.1},
    "mask_rcnn": {"params": 46.5, "flops": 260.1},
}
PAPER_ADDED = {"params": 3.6, "flops": 1.8}
PAPER_SIZE = (800, 1280)
CLASSIFIER_PARAMETERS = 2048 * 1000 + 1000  # of an ImageNet ResNet-50

NOTES = f"""\
FLOPs are the paper's: multiply-accumulates, as OpenMMLab's counter has them. The paper gives no input size; its static
figures are those at the counter's own, 1280x800, with {PROPOSALS} proposals and {MASKS} masks.

Parameters, static: the paper's figures are met with the {CLASSIFIER_PARAMETERS / 1e6:.2f} M of ImageNet's classifier,
which a detector does not have. Torchvision's heads have a box and a mask for the background too: 0.004 M and 0.02 G
more.

FLOPs, static: convolutions and linear layers, and as in that counter, 2 a value for BatchNorm and 1 for ReLU, pooling
and convolutions' biases.

FLOPs, added: the paper does not say what it counts. FDW, KSM and FBM's modulation maps come to its figure; FBM's
filters do not fit in. The official code filters by FFT, which a counter of modules does not see; here it is matrix
products, unless mask_grid is set. The official detector's configuration also has no FBM in strided layers (0.39 G of
the maps).

{METHOD_NOTES}"""


@torch.no_grad()
def forward_with_hook(
    detector: nn.Module, size: tuple[int, int], hook: Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]
) -> None:
    """Run a detector on an image of that height and width, and the hook after each module without parts."""
    handles = [module.register_forward_hook(hook) for module in detector.modules() if not list(module.children())]
    DummyForward(detector)(torch.empty(1, 3, *size, device="meta"))
    for handle in handles:
        handle.remove()


def count_elementwise(detector: nn.Module, size: tuple[int, int]) -> int:
    """Return what OpenMMLab's counter adds to the multiply-accumulates of a static detector.

    Args:
        detector: Of :func:`build_detector`.
        size: Height and width of the image.
    """
    counts = []

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.BatchNorm2d):
            counts.append(2 * output.numel())
        elif isinstance(module, nn.MaxPool2d):
            counts.append(inputs[0].numel())
        elif isinstance(module, nn.ReLU) or getattr(module, "bias", None) is not None:
            # that counter leaves out the biases of linear layers
            counts.append(0 if isinstance(module, nn.Linear) else output.numel())

    forward_with_hook(detector, size, count)
    return sum(counts)


def count_modulation_maps(detector: nn.Module, size: tuple[int, int]) -> int:
    """Return the multiply-accumulates of the convolutions that make FBM's modulation maps.

    Args:
        detector: Of :func:`build_detector`.
        size: Height and width of the image.
    """
    counts = []

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, FBM):
            counts.append(module.weight.numel() * output.shape[2:].numel())

    forward_with_hook(detector, size, count)
    return sum(counts)


def measure(head: str, size: tuple[int, int]) -> dict[str, Any]:
    """Return parameters and FLOPs of a detector, static and FDConv, the parts of the difference, and other methods'.

    Args:
        head: One of `HEADS`.
        size: Height and width of the image, multiples of 32.
    """

    def flops(detector: nn.Module) -> int:
        return count_detector_macs(detector, size)

    static = build_detector(head, "resnet50")
    fdconv = build_detector(head, "resnet50_fdconv")
    fdw, ksm, full = (
        flops(detector)
        for detector in (
            build_detector(head, "resnet50_fdconv", ksm=False, fbm=False),
            build_detector(head, "resnet50_fdconv", fbm=False),
            fdconv,
        )
    )
    macs = flops(static)
    maps = count_modulation_maps(fdconv, size)
    return {
        "methods": measure_methods(head, size),
        "static_params": count_parameters(static),
        "added_params": count_parameters(fdconv) - count_parameters(static),
        "static_macs": macs,
        "static_elementwise": count_elementwise(static, size),
        "added_fdw": fdw - macs,
        "added_ksm": ksm - fdw,
        "added_fbm_maps": maps,
        "added_fbm_filters": full - ksm - maps,
        "added_fbm_filters_by_fft": flops(build_detector(head, "resnet50_fdconv", mask_grid=64)) - ksm - maps,
    }


def describe(head: str, counts: dict[str, Any], size: tuple[int, int]) -> str:
    """Return the Markdown table of one detector, the paper's figures beside those counted here."""
    paper = PAPER[head] if size == PAPER_SIZE else {"params": PAPER[head]["params"]}
    numbers = {key: value for key, value in counts.items() if key != "methods"}
    millions = {key: value / 1e6 for key, value in numbers.items()}
    billions = {key: value / 1e9 for key, value in numbers.items()}
    without_filters = billions["added_fdw"] + billions["added_ksm"] + billions["added_fbm_maps"]
    rows = [
        ("parameters, static", f"{paper['params']:.2f} M", f"{millions['static_params']:.2f} M"),
        (
            "the same with ImageNet's classifier",
            f"{paper['params']:.2f} M",
            f"{millions['static_params'] + CLASSIFIER_PARAMETERS / 1e6:.2f} M",
        ),
        ("parameters, FDConv adds", f"+{PAPER_ADDED['params']} M", f"+{millions['added_params']:.3f} M"),
        (
            "FLOPs, static",
            f"{paper['flops']:.1f} G" if "flops" in paper else "",
            f"{billions['static_macs'] + billions['static_elementwise']:.2f} G",
        ),
        ("of them convolutions and linear layers", "", f"{billions['static_macs']:.2f} G"),
        (
            "FLOPs, FDConv adds without FBM's filters",
            f"+{PAPER_ADDED['flops']} G" if "flops" in paper else "",
            f"+{without_filters:.2f} G",
        ),
        ("FDW's transforms and gains", "", f"{billions['added_fdw']:.2f} G"),
        ("KSM", "", f"{billions['added_ksm']:.2f} G"),
        ("FBM's modulation maps", "", f"{billions['added_fbm_maps']:.2f} G"),
        ("FBM's filters, matrix products", "", f"+{billions['added_fbm_filters']:.2f} G"),
        ("FBM's filters with mask_grid=64, FFT", "", f"+{billions['added_fbm_filters_by_fft']:.2f} G"),
    ]
    lines = [f"| {head}, {size[1]}x{size[0]} | Table 1 | here |", "|---|---:|---:|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines + describe_methods(head, counts["methods"], "flops" in paper))


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="table1.py", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--heads", nargs="+", choices=tuple(HEADS), default=list(HEADS), help="default: both")
    parser.add_argument(
        "--input-size",
        nargs=2,
        type=int,
        default=list(PAPER_SIZE),
        metavar=("HEIGHT", "WIDTH"),
        help="multiples of 32 (default: 800 1280)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there, as whole numbers")
    args = parser.parse_args(argv)
    if any(side < 32 or side % 32 for side in args.input_size):
        parser.error(f"--input-size must be multiples of 32, got {' '.join(map(str, args.input_size))}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Count, print, and write the file."""
    args = parse_args(argv)
    size = (args.input_size[0], args.input_size[1])
    results = {}
    for head in args.heads:
        print(f"counting {head} ...", file=sys.stderr, flush=True)
        results[head] = measure(head, size)
        print(describe(head, results[head], size), end="\n\n", flush=True)
    print(NOTES)
    if args.json:
        report = {
            "input_size": list(size),
            "paper": {head: PAPER[head] for head in args.heads} | {"added": PAPER_ADDED},
            "paper_methods": {head: [row._asdict() for row in METHODS[head]] for head in args.heads},
            "counted": results,
            "versions": versions() | {"torchvision": torchvision.__version__},
        }
        write_json(args.json, report)


if __name__ == "__main__":
    main()
