"""Publish a model on the Hugging Face Hub: `python -m hub.publish --help`."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import safetensors
import timm
import torch
from huggingface_hub import CommitOperationAdd, HfApi, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import save_file
from timm.models import save_for_hf

import fdconv_zoo  # noqa: F401  (registers the models)
from fdconv_zoo.download import WAYS_OUT, WEIGHTS_NAME, redact
from fdconv_zoo.integrity import file_digest
from hub.card import render_card
from hub.release import Release, read_run, read_tag, read_weights
from hub.verify import FORWARD_PASS, run_model

PUBLISHED = (WEIGHTS_NAME, "config.json", "README.md", FORWARD_PASS)
DIRT = {
    "an access token": re.compile(r"\bhf_[A-Za-z0-9]{20,}"),
    "a path of this machine": re.compile(r"(?<![\w/.:])(?:/(?:home|root|Users|mnt|tmp|data|scratch|work)/|[A-Z]:\\)"),
    "an e-mail address": re.compile(r"[\w.+-]+@[\w-]+\.[\w.]+"),
}
# In place of the ways out that are calls of the library.
NO_WEIGHTS = """Ways out: a mirror (HF_ENDPOINT) or a filled cache (HF_HUB_CACHE), see `python -m hub.mirror --help`;
or a local file: python -m hub.publish weights.safetensors --model NAME ..."""
EPILOG = """\
examples:
  python -m hub.publish outputs/flowers --repo me/resnet50_fdconv.flowers --license apache-2.0 --dataset flowers102
  python -m hub.publish resnet50_fdconv.a1_in1k_converted --repo me/resnet50_fdconv.a1_in1k_converted
  python -m hub.publish weights.safetensors --model resnet50_fdconv --repo me/mine --license mit --dataset mine

The token is that of `hf auth login` or HF_TOKEN; with --dry-run none is needed. Publishing the same again changes
nothing; if someone else commits in between, nothing is overwritten and the command says so.
"""


def read_release(args: argparse.Namespace) -> Release:
    """What the command line names: a run's directory, a weight file, or a model name."""
    path = Path(args.source)
    if path.is_dir():
        release = read_run(path, args.weights)
    elif path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(f"{path} is refused: a lone file must be .safetensors, no pickle")
        if not args.model:
            raise ValueError(f"name the model of {path} with --model")
        release = replace(read_weights(path, args.model, **args.model_kwargs), base_model=None, license=None)
    elif "/" in args.source and ":" not in args.source:  # a model's name has none
        raise ValueError(f"there is no folder or file {path}")
    else:
        release = read_tag(args.source)
    if release.start in ("file", "unknown") and not args.base_model:
        raise ValueError(
            f"the run started from weights of a file, {release.recipe.get('start', 'which nobody knows')}: name their "
            "repository with --base-model owner/name, or --base-model none if they are in none"
        )
    base_model = None if args.base_model == "none" else args.base_model or release.base_model
    release = replace(
        release,
        license=args.license or release.license,
        base_model=base_model,
        datasets=tuple(args.dataset) or release.datasets,
    )
    if not release.license:
        raise ValueError("name the licence of the weights with --license (a Hub identifier, such as apache-2.0)")
    if not release.datasets:
        raise ValueError("name the training data with --dataset (a data set on the Hub, or a name)")
    return release


def write_folder(release: Release, repo: str, folder: Path) -> None:
    """Write everything that is published: weights, config, card, and a stored forward pass.

    Raises:
        ValueError: A weight is not finite, or something is left that does not belong on the Hub.
    """
    model = release.model
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{name} holds values that are not finite")
    labels = {"label_names": list(release.label_names)} if release.label_names else {}
    save_for_hf(model, str(folder), labels, safe_serialization=True, data_config=release.data_config)
    # Written again with the metadata that transformers demands.
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / WEIGHTS_NAME, {"format": "pt"})

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.get("model_args", {}).pop("num_classes", None)  # transformers passes num_classes itself, and once too often
    config["pretrained_cfg"]["license"] = release.license
    if release.trained:
        for key in ("tag", "description", "origin_url", "paper_ids", "paper_name", "notes"):
            config["pretrained_cfg"].pop(key, None)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    sha256 = file_digest(folder / WEIGHTS_NAME)
    size = release.data_config["input_size"]
    image = torch.randn(1, *size, generator=torch.Generator().manual_seed(0)).half()
    output = run_model(folder, image)  # of the written files, not of the model in memory
    save_file({"input": image, "output": output}, folder / FORWARD_PASS, {"sha256": sha256})
    (folder / "README.md").write_text(render_card(release, repo, sha256), encoding="utf-8")
    check_clean(folder)


