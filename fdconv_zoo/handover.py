"""What else refers to a layer goes over to its replacement: hooks, shared parameters, containers that hold it."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import is_dataclass
from functools import cache, partial
from types import MethodType, SimpleNamespace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from .layers.base import DynamicLayer

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
STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
GRADIENT_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


def kept_reason(layer: nn.Module) -> str:
    """Why a layer can't be replaced without a loss of what others did to it, or an empty string."""
    if any(getattr(layer, hooks) for hooks in STATE_HOOKS):
        return "it has hooks on its state dict"
    for key, parameter in layer._parameters.items():
        if any(getattr(parameter, hooks, None) for hooks in GRADIENT_HOOKS):
            return f"its {key} has hooks on its gradient"
    if "forward" in vars(layer):
        return "its forward has been replaced by another one (accelerate's hooks, for example)"
    names = [*layer._parameters, *layer._buffers, *layer._modules]
    extra = [name for name in names if name not in ("weight", "bias")]
    return f"it has been given {', '.join(extra)}, which its replacement would lack" if extra else ""


def refuse_held(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Raises a ValueError where something but the layers holds their parameters, whose replacements it would not know.

    Args:
        model: The model.
        layers: The layers that are replaced.
    """
    inside = {part for layer in layers for part in layer.modules()}
    parameters = {id(parameter) for layer in layers for parameter in layer.parameters()}
    for module in model.modules():
        if module in inside:
            continue
        for attribute, part in (*module._parameters.items(), *_held(module)):
            if id(part) in parameters:
                raise ValueError(
                    f"{type(module).__name__} holds a parameter of an FDConv layer in its {attribute}, and a static "
                    "layer has others: make it after to_static. Of a wrapper, such as DistributedDataParallel, make "
                    "the .module static, and wrap that"
                )


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
    for name, module in model.named_modules():
        for attribute, part in _held(module):
            for _, holder, key in holders.get(id(part), []):
                if holder in layers:
                    place = f"{name}.{attribute}" if name else attribute
                    shared[holder] = f"its {key} is also in {place}, which would go on with the static one"
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
    """Gives replacements what the layers before them had: hooks, attributes of others, places in containers.

    Args:
        model: The model, in which the layers are still in place.
        replaced: Replacement of each layer.
    """
    for old, new in replaced.items():
        for hooks in HOOKS:
            if hasattr(old, hooks):
                setattr(new, hooks, getattr(old, hooks))
        if not isinstance(old, DynamicLayer):
            for key in vars(old).keys() - vars(new).keys() - _usual_attributes(type(old)):
                setattr(new, key, _swap(vars(old)[key], replaced))
    for module in model.modules():
        for key, value in vars(module).items():
            if key not in OWN:
                new = _swap(value, replaced)
                if new is not value:
                    module.__dict__[key] = new


@cache
def _usual_attributes(kind: type[nn.Module]) -> frozenset[str]:
    """Attributes of each static layer of a kind, and of one that was compiled, which would call the old layer."""
    return frozenset([*vars(kind(1, 1, 1, device="meta")), "_compiled_call_impl"])


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


def _held(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """What a module's attributes hold beside what is registered, with the attribute's name."""
    for attribute, value in vars(module).items():
        if attribute not in OWN:
            for part in _parts(value):
                yield attribute, part


def _parts(value: Any, within: frozenset[int] = frozenset()) -> Iterator[Any]:
    """What plain containers and optimisers hold, at any depth; anything else as it is.

    Args:
        value: The container, or what is none.
        within: Identities of containers that this one is in: a tree may know its root.
    """
    if id(value) in within:
        return
    within |= {id(value)}
    if isinstance(value, dict):
        value = [*value, *value.values()]
    elif isinstance(value, partial):
        value = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, MethodType):
        value = [value.__self__]
    elif isinstance(value, Optimizer):
        value = value.param_groups
    elif _is_record(value):
        value = [*vars(value).values()]
    if isinstance(value, list | deque | tuple | set | frozenset):
        for item in value:
            yield from _parts(item, within)
    else:
        yield value


def _swap(value: Any, replaced: Mapping[nn.Module, nn.Module], within: frozenset[int] = frozenset()) -> Any:
    """A value with layers replaced, also in containers, which are changed in place where they can be.

    Args:
        value: The container, or what is none.
        replaced: Replacement of each layer.
        within: Identities of containers that this one is in, and that are being changed.
    """
    if id(value) in within or not any(isinstance(part, nn.Module) and part in replaced for part in _parts(value)):
        return value
    swap = partial(_swap, replaced=replaced, within=within | {id(value)})
    if isinstance(value, nn.Module):
        return replaced[value]
    if isinstance(value, MethodType):
        return getattr(replaced[value.__self__], value.__name__)
    if isinstance(value, partial):
        swapped = {key: swap(item) for key, item in value.keywords.items()}
        return partial(swap(value.func), *map(swap, value.args), **swapped)
    if isinstance(value, dict):
        items = [(swap(key), swap(item)) for key, item in value.items()]
        value.clear()
        value.update(items)
        return value
    if _is_record(value):
        for key, item in vars(value).items():
            object.__setattr__(value, key, swap(item))  # it may be frozen
        return value
    items = [swap(item) for item in value]
    if isinstance(value, list | deque | set):
        value.clear()
        (value.update if isinstance(value, set) else value.extend)(items)
        return value
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def _is_record(value: Any) -> bool:
    """Whether a value is a namespace or of a dataclass, which hold things in attributes and do nothing else."""
    is_one = isinstance(value, SimpleNamespace) or (is_dataclass(value) and not isinstance(value, type | nn.Module))
    return is_one and hasattr(value, "__dict__")
