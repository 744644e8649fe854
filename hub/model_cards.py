"""Write MODEL_CARDS.md, the cards of all registered models: `python -m hub.model_cards`."""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import groupby, zip_longest
from pathlib import Path

import timm
from timm.models import get_pretrained_cfg, is_model_in_modules
from torch import nn

import fdconv_zoo
from fdconv_zoo import static_name
from fdconv_zoo.choice import named_fd_layers
from fdconv_zoo.cost import count_macs, count_parameters
from fdconv_zoo.default_cfgs import zoo_tags
from fdconv_zoo.pretrained import find_source
from hub.card import PAPER
from hub.families import FAMILIES, Family

PATH = Path(__file__).parents[1] / "MODEL_CARDS.md"
STATIC_RESULTS = Path(__file__).with_name("static_results.json")
TRAINED_WEIGHTS_SEEN = "mobilenetv2_100"  # the demo's

Variant = tuple[tuple[int, int, int], int]  # input size, number of classes

INTRODUCTION = """\
# Model cards

<!-- Written by `python -m hub.model_cards` from the registered models: change that, not this file. -->

{paper}
Every tag is a static ImageNet model of timm: its weights are downloaded from the Hub and moved into the Fourier domain
on load, with every gate at 1; those of other dynamic convolutions are converted likewise, their attention at rest. The
model then computes what its static base computes, and is ready for more training.

```python
import fdconv_zoo, timm
model = timm.create_model("resnet50_fdconv.a1_in1k_converted", pretrained=True)
```

**Every accuracy on this page is that of the static base, published by timm. None is of a trained FDConv model.**

## What was verified here, and what was not

Verified:

- Conversion on random weights: every architecture below gives the outputs of its static base, to a relative error of
  1e-8 in float64 (`pytest -m slow tests/hub/test_model_cards.py`).
- Conversion on trained weights: only `mobilenetv2_100_fdconv`, with torchvision's ImageNet weights, which are not
  those of its tag (`make demo`).
- Parameters and GMACs: counted from the models' shapes (`fdconv_zoo.cost`).

Not verified:

- The tags' files: no weight was ever downloaded from the Hub here. Where a commit or sha256 is given, the tables say
  where it was seen. Where no sha256 is known, a download is compared with the one that the Hub announces.
- Accuracy: no model was evaluated on ImageNet, static or converted. The figures are from
  [{file}]({url})
  of {repo} at commit {commit}.
- Accuracy of FDConv itself: no FDConv model was trained on ImageNet here, and no FDConv weights trained on ImageNet are
  public.

## For all models

- **Intended use**: start of fine-tuning with FDConv, backbone of dense heads (`features_only=True`), and ImageNet
  classification as the base does it.
- **To fine-tune FDConv, `ksm=False`**: with KSM a converted MobileNetV2 was behind the static one after some 500
  updates, by 3.3 points of mIoU and 0.7 of accuracy on two data sets of three; without it there was no telling them
  apart. No other network was tried, none with FBM ([experiments](docs/experiments.md)).
- **Limits**: each sample gets weights of its own, so time and memory grow more than GMACs, which leave out everything
  elementwise and all data movement. KSM has a batch norm over pooled features: training wants at least 2 images in a
  batch. Biases and errors are those of the base and its data, and so is the licence of the weights.
- **Columns**: parameters in millions, and GMACs for one image of the input size, static base → FDConv. "Test" is the
  size that timm evaluates the base at, where that differs. "Not published there": timm's table has no row; heads of
  11821 and 21841 classes (in12k, in22k) have no ImageNet-1k figure.
- **Citation**: the paper of FDConv ([CITATION.cff](CITATION.cff)) and that of the base."""


def registered_tags() -> list[str]:
    return zoo_tags()


def published_top1(base: str) -> str:
    """The ImageNet-1k top-1 of a static model, named with its tag, in timm's table of results.

    Raises:
        ValueError: static_results.json does not know the model.
    """
    results = json.loads(STATIC_RESULTS.read_text(encoding="utf-8"))["results"]
    if base not in results:
        raise ValueError(f"{STATIC_RESULTS.name} has no entry for {base}: copy its row of timm's table, or enter null")
    row = results[base]
    return f"{row['top1']:.3f} at {row['img_size']}" if row else "not published there"


def source_row(name: str) -> list[str]:
    """Where the weights of a tag come from."""
    config = get_pretrained_cfg(name)
    source = find_source(config.hf_hub_id, config.hf_hub_filename)
    address = f"https://huggingface.co/{source.repo}"
    commit = f"[`{source.commit[:12]}`]({address}/tree/{source.commit})" if source.commit else "not pinned"
    sha256 = f"`{source.sha256}`" if source.sha256 else "announced by the Hub"
    return [f"`{name}`", f"[{source.repo}]({address})", commit, sha256, source.checked or "not seen"]


def weights_row(name: str) -> list[str]:
    """What the weights of a tag are, but for their cost."""
    config, base = get_pretrained_cfg(name), static_name(name)
    size, test_size = (
        "x".join(map(str, s[1:])) for s in (config.input_size, config.test_input_size or config.input_size)
    )
    verified = "conversion, random weights"
    if base.partition(".")[0] == TRAINED_WEIGHTS_SEEN:
        verified = "conversion, random weights and torchvision's trained ones"
    return [
        f"`{name}`",
        config.license,
        size if size == test_size else f"{size}, test {test_size}",
        str(config.num_classes),
        published_top1(base),
        verified,
        "the tag's file, accuracy",
    ]


