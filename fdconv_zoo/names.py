"""Names of models, as commands take them."""

import difflib

import timm

__all__ = ["check_name"]


def check_name(name: str) -> None:
    """Refuse a name that timm does not know; `hf-hub:` and `local-dir:` names are not looked up.

    Raises:
        ValueError: Names close matches.
    """
    if ":" in name:
        return
    if not timm.is_model(name) or ("." in name and name not in timm.list_models(include_tags=True)):
        close = difflib.get_close_matches(name, [*timm.list_models(), *timm.list_pretrained()], n=4)
        raise ValueError(f"unknown model {name}" + (f", did you mean {', '.join(close)}?" if close else ""))
