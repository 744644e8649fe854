"""A small network with layers of each kind that conversion meets, and a small ResNet of the zoo."""

import torch
from timm.models.resnet import BasicBlock
from torch import nn

from fdconv_zoo.fdconv_resnet import FDConvResNet
from tests.compare import randomise_norms


class Net(nn.Module):
    """A static network with one layer of each kind."""

    def __init__(self, classes=5):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 20, 3)
        self.norm = nn.BatchNorm2d(20)
        self.conv2 = nn.Conv2d(20, 24, 3, stride=2, padding=1, bias=False)
        self.conv3 = nn.Conv2d(24, 20, (1, 3), padding=(0, 1))
        self.mlp = nn.Sequential(nn.Linear(20, 40), nn.GELU(), nn.Linear(40, 20, bias=False))
        self.fc = nn.Linear(20, classes)

    def forward(self, x):
        x = self.conv3(self.conv2(self.norm(self.conv1(x)).relu()).relu())
        return self.fc(self.mlp(x.mean((2, 3))[:, None])[:, 0])


def net(**keywords):
    return randomise_norms(Net(**keywords)).eval()


def images(size=9, batch=3):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def small_resnet(cls=FDConvResNet, **keywords):
    return cls(BasicBlock, (1, 1, 1, 1), channels=(24, 24, 32, 32), num_classes=5, **keywords)
