"""The layers of FDConv: FDW makes the weight, KSM gates it, FBM gates the input; FDConv2d and FDLinear compose them."""

from .fbm import FBM
from .fdconv import FDConv2d, FDLinear
from .fdw import FDW
from .fourier import band_index, from_spectrum, to_spectrum
from .ksm import KSM
from .low_pass import low_pass

__all__ = ["FBM", "FDW", "KSM", "FDConv2d", "FDLinear", "band_index", "from_spectrum", "low_pass", "to_spectrum"]
