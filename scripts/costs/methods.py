"""The other dynamic convolutions' rows of Table 1: parameters and FLOPs that they add to a detector."""

from typing import NamedTuple

from costs.detectors import build_detector, count_detector_macs
from fdconv_zoo.cost import count_parameters


class Row(NamedTuple):
    """A method's row.

    Attributes:
        model: The backbone here.
        title: As in the paper.
        params: Parameters that the paper says it adds, in millions.
        flops: The same for FLOPs, in billions, None where it says nothing.
    """

    model: str
    title: str
    params: float
    flops: float | None


CONDCONV = Row("resnet50_condconv", "CondConv (8x)", 90.0, 0.01)
DYCONV = Row("resnet50_dyconv", "DY-Conv (4x)", 75.3, 0.16)
DCD = Row("resnet50_dcd", "DCD", 4.3, 0.13)
ODCONV = Row("resnet50_odconv", "ODConv (4x)", 65.1, 0.35)
KW = Row("resnet50_kw", "KW (1x)", 2.5, None)
KW_4X = Row("resnet50_kw_4x", "KW (4x)", 76.5, None)
# arXiv 2503.18783v2, Table 1.
METHODS = {"faster_rcnn": (CONDCONV, DYCONV, DCD, ODCONV), "mask_rcnn": (DYCONV, ODCONV, KW, KW_4X)}

METHOD_NOTES = """\
Other methods, parameters: each is where its own paper puts it, which gives the paper's figures to its last digit. DCD's
4.3 M include a dynamic classifier (+0.229 M), which a detector does not have: without it 4.05 M.

Other methods, FLOPs: counted are the mixing of kernels, the attention, and DCD's pointwise convolutions. The paper does
not say what it counts. Mixing costs a product for each weight of the bank, whatever the image. DCD's latent part runs
on the maps, which its row can't contain; KW mixes each cell from all of its warehouse, and its rows say nothing."""


def measure_methods(head: str, size: tuple[int, int]) -> dict[str, dict[str, int]]:
    """Return parameters and multiply-accumulates that each method of a detector's table adds, by the backbone's name.

    Args:
        head: One of `METHODS`.
        size: Height and width of the image, multiples of 32.
    """
    static = build_detector(head, "resnet50")
    parameters, macs = count_parameters(static), count_detector_macs(static, size)
    counts = {}
    for row in METHODS[head]:
        detector = build_detector(head, row.model)
        counts[row.model] = {
            "added_params": count_parameters(detector) - parameters,
            "added_macs": count_detector_macs(detector, size) - macs,
        }
    return counts


def describe_methods(head: str, counts: dict[str, dict[str, int]], with_paper_flops: bool) -> list[str]:
    """Return a line of the table for each figure of each method.

    Args:
        head: One of `METHODS`.
        counts: Of :func:`measure_methods`.
        with_paper_flops: The image is of the paper's size.
    """
    lines = []
    for row in METHODS[head]:
        found = counts[row.model]
        paper = f"+{row.flops} G" if row.flops is not None and with_paper_flops else ""
        lines.append(f"| parameters, {row.title} adds | +{row.params} M | +{found['added_params'] / 1e6:.3f} M |")
        lines.append(f"| FLOPs, {row.title} adds | {paper} | +{found['added_macs'] / 1e9:.2f} G |")
    return lines
