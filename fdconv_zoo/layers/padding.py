"""Padding of a convolution, in numbers."""

KINDS = {1: "a number", 2: "a number, a pair", 3: "a number, three"}


def as_given(values: tuple[int, ...]) -> int | tuple[int, ...]:
    """One number for all dimensions where they have the same, as people write it."""
    return values if len(set(values)) > 1 else values[0]


def explicit_pads(
    padding: tuple[int, ...] | str, kernel_size: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[int, ...]:
    """Zeros before and after each dimension, the last dimension first, as F.pad takes them.

    Args:
        padding: A number for each dimension, "same" or "valid", as nn.Conv2d has it.
        kernel_size: Size of the kernel in each dimension; and so on.
        stride: Stride.
        dilation: Dilation.

    Raises:
        ValueError: If a number is too small, or "same" meets a stride.
    """
    if min(*stride, *dilation) < 1:
        raise ValueError(f"stride={as_given(stride)} and dilation={as_given(dilation)}, but both must be at least 1")
    extents = [d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True)]
    if padding == "same":
        if max(stride) > 1:
            raise ValueError(f"padding='same' needs stride 1, but stride={as_given(stride)}")
        sides = [(extent // 2, extent - extent // 2) for extent in extents]
    elif padding == "valid":
        sides = [(0, 0) for _ in extents]
    elif isinstance(padding, str):
        raise ValueError(f"padding={padding!r}, but it must be {KINDS[len(extents)]}, 'same' or 'valid'")
    elif min(padding) < 0:
        raise ValueError(f"padding={as_given(padding)}, but it must be at least 0")
    else:
        sides = [(zeros, zeros) for zeros in padding]
    return tuple(zeros for side in reversed(sides) for zeros in side)
