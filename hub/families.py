"""What the model cards say in words of each family of models."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """The words on one model module.

    Attributes:
        title: Heading.
        module: Module of fdconv_zoo.
        converted: Layers that are FDConv, and those that stay static.
        added: Parameters beside what the paper gives.
        limits: Beyond those of all models.
        base_papers: Of the static models.
    """

    title: str
    module: str
    converted: str
    added: str
    limits: str
    base_papers: str


FAMILIES = (
    Family(
        title="ResNet",
        module="fdconv_resnet",
        converted="every 1x1 and 3x3 convolution of the residual branches, strided ones too, the 3x3 ones with FBM. "
        "Stem, downsampling shortcuts and classifier stay static.",
        added="ResNet-50 has exactly 3,647,120 parameters more than its base; the paper gives +3.6M.",
        limits="tags with `fb_ssl` or `fb_swsl` are CC BY-NC 4.0: no commercial use. Weights trained with the official "
        "code need `mask_grid=64`.",
        base_papers="[ResNet](https://arxiv.org/abs/1512.03385), [Wide ResNet](https://arxiv.org/abs/1605.07146)",
    ),
    Family(
        title="MobileNetV2",
        module="fdconv_mobilenet",
        converted="the pointwise convolutions of more than 16 channels on both sides. Stem, depthwise and narrower "
        "convolutions and classifier stay static; there is no FBM, as no replaced kernel is larger than 1x1.",
        added="there is no figure of the paper to compare with.",
        limits="depthwise convolutions, where most of a MobileNet's spatial filtering happens, are not dynamic.",
        base_papers="[MobileNetV2](https://arxiv.org/abs/1801.04381)",
    ),
    Family(
        title="ConvNeXt",
        module="fdconv_convnext",
        converted="both linear layers of every MLP. Stem, depthwise 7x7 convolutions, downsampling and classifier stay "
        "static; there is no FBM.",
        added="ConvNeXt-T has 2,929,464 more than its base. The paper gives +3M and no details; the reduction is ours.",
        limits="which layers the authors replaced, and with what reduction, is not published.",
        base_papers="[ConvNeXt](https://arxiv.org/abs/2201.03545)",
    ),
    Family(
        title="Swin Transformer",
        module="fdconv_swin",
        converted="both linear layers of every MLP. Patch embedding, attention, patch merging and classifier stay "
        "static; there is no FBM.",
        added="Swin-T has 3,233,520 more than its base. The paper gives +3M and no details; the reduction is ours.",
        limits="classification takes the one input size that the model is built for (`img_size`); with "
        "`features_only=True` any size works. Which layers the authors replaced is not published.",
        base_papers="[Swin Transformer](https://arxiv.org/abs/2103.14030)",
    ),
    Family(
        title="ResNet with other dynamic convolutions",
        module="dynamic_resnet",
        converted="`_dcd` and `_odconv`: every convolution of the residual branches; `_condconv`: those of the last "
        "stage; `_dyconv`: the shortcuts too; `_kw`: those and the strided shortcuts, but for what comes before the "
        "first warehouse. Each is where its own paper has it; stem and classifier stay static.",
        added="of ResNet-50 those of the papers: 90.0M, 75.3M, 65.1M (`_odconv`, four kernels), 2.5M (`_kw`), 76.5M "
        "(`_kw_4x`). DCD's 4.3M has a dynamic classifier, for which there is none here.",
        limits="as for ResNet with FDConv. `_kw` models are not for TorchScript. No weights that were trained with "
        "these layers are here: docs/compare.md says where their authors have some.",
        base_papers="[ResNet](https://arxiv.org/abs/1512.03385)",
    ),
    Family(
        title="ConvNeXt with KernelWarehouse",
        module="dynamic_convnext",
        converted="both layers of every MLP, as pointwise convolutions, one warehouse a stage. Stem, depthwise 7x7 "
        "convolutions, downsampling and classifier stay static.",
        added="there is no figure of the paper at hand; the placement is ours.",
        limits="not for TorchScript.",
        base_papers="[ConvNeXt](https://arxiv.org/abs/2201.03545)",
    ),
)
