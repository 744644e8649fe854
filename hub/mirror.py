"""Copy pretrained weights for machines that do not see the Hub: `python -m hub.mirror --help`."""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import shutil
import sys
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi
from huggingface_hub.file_download import repo_folder_name
from timm.models import get_pretrained_cfg

from fdconv_zoo.default_cfgs import zoo_tags
from fdconv_zoo.download import PretrainedError, Source, download_verified, redact
from fdconv_zoo.integrity import check_repo_path, file_digest
from fdconv_zoo.pretrained import manifest
from hub.mirror_server import serve

INDEX = "mirror.json"
SMALL_FILES = ("config.json", "README.md", "LICENSE*")
EPILOG = """\
examples:
  python -m hub.mirror --cache-dir bundle 'resnet50_fdconv*'   # then: HF_HUB_CACHE=bundle HF_HUB_OFFLINE=1
  python -m hub.mirror --output mirror resnet50.a1_in1k me/my-model
  python -m hub.mirror --output mirror --serve                 # then: HF_ENDPOINT=http://127.0.0.1:8000

Files that are there and intact are not fetched again: run the same command again after an interruption.
To carry a cache bundle over: tar cf bundle.tar bundle
"""


def select(patterns: Iterable[str], sources: Iterable[Source]) -> list[Source]:
    """The sources that the patterns name, and every file of a repository that is none of them.

    Args:
        patterns: Names or wildcards of the zoo's models (`resnet50_fdconv.a1_in1k_converted`), of the static models
            they start from, or of repositories (`owner/name` or `owner/name@revision`).
        sources: What names and wildcards are looked up in.

    Raises:
        ValueError: A pattern matches nothing.
    """
    chosen: dict[tuple[str, str, str | None], Source] = {}
    for pattern in patterns:
        of_zoo = {
            get_pretrained_cfg(tag).hf_hub_id
            for tag in zoo_tags()
            if fnmatch.fnmatchcase(tag, pattern) or fnmatch.fnmatchcase(tag.partition(".")[0], pattern)
        }
        static = (pattern, f"*/{pattern}", f"*/{pattern}.*")
        found = [
            source
            for source in sources
            if source.repo in of_zoo or any(fnmatch.fnmatchcase(source.repo, name) for name in static)
        ]
        if not found and "/" in pattern and not set(pattern) & set("*?["):
            found = list_repo(pattern)
        if not found:
            raise ValueError(f"{pattern!r} matches no pretrained source and is no repository (owner/name)")
        chosen.update(((source.repo, source.file, source.commit), source) for source in found)
    return list(chosen.values())


def list_repo(name: str) -> list[Source]:
    """Weights, config and card of any repository on the Hub, pinned to its current commit.

    Raises:
        ValueError: The listing holds a path that would leave the folder.
    """
    repo, _, revision = name.partition("@")
    info = HfApi().model_info(repo, revision=revision or None)
    files = [sibling.rfilename for sibling in info.siblings or ()]
    for file in files:
        check_repo_path(file)
    wanted = ("*.safetensors", *SMALL_FILES)
    return [
        Source(repo, file, info.sha)
        for file in files
        if any(fnmatch.fnmatchcase(PurePosixPath(file).name, pattern) for pattern in wanted)
    ]


def check_one_commit(sources: Iterable[Source]) -> None:
    """Raises a ValueError if a file is wanted at two commits, for which a folder has one place."""
    commits: dict[tuple[str, str], str | None] = {}
    for source in sources:
        other = commits.setdefault((source.repo, source.file), source.commit)
        if other != source.commit:
            raise ValueError(
                f"{source.repo}/{source.file} is wanted at {other} and at {source.commit}, but a folder holds one of "
                "them: take another --output for each, or --cache-dir"
            )


def read_index(folder: Path) -> dict[tuple[str, str], Source]:
    """What a mirror folder holds, each file with its commit, size and sha256."""
    path = folder / INDEX
    entries = json.loads(path.read_text(encoding="utf-8"))["files"] if path.exists() else []
    return {(entry["repo"], entry["file"]): Source(**entry) for entry in entries}


def write_index(folder: Path, index: dict[tuple[str, str], Source]) -> None:
    temporary = folder / f".{INDEX}.tmp"
    temporary.write_text(json.dumps({"files": [asdict(source) for source in index.values()]}, indent=1) + "\n")
    temporary.replace(folder / INDEX)


