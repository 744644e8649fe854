"""A layer of the decoder, and the queries that are selected among the encoded places."""

import torch
from torch import Tensor, nn

from .attention import DeformableAttention, Memory
from .config import HEADS, MaskDinoConfig
from .positions import centres


class DecoderLayer(nn.Module):
    """Self-attention of the queries, deformable attention to the memory, then a feed-forward part.

    Args:
        config: Of the head.
    """

    def __init__(self, config: MaskDinoConfig) -> None:
        super().__init__()
        width = config.hidden_dim
        self.self_attn = nn.MultiheadAttention(width, HEADS, batch_first=True)
        self.cross_attn = DeformableAttention(width, config.num_levels)
        # numbered as in official checkpoints: 2 after the self-attention, 1 after the other
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.linear1 = nn.Linear(width, config.decoder_ffn_dim)
        self.linear2 = nn.Linear(config.decoder_ffn_dim, width)
        for linear in (self.self_attn.out_proj, self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, y: Tensor, positions: Tensor, boxes: Tensor, memory: Memory, hidden: Tensor | None) -> Tensor:
        """Returns the queries (B, N, D) after the layer.

        Args:
            y: Queries (B, N, D).
            positions: (B, N, D), added to queries and keys, not to values.
            boxes: (B, N, 4), within which the memory is looked at.
            memory: Encoded levels.
            hidden: (N, N), True where a query does not see a key; None if all see all.
        """
        seeking = y + positions
        found, _ = self.self_attn(seeking, seeking, y, attn_mask=hidden, need_weights=False)
        y = self.norm2(y + found)
        y = self.norm1(y + self.cross_attn(y + positions, boxes, memory))
        return self.norm3(y + self.linear2(self.linear1(y).relu()))


def proposals(memory: Memory) -> tuple[Tensor, Tensor]:
    """Return the logits (1, S, 4) of the boxes that places propose, and which of them are valid (1, S, 1).

    A place of level l proposes its centre and a side of 0.05 * 2^l, l counted in the decoder's order: where the
    encoder has the finest level first, the coarsest one proposes the smallest boxes. So it is in the published models.
    The logits of others are infinite.
    """
    device = memory.values.device
    sides = [
        torch.full((1, height * width, 2), 0.05 * 2**level, device=device)
        for level, (height, width) in enumerate(memory.shapes)
    ]
    box = torch.cat((centres(memory.shapes, device), torch.cat(sides, 1)), -1)
    valid = ((box > 0.01) & (box < 0.99)).all(-1, keepdim=True)
    return torch.log(box / (1 - box)).masked_fill(~valid, torch.inf), valid


def hidden_keys(slots: int, groups: int, queries: int, device: torch.device) -> Tensor:
    """Return the mask (N, N), True where a query (row) does not see a key: noised slots first, then queries.

    Queries see no noised slot, and a group no other group; noised slots see the queries.
    """
    slot_groups = torch.arange(slots, device=device) // (slots // groups)
    group = torch.cat((slot_groups, slot_groups.new_full((queries,), -1)))
    return (group >= 0) & (group != group[:, None])
