"""What else refers to a layer goes over to its replacement: hooks, shared parameters, lists that hold it."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

# Registered hooks of nn.Module; the dictionaries themselves go over, so that handles still remove theirs.
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)
OWN = {"_parameters", "_buffers", "_modules", *HOOKS}


def find_shared(model: nn.Module, layers: Iterable[nn.Module]) -> dict[nn.Module, str]:
    """Layers whose parameters another module holds that is not replaced in the same way, and which.

    Args:
        model: The model.
        layers: The layers that are replaced.
    """
    layers = set(layers)
    holders: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append((name, module, key))
    shared = {}
    for held in holders.values():
        for _, module, key in held:
            for other_name, other, other_key in held:
                alike = other in layers and type(other) is type(module) and other_key == key
                if module in layers and not alike:
                    shared[module] = f"its {key} is also {other_name}.{other_key}, which stays static"
    return shared


def tie(replaced: Mapping[nn.Module, nn.Module]) -> None:
    """Lets dynamic layers share what their static layers share, given the dynamic layer of each static one.

    Raises:
        ValueError: Two layers share a parameter whose counterparts can't be shared.
    """
    _refuse_untied(replaced)
    known: dict[int, nn.Parameter] = {}
    for static, layer in replaced.items():
        for key, name in layer.tied.items():
            if static._parameters[key] is not None:
                path, _, own = name.rpartition(".")
                holder = layer.get_submodule(path)
                setattr(holder, own, known.setdefault(id(static._parameters[key]), getattr(holder, own)))


def hand_over(model: nn.Module, replaced: Mapping[nn.Module, nn.Module]) -> None:
    """Gives replacements what the layers before them had: hooks, places in lists.

    Args:
        model: The model, in which the layers are still in place.
        replaced: Replacement of each layer.
    """
    for old, new in replaced.items():
        for hooks in HOOKS:
            if hasattr(old, hooks):
                setattr(new, hooks, getattr(old, hooks))
    for module in model.modules():
        for key, value in vars(module).items():
            if key not in OWN:
                new = _swap(value, replaced)
                if new is not value:
                    module.__dict__[key] = new


def _refuse_untied(replaced: Mapping[nn.Module, nn.Module]) -> None:
    seen: set[int] = set()
    for static, layer in replaced.items():
        for key, parameter in static._parameters.items():
            if parameter is not None and key not in layer.tied:
                if id(parameter) in seen:
                    raise ValueError(
                        f"two layers share a {key}, which {type(layer).__name__} can't: leave them with include"
                    )
                seen.add(id(parameter))


def _swap(value: Any, replaced: Mapping[nn.Module, nn.Module]) -> Any:
    """A value with layers replaced, also in lists and dictionaries, which are changed in place."""
    if isinstance(value, nn.Module):
        return replaced.get(value, value)
    if type(value) is list:
        value[:] = [_swap(item, replaced) for item in value]
    elif type(value) is dict:
        value.update({key: _swap(item, replaced) for key, item in value.items()})
    elif type(value) is tuple:
        items = tuple(_swap(item, replaced) for item in value)
        return items if any(new is not old for new, old in zip(items, value, strict=True)) else value
    return value