def check_clean(folder: Path) -> None:
    """Refuse pickles, strange files and metadata that tells about this machine.

    Raises:
        ValueError: Names the file and the kind of dirt, not the dirt itself.
    """
    for path in sorted(folder.iterdir()):
        if path.name not in PUBLISHED:
            raise ValueError(f"{path.name} does not belong in a published model, only {', '.join(PUBLISHED)}")
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, "pt") as file:
                text = json.dumps(file.metadata())
        else:
            text = path.read_text(encoding="utf-8")
        for kind, pattern in DIRT.items():
            if pattern.search(text):
                raise ValueError(f"{path.name} holds {kind}")


def upload(folder: Path, repo: str, private: bool) -> tuple[str, bool]:
    """Commit the folder on top of the repository's head.

    Returns:
        The commit, and whether it is new.

    Raises:
        ValueError: Someone else committed in between.
    """
    api = HfApi()
    repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
    info = api.model_info(repo)
    files = sorted(path.name for path in folder.iterdir())
    present = [sibling.rfilename for sibling in info.siblings or ()]
    if WEIGHTS_NAME in present and FORWARD_PASS in present:
        announced = get_hf_file_metadata(hf_hub_url(repo, WEIGHTS_NAME, revision=info.sha, endpoint=api.endpoint)).etag
        if announced == file_digest(folder / WEIGHTS_NAME):
            files.remove(FORWARD_PASS)  # the last bits of an output differ from machine to machine
    operations = [CommitOperationAdd(name, folder / name) for name in files]
    try:
        commit = api.create_commit(repo, operations, commit_message="Publish weights", parent_commit=info.sha)
    except HfHubHTTPError as error:
        if error.response.status_code == 412:
            raise ValueError(f"someone else committed to {repo} in between: look at it, then run again") from error
        raise
    return commit.oid, commit.oid != info.sha


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m hub.publish",
        description="Publish a model on the Hugging Face Hub: weights, config.json, model card, stored forward pass.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what")
    what.add_argument("source", help="directory of scripts/train.py, .safetensors file, or model name")
    what.add_argument("--weights", help="file in the directory (default: model_best, else last)")
    what.add_argument("--model", help="model name of a lone .safetensors file")
    what.add_argument(
        "--model-kwargs",
        nargs="*",
        default={},
        action=timm.utils.ParseKwargs,
        metavar="NAME=VALUE",
        help="arguments of that model, such as num_classes=102",
    )
    where = parser.add_argument_group("where to")
    where.add_argument("--repo", required=True, help="owner/name; created if need be")
    where.add_argument("--private", action="store_true", help="create it private")
    where.add_argument("--output", type=Path, help="write the published files into this new folder too")
    where.add_argument("--dry-run", action="store_true", help="write and check the files, upload nothing")
    card = parser.add_argument_group("card")
    card.add_argument("--license", help="licence identifier of the Hub (default: the base model's)")
    card.add_argument(
        "--base-model", help="owner/name of the weights it started from, or none (default: known from the run)"
    )
    card.add_argument("--dataset", nargs="+", default=[], help="training data (default: known from the run or tag)")
    args = parser.parse_args(argv)
    if args.output and args.output.exists():
        parser.error(f"--output {args.output} exists")

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        try:
            write_folder(read_release(args), args.repo, folder)
            if args.output:
                shutil.copytree(folder, args.output)
            for path in sorted(folder.iterdir()):
                print(f"{path.name}: {path.stat().st_size} bytes, sha256 {file_digest(path)}")
            if args.dry_run:
                print(f"dry run: nothing uploaded to {args.repo}")
                return
            commit, new = upload(folder, args.repo, args.private)
        except Exception as error:  # a bad source or the Hub's refusal, without a token in it
            parser.exit(1, f"{parser.prog}: {redact(str(error).replace(WAYS_OUT, NO_WEIGHTS))}\n")
    print(f"{'published' if new else 'already up to date'}: hf-hub:{args.repo}@{commit}")


if __name__ == "__main__":
    main()
