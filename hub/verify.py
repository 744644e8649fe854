"""Check weights against their digests and against a stored forward pass: `python -m hub.verify --help`."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from safetensors import safe_open

import fdconv_zoo  # noqa: F401  (registers the models)
from fdconv_zoo.download import WEIGHTS_NAME, PretrainedError, Source, download_verified, find_cached, redact
from fdconv_zoo.integrity import check_safetensors, file_digest
from fdconv_zoo.pretrained import find_source, manifest
from hub.mirror import INDEX, list_repo, read_index

FORWARD_PASS = "forward_pass.safetensors"
TOLERANCE = 1e-3
EPILOG = """\
examples:
  python -m hub.verify --cache                      # every source of the manifest that lies in the Hub cache
  python -m hub.verify --folder mirror              # a folder of hub.mirror
  python -m hub.verify --folder outputs/my-model    # a folder of hub.publish: digest and forward pass
  python -m hub.verify --repo me/my-model           # the same on the Hub
"""


class Finding(NamedTuple):
    """One thing looked at: its name, whether it is right, and in words what was found."""

    name: str
    good: bool
    text: str


def compare(name: str, path: Path, sha256: str | None) -> Finding:
    """A file's content against a digest."""
    if not path.is_file():
        return Finding(name, False, "missing")
    digest = file_digest(path)
    if sha256 is None:
        return Finding(name, True, f"no digest known; it has sha256 {digest}")
    return Finding(name, digest == sha256, "sha256 right" if digest == sha256 else f"corrupt: sha256 {digest}")


def verify_cache(cache_dir: Path | None, sources: Iterable[Source]) -> list[Finding]:
    """Each copy of a source that would be taken from the Hub cache, against the manifest or the digest it came with."""
    findings = []
    for source in sources:
        copies = {path.resolve(): path for path in find_cached(source, cache_dir)}
        for path in copies.values():
            announced = path.readlink().name if path.is_symlink() else None
            findings.append(compare(f"{source.repo}/{source.file}", path, source.sha256 or announced))
    return findings


def verify_folder(folder: Path) -> list[Finding]:
    """A folder of hub.mirror or of hub.publish.

    Raises:
        ValueError: There is no such folder, or it is neither.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    if (folder / INDEX).exists():
        findings = []
        for source in read_index(folder).values():
            name, pinned = f"{source.repo}/{source.file}", find_source(source.repo, source.file).sha256
            findings.append(compare(name, folder / source.repo / source.file, source.sha256))
            if pinned not in (None, source.sha256):
                findings.append(Finding(name, False, f"differs from the manifest, which pins {pinned}"))
        return findings
    if not (folder / FORWARD_PASS).exists():
        raise ValueError(f"{folder} holds neither {INDEX} (hub.mirror) nor {FORWARD_PASS} (hub.publish)")
    return verify_model(str(folder), folder)


def verify_model(name: str, folder: Path) -> list[Finding]:
    """A published model: its weights' digest and its output on the stored input."""
    for file in (WEIGHTS_NAME, FORWARD_PASS):
        check_safetensors(folder / file)
    with safe_open(folder / FORWARD_PASS, "pt") as stored:
        sha256 = stored.metadata()["sha256"]
        image, expected = stored.get_tensor("input"), stored.get_tensor("output")
    findings = [compare(f"{name}/{WEIGHTS_NAME}", folder / WEIGHTS_NAME, sha256)]
    if findings[0].good:
        error = relative_error(run_model(folder, image), expected)
        text = f"largest difference {error:.1e} of the largest output, {TOLERANCE:.0e} allowed"
        findings.append(Finding(f"{name} forward pass", error <= TOLERANCE, text))
    return findings


def run_model(folder: Path, image: torch.Tensor) -> torch.Tensor:
    """Output of the model in a folder for `image` (B, C, H, W)."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        return model(image.float())


def relative_error(output: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected value; infinite where the shapes differ or values are not finite."""
    if output.shape != expected.shape or not output.isfinite().all():
        return float("inf")
    return ((output - expected).abs().max() / expected.abs().max().clamp_min(1e-12)).item()


def verify_repo(name: str, cache_dir: Path | None) -> list[Finding]:
    """A repository: what the Hub announces against the manifest; a published model is also downloaded and run."""
    files = list_repo(name)
    findings = []
    for source in files:
        pinned = find_source(source.repo, source.file)
        if pinned.sha256:
            url = hf_hub_url(source.repo, source.file, revision=source.commit)
            announced = get_hf_file_metadata(url).etag
            text = "announced as pinned" if announced == pinned.sha256 else f"announced {announced}, not as pinned"
            findings.append(Finding(f"{source.repo}/{source.file}", announced == pinned.sha256, text))
    if FORWARD_PASS in [source.file for source in files]:
        needed = [source for source in files if source.file in (WEIGHTS_NAME, "config.json", FORWARD_PASS)]
        paths = [download_verified(source, cache_dir) for source in needed]
        findings += verify_model(name, paths[0].parent)
    return findings or [Finding(name, False, f"nothing to check it by: not in the manifest and no {FORWARD_PASS}")]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m hub.verify",
        description="Check weights: digests against the manifest, published models against their stored forward pass.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--cache", action="store_true", help="the Hub cache (see --cache-dir)")
    what.add_argument("--folder", type=Path, help="a folder written by hub.mirror or hub.publish")
    what.add_argument("--repo", help="a repository on the Hub: owner/name or owner/name@revision")
    parser.add_argument("--cache-dir", type=Path, help=f"Hub cache (default: {constants.HF_HUB_CACHE})")
    parser.add_argument("--dry-run", action="store_true", help="print what would be checked")
    args = parser.parse_args(argv)

    if args.dry_run:
        target = args.folder or args.repo or args.cache_dir or constants.HF_HUB_CACHE
        print(f"would check {target} against {len(manifest())} sources of the manifest")
        return
    try:
        if args.cache:
            findings = verify_cache(args.cache_dir, manifest())
        else:
            findings = verify_folder(args.folder) if args.folder else verify_repo(args.repo, args.cache_dir)
    except PretrainedError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    except Exception as error:  # a listing or a config that can't be read; the Hub's errors differ by version
        # Our own say what is wrong; others often make no sense without their type.
        reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        parser.exit(2, f"{parser.prog}: {redact(reason)}\n")
    for finding in findings:
        print(f"{'ok ' if finding.good else 'BAD'}  {finding.name}: {finding.text}")
    bad = sum(not finding.good for finding in findings)
    print(f"{len(findings)} checked, {bad} bad")
    parser.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