def copy_to_folder(source: Source, folder: Path) -> bool:
    """Put a verified file at folder/owner/name/file and into the folder's index.

    Returns:
        Whether it had to be downloaded.

    Raises:
        PretrainedError: It could not be had.
    """
    known = read_index(folder).get((source.repo, source.file))
    target = folder / source.repo / source.file
    same = known and (source.sha256 or known.sha256) == known.sha256 and source.commit in (None, known.commit)
    if same and target.exists() and file_digest(target) == known.sha256:
        return False
    # Of this file alone: another process may be at another one.
    download = folder / ".download" / f"{source.repo}--{source.file}".replace("/", "--")
    path = download_verified(source, download)
    commit = path.parts[-1 - len(PurePosixPath(source.file).parts)]  # .../snapshots/COMMIT/file
    entry = replace(
        source, commit=commit, size=path.stat().st_size, sha256=file_digest(path), checked="downloaded and verified"
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.copyfile(path, temporary)
    temporary.replace(target)
    shutil.rmtree(download)
    with contextlib.suppress(OSError):  # not empty
        download.parent.rmdir()
    write_index(folder, {**read_index(folder), (source.repo, source.file): entry})
    return True


def copy_to_cache(source: Source, cache_dir: Path, revision_named: bool) -> bool:
    """Put a verified file into a Hub cache.

    Args:
        source: The file, at its commit.
        cache_dir: The cache.
        revision_named: Whether that commit was asked for. Else it is what the cache has for the main branch, if it has
            nothing yet: what is asked for without a commit is found offline by that alone.

    Returns:
        Whether it was new there.

    Raises:
        PretrainedError: It could not be had.
    """
    before = {path.resolve() for path in cache_dir.glob("models--*/blobs/*")}
    path = download_verified(source, cache_dir)
    main = cache_dir / repo_folder_name(repo_id=source.repo, repo_type="model") / "refs" / "main"
    if source.commit and not revision_named and not main.exists():
        main.parent.mkdir(parents=True, exist_ok=True)
        main.write_text(source.commit, encoding="utf-8")
    return path.resolve() not in before


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m hub.mirror",
        description="Copy pretrained weights, verified, into a folder or a Hub cache, or serve such a folder as a Hub.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what")
    what.add_argument("sources", nargs="*", help="model names, wildcards ('*' for all), or repositories owner/name")
    where = parser.add_argument_group("where to").add_mutually_exclusive_group(required=True)
    where.add_argument("--output", type=Path, metavar="DIR", help="folder: DIR/owner/name/model.safetensors")
    where.add_argument("--cache-dir", type=Path, metavar="DIR", help="Hub cache, for HF_HUB_CACHE and HF_HUB_OFFLINE=1")
    parser.add_argument("--dry-run", action="store_true", help="print what would be fetched")
    server = parser.add_argument_group("serving")
    server.add_argument("--serve", action="store_true", help="serve the --output folder as an HF_ENDPOINT")
    server.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    server.add_argument("--port", type=int, default=8000, help="port (default: 8000; 0 for any that is free)")
    args = parser.parse_args(argv)
    if args.serve and not args.output:
        parser.error("--serve needs --output")
    if not args.serve and not args.sources:
        parser.error("name what to fetch ('*' for all), or --serve")

    try:
        of_main = select([name for name in args.sources if "@" not in name], manifest())
        chosen = list(dict.fromkeys([*of_main, *select([name for name in args.sources if "@" in name], manifest())]))
        if args.output:
            check_one_commit(chosen)
    except Exception as error:  # the Hub's own errors differ by its library's version
        parser.exit(2, f"{parser.prog}: {redact(str(error))}\n")
    failed = []
    for number, source in enumerate(chosen, 1):
        name = f"[{number}/{len(chosen)}] {source.repo}/{source.file}"
        if args.dry_run:
            print(f"{name}: {source.size or 'unknown'} bytes, sha256 {source.sha256 or 'from the Hub'}")
            continue
        try:
            if args.output:
                new = copy_to_folder(source, args.output)
            else:
                new = copy_to_cache(source, args.cache_dir, revision_named=source not in of_main)
            print(f"{name}: {'downloaded' if new else 'already there'}", flush=True)
        except PretrainedError as error:
            failed.append(name)
            print(f"{name}: {error}", file=sys.stderr)
    if failed:
        parser.exit(1, f"{len(failed)} of {len(chosen)} failed; run the same command again to fetch only those\n")
    if args.serve:
        serve(args.output, read_index(args.output), args.host, args.port)


if __name__ == "__main__":
    main()
