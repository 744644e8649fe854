"""What a MaskDINO head is built from; the defaults are those of ADE20K with three levels."""

from dataclasses import dataclass

HEADS, POINTS = 8, 4  # of every attention, whatever the original's configurations say
NORM_GROUPS = 32
EXTRA_LEVELS = (0, 1)
INITIAL_BOXES = (None, "bitmask", "mask2box")


@dataclass(frozen=True, kw_only=True)
class MaskDinoConfig:
    """Sizes and choices of a head, of its losses and of its matching.

    Published (all with the default widths, depths and numbers of points): ADE20K and Cityscapes are the defaults;
    COCO instance segmentation is `extra_levels=1, coarse_first=False, encoder_ffn_dim=2048, num_queries=300,
    select_queries=True, softmax_classes=False, initial_boxes="mask2box"` (Swin-L: `encoder_maps=4`, "bitmask");
    panoptic the same with `initial_boxes=None`.

    Args:
        num_classes: Classes without "none".
        in_channels: Channels of the four maps, finest first (strides 4, 8, 16, 32).
        encoder_maps: How many of them, the coarsest ones, go into the encoder.
        extra_levels: Coarser levels made from the coarsest map, 0 or 1. With two, the original orders maps and
            positions differently, a defect of which there are no published weights.
        coarse_first: Order of the encoder's levels.
        select_queries: Queries are the encoded places of the highest scores ("two-stage"), in place of learnt ones.
        initial_boxes: Boxes that selected queries start with: None for their own, "bitmask" or "mask2box" for those
            of their masks, with and without the last row and column.
        softmax_classes: Classes exclude each other and "none" is one more; else each has a probability of its own.
        num_queries: Queries, learnt or selected.
        hidden_dim: Width, a multiple of 32.
        mask_dim: Channels of the mask features.
        encoder_layers: Layers of the pixel decoder's encoder.
        decoder_layers: Layers of the decoder.
        encoder_ffn_dim: Width within their feed-forward parts.
        decoder_ffn_dim: The same of the decoder.
        denoising_queries: Noised targets an image, at most; 0 for none.
        noise_scale: Of boxes; half of it is the probability of a random label.
        num_points: Points at which a mask is compared with its target.
        class_weight: Weight of the classes' loss, and of their cost in the matching.
        box_weight: The same of the boxes' L1 distance.
        giou_weight: The same of the boxes' generalised IoU.
        mask_weight: The same of the masks' cross-entropy.
        dice_weight: The same of the masks' dice.
        no_object_weight: Weight of "none" among softmax classes.

    Raises:
        ValueError: A value can't be, or does not go with another.
    """

    num_classes: int
    in_channels: tuple[int, int, int, int]
    encoder_maps: int = 3
    extra_levels: int = 0
    coarse_first: bool = True
    select_queries: bool = False
    initial_boxes: str | None = None
    softmax_classes: bool = True
    num_queries: int = 100
    hidden_dim: int = 256
    mask_dim: int = 256
    encoder_layers: int = 6
    decoder_layers: int = 9
    encoder_ffn_dim: int = 1024
    decoder_ffn_dim: int = 2048
    denoising_queries: int = 100
    noise_scale: float = 0.4
    num_points: int = 12544
    class_weight: float = 4.0
    box_weight: float = 5.0
    giou_weight: float = 2.0
    mask_weight: float = 5.0
    dice_weight: float = 5.0
    no_object_weight: float = 0.1

    def __post_init__(self) -> None:
        if len(self.in_channels) != 4:
            raise ValueError(f"in_channels {tuple(self.in_channels)} must be of four maps, strides 4, 8, 16 and 32")
        counts = ("num_classes", "num_queries", "mask_dim", "encoder_layers", "decoder_layers")
        for name in (*counts, "encoder_ffn_dim", "decoder_ffn_dim", "num_points"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, it must be at least 1")
        if self.hidden_dim < NORM_GROUPS or self.hidden_dim % NORM_GROUPS:
            raise ValueError(f"hidden_dim is {self.hidden_dim}, it must be a multiple of {NORM_GROUPS}")
        if not 1 <= self.encoder_maps <= 4:
            raise ValueError(f"encoder_maps is {self.encoder_maps}, it must be 1 to 4")
        if self.extra_levels not in EXTRA_LEVELS:
            raise ValueError(f"extra_levels is {self.extra_levels}, it must be one of {EXTRA_LEVELS}")
        if self.initial_boxes not in INITIAL_BOXES:
            raise ValueError(f"initial_boxes is {self.initial_boxes!r}, it must be one of {INITIAL_BOXES}")
        if self.initial_boxes and not self.select_queries:
            raise ValueError(f"initial_boxes={self.initial_boxes!r} are of selected queries: select_queries=True")
        if self.denoising_queries < 0 or not 0 <= self.noise_scale <= 1:
            raise ValueError(
                f"denoising_queries is {self.denoising_queries} and noise_scale {self.noise_scale}: they must be "
                "at least 0, and between 0 and 1"
            )

    @property
    def num_levels(self) -> int:
        """Levels of the encoder and of the decoder's memory."""
        return self.encoder_maps + self.extra_levels

    @property
    def num_logits(self) -> int:
        """Numbers that the class layer gives for a query."""
        return self.num_classes + self.softmax_classes
