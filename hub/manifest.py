"""Write the manifest of pretrained sources from the zoo's registered models: `python -m hub.manifest`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

from huggingface_hub import get_hf_file_metadata, hf_hub_url
from timm.models import get_pretrained_cfg

import fdconv_zoo
from fdconv_zoo.default_cfgs import zoo_tags
from fdconv_zoo.download import Source

PATH = Path(fdconv_zoo.__file__).with_name("pretrained_manifest.json")


def sources(known: Iterable[Source]) -> list[Source]:
    """One source for each file that a registered model of the zoo loads; what is already known about it is kept."""
    old = {(source.repo, source.file): source for source in known}
    configs = [get_pretrained_cfg(name) for name in zoo_tags()]
    wanted = {Source(config.hf_hub_id, config.hf_hub_filename) for config in configs}
    return sorted((old.get((source.repo, source.file), source) for source in wanted), key=lambda source: source.repo)


def ask_hub(source: Source) -> Source:
    """`source` with the commit, size and sha256 that the Hub announces now, at the source's commit if it has one."""
    metadata = get_hf_file_metadata(hf_hub_url(source.repo, source.file, revision=source.commit))
    if source.sha256 and metadata.etag != source.sha256:
        raise SystemExit(f"{source.repo}/{source.file}: pinned sha256 {source.sha256}, the Hub has {metadata.etag}")
    return replace(
        source,
        commit=metadata.commit_hash,
        size=metadata.size,
        sha256=metadata.etag,
        checked="announced by the Hub",
    )


def read(path: Path) -> list[Source]:
    return [Source(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))["sources"]]


def render(entries: Iterable[Source]) -> str:
    lines = ",\n".join(json.dumps(asdict(entry)) for entry in entries)
    return f'{{"sources": [\n{lines}\n]}}\n'


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m hub.manifest",
        description="Write fdconv_zoo/pretrained_manifest.json from the registered models, keeping what is known.",
        epilog="example: python -m hub.manifest --ask-hub    # where there is a network: fill in what is unknown",
    )
    parser.add_argument("--output", type=Path, default=PATH, help="file to update (default: the package's)")
    parser.add_argument("--ask-hub", action="store_true", help="ask the Hub for commit, size and sha256 of every file")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the file is out of date")
    args = parser.parse_args(argv)

    entries = sources(read(args.output) if args.output.exists() else [])
    if args.ask_hub:
        entries = [ask_hub(entry) for entry in entries]
    text = render(entries)
    if args.check:
        if args.output.read_text(encoding="utf-8") != text:
            raise SystemExit(f"{args.output} is out of date: run `python -m hub.manifest`")
        return
    args.output.write_text(text, encoding="utf-8")
    print(f"{args.output}: {len(entries)} sources, {sum(entry.sha256 is not None for entry in entries)} with a sha256")


if __name__ == "__main__":
    main()
