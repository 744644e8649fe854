"""Checkpoints that survive kills and full disks, and that resume exactly.

A run's directory holds ``last.state.pt`` (everything that a resumed run needs, the weights included) and, for all
other tools, ``last.safetensors``, ``last_ema.safetensors`` and ``model_best.safetensors`` (weights only). Each file
is written beside its final name and renamed. A resume reads the state file alone: its one rename is the commit, so that
no kill can leave weights and optimiser of different steps.
"""

import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors.torch
import torch

STATE_FILE = "last.state.pt"
BEST_FILE = "model_best.safetensors"


class CheckpointError(RuntimeError):
    """A checkpoint can't be written or read; the message says what remains and what to do."""


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file for writing that takes the place of ``path`` once it is complete and on the disk.

    Raises:
        CheckpointError: The file can't be written; ``path`` is as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        kept = f"the previous {path.name} is intact" if path.exists() else "there was no earlier one"
        raise CheckpointError(f"can't write {path}: {error}; {kept}") from error


def save_weights(weights: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a state dict as safetensors.

    Args:
        weights: State dict of the unwrapped model.
        path: File to write or replace.
        metadata: Short facts for the file's header (model, epoch, update).

    Raises:
        CheckpointError: The file can't be written; an earlier one is intact.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    with _replacing(path) as file:
        file.write(safetensors.torch.save(tensors, metadata))


def save_state(state: dict[str, Any], path: Path) -> None:
    """Write a training state: tensors, numbers, strings and containers of them.

    Raises:
        CheckpointError: The file can't be written; an earlier one is intact.
    """
    with _replacing(path) as file:
        torch.save(state, file)


def load_state(path: Path) -> dict[str, Any]:
    """Read a training state, tensors on the CPU, without unpickling code.

    Raises:
        CheckpointError: There is no such file or it is no training state.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"can't resume from {path}: {error}") from error
    if not isinstance(state, dict) or "progress" not in state:
        raise CheckpointError(f"can't resume from {path}: not a state file of train.py (they end in .state.pt)")
    return state


def copy_weights(source: Path, target: Path) -> None:
    """Make ``target`` the same file as ``source``, at once or not at all.

    Raises:
        CheckpointError: The copy can't be written; an earlier ``target`` is intact.
    """
    with _replacing(target) as file, source.open("rb") as original:
        shutil.copyfileobj(original, file)


def random_state(device: torch.device) -> dict[str, Any]:
    """State of this process's random generators (Python, NumPy, PyTorch, and ``device`` if it is a GPU)."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Set this process's random generators to what :func:`random_state` returned."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
