"""The head: pixel decoder, queries, decoder layers, and a prediction from each of them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import MLP

from .attention import Memory, flatten
from .config import MaskDinoConfig
from .decoder import DecoderLayer, hidden_keys, proposals
from .pixel_decoder import PixelDecoder
from .positions import box_positions, boxes_of_masks, logit
from .types import NoisedTargets, Outputs, Prediction


class MaskDino(nn.Module):
    """MaskDINO without its backbone.

    Args:
        config: Sizes and choices.
    """

    def __init__(self, config: MaskDinoConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_dim
        self.pixel_decoder = PixelDecoder(config)
        if config.select_queries:
            self.enc_output, self.enc_output_norm = nn.Linear(width, width), nn.LayerNorm(width)
        else:
            self.query_feat = nn.Embedding(config.num_queries, width)
            self.query_embed = nn.Embedding(config.num_queries, 4)
        # no row for "none"
        self.label_enc = nn.Embedding(config.num_classes, width)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.ref_point_head = MLP(2 * width, [width, width])
        # these four are shared by all predictions, that of the selection among them
        self.norm = nn.LayerNorm(width)
        self.class_embed = nn.Linear(width, config.num_logits)
        self.mask_embed = MLP(width, [width, width, config.mask_dim])
        self.box_embed = MLP(width, [width, width, 4])
        for linear in self.ref_point_head:
            if isinstance(linear, nn.Linear):
                nn.init.xavier_uniform_(linear.weight)
        last = [linear for linear in self.box_embed if isinstance(linear, nn.Linear)][-1]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def no_weight_decay(self) -> set[str]:
        """Returns the embeddings, timm's way to tell an optimiser what is not decayed beside vectors."""
        tables = {f"{name}.weight" for name, module in self.named_modules() if isinstance(module, nn.Embedding)}
        return {"pixel_decoder.level_embed", *tables}

    def forward(self, features: Sequence[Tensor], denoising: NoisedTargets | None = None) -> Outputs:
        """Returns all predictions; the queries' are the same with and without noised targets.

        Args:
            features: Four maps of the backbone (B, C, h, w), finest first.
            denoising: Noised targets, in training.

        Raises:
            ValueError: The maps are not those of the configuration, or have fewer places than queries are selected.
        """
        mask_features, levels = self.pixel_decoder(features)
        # the decoder has the levels in the other order
        memory = flatten(levels[::-1])
        selection, hidden = None, None
        if self.config.select_queries:
            y, box_logits, selection = self._select(memory, mask_features)
        else:
            batch = len(mask_features)
            y = self.query_feat.weight.expand(batch, -1, -1)
            box_logits = self.query_embed.weight.expand(batch, -1, -1)
        slots = 0
        if denoising is not None:
            slots = denoising.labels.shape[1]
            hidden = hidden_keys(slots, denoising.groups, y.shape[1], y.device)
            filled = denoising.filled[..., None]
            y = torch.cat((self.label_enc(denoising.labels) * filled, y), 1)
            box_logits = torch.cat((logit(denoising.boxes) * filled, box_logits), 1)
        elif self.training:
            # DDP wants a gradient of every parameter, also from a process whose images are empty
            y = y + 0 * self.label_enc.weight.sum()
        predictions = self._decode(y, box_logits, memory, mask_features, hidden)
        return Outputs(
            [Prediction(*(part[:, slots:] for part in prediction)) for prediction in predictions],
            [Prediction(*(part[:, :slots] for part in prediction)) for prediction in predictions] if slots else [],
            selection if self.training else None,
        )

    def _decode(
        self, y: Tensor, box_logits: Tensor, memory: Memory, mask_features: Tensor, hidden: Tensor | None
    ) -> list[Prediction]:
        """Return the predictions before any layer and after each; in eval mode the last alone."""
        reference = refined = box_logits.sigmoid()
        predictions = [self._predict(y, reference, mask_features)] if self.training else []
        for number, layer in enumerate(self.layers, 1):
            y = layer(y, self.ref_point_head(box_positions(reference, y.shape[-1])), reference, memory, hidden)
            z = self.norm(y)
            if self.training or number == len(self.layers):
                # `refined` keeps its gradient, through which a layer learns from the box of the next ("look forward
                # twice"); the box is of the normed state, which is normed once more for classes and masks
                boxes = (self.box_embed(z) + logit(refined)).sigmoid()
                predictions.append(self._predict(z, boxes, mask_features))
            # what the next layer looks at is refined from the raw state
            refined = (self.box_embed(y) + logit(reference)).sigmoid()
            reference = refined.detach()
        return predictions

    def _predict(self, y: Tensor, boxes: Tensor, mask_features: Tensor) -> Prediction:
        z = self.norm(y)
        masks = torch.einsum("bqc,bchw->bqhw", self.mask_embed(z), mask_features)
        return Prediction(self.class_embed(z), boxes, masks)

    def propose(self, memory: Memory) -> tuple[Tensor, Tensor, Tensor]:
        """Returns each place's state (B, S, D), box logits that it proposes (1, S, 4), and score (B, S)."""
        offered, valid = proposals(memory)
        states = self.enc_output_norm(self.enc_output(memory.values.masked_fill(~valid, 0)))
        return states, offered, self.class_embed(states).amax(-1)

    def _select(self, memory: Memory, mask_features: Tensor) -> tuple[Tensor, Tensor, Prediction]:
        """Return content (B, Q, D) and box logits (B, Q, 4) of the selected places, without a gradient, and what is
        said of them, with one."""
        queries, places = self.config.num_queries, memory.values.shape[1]
        if places < queries:
            raise ValueError(f"{queries} queries can't be selected among {places} places: larger images, or fewer")
        states, offered, scores = self.propose(memory)
        best = scores.topk(queries, 1).indices[..., None]
        content = states.take_along_dim(best, 1)
        box_logits = self.box_embed(content) + offered.expand(len(best), -1, -1).take_along_dim(best, 1)
        selection = self._predict(content, box_logits.sigmoid(), mask_features)
        if self.config.initial_boxes:
            boxes = boxes_of_masks(selection.masks.detach() > 0, self.config.initial_boxes)
            return content.detach(), logit(boxes), selection
        return content.detach(), box_logits.detach(), selection
