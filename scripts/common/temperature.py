"""The schedule of a temperature: what DY-Conv, ODConv and KernelWarehouse anneal at the beginning of a training."""

from torch import nn

from common.training_recipe import Recipe
from fdconv_zoo import set_temperature


def temperature_at(recipe: Recipe, epochs: float) -> float | None:
    """The recipe's temperature after so many epochs, fractions of one included, or None where it has none.

    It falls, or rises, on a line from its start to its end, and stays there.
    """
    if recipe.temperature is None:
        return None
    start, end = recipe.temperature
    return end + (start - end) * max(0.0, 1 - epochs / recipe.temperature_epochs)


def anneal(models: list[nn.Module], recipe: Recipe, epochs: float) -> None:
    """Give the recipe's temperature to models; without one they keep theirs.

    Args:
        models: The one that is trained, and perhaps an average of it.
        recipe: Of the training.
        epochs: Those that are done, fractions of one included.

    Raises:
        ValueError: A model has no layer with a temperature, or the number is out of its range.
    """
    value = temperature_at(recipe, epochs)
    if value is None:
        return
    for model in models:
        if not set_temperature(model, value):
            raise ValueError(
                f"--temperature is for DY-Conv, ODConv and KernelWarehouse: {type(model).__name__} has no such layer"
            )
