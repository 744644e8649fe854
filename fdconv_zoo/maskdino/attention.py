"""Multi-scale deformable attention, transformers' part with MaskDINO's initialisation."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .config import HEADS, POINTS
from .parts import DeformableAttentionPart, DeformableDetrConfig


class Memory(NamedTuple):
    """Maps as one sequence.

    Attributes:
        values: (B, S, D), level after level, in each row after row.
        shapes: Height and width of each level.
        sizes: The same as a tensor (levels, 2).
        starts: First place of each level (levels,).
    """

    values: Tensor
    shapes: list[tuple[int, int]]
    sizes: Tensor
    starts: Tensor


def flatten(levels: list[Tensor]) -> Memory:
    """Join maps (B, D, h, w)."""
    values = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], 1)
    shapes = [tuple(level.shape[-2:]) for level in levels]
    sizes = torch.tensor(shapes, device=values.device)
    areas = sizes.prod(1)
    return Memory(values, shapes, sizes, areas.cumsum(0) - areas)


class DeformableAttention(DeformableAttentionPart):
    """Each query looks at a few places of each level, around a point or within a box.

    Args:
        hidden_dim: Width.
        num_levels: Levels of the memory.
    """

    def __init__(self, hidden_dim: int, num_levels: int) -> None:
        config = DeformableDetrConfig(use_timm_backbone=False, d_model=hidden_dim, num_feature_levels=num_levels)
        super().__init__(config, num_heads=HEADS, n_points=POINTS)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Looks in eight directions, one a head, 1 to 4 steps far, with equal weights."""
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        angles = torch.arange(HEADS) * (2 * math.pi / HEADS)
        directions = torch.stack((angles.cos(), angles.sin()), -1)
        directions /= directions.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, POINTS + 1)[:, None] * directions[:, None, None]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(steps.expand(-1, self.n_levels, -1, -1).flatten())
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, queries: Tensor, references: Tensor, memory: Memory) -> Tensor:
        """Returns (B, N, D).

        Args:
            queries: (B, N, D), positions added.
            references: Points (B, N, 2) or boxes (B, N, 4), the same for all levels.
            memory: What is looked at.
        """
        output, _ = super().forward(
            hidden_states=queries,
            encoder_hidden_states=memory.values,
            reference_points=references[:, :, None],
            spatial_shapes=memory.sizes,
            spatial_shapes_list=memory.shapes,
            level_start_index=memory.starts,
        )
        return output
