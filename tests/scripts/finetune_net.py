"""A network small enough to be fine-tuned in a test."""

import torch
from torch import nn


class SmallNet(nn.Module):
    """Two pointwise convolutions that are replaced, a narrow stem and a head that is wide enough to be."""

    def __init__(self):
        super().__init__()
        self.pretrained_cfg = {"classifier": "head"}
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 24, 3, 2)
        self.blocks = nn.Sequential(nn.Conv2d(24, 32, 1), nn.ReLU(), nn.Conv2d(32, 24, 3, padding=1))
        self.head = nn.Conv2d(24, 20, 1)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x))).mean((2, 3))
