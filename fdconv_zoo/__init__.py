"""Frequency Dynamic Convolution (FDConv, CVPR 2025) for timm."""

from .version import __version__

__all__ = ["__version__"]
