"""One run: a network made, trained, tested and looked into."""

import time
from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from common.fit import EVAL_BATCH, fit
from experiments.finetune.measures import disagreement, gate_moves
from experiments.finetune.protocol import Run, Variant
from experiments.finetune.tasks import Outcome, Task
from experiments.finetune.variants import CALIBRATION_BATCHES, calibrate, make_variant
from fdconv_zoo.cost import count_parameters

LOOKED_AT_BATCHES = 4
# An average over some 50 updates, a twelfth of a run.
EMA_DECAY = 0.98


class Answers:
    """Collects the answers to all images, and measures them."""

    def __init__(self, task: Task, facts: dict[str, Any]) -> None:
        self._task, self._facts = task, facts
        self._outputs: list[Tensor] = []
        self._labels: list[Tensor] = []

    def update(self, output: Tensor, labels: Tensor) -> None:
        self._outputs.append(output.cpu())
        self._labels.append(labels.cpu())

    def outcome(self) -> Outcome:
        """What is kept of them."""
        return self._task.outcome(torch.cat(self._outputs), torch.cat(self._labels), self._facts)

    def compute(self) -> dict[str, float]:
        return measure_once(self._task, self.outcome())


def measure_once(task: Task, outcome: Outcome) -> dict[str, float]:
    """Measures with each test image counted once."""
    measures = task.measure(outcome, np.ones((1, len(task.clusters(outcome)))))
    return {name: round(float(value[0]), 6) for name, value in measures.items()}


@torch.no_grad()
def test_outcome(task: Task, model: nn.Module, test_set: Dataset, facts: dict[str, Any], device: str) -> Outcome:
    """What is kept of a network's answers to all images of a set."""
    answers = Answers(task, facts)
    model.eval()
    for images, labels in DataLoader(test_set, EVAL_BATCH):
        answers.update(model(images.to(device).contiguous(memory_format=torch.channels_last)), labels)
    return answers.outcome()


def make_run(
    task: Task, run: Run, variant: Variant, device: str, on_epoch: Callable[[dict[str, float]], None]
) -> dict[str, Any]:
    """Train and test.

    Args:
        task: Of the run.
        run: What to train.
        variant: Of the run.
        device: Where.
        on_epoch: Called with a row of figures after each epoch.

    Returns:
        Figures of the last epoch and of the averaged weights, outcomes, curve, gates and times.

    Raises:
        DivergedError: The loss is not finite.
    """
    data = task.data(run.phase, run.fold, run.seed)
    model = make_variant(task.create_model(run.seed), variant.layer, variant.fourier).to(device)
    parameters = count_parameters(model)
    generator = torch.Generator().manual_seed(run.seed)
    plain_loader = DataLoader(data.plain, run.recipe.batch_size, shuffle=True, generator=generator)
    plain = [images.to(device) for images, _ in islice(plain_loader, CALIBRATION_BATCHES)]
    calibrate(model, plain)

    average = ModelEmaV3(model, decay=EMA_DECAY, use_warmup=True)
    updates = 0

    def follow(epoch: int, loss: float) -> None:
        nonlocal updates
        updates += 1
        average.update(model, step=updates)

    start, cpu_start = time.perf_counter(), time.process_time()
    curve = []
    for row in fit(
        model,
        data.train,
        data.curve,
        run.recipe,
        seed=run.seed,
        metrics=lambda: Answers(task, data.test_facts),
        on_update=follow,
    ):
        curve.append({key: round(value, 6) for key, value in row.items()})
        on_epoch(curve[-1])
    seconds = {"wall": round(time.perf_counter() - start, 1), "cpu": round(time.process_time() - cpu_start, 1)}

    outcome = test_outcome(task, model, data.test, data.test_facts, device)
    averaged = test_outcome(task, average.module, data.test, data.test_facts, device)
    return {
        "measures": measure_once(task, outcome),
        "averaged_measures": measure_once(task, averaged),
        "parameters": parameters,
        "updates": updates,
        "seconds": seconds,
        "gates": gate_moves(model, plain[0]),
        "ksm_disagreement": disagreement(model, plain[:LOOKED_AT_BATCHES]),
        "curve": curve,
        "outcome": outcome,
        "averaged_outcome": averaged,
    }
