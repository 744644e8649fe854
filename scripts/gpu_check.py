#!/usr/bin/env python3
"""Check and measure FDConv on a GPU: kernels, layers, models, speed, training. One command, no network."""

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("torch", "torchvision", "timm", "safetensors", "huggingface_hub")


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line, or from ``argv``."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise SystemExit(f"gpu_check.py: error: this machine has no {', '.join(missing)}")
    # A lent machine has the tree and nothing installed. Behind scripts/, so that the rooms are found first.
    if str(ROOT) not in sys.path:
        sys.path.insert(1, str(ROOT))
    from common.command_line import fail
    from gpu_checks.args import check_args, parse_args
    from gpu_checks.parts import PARTS
    from gpu_checks.runner import Runner

    args = parse_args(argv)
    try:
        check_args(args)
    except ValueError as error:
        raise fail("gpu_check.py", error) from error
    if not Runner(args, PARTS, Path(__file__)).run():
        raise SystemExit(1)


if __name__ == "__main__":
    main()