def count_costs(model: nn.Module, variants: Iterable[Variant]) -> dict[Variant, tuple[int, int]]:
    """Parameters and multiply-accumulates of a model for each input size with number of classes.

    Each size is counted once, without a classifier: that is a matrix product of the pooled features.
    """
    model.reset_classifier(0)
    body = {size: count_macs(model, size) for size in {size for size, _ in variants}}
    costs = {}
    for input_size, num_classes in variants:
        model.reset_classifier(num_classes)
        macs = body[input_size] + model.head_hidden_size * num_classes
        costs[input_size, num_classes] = count_parameters(model), macs
    return costs


def architecture_rows(name: str, tags: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """The row of an architecture, and the rows of its weights with their costs."""
    print(f"counting {name}", file=sys.stderr)
    variants = [(config.input_size, config.num_classes) for config in map(get_pretrained_cfg, tags)]
    static, model = (timm.create_model(n, device="meta") for n in (static_name(name), name))
    reports = fdconv_zoo.summary(model)
    layers = f"{sum(report.replaced for report in reports)} of {len(reports)}"
    own = inspect.signature(fdconv_zoo.FDConv2d).parameters["reduction"].default
    is_fdconv = any(True for _ in named_fd_layers(model))
    reduction = str(Fraction(type(model).defaults.get("reduction", own))) if is_fdconv else "no KSM"
    before, after = count_costs(static, set(variants)), count_costs(model, set(variants))
    added = after[variants[0]][0] - before[variants[0]][0]
    rows = []
    for tag, variant in zip(tags, variants, strict=True):
        parameters, macs = zip(before[variant], after[variant], strict=True)
        costs = [" → ".join(f"{n / unit:.2f}" for n in pair) for pair, unit in ((parameters, 1e6), (macs, 1e9))]
        rows.append([*weights_row(tag), *costs])
    return [f"`{name}`", f"`{static_name(name)}`", layers, reduction, f"{added:,}"], rows


def render_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def render_family(family: Family, names: Sequence[str]) -> str:
    """The section of one family: card, architectures, weights and their sources.

    Args:
        family: Its words.
        names: Its tags.
    """
    architectures, weights = [], []
    for name, tags in groupby(names, key=lambda name: name.partition(".")[0]):
        architecture, rows = architecture_rows(name, list(tags))
        architectures.append(architecture)
        weights += rows
    architecture_head = ("Architecture", "Static base", "Dynamic layers", "KSM reduction", "Parameters added")
    weights_head = ("Tag", "Licence", "Input", "Classes", "Static base's ImageNet-1k top-1, %")
    weights_head += ("Verified here", "Not verified here", "Parameters, M", "GMACs")
    source_head = ("Tag", "Source", "Commit", "sha256", "Commit and sha256 seen in")
    return f"""\
## {family.title}

- **Converted**: {family.converted}
- **Added parameters**: {family.added}
- **Limits**: {family.limits}
- **Base**: {family.base_papers}

{render_table(architecture_head, architectures)}

### {family.title}: weights

{render_table(weights_head, weights)}

### {family.title}: sources

{render_table(source_head, map(source_row, names))}"""


def render(names: Sequence[str]) -> str:
    """The whole of MODEL_CARDS.md.

    Args:
        names: Registered names with tags.

    Raises:
        ValueError: A name belongs to no family, or its base is missing in static_results.json.
    """
    origin = json.loads(STATIC_RESULTS.read_text(encoding="utf-8"))["source"]
    url = f"https://github.com/{origin['repo']}/blob/{origin['commit']}/{origin['file']}"
    tags = {
        family: [name for name in names if is_model_in_modules(name.partition(".")[0], [family.module])]
        for family in FAMILIES
    }
    homeless = set(names).difference(*tags.values())
    if homeless:
        raise ValueError(f"no card describes {', '.join(sorted(homeless))}: add their family to hub/families.py")
    sections = [INTRODUCTION.format(paper=PAPER.strip(), url=url, **origin)]
    sections += [render_family(family, own) for family, own in tags.items() if own]
    return "\n\n".join(sections) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m hub.model_cards",
        description="Write MODEL_CARDS.md from the registered models. Counts every architecture: a minute or more.",
        epilog="example: python -m hub.model_cards --check    # in CI",
    )
    parser.add_argument("--output", type=Path, default=PATH, help="file to write (default: the checkout's)")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the file is out of date")
    args = parser.parse_args(argv)

    text = render(registered_tags())
    if not args.check:
        args.output.write_text(text, encoding="utf-8")
        print(f"{args.output}: {len(registered_tags())} tags")
        return
    found = args.output.read_text(encoding="utf-8") if args.output.exists() else ""
    for number, (old, new) in enumerate(zip_longest(found.splitlines(), text.splitlines()), start=1):
        if old != new:
            raise SystemExit(
                f"{args.output} is out of date from line {number} on: run `python -m hub.model_cards`\n"
                f"  there:    {old}\n  expected: {new}"
            )


if __name__ == "__main__":
    main()
