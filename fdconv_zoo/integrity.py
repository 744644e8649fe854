"""Whether a file is what it is said to be: digests, the header of safetensors, paths that stay in their folder."""

from __future__ import annotations

import hashlib
from pathlib import Path, PureWindowsPath

from huggingface_hub import constants

__all__ = ["CorruptFileError", "check_repo_path", "check_safetensors", "file_digest", "matches"]

MAX_HEADER_BYTES = constants.SAFETENSORS_MAX_HEADER_LENGTH


class CorruptFileError(OSError):
    """A file's content is not what its digest says."""


def check_repo_path(path: str) -> None:
    """Refuse a path that, joined to a folder on any system, could lead out of it.

    Raises:
        ValueError: The path is absolute, has a drive or a share, or goes up.
    """
    windows = PureWindowsPath(path)  # takes / and \\ for separators, and knows drives and shares
    if not path or windows.anchor or ".." in windows.parts:
        raise ValueError(f"the path {path!r} leaves its folder")


def check_safetensors(path: Path) -> None:
    """Refuse a file whose header could not be a safetensors header, before any parser sees it.

    Raises:
        ValueError: The header's size is absurd (above `MAX_HEADER_BYTES` or the file's own size) or it is not JSON.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        start = file.read(1)
    limit = min(MAX_HEADER_BYTES, path.stat().st_size - 8)
    if not 2 <= length <= limit or start != b"{":
        raise ValueError(
            f"{path} is no safetensors file: its header claims {length} bytes (2 to {limit} are possible) "
            f"and starts with {start!r} instead of b'{{'"
        )


def file_digest(path: Path, git: bool = False) -> str:
    """Hexadecimal sha256 of a file, or the sha1 under which git stores it."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size) if git else hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def matches(path: Path, digest: str) -> bool:
    """Whether a file's content has this digest: sha256, or git's sha1 as the Hub's ETags of small files."""
    return file_digest(path, git=len(digest) == 40) == digest
