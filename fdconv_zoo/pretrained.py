"""Where pretrained weights come from: the pinned sources of the zoo's tags, and `pretrained=True` by way of them.

Only safetensors come from the network, never a pickle.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from safetensors import safe_open
from timm.models import PretrainedCfg, load_state_dict, resolve_pretrained_cfg
from torch import Tensor

from .download import WAYS_OUT, WEIGHTS_NAME, PretrainedError, Source, download_verified, redact
from .integrity import check_safetensors

__all__ = ["PretrainedError", "Source", "download_verified", "find_source", "manifest", "resolve_pretrained"]


@cache
def manifest() -> tuple[Source, ...]:
    """The sources of the zoo's tags, as `python -m hub.manifest` writes them."""
    text = resources.files("fdconv_zoo").joinpath("pretrained_manifest.json").read_text(encoding="utf-8")
    return tuple(Source(**entry) for entry in json.loads(text)["sources"])


def find_source(hub_id: str, file: str = WEIGHTS_NAME) -> Source:
    """The manifest's source for `owner/name` or `owner/name@revision`, else one with nothing known."""
    repo, _, revision = hub_id.partition("@")
    for source in manifest():
        if (source.repo, source.file) == (repo, file) and revision in ("", source.commit):
            return source
    return Source(repo, file, revision or None)


def resolve_pretrained(
    variant: str,
    pretrained_cfg: PretrainedCfg | dict[str, Any] | str | None = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | Path | None = None,
) -> dict[str, Any]:
    """Download and verify what `pretrained=True` asks for, and point timm at the local file.

    Call it before `build_model_with_cfg`, with the same arguments, and hand it the overlay that comes back.

    Args:
        variant: Model name without its tag.
        pretrained_cfg: As timm passes it to an entry point: a config, a tag, or None for the default.
        pretrained_cfg_overlay: The caller's overlay.
        cache_dir: Hub cache; None is huggingface_hub's own (HF_HUB_CACHE).

    Returns:
        The overlay, with `file` set to the verified download if the source is the Hub. A local folder, a `file` and
        a `state_dict` stay as they are; the last two also win over the source of an `hf-hub:` or `local-dir:` name.
        `num_classes` is that of the weights, unless the caller gave it: where timm takes weights to be of another
        number of classes than the model, it leaves the classifier random without a word.

    Raises:
        PretrainedError: Nothing trustworthy could be had.
    """
    overlay = dict(pretrained_cfg_overlay or {})
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, overlay)
    if cfg.source and (overlay.get("file") or overlay.get("state_dict")):
        overlay["source"] = None  # timm looks at an `hf-hub:` or `local-dir:` name's source first
        cfg = replace(cfg, source=None)
    if cfg.source == "local-dir":
        return overlay
    if cfg.source != "hf-hub" and cfg.state_dict:
        return _with_classes(overlay, cfg, cfg.state_dict)
    if cfg.source != "hf-hub" and cfg.file:
        _check_local(Path(cfg.file))
        return _with_classes(overlay, cfg, Path(cfg.file))
    if not cfg.hf_hub_id:
        if cfg.url:
            raise PretrainedError(
                f"{variant}: weights at a bare URL ({redact(str(cfg.url))}) are refused: they are pickles, and no "
                f"digest is known for them. Give a Hub repository (hf_hub_id) instead.\n{WAYS_OUT}"
            )
        return overlay  # no weights at all: timm says so itself
    file = cfg.hf_hub_filename or WEIGHTS_NAME
    if not file.endswith(".safetensors"):
        raise PretrainedError(
            f"{cfg.hf_hub_id}/{file} is refused: only .safetensors files are loaded from the network, never a pickle. "
            f"Ask the owner for {WEIGHTS_NAME}, or download and convert the file yourself.\n{WAYS_OUT}"
        )
    path = download_verified(find_source(cfg.hf_hub_id, file), cache_dir)
    _check_local(path)
    return _with_classes({**overlay, "file": str(path), "source": None}, cfg, path)


def _shapes(state_dict: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state_dict.items() if isinstance(value, Tensor)}


def _read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of a local file's weights, as timm reads them; none of one that can't be read, which timm tells itself."""
    try:
        if path.suffix != ".safetensors":
            return _shapes(load_state_dict(str(path)))
        with safe_open(path, "pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except Exception:  # unpicklers raise anything
        return {}


def _with_classes(overlay: dict[str, Any], cfg: PretrainedCfg, weights: Path | Mapping[str, Any]) -> dict[str, Any]:
    """The overlay with the number of classes of these weights, where they tell it and nobody else did."""
    names = (cfg.classifier,) if isinstance(cfg.classifier, str) else cfg.classifier or ()
    if not names or "num_classes" in overlay or cfg.label_offset:
        return overlay
    shapes = _read_shapes(weights) if isinstance(weights, Path) else _shapes(weights)
    counts = [shapes[key][0] for key in (f"{name}.weight" for name in names) if key in shapes]
    return {**overlay, "num_classes": counts[0]} if counts else overlay


def _check_local(path: Path) -> None:
    """A local file: there, and if it says that it is a safetensors file, one. timm loads others with weights_only."""
    try:
        if path.suffix == ".safetensors":
            check_safetensors(path)
        path.open("rb").close()
    except (OSError, ValueError) as error:
        raise PretrainedError(
            f"Could not use the local file {path}: {redact(f'{type(error).__name__}: {error}')}\n{WAYS_OUT}"
        ) from None
