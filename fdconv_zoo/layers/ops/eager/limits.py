"""What was measured of devices: sizes that steer how they compute, and a habit of glibc's on CPUs."""

import os
from functools import cache

import torch

from ..types import Limits

CPU = Limits(chunk=1 << 20, bank=1 << 22, places=1024, packed=1 << 15, block=1 << 20, matrix=256)
# Guesses: no such device was there to measure.
OTHER = Limits(chunk=1 << 26, bank=1 << 22, places=0, packed=None, block=None, matrix=256)


@cache
def keep_freed_memory() -> None:
    """Frees a block of 31 MiB, once, so that glibc keeps the weights' memory.

    glibc gives a freed block back to the system where it is larger than the largest one freed before, 32 MiB at most,
    and the next weight is then made of fresh pages: a quarter of the time of a ResNet-50 on a CPU. The block is never
    touched. The environment variable FDCONV_ZOO_KEEP_FREED_MEMORY=0 turns this off.
    """
    if os.environ.get("FDCONV_ZOO_KEEP_FREED_MEMORY", "1") != "0":
        torch.empty(31 << 20, dtype=torch.uint8, device="cpu")
