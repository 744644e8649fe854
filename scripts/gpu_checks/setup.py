"""What every part gets, and the rows that it gives back."""

import contextlib
import math
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fdconv_zoo.layers.ops import triton

# What a part found: `case` names it, `error` and `limit` are a relative error and the largest allowed, `fault` is a
# traceback; everything else is figures.
Row = dict[str, Any]


class UnavailableError(RuntimeError):
    """A part, or what is left of it, can't run on this machine; the message says what is missing."""


class DeviceLostError(RuntimeError):
    """The GPU answers this process no more, as after an illegal access: everything after it would fail too."""


@dataclass(frozen=True)
class Setup:
    """Where and how large.

    Attributes:
        device: Device of all checks.
        small: Tiny models and counts.
        until: When the part should end, in seconds of `time.monotonic`.
    """

    device: torch.device
    small: bool
    until: float = math.inf

    @property
    def seconds_left(self) -> float:
        return self.until - time.monotonic()

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def has_kernels(self) -> bool:
        """Whether Triton's kernels compute here."""
        return triton.is_supported(torch.empty(0, device=self.device), torch.float32)

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Dtypes to check; Triton's interpreter can't multiply bfloat16."""
        return (torch.float32,) if self.small else (torch.float32, torch.bfloat16, torch.float16)

    @property
    def half_dtype(self) -> torch.dtype:
        """The dtype to be fast in."""
        return torch.float32 if self.small else torch.bfloat16

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def check_alive(self) -> None:
        """Raises a DeviceLostError unless the device still computes for this process."""
        try:
            self.synchronize()
            torch.ones(1, device=self.device).sum().item()
        except RuntimeError as error:
            raise DeviceLostError(str(error)) from error

    def attempt(self, case: str, measure: Callable[[], Row]) -> Row:
        """A row of what is measured, or of how it failed.

        Raises:
            DeviceLostError: The device computes no more.
        """
        try:
            row = {"case": case, **measure()}
            self.synchronize()
            return row
        except UnavailableError:
            raise
        except Exception:  # of torch, Triton and its compiler: no common base
            fault = traceback.format_exc()
        try:
            self.check_alive()
        except DeviceLostError as error:
            raise DeviceLostError(f"in {case}: {fault}") from error
        if self.on_gpu:
            torch.cuda.empty_cache()
        return {"case": case, "fault": fault}

    def seed(self) -> None:
        """The same random numbers for every case, alone or in a row."""
        torch.manual_seed(0)

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Normal numbers on the device."""
        return torch.randn(*shape, device=self.device).to(dtype)


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16`."""
    return str(dtype).removeprefix("torch.")


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """float32 products and convolutions without TF32, PyTorch's own among them."""
    allowed, precision = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = allowed
        torch.set_float32_matmul_precision(precision)


def largest_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest number expected, or over 1 where all are 0; infinite for other shapes."""
    if found.shape != expected.shape:
        return math.inf
    scale = expected.abs().max().item() if expected.numel() else 0.0
    difference = (found.to(expected.device).to(expected.dtype) - expected).abs()
    return difference.max().item() / (scale or 1.0) if difference.numel() else 0.0


def norm_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over that of what is expected, or over 1 where it vanishes; infinite for other shapes."""
    if found.shape != expected.shape:
        return math.inf
    scale = expected.double().norm().item()
    difference = (found.to(expected.device).double() - expected.double()).norm().item()
    return difference / (scale if scale > 1e-12 else 1.0)


def worst_of(errors: Mapping[str, float]) -> str:
    """Name of the largest error; what is not a number is larger than any."""
    return max(errors, key=lambda name: (math.isnan(errors[name]), errors[name]))


def is_good(row: Row) -> bool:
    """Whether a row has no fault, and an error within its limit if it has one; not a number is beyond any limit."""
    return "fault" not in row and ("limit" not in row or row["error"] <= row["limit"])
