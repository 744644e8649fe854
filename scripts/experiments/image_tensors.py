"""Small images as a data set in memory."""

from collections.abc import Callable

from torch import Tensor
from torch.utils.data import Dataset


class ImageTensors(Dataset):
    """Images in memory with their labels.

    Args:
        images: (N, C, H, W), uint8.
        labels: (N,), int64.
        transform: Makes one image (C, H, W) the model's input.
    """

    def __init__(self, images: Tensor, labels: Tensor, transform: Callable[[Tensor], Tensor]) -> None:
        self.images, self.labels, self.transform = images, labels, transform

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.transform(self.images[index]), self.labels[index]

    def __len__(self) -> int:
        return len(self.images)
