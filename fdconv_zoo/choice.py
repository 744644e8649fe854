"""Which layers of a model are replaced, and why the others stay (Sec. 4 of the paper).

Paper: Frequency Dynamic Convolution for Dense Image Prediction, CVPR 2025, https://arxiv.org/abs/2503.18783

Replaced are the convolutions of a network's blocks and the linear layers of its MLPs, known by the structure around
them first and by names second. What a model is wrapped in changes nothing.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from .handover import kept_reason
from .layers import FDConv1d, FDConv2d, FDConv3d, FDLinear
from .layers.base import DynamicLayer, computed_reason
from .methods import METHODS, Method
from .structure import (
    MIN_CHANNELS,
    SHORTCUTS,
    find_mlps,
    find_pooled,
    has_stages,
    network_names,
    within_network,
)
from .tokens import Problem, find_unfit

FDLayer = FDConv1d | FDConv2d | FDConv3d | FDLinear
# True insists on a layer, False leaves it, None is the rule's answer.
Rule = Callable[[str, nn.Module], bool | None]
# Names, each for itself and all below it, narrow the rule's choice.
Include = Rule | str | Sequence[str]

WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear)
STEMS = {"stem", "conv1", "conv_stem", "patch_embed"}
CLASSIFIERS = {"head", "heads", "head_dist", "classifier", "fc", "AuxLogits", "aux_classifier"}
MLPS = {"mlp", "ffn"}
SQUEEZE_EXCITE = ("SqueezeExcit", "SEModule", "SEBlock", "EffectiveSE")
LARGE = "a large kernel: the paper's are of 1x1 and 3x3"
POSITIONS = ("PositionalEncoding", "PositionEmbedding", "PosConv")


@dataclass(frozen=True)
class LayerReport:
    """What becomes of one convolution or linear layer.

    Attributes:
        name: Name of the layer in the model.
        shape: Shape of its static weight; empty before a lazy layer has one.
        reason: Why it stays static; empty where it is (to be) dynamic.
        kind: What it is (to be) then.
    """

    name: str
    shape: tuple[int, ...]
    reason: str
    kind: str = "FDConv"

    @property
    def replaced(self) -> bool:
        return not self.reason

    def __str__(self) -> str:
        return f"{self.name}: {'x'.join(map(str, self.shape))} {self.reason or self.kind}"


class Summary(list[LayerReport]):
    """Reports on the layers of a model; printed, a table."""

    def __str__(self) -> str:
        replaced = sum(report.replaced for report in self)
        rows = [(r.name, "x".join(map(str, r.shape)), f"static: {r.reason}" if r.reason else r.kind) for r in self]
        name_width, shape_width = (max((len(row[i]) for row in rows), default=0) for i in (0, 1))
        lines = [f"{name:<{name_width}}  {shape:<{shape_width}}  {fate}" for name, shape, fate in rows]
        shown = [report.kind for report in self if report.replaced] or [report.kind for report in self] or ["FDConv"]
        kinds = ", ".join(dict.fromkeys(shown))
        return "\n".join([*lines, f"{kinds}: {replaced} of {len(self)} layers"])


class Candidate(NamedTuple):
    """A static layer and what is decided about it.

    Attributes:
        name: Name in the model.
        layer: The layer.
        reason: Why it stays; empty if it is replaced.
        problem: Why replacing it would be wrong.
    """

    name: str
    layer: nn.Module
    reason: str
    problem: Problem | None = None

    def report(self, kind: str) -> LayerReport:
        weight = getattr(self.layer, "weight", None)
        known = weight is not None and not isinstance(self.layer, LazyModuleMixin)
        return LayerReport(self.name, tuple(weight.shape) if known else (), self.reason, kind)


def named_fd_layers(model: nn.Module) -> Iterator[tuple[str, FDLayer]]:
    """Names and modules of the FDConv layers of a model; a lone layer has the empty name."""
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, FDLayer):
            yield name, module


def named_dynamic_layers(model: nn.Module) -> Iterator[tuple[str, DynamicLayer]]:
    """Names and modules of the dynamic layers of a model, of whatever method; a lone layer has the empty name."""
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, DynamicLayer):
            yield name, module


def is_narrow(in_channels: int, out_channels: int) -> bool:
    """Whether the paper leaves a layer of so many channels static."""
    return min(in_channels, out_channels) < MIN_CHANNELS


def is_large(kernel_size: Sequence[int]) -> bool:
    """Whether a kernel has more positions than those that the paper replaces, 3x3 (3x3x3 of volumes)."""
    return math.prod(kernel_size) > 3 ** max(len(kernel_size), 2)


def impossible_reason(layer: nn.Module, method: Method) -> str:
    """Why a layer can't be one of a method's, or an empty string."""
    if isinstance(layer, LazyModuleMixin):
        return f"not initialised ({type(layer).__name__}): run the model once before it is converted"
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return f"a transposed convolution: {method.title} has none"
    if computed := computed_reason(layer):
        return computed
    if type(layer) not in method.counterparts:
        if type(layer) in METHODS["fdconv"].counterparts:
            return f"nn.{type(layer).__name__}: {method.title} has none"
        return f"a subclass ({type(layer).__name__}) that computes something else"
    if kept := kept_reason(layer):
        return kept
    if getattr(layer, "groups", 1) > 1 and not method.groups:
        return f"groups={layer.groups}"
    if getattr(layer, "padding_mode", "zeros") != "zeros":
        return f"padding_mode={layer.padding_mode!r}"
    return ""


class Rules:
    """The paper's choice for the layers of one model.

    Args:
        model: A static or a converted model.
        method: What the layers are replaced by.
    """

    def __init__(self, model: nn.Module, method: Method) -> None:
        self.model, self.method = model, method
        self.networks = network_names(model)
        self.mlps, self.narrow_mlps = find_mlps(model)
        self.pooled = find_pooled(model)

    def reason(self, name: str, layer: nn.Module) -> str:
        """Why a layer stays static, or an empty string if it is replaced."""
        network, parts = within_network(name, self.networks)
        if isinstance(layer, LazyModuleMixin | nn.modules.conv._ConvTransposeNd):
            return impossible_reason(layer, self.method)
        if "weight" in layer._parameters and is_narrow(*layer.weight.shape[:2]) and getattr(layer, "groups", 1) == 1:
            return f"narrow: fewer than {MIN_CHANNELS} channels"
        if parts[0] in CLASSIFIERS:
            return "classifier"
        impossible = impossible_reason(layer, self.method)
        if impossible and not impossible.startswith("groups"):
            return impossible
        if parts[0] in STEMS and len(parts) <= 2:
            if parts[0] != "conv1" or has_stages(self.model.get_submodule(network)):
                return "stem"
        parent = type(self.model.get_submodule(name.rpartition(".")[0])).__name__
        if parent.startswith(SQUEEZE_EXCITE):
            return "squeeze and excitation"
        if layer in self.pooled.attention:
            return "attention over channels, of a pooled map"
        if layer in self.pooled.classifiers:
            return "classifier"
        if parent.startswith(POSITIONS):
            return "encoding of positions, the same for every image"
        if isinstance(layer, nn.Linear):
            return self._linear_reason(layer, parts)
        if SHORTCUTS.intersection(parts) and not self.method.shortcuts:
            return "shortcut or downsampling between stages"
        if layer.groups > 1:
            return f"groups={layer.groups}"
        if layer.kernel_size == layer.stride != (1,) * len(layer.stride):
            return "patch embedding or downsampling between stages"
        return LARGE if is_large(layer.kernel_size) else ""

    def _linear_reason(self, layer: nn.Linear, parts: list[str]) -> str:
        if layer in self.narrow_mlps:
            return f"MLP of fewer than {MIN_CHANNELS} channels"
        return "" if layer in self.mlps or MLPS.intersection(parts) else "linear layer outside an MLP"


def check_module(model: object) -> None:
    """Refuse what is no model.

    Raises:
        TypeError: Says what it is.
    """
    if not isinstance(model, nn.Module):
        got = repr(model) if isinstance(model, str | type) else type(model).__name__
        hint = f'; timm.create_model("{model}") makes one' if isinstance(model, str) else ""
        raise TypeError(f"a model (nn.Module) is wanted, got {got}{hint}")


def include_rule(include: Include, model: nn.Module) -> Rule:
    """What `include` says about each layer, as a function.

    Args:
        include: Such a function itself, or names of modules, in which `*`, `?` and `[...]` stand for any characters:
            whatever lies in one of them takes the rule's choice, and all else is left.
        model: Has modules of these names.

    Raises:
        ValueError: A name fits no module.
        TypeError: It is neither.
    """
    if callable(include):
        return include
    names = [include] if isinstance(include, str) or not isinstance(include, Iterable) else list(include)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"include={include!r}, but it must be a function, a name or names of the model's modules")
    modules = [name for name, _ in model.named_modules(remove_duplicate=False)]
    for name in names:
        if not any(_lies_in(module, name) for module in modules):
            children = ", ".join(child for child, _ in model.named_children())
            raise ValueError(f"include names {name!r}, which is no module of {type(model).__name__}; it has {children}")
    return lambda layer, _: None if any(_lies_in(layer, name) for name in names) else False


def _lies_in(layer: str, name: str) -> bool:
    return fnmatchcase(layer, name) or fnmatchcase(layer, f"{name}.*")


def choose(
    model: nn.Module,
    include: Include | None = None,
    allow: Collection[str] = (),
    method: Method = METHODS["fdconv"],
) -> list[Candidate]:
    """Decides about every static convolution and linear layer of a model.

    Args:
        model: A static or a converted model.
        include: As for :func:`~fdconv_zoo.convert_to_fdconv`.
        allow: As for :func:`~fdconv_zoo.convert_to_fdconv`.
        method: What the layers are replaced by.

    Raises:
        ValueError: If `include` insists on a layer that can't be replaced, or names what the model has not.
        TypeError: If `model` is no module, or `include` neither function nor names.
    """
    check_module(model)
    rule = None if include is None else include_rule(include, model)
    inside = tuple(f"{name}." if name else "" for name, _ in named_dynamic_layers(model))
    rules, unfit = Rules(model, method), find_unfit(model)
    found, insisted = [], set()
    for name, layer in model.named_modules(remove_duplicate=False):
        if not isinstance(layer, WEIGHTED) or name.startswith(inside):
            continue
        reason = rules.reason(name, layer)
        wanted = None if rule is None else rule(name, layer)
        if wanted is not None and not wanted:
            reason = reason or "not included"
        elif wanted and reason:
            if impossible := impossible_reason(layer, method):
                raise ValueError(
                    f"include returned True for {name}, which {method.title} has no layer for: {impossible}. "
                    "True insists on a layer that the rule leaves; return None for the rule's choice"
                )
            reason = ""
        if wanted:
            insisted.add(name)
        problem = None if reason else unfit.get(layer)
        if problem and problem.keyword not in allow:
            found.append(Candidate(name, layer, problem.reason, problem))
        else:
            found.append(Candidate(name, layer, reason))
    left = method.left(model, {candidate.name: candidate.layer for candidate in found if not candidate.reason})
    return [c._replace(reason=left[c.name]) if c.name in left and c.name not in insisted else c for c in found]
