"""Whole models in float32: logits against the CPU in float64, steps against PyTorch's operations on the device.

Those compute in float64 at a small batch; a step in float64 would take a CPU longer than this part has.
"""

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gpu_checks.builds import Spec, fdconv_model, images_and_labels, specs, unfused
from gpu_checks.setup import Row, Setup, exact_float32, norm_error

# Samples to compare with the CPU: enough for KSM's batch norm to have a variance.
BATCH = 4
LOGITS_LIMIT, GRADIENTS_LIMIT, HALF_LIMIT = 1e-3, 5e-3, 0.1


def run(setup: Setup) -> Iterator[Row]:
    """For each model a row of the logits, of a training step, of 16 bits, and of a step by other operations."""
    for spec in specs(setup.small):
        model = fdconv_model(spec)
        with exact_float32():
            expected = logits_on_cpu(spec, model)
            checks = {
                "eval, against float64 on the CPU": partial(check_logits, setup, spec, model, expected),
                "eval, autocast": partial(check_half, setup, spec, model, expected),
                "train step, against float64": partial(check_step, setup, spec, model),
                "train step, against PyTorch's operations": partial(check_unfused, setup, spec, model),
            }
            for name, check in checks.items():
                yield setup.attempt(f"{spec.name}: {name}", check)


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """Logits in eval mode."""
    with torch.no_grad():
        return model.eval()(images)


def gradients_of(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Gradients of a training step, by parameter, and the loss."""
    model.train().zero_grad()
    loss = cross_entropy(model(images), labels)
    loss.backward()
    return {"loss": loss.detach(), **{name: parameter.grad for name, parameter in model.named_parameters()}}


def logits_on_cpu(spec: Spec, model: nn.Module) -> Tensor:
    """Logits in float64."""
    wide = copy.deepcopy(model).double()
    images, _ = images_and_labels(spec, BATCH, wide, torch.device("cpu"))
    return logits_of(wide, images.double())


def on_device(setup: Setup, spec: Spec, model: nn.Module, batch: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A copy of the model on the device, images and labels."""
    return copy.deepcopy(model).to(setup.device), *images_and_labels(spec, batch, model, setup.device)


def compare_steps(found: dict[str, Tensor], expected: dict[str, Tensor]) -> Row:
    """Error of all gradients as one vector, and the parameters that have the largest part in it."""
    if any(value is None or not value.isfinite().all() for value in found.values()):
        names = [name for name, value in found.items() if value is None or not value.isfinite().all()]
        return {"error": float("inf"), "limit": GRADIENTS_LIMIT, "not finite": names[:5]}
    names = [name for name in found if name != "loss"]
    squares = {
        name: (found[name].double() - expected[name].to(found[name].device).double()).square().sum().item()
        for name in names
    }
    scale = sum(expected[name].double().square().sum().item() for name in names)
    worst = sorted(names, key=squares.__getitem__, reverse=True)[:3]
    return {
        "error": (sum(squares.values()) / scale) ** 0.5,
        "limit": GRADIENTS_LIMIT,
        "loss": norm_error(found["loss"], expected["loss"]),
        "most in": {name: norm_error(found[name], expected[name]) for name in worst},
    }


def check_logits(setup: Setup, spec: Spec, model: nn.Module, expected: Tensor) -> Row:
    """Error of the logits in float32, contiguous and channels_last."""
    copied, images, _ = on_device(setup, spec, model, BATCH)
    errors = [norm_error(logits_of(copied, images), expected)]
    copied, images = (value.to(memory_format=torch.channels_last) for value in (copied, images))
    errors.append(norm_error(logits_of(copied, images), expected))
    return {"error": max(errors), "limit": LOGITS_LIMIT, "channels_last": errors[1]}


def check_step(setup: Setup, spec: Spec, model: nn.Module) -> Row:
    """Error of the gradients of a training step in float32, against float64, which the kernels leave to PyTorch."""
    copied, images, labels = on_device(setup, spec, model, BATCH)
    expected = gradients_of(copy.deepcopy(copied).double(), images.double(), labels)
    return compare_steps(gradients_of(copied, images, labels), expected)


def check_half(setup: Setup, spec: Spec, model: nn.Module, expected: Tensor) -> Row:
    """Error of the logits under autocast, channels_last; and that of PyTorch's operations, for comparison."""
    copied, images, _ = on_device(setup, spec, model, BATCH)
    images = images.contiguous(memory_format=torch.channels_last)
    autocast = nullcontext() if setup.small else torch.autocast(setup.device.type, setup.half_dtype)
    with autocast:
        found, plain = (logits_of(m, images).float() for m in (copied, unfused(copied)))
    row = {"error": norm_error(found, expected), "limit": HALF_LIMIT}
    return {**row, "pytorch": norm_error(plain, expected)}


def check_unfused(setup: Setup, spec: Spec, model: nn.Module) -> Row:
    """Error of the gradients of a step at a batch that pays for a bank, against PyTorch's operations in float32."""
    copied, images, labels = on_device(setup, spec, model, 4 if setup.small else 48)
    expected = gradients_of(unfused(copied), images, labels)
    return compare_steps(gradients_of(copied, images, labels), expected)
