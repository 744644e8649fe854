"""README.md: short, its links lead somewhere, its code runs."""

import re
from pathlib import Path

import pytest
import timm
from PIL import Image

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CODE = re.findall(r"```python\n(.*?)```", README, re.S)


def test_it_is_short():
    assert len(README.splitlines()) < 160


@pytest.mark.parametrize(
    "page", ["README.md", "docs/paper.md", "docs/performance.md", "docs/training.md", "docs/deploy.md"]
)
def test_links_within_the_repository_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text(encoding="utf-8"))
    assert all(((ROOT / page).parent / link).exists() for link in links), links


def test_files_and_models_that_it_names_are_there():
    for path in re.findall(r"python ((?:scripts|examples)/\S+\.py)", README):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"create_model\(\"(\w+)\"|--model (\w+)", README):
        assert timm.is_model("".join(name)), name


@pytest.mark.slow
def test_its_code_runs(tmp_path, monkeypatch, capsys):
    create_model = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **kwargs: create_model(name, **kwargs))
    Image.new("RGB", (300, 280), (10, 200, 40)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    exec("\n".join(CODE), {})
    assert len(capsys.readouterr().out) > 3
