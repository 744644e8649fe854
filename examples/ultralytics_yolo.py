"""A YOLO of ultralytics with an FDConv backbone: training on images made here, validation, prediction and export.

python examples/ultralytics_yolo.py --help
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from fdconv_zoo import FDConv2d, convert_to_fdconv

try:
    from ultralytics import YOLO
    from ultralytics.models.yolo.detect import DetectionTrainer
except ModuleNotFoundError as error:
    raise SystemExit(f"ultralytics_yolo.py: error: needs {error.name}: pip install -e '.[ultralytics]'") from error

EXAMPLES = """examples:
  ultralytics_yolo.py --model yolov8n.yaml --epochs 3        random weights
  ultralytics_yolo.py --model yolov8n.pt --data coco8.yaml   fine-tunes static weights
  ultralytics_yolo.py --export torchscript onnx"""

CLASSES = ("red square", "green square")


def is_converted(model: nn.Module) -> bool:
    return any(isinstance(module, FDConv2d) for module in model.modules())


def convert_backbone(model: nn.Module) -> None:
    """Converts the layers of a DetectionModel that its yaml calls the backbone."""
    length = len(model.yaml["backbone"])
    convert_to_fdconv(model, include=lambda name, _: None if int(name.split(".")[1]) < length else False)


class FDConvTrainer(DetectionTrainer):
    """ultralytics builds the model anew from its yaml before it trains: it has to be converted here."""

    def get_model(
        self, cfg: str | dict | None = None, weights: nn.Module | None = None, verbose: bool = True
    ) -> nn.Module:
        model = super().get_model(cfg, verbose=verbose)
        if weights is not None and not is_converted(weights):
            model.load(weights)
        convert_backbone(model)
        if weights is not None and is_converted(weights):
            model.load(weights)
        return model


def make_dataset(folder: Path, count: int, size: int) -> Path:
    """Writes images of coloured squares on noise with their boxes, and returns the data set's yaml."""
    draw = np.random.default_rng(0)
    for split in ("train", "val"):
        for part in ("images", "labels"):
            (folder / part / split).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            pixels = draw.integers(0, 120, (size, size, 3), dtype=np.uint8)
            kind, side = index % 2, int(draw.integers(size // 4, size // 2))
            left, top = draw.integers(0, size - side, 2)
            pixels[top : top + side, left : left + side, kind] = 255
            Image.fromarray(pixels).save(folder / "images" / split / f"{index}.png")
            box = ((left + side / 2) / size, (top + side / 2) / size, side / size, side / size)
            text = " ".join(f"{number:.6f}" for number in box)
            (folder / "labels" / split / f"{index}.txt").write_text(f"{kind} {text}\n")
    names = "".join(f"  {index}: {name}\n" for index, name in enumerate(CLASSES))
    data = folder / "squares.yaml"
    data.write_text(f"path: {folder.resolve()}\ntrain: images/train\nval: images/val\nnames:\n{names}")
    return data


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="yolov8n.yaml", metavar="NAME", help="yaml or weights (default: %(default)s)"
    )
    parser.add_argument("--data", metavar="FILE", help="a data set of ultralytics (default: squares made here)")
    parser.add_argument("--epochs", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--size", type=int, default=64, metavar="PIXELS", help="multiple of 32 (default: %(default)s)")
    parser.add_argument("--images", type=int, default=16, help="of each split that is made (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("outputs/yolo"), help="default: %(default)s")
    parser.add_argument("--export", nargs="*", default=["torchscript", "onnx"], metavar="FORMAT")
    args = parser.parse_args(argv)
    if args.size < 32 or args.size % 32:
        parser.error(f"--size must be a multiple of 32, got {args.size}")
    return args


def raw_output(model: Any, image: torch.Tensor) -> torch.Tensor:
    """What a model returns before boxes are chosen, of the class or of an exported file."""
    output = model(image)
    return output[0] if isinstance(output, list | tuple) else output


def main(argv: Sequence[str] | None = None) -> None:
    """Train, validate, predict and export, and print how far each file is from the model."""
    args = parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    data = args.data or make_dataset(args.output / "squares", args.images, args.size)
    yolo = YOLO(args.model)
    yolo.train(
        trainer=FDConvTrainer, data=str(data), epochs=args.epochs, imgsz=args.size, batch=8, workers=0, plots=False,
        project=str(args.output.resolve()), name="run", exist_ok=True, verbose=False,
    )  # fmt: skip
    layers = sum(isinstance(module, FDConv2d) for module in yolo.model.modules())
    print(f"trained: {layers} FDConv layers, weights in {yolo.trainer.best}")

    yolo = YOLO(yolo.trainer.best)
    image = torch.rand(1, 3, args.size, args.size)
    with torch.no_grad():
        expected = raw_output(yolo.model.eval(), image)
    metrics = yolo.val(data=str(data), imgsz=args.size, workers=0, plots=False, verbose=False)
    print(f"validated: mAP50 {metrics.box.map50:.3f}")
    result = yolo.predict(image, imgsz=args.size, verbose=False)[0]
    print(f"predicted: {len(result.boxes)} boxes")
    for kind in args.export:
        options = dict(simplify=False) if kind == "onnx" else {}  # simplifying needs a package more
        file = YOLO(yolo.ckpt_path).export(format=kind, imgsz=args.size, **options)
        output = torch.as_tensor(np.asarray(run_file(Path(file), image)))
        error = ((output - expected).abs().max() / expected.abs().max()).item()
        print(f"exported: {file}, relative difference {error:.1e}")


def run_file(file: Path, image: torch.Tensor) -> Any:
    """Runs a TorchScript or an ONNX file on an image."""
    if file.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        return session.run(None, {session.get_inputs()[0].name: image.numpy()})[0]
    with torch.no_grad():
        return raw_output(torch.jit.load(str(file)), image)


if __name__ == "__main__":
    main()
