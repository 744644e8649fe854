#!/usr/bin/env python3
"""Draw what FDConv does in a model: frequency groups, gates and bands, as an HTML page with PNGs."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from timm.data import create_transform
from timm.data.loader import adapt_to_chs
from torch import Tensor, nn

from common.command_line import fail
from common.demo_data import DEMO_DEFAULTS, PhotoReader, create_demo_model
from common.gates import GATE_STD, move_gates
from common.images import channels_mode, load_image
from common.models import build_model, check_image_size, expand_names
from common.record import versions
from common.run_options import adopt_model_options, resolve_preprocessing
from common.weights import load_checkpoint, read_checkpoint
from fdconv_zoo import FDConv2d, convert
from fdconv_zoo.choice import named_dynamic_layers, named_fd_layers
from pictures.args import check_args, parse_args
from pictures.layer import Layer, LayerInputs, find_layer

DEMO_PHOTOS = (13, 0, 7)
DEMO_NOTE = (
    "MobileNetV2 with torchvision's ImageNet weights, converted. Its 3x3 stem, static in the zoo's model, was "
    "converted too: only layers with kernels larger than 1x1 have bands to look at."
)
REST_NOTE = (
    "Every gate of every layer is exactly 1, as in a model that is converted or new and was not trained since. It "
    "computes what its static source does; gates, maps and spectra start to differ with training."
)
STIR_NOTE = (
    "Gates at random, not trained: what makes them was drawn from a normal distribution of standard deviation "
    f"{GATE_STD} (--stir-gates {{seed}}). Their pictures show the mechanism and say nothing about a trained model."
)
NEEDED = "visualize.py needs matplotlib and scikit-learn: pip install matplotlib scikit-learn"


def create_model(args: argparse.Namespace) -> tuple[str, nn.Module]:
    """Return the title and the model that was asked for, with its weights; to list its layers it needs none.

    Raises:
        ValueError: The name, the checkpoint or the conversion does not fit.
        RuntimeError: There are no pretrained weights to be had.
    """
    if args.demo:
        name = DEMO_DEFAULTS["model"][0]
        model = create_demo_model(name)
        model.conv_stem = FDConv2d.from_conv(model.conv_stem)
        return f"{name}, stem converted", model
    pretrained = not (args.checkpoint or args.list_layers)
    names = expand_names([args.model], weights_needed=pretrained)
    if len(names) > 1:
        raise ValueError(f"--model takes one model, got {', '.join(names)}")
    checkpoint = read_checkpoint(args.checkpoint, args.use_ema) if args.checkpoint else None
    kwargs = {"num_classes": args.num_classes, **args.model_kwargs}
    if not args.convert:
        return names[0], build_model(names[0], checkpoint=checkpoint, pretrained=pretrained, **kwargs)
    # a checkpoint may be of the converted model
    model = convert(build_model(names[0], pretrained=pretrained, **kwargs), args.method or "fdconv")
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    return f"{names[0]}, converted", model


def read_photos(paths: Sequence[Path], config: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Read photos and prepare them as for inference.

    Args:
        paths: Of the photos.
        config: Preprocessing, as timm's loader takes it.

    Returns:
        Input of the model (B, C, H, W), and the same as a picture, values in [0, 1].

    Raises:
        ValueError: A file is no image.
        UnusableImagesError: Its pixels have no known range.
    """
    channels = config["input_size"][0]
    # As timm's loader has it for grey images: the mean of three numbers.
    mean, std = (adapt_to_chs(config[key], channels) for key in ("mean", "std"))
    transform, mode = create_transform(**{**config, "mean": mean, "std": std}), channels_mode(channels)
    inputs = []
    for path in paths:
        try:
            inputs.append(transform(load_image(str(path), mode)))
        except OSError as error:
            raise ValueError(f"cannot read photo {error}") from error
    batch = torch.stack(inputs)
    return batch, (batch * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]).clamp(0, 1)


