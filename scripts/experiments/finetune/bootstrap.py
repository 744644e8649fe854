"""Paired differences of two variants with intervals by the bootstrap."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from experiments.finetune.tasks import Outcome, Task

DRAWS = 4000
# Outcomes by fold and seed.
Outcomes = Mapping[tuple[int, int], Outcome]


class Difference(NamedTuple):
    """Mean of one variant less that of another, with a 95 % interval."""

    mean: float
    low: float
    high: float


def draw_weights(clusters: np.ndarray, draws: int, generator: np.random.Generator) -> np.ndarray:
    """Draw clusters with replacement, as many as there are.

    Returns:
        How often each image is counted (draws, images).
    """
    names, members = np.unique(clusters, return_inverse=True)
    counts = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
    return counts[:, members].astype(float)


def paired_difference(task: Task, first: Outcomes, second: Outcomes, name: str, draws: int = DRAWS) -> Difference:
    """Difference of a measure, averaged over folds and seeds, between runs of equal fold and seed.

    Each draw takes test clusters within each fold, the same for all runs, and seeds, the same for both variants: the
    interval is of new modules (images, blocks) and of new trainings.

    Args:
        task: Measures, and tells the clusters.
        first: Outcomes of one variant.
        second: Outcomes of the other.
        name: Of the measure.
        draws: Of the bootstrap.

    Raises:
        ValueError: They have no runs of equal fold and seed.
    """
    pairs = sorted(first.keys() & second.keys())
    if not pairs:
        raise ValueError("no runs of equal fold and seed to compare")
    generator = np.random.default_rng(0)
    drawn = np.zeros(draws)
    observed = 0.0
    folds = sorted({fold for fold, _ in pairs})
    for fold in folds:
        seeds = [seed for each, seed in pairs if each == fold]
        clusters = task.clusters(first[fold, seeds[0]])
        once = np.ones((1, len(clusters)))
        weights = np.concatenate([once, draw_weights(clusters, draws, generator)])
        gains = np.stack(
            [
                task.measure(first[fold, seed], weights)[name] - task.measure(second[fold, seed], weights)[name]
                for seed in seeds
            ]
        )
        observed += gains[:, 0].mean()
        chosen = generator.integers(len(seeds), size=(len(seeds), draws))
        drawn += np.take_along_axis(gains[:, 1:], chosen, axis=0).mean(0)
    low, high = np.nanpercentile(drawn / len(folds), [2.5, 97.5])
    return Difference(observed / len(folds), float(low), float(high))
