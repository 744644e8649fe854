"""What the registered models share: their class, and building them the way timm does with verified weights."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, NamedTuple

from timm.models import build_model_with_cfg
from torch import Tensor, nn

from .checkpoint import describe_misfits, fits, strip_prefixes
from .choice import named_dynamic_layers
from .conversion import first_three, move_static_weights, replace_layers
from .layers.options import describe_names
from .pretrained import PretrainedError, resolve_pretrained


class ConvertedModel(nn.Module):
    """A model of timm's, converted: the first base of a class whose second is timm's.

    Options of the dynamic layers are keyword arguments of the model; all others are timm's. KSM's `norm_layer` and
    `act_layer` are called `ksm_norm_layer` and `ksm_act_layer`, since timm's models have their own; those of the other
    methods `attention_norm_layer`. Without pretrained weights the layers start as their paper has it.

    Args:
        *args: As for timm's model.
        weights_follow: Weights are loaded next: NaN stands for those of FDConv layers, whose transform takes as long as
            all the rest. :func:`build_fdconv` sees to it that none is left.
        **kwargs: As for timm's model, and the layers' options.

    Attributes:
        method: What :func:`~fdconv_zoo.convert` converts to.
        options: Options of the layers that such a model may be given.
        defaults: Those that differ from the layers' own.

    Raises:
        TypeError: On a keyword argument that neither the layers nor timm's model have; it lists those there are.
    """

    method: ClassVar[str] = "fdconv"
    options: ClassVar[frozenset[str]]
    defaults: ClassVar[dict[str, Any]] = {}

    def __init__(self, *args: Any, weights_follow: bool = False, **kwargs: Any) -> None:
        chosen, rest = self._split_options(kwargs)
        super().__init__(*args, **rest)
        replace_layers(self, self.method, self._rule_within, (), {**self.defaults, **chosen}, weights_follow)
        self._start_from_scratch()

    def _start_from_scratch(self) -> None:
        for _, layer in named_dynamic_layers(self):
            layer.start_from_scratch()

    @classmethod
    def _rule_within(cls, name: str, module: nn.Module) -> bool | None:
        return None if cls._include(name, module) else False

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> NamedTuple:
        """As of any module; a static model's weights, as `create_model(checkpoint_path=...)` hands over, are converted.

        Prefixes of wrappers go.

        Raises:
            RuntimeError: The state dict does not fit; names a key of a kind and the likely cause, where torch would
                list all keys.
        """
        stripped = strip_prefixes(state_dict, self)
        if stripped.keys() != state_dict.keys():
            state_dict = stripped  # else what it was, which has torch's versions of its modules
        if any(f"{name}.weight" in state_dict for name, _ in named_dynamic_layers(self)):
            try:
                state_dict = move_static_weights(state_dict, self)
            except ValueError as error:
                raise RuntimeError(f"the state dict does not fit: {error}") from None
            own = self.state_dict()
            on_meta = [key for key, value in state_dict.items() if isinstance(value, Tensor) and value.is_meta]
            if assign and 0 < len(on_meta) < len(state_dict):
                raise RuntimeError(
                    f"{on_meta[0]} is on the meta device and would stay there, as static weights say nothing of the "
                    "modulation: build the model with numbers, or call to_empty(device=...) and each layer's "
                    "reset_parameters() first"
                )
            if strict and not all(fits(key, own) for key in state_dict):
                raise RuntimeError(f"the state dict does not fit: {describe_misfits(state_dict, self)}")
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError:
            misfits = describe_misfits(state_dict, self) if strict else ""
            if not misfits:
                raise
            raise RuntimeError(f"the state dict does not fit: {misfits}") from None

    @staticmethod
    def _include(name: str, module: nn.Module) -> bool:
        """Whether a layer of the static model is replaced, if the paper's rules replace it."""
        raise NotImplementedError

    @classmethod
    def _split_options(cls, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Options of the layers by the layers' names, and what is left for timm's model."""
        part = "ksm" if cls.method == "fdconv" else "attention"
        own = {
            f"{part}_{option}" if option in ("norm_layer", "act_layer") else option: option for option in cls.options
        }
        known = inspect.signature(super().__init__).parameters
        unknown = [key for key in kwargs if key not in own and key not in known]
        # timm 1.0.26's SwinTransformer takes any keyword.
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
        if unknown and not takes_any:
            raise TypeError(
                f"{cls.__name__} has no keyword argument {describe_names(unknown)}; those of its dynamic layers are "
                f"{', '.join(sorted(own))}, those of timm's model {', '.join(k for k in known if k != 'self')}"
            )
        chosen = {option: kwargs[key] for key, option in own.items() if key in kwargs}
        return chosen, {key: value for key, value in kwargs.items() if key not in own}


def build_fdconv(
    model_cls: Callable[..., nn.Module],
    variant: str,
    pretrained: bool,
    pretrained_filter_fn: Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]],
    pretrained_strict: bool = True,
    **kwargs: Any,
) -> nn.Module:
    """Builds a registered model.

    Args:
        model_cls: Class of the model.
        variant: Registered name without a tag.
        pretrained: Loads pretrained weights.
        pretrained_filter_fn: Converts a checkpoint of the static model.
        pretrained_strict: Weights that lack a layer are refused, for FDConv layers also where the classifier differs.
        **kwargs: As for timm's `build_model_with_cfg`.

    Raises:
        PretrainedError: If the weights can't be had whole.
    """
    make = model_cls
    if pretrained:
        if pretrained_strict and getattr(model_cls, "method", None) == "fdconv":
            make = partial(model_cls, weights_follow=True)
        kwargs["pretrained_cfg_overlay"] = resolve_pretrained(
            variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"), kwargs.get("cache_dir")
        )
    model = build_model_with_cfg(
        make,
        variant,
        pretrained,
        pretrained_filter_fn=pretrained_filter_fn,
        pretrained_strict=pretrained_strict,
        **kwargs,
    )
    if left := [name for name, layer in named_dynamic_layers(model) if layer.expects_weights()]:
        raise PretrainedError(
            f"the weights for {variant} lack {len(left)} of its layers, or have NaN there: {first_three(left)}. "
            "pretrained_strict=False leaves such layers as they are drawn."
        )
    return model
