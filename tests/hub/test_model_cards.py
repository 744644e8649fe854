import json

import pytest
import timm
import torch
from timm.models import get_pretrained_cfg
from torch import nn

from fdconv_zoo import convert_static_state_dict, static_name
from fdconv_zoo.pretrained import find_source
from hub import model_cards
from tests.compare import randomise_norms, relative_error

TAG = "mobilenetv2_100_fdconv.ra_in1k_converted"
SMALL = {
    "swin_tiny": 56,
    "swin_small": 56,
    "swin_base": 56,
    "swin_large": 56,
    "swin_base_384": 96,
    "swin_large_384": 96,
}


@pytest.fixture
def one_tag(monkeypatch):
    """A registry with one tag."""
    monkeypatch.setattr(model_cards, "registered_tags", lambda: [TAG])


def read_tables():
    """The cells of the rows of MODEL_CARDS.md about each tag: those on its weights, those on its source."""
    rows = {}
    for line in model_cards.PATH.read_text(encoding="utf-8").splitlines():
        if line.startswith("| `") and "_converted`" in line:
            cells = line.strip("| ").split(" | ")
            rows.setdefault(cells[0].strip("`"), []).append(cells)
    return rows


def test_names_licences_commits_and_figures_are_current():
    tables = read_tables()
    assert sorted(tables) == sorted(model_cards.registered_tags())
    for name, (weights, source) in tables.items():
        assert weights[:-2] == model_cards.weights_row(name)
        assert source == model_cards.source_row(name)
        assert weights[1] == get_pretrained_cfg(name).license


@pytest.mark.slow
def test_file_is_current():
    model_cards.main(["--check"])


def test_check_finds_an_edit(one_tag, tmp_path):
    path = tmp_path / "MODEL_CARDS.md"
    with pytest.raises(SystemExit, match="out of date from line 1 "):
        model_cards.main(["--output", str(path), "--check"])
    model_cards.main(["--output", str(path)])
    model_cards.main(["--output", str(path), "--check"])

    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("72.976", "79.976"), encoding="utf-8")
    line = text[: text.index("72.976")].count("\n") + 1
    with pytest.raises(
        SystemExit, match=rf"out of date from line {line} on: run `python -m hub.model_cards`"
    ) as caught:
        model_cards.main(["--output", str(path), "--check"])
    assert "79.976" in str(caught.value) and "72.976" in str(caught.value)


def test_known_digests_and_commits_are_given_with_where_they_were_seen():
    source = find_source("timm/resnet50.a1_in1k")
    _, _, commit, sha256, seen = model_cards.source_row("resnet50_fdconv.a1_in1k_converted")
    assert (commit.endswith(f"/tree/{source.commit})"), sha256, seen) == (True, f"`{source.sha256}`", source.checked)
    unknown = find_source("timm/resnet18.tv_in1k")
    row = model_cards.source_row("resnet18_fdconv.tv_in1k_converted")
    assert row[2:] == ["not pinned", "announced by the Hub", "not seen"] or unknown.checked


def test_published_figures_are_of_the_registered_bases_alone():
    results = json.loads(model_cards.STATIC_RESULTS.read_text(encoding="utf-8"))["results"]
    tags = {static_name(name): get_pretrained_cfg(name) for name in model_cards.registered_tags()}
    assert set(results) == set(tags)
    for base, row in results.items():
        if row:
            config = tags[base]
            assert config.num_classes == 1000
            assert row["img_size"] == (config.test_input_size or config.input_size)[1]
            assert 60 < row["top1"] < 90


def test_figures_that_timm_does_not_publish_are_not_made_up():
    assert model_cards.published_top1("resnet50.a1_in1k") == "81.214 at 288"
    assert model_cards.published_top1("convnext_tiny.fb_in22k") == "not published there"
    with pytest.raises(ValueError, match=r"no entry for resnet50\.mine"):
        model_cards.published_top1("resnet50.mine")


def test_a_model_of_no_family_is_named():
    with pytest.raises(ValueError, match=r"no card describes vgg16\.tv_in1k"):
        model_cards.render(["vgg16.tv_in1k"])


def test_costs_follow_classes_and_size():
    model = timm.create_model("mobilenetv2_100", device="meta")
    costs = model_cards.count_costs(model, [((3, 224, 224), 1000), ((3, 224, 224), 10), ((3, 448, 448), 10)])
    (parameters, macs), (fewer, less), (same, four_fold) = (
        costs[size, classes] for size, classes in (((3, 224, 224), 1000), ((3, 224, 224), 10), ((3, 448, 448), 10))
    )
    assert parameters == 3_504_872
    assert (parameters - fewer, macs - less) == (990 * 1281, 990 * 1280)
    assert (same, four_fold - 12_800) == (fewer, 4 * (less - 12_800))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({name.partition(".")[0] for name in model_cards.registered_tags()}))
def test_every_architecture_computes_what_its_static_base_does(name):
    torch.manual_seed(0)
    size = SMALL.get(name.removesuffix("_fdconv"), 64)
    options = {"img_size": size} if name.startswith("swin") else {}
    static = randomise_norms(timm.create_model(static_name(name), num_classes=10, **options)).eval().double()
    batch_norms = [module for module in static.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        if batch_norms:  # statistics that fit, or a deep ResNet's output no longer depends on its input
            for norm in batch_norms:
                norm.momentum = 1.0
            static.train()(torch.randn(8, 3, size, size, dtype=torch.float64))
            static.eval()
        static.get_classifier().weight.normal_(std=0.1)
        model = timm.create_model(name, num_classes=10, **options).eval().double()
        model.load_state_dict(convert_static_state_dict(static.state_dict(), model))
        images = torch.randn(2, 3, size, size, dtype=torch.float64)
        expected = static(images)
        assert (expected[0] - expected[1]).norm() > 0.05 * expected.norm()
        assert relative_error(model(images), expected) < 1e-8
