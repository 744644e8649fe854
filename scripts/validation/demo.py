"""What `validate.py --demo` tells of its photos: the predictions of both models, and a picture of FBM and FDW."""

from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform
from torch import Tensor
from torchvision.transforms.functional import to_tensor

from common.demo_data import DEMO_DEFAULTS, STATIC, PhotoReader, create_demo_model, create_photo_dataset
from fdconv_zoo.layers import FDW, low_pass
from fdconv_zoo.layers.fourier import matrix_to_weight, weight_to_matrix

CUTOFFS = (1 / 4, 1 / 8, 1 / 16)
BAND_GAINS = (4, 3, 2)  # the finer the band, the fainter
PICTURE_PHOTO = 13  # a cannon: thin spokes before a smooth ground


def describe_predictions(reader: PhotoReader, logits: dict[str, Tensor]) -> str:
    """Return a table of the photos, what they show, and what each model takes them for.

    Args:
        reader: The photos.
        logits: Of each model, (photos, classes).
    """
    labels = [description.split(",")[0] for description in ImageNetInfo().label_descriptions()]
    truths = torch.tensor(reader.labels)
    lines = [(f"{'photo':<20}  {'label':<15}" + "".join(f"  {name:<24}" for name in logits)).rstrip()]
    for number, (path, truth) in enumerate(zip(reader.paths, reader.labels, strict=True)):
        line = f"{path.name:<20}  {labels[truth]:<15}"
        for predicted in (table[number].argmax().item() for table in logits.values()):
            line += f"  {'ok ' if predicted == truth else 'not'} {labels[predicted]:<20}"
        lines.append(line.rstrip())
    line = f"{'right':<37}"
    for table in logits.values():
        hits1, hits5 = ((table.topk(k).indices == truths[:, None]).any(1).sum() for k in (1, 5))
        line += f"  {f'top-1 {hits1}/{len(truths)}, top-5 {hits5}/{len(truths)}':<24}"
    return "\n".join([*lines, line.rstrip()])


@torch.no_grad()
def draw_picture(photo: Tensor, weight: Tensor, path: Path) -> None:
    """Draw FBM's bands of a photo and the frequency response of some FDW groups of a layer.

    Args:
        photo: (3, H, W), values in [0, 1].
        weight: Trained kernels (Cout, Cin, kh, kw).
        path: The .png to write.

    Raises:
        ImportError: matplotlib is not installed; says how to.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            "the demo's picture needs matplotlib: run `make demo`, or `pip install matplotlib`"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(15, 7.4), layout="constrained")
    upper, lower = figure.subfigures(2, 1, hspace=0.04)

    upper.suptitle(
        "FBM: frequency bands of a photo, f = max(|fx|, |fy|) in cycles/pixel; a map gates each but the lowest",
        fontsize=15,
    )
    limits = [f"1/{round(1 / cutoff)}" for cutoff in CUTOFFS]
    ranges = [f"f ≥ {limits[0]}", *(f"{low} ≤ f < {high}" for high, low in pairwise(limits)), f"f < {limits[-1]}"]
    layers = [photo, *(low_pass(photo, cutoff) for cutoff in CUTOFFS)]
    panels = [("photo", photo)]
    for number, (above, below) in enumerate(pairwise(layers)):
        gain = BAND_GAINS[number]
        panels.append((f"{ranges[number]} (x{gain}, on grey)", 0.5 + gain * (above - below)))
    panels.append((ranges[-1], layers[-1]))
    axes = upper.subplots(1, len(panels))
    for axis, (title, image) in zip(axes, panels, strict=True):
        axis.imshow(image.clamp(0, 1).permute(1, 2, 0))
        axis.set_title(title, fontsize=11)
        axis.set(xlabel="x (pixels)", xticks=(0, 112, 223), yticks=(0, 112, 223))
    axes[0].set_ylabel("y (pixels)")

    matrix = weight_to_matrix(weight)
    fdw = FDW(*matrix.shape)
    fdw.set_matrix(matrix)
    lower.suptitle(
        "FDW made from MobileNetV2's trained 3x3 stem: frequency response of five of "
        f"{fdw.num_bands} groups; a gain scales each",
        fontsize=15,
    )
    axes = lower.subplots(1, len(panels))
    for axis, group in zip(axes, torch.linspace(0, fdw.num_bands - 1, len(axes)).round().int().tolist(), strict=True):
        kernels = matrix_to_weight(fdw.group_matrix(group), weight.shape[2:])
        response = torch.fft.fft2(kernels, s=(128, 128)).abs().square().mean((0, 1)).sqrt()
        share = (kernels.square().sum() / weight.square().sum()).item()
        image = axis.imshow(torch.fft.fftshift(response / response.max()), extent=(-0.5, 0.5, 0.5, -0.5), cmap="magma")
        image.set_clim(0, 1)
        axis.set_title(f"group {group + 1}, {share:.1%} of the energy", fontsize=11)
        axis.set(xlabel="fx (cycles/pixel)", xticks=(-0.5, 0, 0.5), yticks=(-0.5, 0, 0.5))
    axes[0].set_ylabel("fy (cycles/pixel)")
    lower.colorbar(image, ax=axes, label="RMS over all kernels\n(peak = 1)", shrink=0.85, pad=0.01)

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


@torch.inference_mode()
def report_photos(folder: Path) -> str:
    """Compare the two models photo by photo and draw the picture into a folder; return the text to print."""
    dataset = create_photo_dataset()
    dataset.transform = create_transform((3, 224, 224), interpolation=DEMO_DEFAULTS["interpolation"])
    images = torch.stack([image for image, _ in dataset])
    models = {name: create_demo_model(name).eval() for name in DEMO_DEFAULTS["model"]}
    logits = {name: model(images) for name, model in models.items()}
    fdconv, static = logits.values()
    difference = (fdconv - static).abs().max().item()

    photo = to_tensor(Image.open(dataset.reader.paths[PICTURE_PHOTO]).convert("RGB").resize((224, 224)))
    picture = folder / "fdconv.png"
    draw_picture(photo, models[STATIC].conv_stem.weight, picture)
    return (
        f"\nlargest logit difference {difference:.1e} (logits reach {static.abs().max().item():.1f})\n\n"
        f"{describe_predictions(dataset.reader, logits)}\n\n"
        f"FBM's bands of a photo and FDW's groups of the 3x3 stem's trained kernels: {picture}"
    )
