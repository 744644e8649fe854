"""Downloads from the Hugging Face Hub whose content is checked, and one error for all that can go wrong.

huggingface_hub checks a download's size, never its content, and reuses whatever lies in its cache. Here every file
is compared with its digest before anything may load it: the pinned sha256, or where none is known the one that the
Hub itself announces as the file's ETag.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import (
    constants,
    get_hf_file_metadata,
    get_token,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RevisionNotFoundError

from .integrity import CorruptFileError, check_repo_path, matches
from .version import __version__

__all__ = ["PretrainedError", "Source", "download_verified", "redact"]

_logger = logging.getLogger(__name__)

WEIGHTS_NAME = "model.safetensors"
TRANSIENT_STATUS = (408, 429, 500, 502, 503, 504)
LEFTOVER_SECONDS = 3600  # a live download writes, or times out, far more often

WAYS_OUT = """Ways out:
  1. a mirror: set HF_ENDPOINT to its address (`python -m hub.mirror --help` makes and serves one)
  2. a local file: timm.create_model(..., pretrained=True, pretrained_cfg_overlay=dict(file='model.safetensors'))
  3. an offline cache: fill one with `python -m hub.mirror --cache-dir DIR` where there is a network, then set
     HF_HUB_OFFLINE=1 and pass cache_dir=DIR (or set HF_HUB_CACHE=DIR)"""


class PretrainedError(RuntimeError):
    """Pretrained weights could not be had, or not be trusted; the message says what was tried and the ways out."""


@dataclass(frozen=True)
class Source:
    """One weight file on the Hub.

    Attributes:
        repo: Repository, `owner/name`.
        file: Path within the repository.
        commit: Commit (or tag or branch) to take it from; None is the main branch.
        size: Bytes, where known.
        sha256: Digest of the content, where known.
        checked: Where commit, size and sha256 were seen.
    """

    repo: str
    file: str = WEIGHTS_NAME
    commit: str | None = None
    size: int | None = None
    sha256: str | None = None
    checked: str | None = None

    @property
    def pinned(self) -> bool:
        """Whether the content can't change: known by digest or by commit."""
        return bool(self.sha256 or re.fullmatch("[0-9a-f]{40}", self.commit or ""))


def download_verified(
    source: Source,
    cache_dir: str | Path | None = None,
    *,
    endpoint: str | None = None,
    attempts: int = 4,
    backoff: float = 1.0,
) -> Path:
    """Path of the file in the Hub cache, downloaded if need be, its content compared with its digest.

    A pinned file that is in the cache and intact costs no network. A corrupt one is downloaded again, once. Where the
    Hub does not answer, an intact file in the cache will do.

    Args:
        source: What to get.
        cache_dir: Hub cache; None is huggingface_hub's own (HF_HUB_CACHE).
        endpoint: Address of the Hub or a mirror; None is HF_ENDPOINT.
        attempts: How often to try; only errors that may pass (transport, 408, 429, 5xx, corrupt) are tried again.
        backoff: Seconds before the second attempt, doubled before each later one.

    Raises:
        PretrainedError: All attempts failed, or the error is one that trying again can't cure.
    """
    if attempts < 1:
        raise ValueError(f"attempts must be at least 1, got {attempts}")
    try:
        check_repo_path(source.file)
        cached = find_cached(source, cache_dir)
    except ValueError as error:  # a name that can't be
        raise _failure(source, cache_dir, endpoint, 0, error) from None
    intact = None
    for path in cached:
        # Hashed on every use, not once: it takes about 0.1 s per 100 MB, less than loading them, it needs no marker
        # that could outlive the file it vouches for, and it sees a disk that went bad since.
        digest = source.sha256 or _announced(path)
        if digest is None or matches(path, digest):
            if digest and source.pinned:
                return path
            intact = path
            break
        _logger.warning("%s does not have the digest %s; downloading it again", path, digest)
    force = bool(cached) and intact is None

    for attempt in itertools.count(1):
        try:
            return _download(source, cache_dir, endpoint, force)
        except RevisionNotFoundError as error:
            if source.commit and source.sha256:
                # The owner rewrote the history, or a mirror has its own: any commit with this digest is the same file.
                return download_verified(
                    replace(source, commit=None), cache_dir, endpoint=endpoint, attempts=attempts, backoff=backoff
                )
            raise _failure(source, cache_dir, endpoint, attempt, error) from None
        except Exception as error:  # httpx's, requests', xet's or the disk's: all mean that there is no file
            if intact and _is_silence(error):
                _logger.warning("the Hub does not answer (%s); using %s from the cache", _describe(error), intact)
                return intact
            corrupt_again = force and isinstance(error, CorruptFileError)
            if attempt == attempts or corrupt_again or not _is_transient(error):
                raise _failure(source, cache_dir, endpoint, attempt, error) from None
            force = force or isinstance(error, CorruptFileError)
            wait = backoff * 2 ** (attempt - 1)
            _logger.warning(
                "%s/%s: attempt %d of %d failed (%s); next in %g s",
                *(source.repo, source.file, attempt, attempts, _describe(error), wait),
            )
            time.sleep(wait)


