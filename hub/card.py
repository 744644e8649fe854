"""The model card: metadata that the Hub understands, and code that runs."""

from __future__ import annotations

from huggingface_hub import EvalResult, ModelCardData

from hub.release import Release

METRICS = {"top1": "Top 1 Accuracy", "top5": "Top 5 Accuracy"}
PAPER = "Frequency Dynamic Convolution ([FDConv, CVPR 2025](https://arxiv.org/abs/2503.18783)). "
USAGE = """\
import fdconv_zoo  # the package fdconv-zoo registers its models with timm
import timm
import torch
from PIL import Image

model = timm.create_model("hf-hub:{repo}", pretrained=True).eval()
data_config = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**data_config, is_training=False)

image = Image.new("RGB", (640, 480))  # Image.open("photo.jpg").convert("RGB")
with torch.no_grad():
    probabilities = model(transform(image).unsqueeze(0)).softmax(dim=1)
print(probabilities.topk({top}))"""


def card_metadata(release: Release, repo: str) -> ModelCardData:
    """The YAML at the head of the card."""
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=release.datasets[0],
            dataset_name=release.datasets[0],
            metric_type="accuracy",
            metric_name=METRICS[name],
            metric_value=round(value, 4),
        )
        for name, value in release.results.items()
    ]
    return ModelCardData(
        license=release.license,
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", *(["fdconv"] if release.is_fdconv else [])],
        datasets=list(release.datasets),
        base_model=release.base_model,
        model_name=repo.partition("/")[2],
        eval_results=results or None,
    )


def _describe_classes(count: int, names: tuple[str, ...]) -> str:
    """Their number, and the first names; all of them are in config.json."""
    shown = ", ".join(names[:20]).replace("|", "\\|")
    return f"{count}: {shown}{', ...' if len(names) > 20 else ''}" if names else str(count)


def render_card(release: Release, repo: str, sha256: str) -> str:
    """The whole README.md.

    Args:
        release: What is published.
        repo: Where to, `owner/name`.
        sha256: Digest of model.safetensors.
    """
    model, size = release.model, " x ".join(str(n) for n in release.data_config["input_size"])
    parameters = sum(parameter.numel() for parameter in model.parameters())
    base = f"[{release.base_model}](https://huggingface.co/{release.base_model})"
    if not release.trained:
        origin = f"The weights of {base}"
        if release.is_fdconv:
            origin += ", moved into the Fourier domain: the same function, ready to fine-tune."
        else:
            origin += (
                f", converted to {release.method}: the same function, ready to fine-tune." if release.method else "."
            )
    elif release.base_model:
        origin = f"Fine-tuned from {base}."
    elif release.start == "random":
        origin = "Trained from scratch."
    elif release.start:
        origin = "Fine-tuned from weights that are in no repository."
    else:
        origin = "What these weights were trained from is not known."
    facts = {
        "Architecture": f"`{release.name}`",
        "Parameters": f"{parameters / 1e6:.2f} M",
        "Input": f"{size}, {release.data_config['interpolation']}, crop {release.data_config['crop_pct']}",
        "Classes": _describe_classes(model.num_classes, release.label_names),
        "Training data": ", ".join(release.datasets),
        **{METRICS[name]: f"{value:.2f} %" for name, value in release.results.items()},
        **{f"`{key}`": f"`{value}`" for key, value in release.recipe.items()},
        "sha256 of model.safetensors": f"`{sha256}`",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    usage = USAGE.format(repo=repo, top=min(5, model.num_classes))
    return f"""---
{card_metadata(release, repo).to_yaml()}
---

# {repo.partition("/")[2]}

{PAPER if release.is_fdconv else ""}{origin}

| | |
|---|---|
{table}

```python
{usage}
```

`forward_pass.safetensors` holds an input and this model's output for it; `python -m hub.verify --repo {repo}`
checks the weights against the digest above and runs them on it.
"""
