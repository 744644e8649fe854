"""timm's re-parameterisation of converted models: exact, with FDConv layers left in place."""

import copy
import pickle

import pytest
import timm
import torch
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from timm.models.repvit import RepVit
from timm.utils import reparameterize_model

from fdconv_zoo import convert_to_fdconv
from fdconv_zoo.conversion import named_fd_layers
from tests.compare import randomise_norms, relative_error


def repvgg():
    blocks = tuple(ByoBlockCfg(type="rep", d=2, c=24, s=2, gs=0) for _ in range(2))
    return ByobNet(ByoModelCfg(blocks=blocks, stem_type="rep", stem_chs=20), num_classes=4)


def repvit():
    return RepVit(embed_dim=(24, 32), depth=(1, 1), num_classes=4, distillation=False)


MODELS = {
    "repvgg": repvgg,
    "repvit": repvit,
    "levit": pytest.param("levit_128s", marks=pytest.mark.slow),
    "efficientvim": pytest.param("efficientvim_m1", marks=pytest.mark.slow),
    "fastvit": pytest.param("fastvit_t8", marks=pytest.mark.slow),
    "nextvit": pytest.param("nextvit_small", marks=pytest.mark.slow),
    "ghostnet": pytest.param("ghostnetv3_050", marks=pytest.mark.slow),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
@torch.no_grad()
def test_reparameterize_model_is_exact(make):
    model = timm.create_model(make, num_classes=4) if isinstance(make, str) else make()
    convert_to_fdconv(randomise_norms(model).eval(), num_bands=8)
    for _, layer in named_fd_layers(model):
        layer.ksm.heads.weight.normal_(std=0.1)
        layer.ksm.heads.bias.normal_(std=0.1)
        layer.ksm.local_conv.weight.normal_(std=0.1)
    x = torch.randn(2, 3, 224 if make == "levit_128s" else 64, 224 if make == "levit_128s" else 64)
    expected = model(x)
    fused = reparameterize_model(pickle.loads(pickle.dumps(copy.deepcopy(model))))
    assert relative_error(fused(x), expected) < 1e-4
    assert len(list(named_fd_layers(fused))) == len(list(named_fd_layers(model)))
    count = [sum(isinstance(m, torch.nn.BatchNorm2d) for m in net.modules()) for net in (model, fused)]
    assert count[1] < count[0] or make == "nextvit_small"  # every block of which has an FDConv layer
    if make is repvgg:
        assert relative_error(torch.jit.script(model)(x), expected) < 1e-5