def visualize(
    model: nn.Module, title: str, layer_name: str, layers: Mapping[str, Layer], args: argparse.Namespace
) -> Path:
    """Draw everything and write the page; return its path.

    Raises:
        ImportError: matplotlib or scikit-learn is not installed.
        ValueError: A photo can't be read, or the model takes images of another size only.
    """
    import matplotlib

    from pictures.captions import photo_pictures, weight_pictures
    from pictures.report import write_report
    from pictures.weights import STYLE

    if not isinstance(layers[layer_name], Layer):
        return visualize_method(title, layer_name, layers, args)
    config = resolve_preprocessing(
        model, {"img_size": args.img_size}, args.checkpoint, channels=args.model_kwargs.get("in_chans")
    )
    batch, photos = read_photos(args.photos, config)
    check_image_size(model, tuple(batch.shape[2:]))
    inputs, layer = LayerInputs(layer_name), layers[layer_name]
    device = torch.device(args.device)
    with torch.inference_mode(), inputs.watch(layers):
        model.to(device)(batch.to(device))
    model.cpu()
    inputs.kept = inputs.kept.cpu()

    notes = [DEMO_NOTE] if args.demo else []
    if args.stir_gates is not None:
        notes.append(STIR_NOTE.format(seed=args.stir_gates))
    elif not any(value for row in inputs.deviation.values() for value in row.values()):
        notes.append(REST_NOTE)
    names = [path.name for path in args.photos]
    facts = {
        "Layer": f"{layer_name}: {type(layer).__name__}({layer.extra_repr()}), {layer.fdw.num_bands} groups",
        "Its input": " x ".join(map(str, inputs.kept.shape[1:])),
        "Weights": "torchvision's" if args.demo else str(args.checkpoint or "pretrained"),
        "Photos": f"{', '.join(names)}, at {batch.shape[2]} x {batch.shape[3]}",
        "Versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }
    with torch.inference_mode(), matplotlib.rc_context(STYLE):
        pictures, similar = weight_pictures(layer)
        pictures += photo_pictures(layer, name=layer_name, inputs=inputs, photos=photos, titles=names)
        page = write_report(args.output, title=title, facts=facts, notes=notes, pictures=pictures, layers=list(layers))
    print(f"{title}, layer {layer_name}", similar, *notes, sep="\n")
    return page


def visualize_method(title: str, layer_name: str, layers: Mapping[str, nn.Module], args: argparse.Namespace) -> Path:
    """Draw what a layer of another method mixes, which no photo changes, and write the page; return its path.

    Raises:
        ImportError: matplotlib or scikit-learn is not installed.
    """
    import matplotlib

    from pictures.parallel import parallel_pictures
    from pictures.report import write_report
    from pictures.weights import STYLE

    layer = layers[layer_name]
    facts = {
        "Layer": f"{layer_name}: {type(layer).__name__}({layer.extra_repr()})",
        "Weights": str(args.checkpoint or "pretrained"),
        "Versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }
    with torch.inference_mode(), matplotlib.rc_context(STYLE):
        pictures, similar = parallel_pictures(layer)
        page = write_report(args.output, title=title, facts=facts, notes=[], pictures=pictures, layers=list(layers))
    print(f"{title}, layer {layer_name}", similar, sep="\n")
    return page


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    huggingface_hub.logging.set_verbosity_error()
    try:
        check_args(args)
        adopt_model_options(args)
        if args.demo and not args.photos:
            paths = PhotoReader().paths
            args.photos = [paths[number] for number in DEMO_PHOTOS]
        # a converted model's hidden layers of KSM are drawn at random
        torch.manual_seed(args.stir_gates or 0)
        title, model = create_model(args)
        # A model of another method has no FDConv layers.
        layers = dict(named_fd_layers(model)) or dict(named_dynamic_layers(model))
        layer_name = find_layer(layers, args.layer)
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        raise fail("visualize.py", error) from error
    if args.list_layers:
        print("\n".join(layers))
        return
    if args.stir_gates is not None:
        move_gates(model, args.stir_gates)
    print("drawing ...", file=sys.stderr, flush=True)
    try:
        print(visualize(model.eval(), title, layer_name, layers, args))
    except ImportError as error:
        raise fail("visualize.py", f"{error}; {NEEDED}") from error
    except (ValueError, AssertionError, RuntimeError, OSError) as error:
        raise fail("visualize.py", error) from error


if __name__ == "__main__":
    main()
