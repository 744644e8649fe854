"""A short training on data that can be learnt, under autocast, in one process of NCCL (of gloo on a CPU)."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from gpu_checks.setup import Row, Setup, dtype_name

CLASSES = 5
# Share of the first losses that the last ones must be below.
FALL = 0.8


@contextmanager
def process_group(setup: Setup, folder: str) -> Iterator[None]:
    """One process, of the backend that such a training has."""
    backend = "nccl" if setup.on_gpu else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/group", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def deterministic_cudnn() -> Iterator[None]:
    """Without cuDNN's algorithms that sum in an order of their own."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


def run(setup: Setup) -> Iterator[Row]:
    """A row for each dtype."""
    with tempfile.TemporaryDirectory() as folder, process_group(setup, folder), deterministic_cudnn():
        for dtype in (torch.bfloat16, torch.float16) if setup.on_gpu else (setup.half_dtype,):
            yield setup.attempt(f"training {dtype_name(dtype)}", partial(train_and_resume, setup, dtype, Path(folder)))


class Run:
    """A model, its optimiser and its scaler.

    Args:
        setup: The device.
        dtype: That of autocast; float16 with a scaler, float32 without autocast.
    """

    def __init__(self, setup: Setup, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.setup, self.dtype = setup, dtype
        small = {"channels": (17, 18, 18, 20), "layers": (1, 1, 1, 1), "num_bands": 3} if setup.small else {}
        model = timm.create_model("resnet18_fdconv", num_classes=CLASSES, **small)
        model.maxpool = nn.Identity()  # its gradient is summed in no fixed order on a GPU
        self.model: nn.Module = model.to(setup.device, memory_format=torch.channels_last)
        ids = [torch.cuda.current_device()] if setup.on_gpu else None
        self.parallel = DistributedDataParallel(self.model, device_ids=ids)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.02, momentum=0.9, weight_decay=1e-4)
        self.scaler = torch.amp.GradScaler(setup.device.type, enabled=dtype == torch.float16)

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        """Images with a pattern of their class under noise; the same for a number, whatever came before."""
        generator = torch.Generator().manual_seed(number)
        count, size = (16, 32) if self.setup.small else (64, 96)
        labels = torch.randint(CLASSES, (count,), generator=generator)
        colours = torch.randn(CLASSES, 3, 2, 2, generator=torch.Generator().manual_seed(-1))
        patterns = colours.repeat_interleave(size // 2, 2).repeat_interleave(size // 2, 3)
        images = patterns[labels] + torch.randn(count, 3, size, size, generator=generator)
        device = self.setup.device
        return images.to(device).contiguous(memory_format=torch.channels_last), labels.to(device)

    def train(self, numbers: range) -> list[float]:
        """Losses of the steps of these numbers."""
        losses = []
        for number in numbers:
            images, labels = self.batch(number)
            enabled = self.dtype != torch.float32
            with torch.autocast(self.setup.device.type, self.dtype if enabled else None, enabled=enabled):
                loss = cross_entropy(self.parallel(images), labels)
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            losses.append(loss.detach())
        return torch.stack(losses).tolist()

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        parts = {"model": self.model, "optimizer": self.optimizer, "scaler": self.scaler}
        return {name: part.state_dict() for name, part in parts.items()}

    def load(self, path: Path) -> "Run":
        """Go on from a checkpoint."""
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name, values in state.items():
            getattr(self, name).load_state_dict(values)
        return self


def train_and_resume(setup: Setup, dtype: torch.dtype, folder: Path) -> Row:
    """Whether the loss falls, all stays finite, and a resumed run ends with the weights of the one that went on."""
    first, more, path = (12, 3, folder / "state.pt") if setup.small else (40, 8, folder / "state.pt")
    going_on = Run(setup, dtype)
    losses = going_on.train(range(first))
    torch.save(going_on.state(), path)
    losses += going_on.train(range(first, first + more))
    resumed = [Run(setup, dtype).load(path) for _ in range(2)]
    for run in resumed:
        run.train(range(first, first + more))
    start, end = (sum(part) / len(part) for part in (losses[:3], losses[-3:]))
    weights = going_on.model.state_dict()
    finite = all(value.isfinite().all().item() for value in weights.values())
    row = {
        "losses": [round(loss, 4) for loss in losses],
        "scale": going_on.scaler.get_scale(),
        "resumed against going on": difference(resumed[0].model.state_dict(), weights),
        "resumed twice": difference(*(run.model.state_dict() for run in resumed)),
        "summary": f"loss {start:.3f} to {end:.3f}, finite: {finite}",
    }
    if not finite or not end < FALL * start:
        raise RuntimeError(f"the loss went from {start:.4f} to {end:.4f}, weights finite: {finite}; {row}")
    # Two resumed runs that differ too mean that the device's order of sums is not fixed, not that the state is short.
    return {**row, "error": row["resumed against going on"], "limit": 0.0}


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest difference of two states."""
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)
