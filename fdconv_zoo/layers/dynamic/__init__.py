"""The dynamic convolutions that the paper compares FDConv with, each from its paper's formulas."""

from .condconv import CondConv2d
from .dcd import DCDClassifier, DCDConv2d
from .dyconv import DYConv2d
from .kw import KWConv2d
from .odconv import ODConv2d
from .parts import Annealed
from .warehouse import Warehouse

__all__ = ["Annealed", "CondConv2d", "DCDClassifier", "DCDConv2d", "DYConv2d", "KWConv2d", "ODConv2d", "Warehouse"]
