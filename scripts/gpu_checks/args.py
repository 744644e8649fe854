"""Command line of ``gpu_check.py``."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from common.command_line import check_device
from gpu_checks.parts import PARTS

DESCRIPTION = """Check and measure FDConv on a GPU, with the tree alone: no installation, no network, no weights.

Correctness comes first, then speed. A part that fails is reported and the others go on; what was found is written to
the JSON file after every single figure, so that a run that is killed loses nothing."""
EXAMPLES = f"""parts, in this order (each has a share of the time; what one leaves goes to those after it):
{chr(10).join(f"  {name:10s} {part.about}" for name, part in PARTS.items())}

examples:
  python scripts/gpu_check.py                                   as much as fits into 8 minutes (--minutes)
  python scripts/gpu_check.py --only facts --only kernels       two parts
  python scripts/gpu_check.py --only speed --minutes 5 --keep   once more, beside what the file holds already
  python scripts/gpu_check.py --device cpu --small              that the parts run, on a CPU; figures mean nothing
  TRITON_INTERPRET=1 python scripts/gpu_check.py --device cpu --small --only kernels   the kernels, interpreted

The status is 1 if a figure is beyond its limit or something failed. On a machine that hands back one folder:
  python scripts/gpu_check.py --minutes 8 2>&1 | tee $OUT/gpu_check.log"""


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu_check.py",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--only", action="append", metavar="PART", help="run this part only; repeat it for several")
    add("--minutes", type=float, default=8, metavar="N", help="time for all parts (default: %(default)s)")
    add("--output", type=Path, metavar="FILE.json", help="default: $OUT/<card>.json where OUT is set, else "
        "results/gpu/<card>.json")  # fmt: skip
    add("--keep", action="store_true", help="keep the parts that the file holds and this run does not run")
    add("--device", default="cuda", help="default: %(default)s")
    add(
        "--small",
        action="store_true",
        help="tiny models, layers and counts in float32: whether the parts run, not what a GPU does",
    )
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    """Refuse what can't work before any work starts, and choose the output file.

    Raises:
        ValueError: Names the argument.
    """
    unknown = [name for name in args.only or [] if name not in PARTS]
    if unknown:
        raise ValueError(f"--only {', '.join(unknown)}: the parts are {', '.join(PARTS)}")
    if args.minutes <= 0:
        raise ValueError(f"--minutes {args.minutes:g} must be above 0")
    check_device(args.device)
    if torch.device(args.device).type != "cuda" and not args.small:
        raise ValueError(f"--device {args.device} is no GPU: add --small")
    if args.output is None:
        folder = Path(os.environ["OUT"]) if os.environ.get("OUT") else Path(__file__).parents[2] / "results" / "gpu"
        args.output = folder / f"{card_name(args.device)}.json"
    if args.output.suffix != ".json":
        raise ValueError(f"--output must end in .json, got {args.output}")


def card_name(device: str) -> str:
    """Name of the card as a file name: `nvidia_h100_80gb_hbm3`; of other devices their type."""
    kind = torch.device(device)
    name = torch.cuda.get_device_name(kind) if kind.type == "cuda" else kind.type
    return "".join(letter if letter.isalnum() else "_" for letter in name.lower())
