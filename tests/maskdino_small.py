"""A small MaskDINO head, maps and targets for it."""

import torch
from torch import nn

from fdconv_zoo.maskdino import MaskDino, MaskDinoConfig, Target
from tests.compare import randomise_norms

SMALL = dict(
    num_classes=4, in_channels=(8, 12, 16, 20), num_queries=6, hidden_dim=32, mask_dim=24, encoder_layers=1,
    decoder_layers=2, encoder_ffn_dim=16, decoder_ffn_dim=24, num_points=32, denoising_queries=8,
)  # fmt: skip
SELECTED = dict(select_queries=True, softmax_classes=False, initial_boxes="bitmask", extra_levels=1, coarse_first=False)


def small(**changes):
    """A head whose every part tells: at the start the box MLP ends in zeros, attention does not see its queries, and
    a norm of what is normed changes nothing."""
    head = randomise_norms(MaskDino(MaskDinoConfig(**{**SMALL, **changes})))
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if parameter.ndim > 1 and "embed" not in name.rpartition(".")[0].partition(".")[0]:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for linear in head.box_embed:
            if isinstance(linear, nn.Linear):
                linear.weight.normal_(std=0.3)
    return head


def maps(height, width, batch=2):
    """Maps of an image, each stage rounding up as ResNets do."""
    sizes = [(-(-height // stride), -(-width // stride)) for stride in (4, 8, 16, 32)]
    return [torch.randn(batch, channels, *size) for channels, size in zip(SMALL["in_channels"], sizes, strict=True)]


def objects(counts, size=(64, 64), classes=4):
    """Random rectangles, `counts` of them in each image."""
    targets = []
    for count in counts:
        low = torch.rand(count, 2) * 0.5
        side = 0.2 + torch.rand(count, 2) * 0.3
        masks = torch.zeros(count, *size)
        for mask, (x, y), (w, h) in zip(masks, low.tolist(), side.tolist(), strict=True):
            mask[int(y * size[0]) : int((y + h) * size[0]) + 1, int(x * size[1]) : int((x + w) * size[1]) + 1] = 1
        targets.append(Target(torch.randint(0, classes, (count,)), torch.cat((low + side / 2, side), 1), masks))
    return targets
