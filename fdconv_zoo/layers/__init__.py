"""The layers of FDConv: FDW makes the weight, KSM gates it, FBM gates the input; FDConv2d and FDLinear compose them."""

from .band_filters import low_pass
from .fbm import FBM
from .fdconv import FDConv2d, FDLinear
from .fdw import FDW, band_index, from_spectrum, to_spectrum
from .ksm import KSM

__all__ = ["FBM", "FDW", "KSM", "FDConv2d", "FDLinear", "band_index", "from_spectrum", "low_pass", "to_spectrum"]