def find_cached(source: Source, cache_dir: str | Path | None) -> list[Path]:
    """Copies of the file in the cache: at its commit, or where the digest tells, also on the main branch."""
    revisions = dict.fromkeys((source.commit, None) if source.sha256 else (source.commit,))
    found = [try_to_load_from_cache(source.repo, source.file, cache_dir, revision) for revision in revisions]
    return [Path(path) for path in found if isinstance(path, str)]


def _download(source: Source, cache_dir: str | Path | None, endpoint: str | None, force: bool) -> Path:
    """One attempt: ask for the digest, transfer, compare."""
    library = {"library_name": "fdconv_zoo", "library_version": __version__}
    # Asked here and not left to hf_hub_download, which spends 23 s of its own on retries when nothing listens.
    url = hf_hub_url(source.repo, source.file, revision=source.commit, endpoint=endpoint)
    announced = _require_digest(get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT, **library).etag)
    if source.sha256 and len(announced) == 64 and announced != source.sha256:
        raise ValueError(
            f"the Hub announces sha256 {announced} for the file, the manifest pins {source.sha256}: the repository "
            "has changed, or the pin is out of date"
        )
    path = Path(
        hf_hub_download(
            source.repo,
            source.file,
            revision=source.commit,
            cache_dir=cache_dir,
            endpoint=endpoint,
            force_download=force,
            **library,
        )
    )
    digest = source.sha256 or announced
    if not matches(path, digest):
        if force:
            # Left in the cache, the bad file would be loaded by programs that do not look.
            _blob(path).unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        raise CorruptFileError(f"the file's content does not have the digest {digest}")
    _sweep(_blob(path))
    return path


def _sweep(blob: Path) -> None:
    """Remove what killed downloads of `blob` left: huggingface_hub names each try anew and would keep them for ever."""
    for leftover in blob.parent.glob(f"{blob.name}.*incomplete"):
        with contextlib.suppress(OSError):  # another process was quicker, or the cache is read-only
            if time.time() - leftover.stat().st_mtime > LEFTOVER_SECONDS:
                leftover.unlink()


def redact(text: str) -> str:
    """`text` without access tokens, user names and passwords in URLs, and signed query strings."""
    token = get_token()
    if token:
        text = text.replace(token, "***")
    text = re.sub(r"\bhf_[A-Za-z0-9]{8,}", "hf_***", text)
    text = re.sub(r"(?<=://)[^/@\s]+@", "***@", text)
    return re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\")]+", r"\1?***", text)


def _blob(path: Path) -> Path:
    """Where the cache keeps the content of the snapshot file `path`: itself where there are no symbolic links."""
    return path.parent / os.readlink(path) if path.is_symlink() else path


def _announced(path: Path) -> str | None:
    """The ETag with which a cached file came: the cache names its blobs after it."""
    name = _blob(path).name
    return name if re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", name) else None


def _require_digest(etag: str | None) -> str:
    if not etag or not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", etag):
        raise ValueError(f"no digest in the ETag {etag!r}: what answers at this address is not a Hub or a mirror of it")
    return etag


def _is_silence(error: Exception) -> bool:
    """Whether the Hub gave no answer, as opposed to one that says no."""
    if isinstance(error, OfflineModeIsEnabled) or _is_unheard(error):
        return True
    return _is_transient(error) and not isinstance(error, CorruptFileError)


def _is_unheard(error: Exception) -> bool:
    """Whether not even a connection came about in 10 s, through TCP's own retries: a firewall, as a rule."""
    return type(error).__name__ == "ConnectTimeout"  # httpx's or requests', whichever huggingface_hub is built on


def _is_transient(error: Exception) -> bool:
    """Whether trying again may help."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in TRANSIENT_STATUS
    if isinstance(error, OfflineModeIsEnabled | ValueError) or _is_unheard(error):
        return False
    # The disk's errors carry an errno and stay; a short read, a reset or a timeout may pass.
    return not isinstance(error, OSError) or error.errno is None or isinstance(error, ConnectionError | TimeoutError)


def _describe(error: BaseException) -> str:
    return redact(" ".join(f"{type(error).__name__}: {error}".split()))


def _failure(
    source: Source, cache_dir: str | Path | None, endpoint: str | None, attempt: int, error: Exception
) -> PretrainedError:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    hint = "\n  private or gated? `hf auth login`, or set HF_TOKEN" if status in (401, 403) else ""
    return PretrainedError(
        f"Could not get pretrained weights.\n"
        f"  file:     {source.repo}/{source.file} at {source.commit or 'main'}\n"
        f"  endpoint: {redact(endpoint or constants.ENDPOINT)}\n"
        f"  cache:    {cache_dir or constants.HF_HUB_CACHE}\n"
        f"  attempts: {attempt}\n"
        f"  cause:    {_describe(error)}{hint}\n"
        f"{WAYS_OUT}"
    )
