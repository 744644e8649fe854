"""The layers of FDConv: FDW makes the weight, KSM gates it, FBM the input; FDConv1d to 3d, FDLinear are all three."""

from .fbm import FBM
from .fdconv import FDConv2d, FDLinear
from .fdconv1d import FDConv1d
from .fdconv3d import FDConv3d
from .fdw import FDW
from .fourier import band_index, from_spectrum, to_spectrum
from .ksm import KSM
from .low_pass import low_pass

__all__ = [
    "FBM",
    "FDW",
    "KSM",
    "FDConv1d",
    "FDConv2d",
    "FDConv3d",
    "FDLinear",
    "band_index",
    "from_spectrum",
    "low_pass",
    "to_spectrum",
]
