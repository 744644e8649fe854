"""The schedule of a temperature: what DY-Conv, ODConv and KernelWarehouse anneal at the beginning of a training."""

from torch import nn

from common.training_recipe import Recipe
from fdconv_zoo import set_temperature
from fdconv_zoo.layers.dynamic import Annealed


def temperature_at(recipe: Recipe, epochs: float) -> float | None:
    """The recipe's temperature after so many epochs, fractions of one included, or None where it has none.

    It falls, or rises, on a line from its start to its end, and stays there.
    """
    if recipe.temperature is None:
        return None
    start, end = recipe.temperature
    return end + (start - end) * max(0.0, 1 - epochs / recipe.temperature_epochs)


def check_temperature(model: nn.Module, recipe: Recipe) -> None:
    """Refuse a recipe's temperature where the model can't have it; if it can, it has the first one then.

    Args:
        model: That is to be trained.
        recipe: Of the training.

    Raises:
        ValueError: The model has no layer with a temperature, the first one is out of its range, or the last one is
            not that at which weights load: what is saved would be another function than what was measured.
    """
    if recipe.temperature is None:
        return
    start, end = recipe.temperature
    if not set_temperature(model, start):
        raise ValueError(
            f"--temperature is for DY-Conv, ODConv and KernelWarehouse: {type(model).__name__} has no such layer"
        )
    for layer in model.modules():
        if isinstance(layer, Annealed) and end != layer.rest:
            raise ValueError(
                f"the temperature ends at {end:g}, but weights of {type(layer).__name__} load at {layer.rest:g}"
            )


def anneal(models: list[nn.Module], recipe: Recipe, epochs: float) -> None:
    """Give the recipe's temperature to models; without one they keep theirs.

    Args:
        models: The one that is trained, and perhaps an average of it.
        recipe: Of the training.
        epochs: Those that are done, fractions of one included.
    """
    value = temperature_at(recipe, epochs)
    if value is None:
        return
    for model in models:
        set_temperature(model, value)
