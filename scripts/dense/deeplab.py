"""DeepLabV3+ on backbones that can't be dilated: the paper's head, on maps of stride 32 in place of 16."""

from collections.abc import Sequence
from typing import Any

from segmentation_models_pytorch.base import SegmentationHead, SegmentationModel
from segmentation_models_pytorch.decoders.deeplabv3.decoder import DeepLabV3PlusDecoder
from segmentation_models_pytorch.encoders import get_encoder
from torch import nn


class UndilatedDeepLabV3Plus(SegmentationModel):
    """smp's decoder of DeepLabV3+ behind an encoder of strides 4 to 32, such as Swin.

    The rates of its dilated convolutions are half of smp's, so that they reach as far in the image, and their map is
    enlarged eight times, not four, to that of stride 4.

    Paper: Encoder-Decoder with Atrous Separable Convolution, ECCV 2018, https://arxiv.org/abs/1802.02611

    Args:
        encoder_name: As smp names it.
        encoder_weights: As for smp's models.
        classes: Classes.
        decoder_channels: Filters of the decoder.
        decoder_atrous_rates: Dilations.
        decoder_aspp_separable: Makes the dilated convolutions separable ones.
        decoder_aspp_dropout: Dropout after them.
        **kwargs: Arguments of the encoder.
    """

    def __init__(
        self,
        encoder_name: str,
        encoder_weights: str | None,
        classes: int,
        decoder_channels: int = 256,
        decoder_atrous_rates: Sequence[int] = (6, 12, 18),
        decoder_aspp_separable: bool = True,
        decoder_aspp_dropout: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.encoder = get_encoder(encoder_name, weights=encoder_weights, **kwargs)
        self.decoder = DeepLabV3PlusDecoder(
            encoder_channels=self.encoder.out_channels,
            encoder_depth=5,
            out_channels=decoder_channels,
            atrous_rates=decoder_atrous_rates,
            output_stride=16,  # of which it takes the factor that is set next
            aspp_separable=decoder_aspp_separable,
            aspp_dropout=decoder_aspp_dropout,
        )
        self.decoder.up = nn.Upsample(mode="bilinear", scale_factor=8, align_corners=True)
        self.segmentation_head = SegmentationHead(decoder_channels, classes, kernel_size=1, upsampling=4)
        self.classification_head = None
        self.name = f"deeplabv3plus-{encoder_name}"
        self.initialize()
