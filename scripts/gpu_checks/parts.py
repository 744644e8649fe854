"""The parts in their order, correctness first, with their shares of the time."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from gpu_checks import commands, facts, golden, kernels, layers, models, profiling, shapes, speed, training
from gpu_checks.setup import Row, Setup


class Part(NamedTuple):
    """A part of the check.

    Attributes:
        run: Yields rows, each as soon as it is known.
        share: Of the time, beside those of the others.
        about: One line for people.
    """

    run: Callable[[Setup], Iterator[Row]]
    share: float
    about: str


PARTS = {
    "facts": Part(facts.run, 10, "device, versions, measured copy bandwidth and product rates"),
    "kernels": Part(kernels.run, 75, "each kernel against its formula in float64"),
    "layers": Part(layers.run, 60, "whole layers, forward and every gradient, against PyTorch's operations in float64"),
    "golden": Part(golden.run, 10, "the layers that the official code ran, from tests/golden"),
    "models": Part(
        models.run,
        75,
        "whole models: logits against the CPU in float64, training steps against PyTorch's operations",
    ),
    "speed": Part(speed.run, 120, "FDConv : static twin : PyTorch's operations : kept banks; medians, memory, traffic"),
    "shapes": Part(shapes.run, 35, "each layer shape: the kernels beside cuDNN's grouped convolution and bmm"),
    "profile": Part(profiling.run, 15, "the ten longest kernels of an eval pass and of a training step"),
    "training": Part(training.run, 30, "a short training under autocast: loss falls, no NaN, resume exact"),
    "commands": Part(commands.run, 45, "train.py, validate.py and train_dense.py, two steps each on made images"),
}
