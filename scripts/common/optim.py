"""Learning rate, parameter groups, optimiser and schedule."""

from typing import Any

from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer

from common.training_recipe import Recipe
from fdconv_zoo import modulation_parameters
from fdconv_zoo.choice import named_dynamic_layers

# What optimisers count in their groups, beside what options set there.
COUNTERS = ("lookahead_step", "step")


def scaled_learning_rate(base: float, base_size: int, global_batch: int, scale: str) -> float:
    """Learning rate for ``global_batch`` images an update, from the one at ``base_size``.

    Args:
        base: Learning rate at ``base_size`` images an update.
        base_size: Images an update that ``base`` is meant for.
        global_batch: Images an update, over all processes and accumulated passes.
        scale: ``linear`` (Goyal et al., arXiv 1706.02677, section 2.1) or ``sqrt``.
    """
    ratio = global_batch / base_size
    return base * (ratio if scale == "linear" else ratio**0.5)


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the model's classifier modules, of which some timm models have two."""
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def undecayed(model: nn.Module) -> set[str]:
    """Names of parameters that are not decayed beside biases and norms.

    They are what any of the model's parts says of its own (timm's `no_weight_decay`); Swin's position tables, of which
    nothing says so in a list of its stages (`FeatureListNet`); and biases that have another name because a layer has
    several.
    """
    names = {
        f"{name}.{own}" if name else own
        for name, module in model.named_modules()
        for own in getattr(module, "no_weight_decay", set)()
    }
    biases = (f"{name}.{layer.held[1]}" if name else layer.held[1] for name, layer in named_dynamic_layers(model))
    tables = (name for name, _ in model.named_parameters() if name.endswith("relative_position_bias_table"))
    return names.union(tables, biases)


def parameter_groups(
    model: nn.Module,
    *,
    weight_decay: float,
    layer_decay: float | None = None,
    static_lr_scale: float = 1.0,
    modulation_lr_scale: float | None = None,
    modulation_weight_decay: float | None = None,
) -> list[dict[str, Any]]:
    """timm's parameter groups, with rates of their own for what a converted model inherits and for its modulation.

    FDConv's modulation (parameters of ``ksm`` and ``fbm`` modules) and the classifier start untrained and keep the
    full rate; all others, the Fourier weights among them, have ``lr_scale`` multiplied by ``static_lr_scale``.
    timm's schedulers apply ``lr_scale``.

    Args:
        model: Model, not wrapped.
        weight_decay: Decay of all parameters but biases, norms and the model's own exceptions.
        layer_decay: Factor from each of timm's layer groups to the one below; ``None`` for one rate.
        static_lr_scale: Factor of the rate of inherited parameters, in (0, 1] as a rule.
        modulation_lr_scale: Factor of the modulation's rate; ``None`` for 1.
        modulation_weight_decay: Decay of the modulation's matrices; ``None`` for ``weight_decay``.
    """
    exceptions = undecayed(model)
    if layer_decay is None:
        groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=exceptions)
    else:
        groups = param_groups_layer_decay(model, weight_decay, no_weight_decay_list=exceptions, layer_decay=layer_decay)
    if static_lr_scale == 1 and modulation_lr_scale is None and modulation_weight_decay is None:
        return groups

    new_parts = tuple(f"{name}." for name in classifier_names(model))
    modulation = {id(parameter) for _, parameter in modulation_parameters(model)}
    new = {id(parameter) for name, parameter in model.named_parameters() if name.startswith(new_parts)}
    full_rate = modulation | new
    split: list[dict[str, Any]] = []
    for group in groups:
        scale, decay = group.get("lr_scale", 1.0), group["weight_decay"]
        own_decay = decay if modulation_weight_decay is None or not decay else modulation_weight_decay
        members: dict[tuple[float, float], list[nn.Parameter]] = {}
        # inherited ones last, as in the optimiser's state of earlier runs
        for parameter in sorted(group["params"], key=lambda each: id(each) not in full_rate):
            if id(parameter) in modulation:
                kind = (1.0 if modulation_lr_scale is None else modulation_lr_scale, own_decay)
            else:
                kind = (1.0 if id(parameter) in new else static_lr_scale, decay)
            members.setdefault(kind, []).append(parameter)
        for (factor, own), parameters in members.items():
            split.append({**group, "params": parameters, "lr_scale": scale * factor, "weight_decay": own})
    return split


def create_optimizer(model: nn.Module, recipe: Recipe, global_batch: int) -> Optimizer:
    """timm's optimiser for the model.

    Args:
        model: Model, not wrapped.
        recipe: Optimiser and rate.
        global_batch: Images an update, over all processes and accumulated passes.
    """
    lr = recipe.lr
    if lr is None:
        lr = scaled_learning_rate(recipe.lr_base, recipe.lr_base_size, global_batch, recipe.lr_base_scale)
    groups = parameter_groups(
        model,
        weight_decay=recipe.weight_decay,
        layer_decay=recipe.layer_decay,
        static_lr_scale=recipe.static_lr_scale,
        modulation_lr_scale=recipe.modulation_lr_scale,
        modulation_weight_decay=recipe.modulation_weight_decay,
    )
    options = {"eps": recipe.opt_eps, "betas": recipe.opt_betas, **recipe.opt_kwargs}
    given = {name: value for name, value in options.items() if value is not None}
    return create_optimizer_v2(groups, recipe.opt, lr, momentum=recipe.momentum, **given)


def create_schedule(optimizer: Optimizer, recipe: Recipe, updates_per_epoch: int) -> tuple[Scheduler, int]:
    """timm's schedule, stepped each update, and the epochs of a whole run with it."""
    return create_scheduler_v2(
        optimizer,
        recipe.sched,
        num_epochs=recipe.epochs,
        decay_epochs=recipe.decay_epochs,
        decay_milestones=recipe.decay_milestones,
        cooldown_epochs=recipe.cooldown_epochs,
        decay_rate=recipe.decay_rate,
        min_lr=recipe.min_lr,
        warmup_lr=recipe.warmup_lr,
        warmup_epochs=recipe.warmup_epochs,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
