"""What the layers' keyword arguments may be: their types, and the official code's names for them."""

from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

# Official constructor: https://github.com/Linwei-Chen/FDConv/issues/6 tells what kernel_num is.
OFFICIAL_NAMES = {"kernel_num": "num_bands"}


def describe_names(names: Iterable[str]) -> str:
    """Names of keyword arguments that are not there, those of the official code with ours."""
    return ", ".join(
        f"{name} (the official name of {OFFICIAL_NAMES[name]})" if name in OFFICIAL_NAMES else name
        for name in sorted(names)
    )


def refuse_official_names(layer: str, keywords: Iterable[str]) -> None:
    """Raises a TypeError that says our names where keyword arguments have those of the official code."""
    if official := OFFICIAL_NAMES.keys() & set(keywords):
        raise TypeError(f"{layer} has no keyword argument {describe_names(official)}")


def check_types(num_bands: Any, reduction: Any, cutoffs: Any, mask_grid: Any) -> None:
    """Raises a TypeError that names the first value which is no number, or no numbers, where a layer wants some.

    Args:
        num_bands: An integer.
        reduction: A number.
        cutoffs: A sequence of numbers.
        mask_grid: None or an integer.
    """
    for name, value, wanted, fits in (
        ("num_bands", num_bands, "an integer", _is_number(num_bands, Integral)),
        ("reduction", reduction, "a number", _is_number(reduction, Real)),
        ("cutoffs", cutoffs, "a sequence of numbers", _are_numbers(cutoffs)),
        ("mask_grid", mask_grid, "None or an integer", mask_grid is None or _is_number(mask_grid, Integral)),
    ):
        if not fits:
            raise TypeError(f"{name}={value!r}, but it must be {wanted}")


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)  # Python's True is an integer, 1


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list | tuple) and all(_is_number(value, Real) for value in values)
