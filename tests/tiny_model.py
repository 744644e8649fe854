"""A static ResNet of a few thousand weights, registered with timm, that loads as the zoo's own models do."""

from __future__ import annotations

from safetensors.torch import save
from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet

from fdconv_zoo.build import build_fdconv

CFG = {"num_classes": 10, "input_size": (3, 32, 32), "pool_size": (1, 1), "first_conv": "conv1", "classifier": "fc"}
default_cfgs = generate_default_cfgs(
    {
        "tiny_resnet.hub": {"hf_hub_id": "org/tiny", "hf_hub_filename": "model.safetensors", **CFG},
        "tiny_resnet.pickle": {"hf_hub_id": "org/tiny", "hf_hub_filename": "pytorch_model.bin", **CFG},
        "tiny_resnet.url": {"url": "https://example.org/tiny.pth", **CFG},
        "tiny_resnet.untrained": CFG,
    }
)


@register_model
def tiny_resnet(pretrained: bool = False, **kwargs) -> ResNet:
    args = {"block": BasicBlock, "layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)}
    return build_fdconv(ResNet, "tiny_resnet", pretrained, lambda state_dict, model: state_dict, **args, **kwargs)


def weights(seed_value: float = 0.01) -> bytes:
    """A safetensors file whose every parameter is `seed_value`, so that a test can tell where weights came from."""
    model = tiny_resnet()
    return save({name: value.clone().fill_(seed_value) for name, value in model.state_dict().items()})
