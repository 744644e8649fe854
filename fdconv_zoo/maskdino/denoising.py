"""Noised targets, which the decoder learns to put right (Section 3.3; DN-DETR, https://arxiv.org/abs/2203.01305)."""

from collections.abc import Sequence

import torch

from .config import MaskDinoConfig
from .types import NoisedTargets, Target


def noise_targets(targets: Sequence[Target], config: MaskDinoConfig) -> NoisedTargets | None:
    """Return as many noised copies of the targets as fit into `denoising_queries`; None if that is none.

    A label becomes a random one with probability `noise_scale / 2`; a box's centre moves by up to `noise_scale` halves
    of its sides, and its sides change by up to that factor. There are no negative examples, which DINO has.

    Args:
        targets: Of each image.
        config: Of the head.
    """
    counts = [len(target.labels) for target in targets]
    most = max(counts, default=0)
    groups = config.denoising_queries // most if most else 0
    if not groups:
        return None
    labels = torch.cat([target.labels for target in targets]).repeat(groups)
    boxes = torch.cat([target.boxes for target in targets]).repeat(groups, 1)
    replaced = torch.rand_like(labels.float()) < config.noise_scale / 2
    labels[replaced] = torch.randint_like(labels[replaced], config.num_classes)
    reach = boxes[:, 2:].repeat(1, 2) * boxes.new_tensor((0.5, 0.5, 1, 1))
    boxes = (boxes + (2 * torch.rand_like(boxes) - 1) * config.noise_scale * reach).clamp(0, 1)

    device = labels.device
    image = torch.cat([torch.full((count,), index, device=device) for index, count in enumerate(counts)])
    place = torch.cat([torch.arange(count, device=device) for count in counts])
    slot = (torch.arange(groups, device=device)[:, None] * most + place).flatten()
    where = (image.repeat(groups), slot)
    shape = (len(targets), groups * most)
    filled = torch.zeros(shape, dtype=torch.bool, device=device).index_put(where, torch.tensor(True, device=device))
    return NoisedTargets(
        labels.new_zeros(shape).index_put(where, labels),
        boxes.new_zeros(*shape, 4).index_put(where, boxes),
        filled,
        groups,
    )


def noised_pairs(targets: Sequence[Target], noised: NoisedTargets) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the filled slots of each image, and the targets in them."""
    most = noised.labels.shape[1] // noised.groups
    pairs = []
    for target in targets:
        index = torch.arange(len(target.labels), device=target.labels.device)
        group = torch.arange(noised.groups, device=index.device)[:, None]
        pairs.append(((group * most + index).flatten(), index.repeat(noised.groups)))
    return pairs
