"""The pixel decoder: a deformable encoder over levels, and mask features of its finest one (Section 3.1)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import DeformableAttention, Memory, flatten
from .config import NORM_GROUPS, MaskDinoConfig
from .positions import centres, map_positions


class EncoderLayer(nn.Module):
    """Deformable self-attention of all places, then a feed-forward part.

    Args:
        config: Of the head.
    """

    def __init__(self, config: MaskDinoConfig) -> None:
        super().__init__()
        width = config.hidden_dim
        self.self_attn = DeformableAttention(width, config.num_levels)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, config.encoder_ffn_dim)
        self.linear2 = nn.Linear(config.encoder_ffn_dim, width)
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, memory: Memory, positions: Tensor, references: Tensor) -> Memory:
        """Returns the memory after the layer.

        Args:
            memory: (B, S, D).
            positions: (S, D), added to the queries.
            references: The places' own centres (1, S, 2).
        """
        x = memory.values
        x = self.norm1(x + self.self_attn(x + positions, references, memory))
        x = self.norm2(x + self.linear2(self.linear1(x).relu()))
        return memory._replace(values=x)


class PixelDecoder(nn.Module):
    """Backbone maps to encoded levels and mask features. It knows no padding.

    Args:
        config: Of the head.
    """

    def __init__(self, config: MaskDinoConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_dim
        channels = list(config.in_channels[-config.encoder_maps :])
        kernels = [1] * len(channels) + [3] * config.extra_levels
        if config.coarse_first:
            channels.reverse()
        # the first extra level is made of the raw coarsest map
        channels += [config.in_channels[-1]] * config.extra_levels
        # numbered as in official checkpoints: the maps in the encoder's order, then the extra level
        self.input_proj = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(inputs, width, kernel, stride=1 if kernel == 1 else 2, padding=kernel // 2),
                nn.GroupNorm(NORM_GROUPS, width),
            )
            for inputs, kernel in zip(channels, kernels, strict=True)
        )
        self.level_embed = nn.Parameter(torch.empty(config.num_levels, width))
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        norms = [nn.GroupNorm(NORM_GROUPS, width) for _ in range(2)]
        self.lateral = nn.Sequential(nn.Conv2d(config.in_channels[0], width, 1, bias=False), norms[0])
        self.output = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), norms[1])
        self.mask_features = nn.Conv2d(width, config.mask_dim, 1)
        self._init_own()

    def _init_own(self) -> None:
        nn.init.normal_(self.level_embed)
        for projection in self.input_proj:
            nn.init.xavier_uniform_(projection[0].weight)
            nn.init.zeros_(projection[0].bias)
        for convolution in (self.lateral[0], self.output[0], self.mask_features):
            nn.init.kaiming_uniform_(convolution.weight, a=1)
        nn.init.zeros_(self.mask_features.bias)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Returns the mask features (B, mask_dim, h, w) at stride 4, and the encoded levels in the encoder's order.

        Args:
            features: Four maps (B, C, h, w), finest first.

        Raises:
            ValueError: There are not four, or their channels are others.
        """
        found = tuple(feature.shape[1] for feature in features)
        if found != tuple(self.config.in_channels):
            raise ValueError(f"maps of {found} channels, not {tuple(self.config.in_channels)}")
        levels = self._project(features)
        memory = flatten(levels)
        device = memory.values.device
        positions = torch.cat(
            [
                map_positions(height, width, self.config.hidden_dim, device) + embedding
                for (height, width), embedding in zip(memory.shapes, self.level_embed, strict=True)
            ]
        )
        references = centres(memory.shapes, device)
        for layer in self.layers:
            memory = layer(memory, positions, references)
        parts = memory.values.split([height * width for height, width in memory.shapes], 1)
        encoded = [part.transpose(1, 2).unflatten(2, shape) for part, shape in zip(parts, memory.shapes, strict=True)]
        finest = encoded[-1] if self.config.coarse_first else encoded[0]
        # one such step, also where the map of stride 4 has been through the encoder
        finest = F.interpolate(finest, features[0].shape[-2:], mode="bilinear", align_corners=False)
        finest = self.output(finest + self.lateral(features[0])).relu()
        return self.mask_features(finest), encoded

    def _project(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return the levels (B, D, h, w) in the encoder's order."""
        config = self.config
        maps = list(features[-config.encoder_maps :])
        if config.coarse_first:
            maps.reverse()
        levels = [projection(level) for projection, level in zip(self.input_proj, maps, strict=False)]
        if not config.extra_levels:
            return levels
        extra = self.input_proj[-1](features[-1])
        return [extra, *levels] if config.coarse_first else [*levels, extra]
