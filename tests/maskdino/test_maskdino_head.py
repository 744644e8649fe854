"""MaskDINO's head by itself: sizes, start, sizes of images, precision, compiler, and what it is made from."""

import importlib.util
import subprocess
import sys

import pytest
import torch

from fdconv_zoo.maskdino import MaskDino, MaskDinoConfig, noise_targets, parts
from fdconv_zoo.maskdino.positions import boxes_of_masks
from tests.maskdino_files import FILES, read
from tests.maskdino_small import SELECTED, SMALL, maps, objects, small

RESNET, SWIN = (256, 512, 1024, 2048), (192, 384, 768, 1536)
COCO = dict(SELECTED, num_queries=300, encoder_ffn_dim=2048)


@pytest.mark.parametrize(
    ("count", "options"),
    [
        (20_357_387, dict(num_classes=150, in_channels=RESNET)),
        (20_290_184, dict(num_classes=19, in_channels=RESNET)),
        (20_111_627, dict(num_classes=150, in_channels=SWIN)),
        (24_441_931, dict(num_classes=150, in_channels=SWIN, encoder_maps=4, extra_levels=1)),
        (28_603_092, dict(COCO, num_classes=80, in_channels=RESNET, initial_boxes="mask2box")),
        (27_597_940, dict(COCO, num_classes=80, in_channels=SWIN, encoder_maps=4)),
        (28_630_281, dict(COCO, num_classes=133, in_channels=RESNET, initial_boxes=None)),
        (27_625_129, dict(COCO, num_classes=133, in_channels=SWIN, encoder_maps=4, initial_boxes=None)),
    ],
    ids=[
        "ade20k",
        "cityscapes",
        "ade20k swin",
        "ade20k swin, 5 levels",
        "instance",
        "instance swin",
        "panoptic",
        "swin",
    ],
)
def test_parameters_of_the_published_configurations(count, options):
    with torch.device("meta"):
        head = MaskDino(MaskDinoConfig(**options))
    assert sum(parameter.numel() for parameter in head.parameters()) == count


def test_start():
    head = MaskDino(MaskDinoConfig(**{**SMALL, "hidden_dim": 64}))
    attention = head.layers[0].cross_attn
    assert not attention.sampling_offsets.weight.any() and not attention.attention_weights.weight.any()
    # eight directions, one a head, 1 to 4 steps
    steps = attention.sampling_offsets.bias.view(8, 3, 4, 2)
    assert torch.allclose(steps[1, 2], torch.tensor([[1.0, 1], [2, 2], [3, 3], [4, 4]]))
    assert torch.allclose(steps[6, 0, 2], torch.tensor([0.0, -3]), atol=1e-6)
    assert not head.box_embed[6].weight.any() and not head.box_embed[6].bias.any()
    # Xavier's bound of a matrix (3D, D); three of (D, D) would have another one
    assert 0.9 < head.layers[1].self_attn.in_proj_weight.abs().max() / (6 / (4 * 64)) ** 0.5 <= 1
    assert 0.9 < head.layers[1].linear1.weight.abs().max() / (6 / (64 + 24)) ** 0.5 <= 1
    assert 0.8 < head.pixel_decoder.level_embed.std() < 1.2 and 0.8 < head.label_enc.weight.std() < 1.2
    assert "query_embed.weight" in head.no_weight_decay() and "pixel_decoder.level_embed" in head.no_weight_decay()
    assert head.no_weight_decay() <= dict(head.named_parameters()).keys()


@pytest.mark.parametrize("options", [{}, SELECTED], ids=["learnt", "selected"])
def test_noised_targets_do_not_change_the_queries(options):
    head, features = small(**options), maps(64, 64)
    noised = noise_targets(objects([3, 1]), head.config)
    alone, beside = head(features), head(features, noised)
    assert noised.labels.shape == (2, 6) and len(beside.noised) == len(beside.predictions) == 3 and not alone.noised
    for first, second in zip(alone.predictions, beside.predictions, strict=True):
        assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(first, second, strict=True))
    # but noised slots see the queries, and those of their own group only
    moved = noised._replace(boxes=noised.boxes.clone())
    moved.boxes[:, :3, :2] = 0.9
    after = head(features, moved).noised[-1].logits
    assert not torch.allclose(after[:, :3], beside.noised[-1].logits[:, :3], atol=1e-4)
    assert torch.allclose(after[:, 3:], beside.noised[-1].logits[:, 3:], atol=1e-5)


def test_normed_twice_and_refined_from_the_raw_state():
    head, seen = small(), []
    head.layers[0].register_forward_hook(lambda layer, inputs, state: seen.append((state, inputs[2])))
    head.layers[1].register_forward_hook(lambda layer, inputs, state: seen.append((state, inputs[2])))
    outputs = head(maps(64, 64))
    (y, boxes), (_, refined) = seen
    z = head.norm(y)
    logits = torch.logit(boxes, 1e-5)
    assert torch.allclose(outputs.predictions[1].logits, head.class_embed(head.norm(z)), atol=1e-5)
    assert torch.allclose(outputs.predictions[1].boxes, (head.box_embed(z) + logits).sigmoid(), atol=1e-5)
    assert torch.allclose(refined, (head.box_embed(y) + logits).sigmoid(), atol=1e-5)
    assert not torch.allclose(refined, outputs.predictions[1].boxes, atol=1e-2)


@pytest.mark.parametrize("options", [{}, SELECTED, dict(SELECTED, encoder_maps=4, coarse_first=True)])
@pytest.mark.parametrize(("size", "batch"), [((67, 93), 1), ((64, 33), 2)])
def test_odd_sizes_and_a_batch_of_one(options, size, batch):
    head, features = small(**options), maps(*size, batch)
    noised = noise_targets(objects([2] * batch, size), head.config)
    outputs = head(features, noised)
    assert outputs.predictions[-1].masks.shape == (batch, 6, *features[0].shape[-2:])
    sum(part.sum() for prediction in (*outputs.predictions, *outputs.noised) for part in prediction).backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in head.parameters())
    head.eval()
    with torch.inference_mode():
        result = head(features)
    assert len(result.predictions) == 1 and result.selection is None
    assert torch.allclose(result.predictions[0].boxes, outputs.predictions[-1].boxes, atol=1e-5)


def test_an_image_does_not_depend_on_the_others():
    head, features = small(**SELECTED).eval(), maps(96, 96)
    together, alone = head(features).predictions[0], head([feature[1:] for feature in features]).predictions[0]
    assert all(torch.allclose(one[1:], other, atol=1e-4) for one, other in zip(together, alone, strict=True))


@pytest.mark.parametrize("options", [pytest.param({}, marks=pytest.mark.slow), SELECTED], ids=["learnt", "selected"])
def test_one_graph(options):
    torch.compiler.reset()
    head, features = small(**options), maps(64, 64)
    noised = noise_targets(objects([3, 1]), head.config)
    compiled = torch.compile(head, fullgraph=True, backend="eager")
    expected, found = head(features, noised), compiled(features, noised)
    for one, other in zip(expected.predictions + expected.noised, found.predictions + found.noised, strict=True):
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(one, other, strict=True))
    found.predictions[-1].masks.sum().backward()
    head.eval()
    with torch.no_grad():
        one, other = (model(features).predictions[0].masks for model in (head, compiled))
    assert torch.allclose(one, other, atol=1e-4)


def test_boxes_of_masks():
    masks = torch.zeros(3, 4, 10, dtype=torch.bool)
    masks[0, 1:3, 2:7] = True
    masks[1, 3, 9] = True
    box = torch.tensor([[0.45, 0.5, 0.5, 0.5], [0.95, 0.875, 0.1, 0.25], [0, 0, 0, 0]])
    assert torch.allclose(boxes_of_masks(masks, "bitmask"), box)
    without_last = torch.tensor([[0.4, 0.375, 0.4, 0.25], [0.9, 0.75, 0, 0], [1, 1, 0, 0]])
    assert torch.allclose(boxes_of_masks(masks, "mask2box"), without_last)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": (8, 12, 16)}, "must be of four maps"),
        ({"num_queries": 0}, "num_queries is 0, it must be at least 1"),
        ({"hidden_dim": 48}, "hidden_dim is 48, it must be a multiple of 32"),
        ({"encoder_maps": 5}, "encoder_maps is 5"),
        ({"extra_levels": 2}, "extra_levels is 2"),
        ({"select_queries": True, "initial_boxes": "no"}, "initial_boxes is 'no'"),
        ({"initial_boxes": "bitmask"}, "are of selected queries: select_queries=True"),
        ({"noise_scale": 2}, "noise_scale 2"),
    ],
)
def test_what_can_not_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        MaskDinoConfig(**{**SMALL, **changes})


def test_features_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"maps of \(8, 12, 16\) channels, not \(8, 12, 16, 20\)"):
        small()(maps(64, 64)[:3])
    with pytest.raises(ValueError, match="40 queries can't be selected among 22 places"):
        small(**SELECTED, num_queries=40)(maps(32, 32))


def test_importing_the_package_imports_no_transformers():
    code = "import sys, fdconv_zoo; assert not {'transformers', 'scipy', 'fdconv_zoo.maskdino'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def import_parts():
    """Run parts.py again, as a module of its own."""
    spec = importlib.util.spec_from_file_location("parts_again", parts.__file__)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("deformable_detr.modeling_deformable_detr", "DeformableDetrMultiscaleDeformableAttention"),
        ("mask2former.modeling_mask2former", "Mask2FormerLoss"),
        ("mask2former.modeling_mask2former", "pair_wise_dice_loss"),
        ("mask2former.modeling_mask2former", "pair_wise_sigmoid_cross_entropy_loss"),
        ("mask2former.modeling_mask2former", "sample_point"),
    ],
)
def test_a_part_that_has_moved_is_named(module, name, monkeypatch):
    import_parts()
    monkeypatch.delattr(f"transformers.models.{module}.{name}")
    with pytest.raises(
        ImportError, match=rf"needs transformers and scipy, and parts of .* cannot import name '{name}'"
    ):
        import_parts()


def test_a_part_whose_arguments_have_other_names_is_named(monkeypatch):
    def forward(self, hidden_states, boxes=None, **kwargs):
        """Takes what it does not know."""

    monkeypatch.setattr(parts.DeformableAttentionPart, "forward", forward)
    with pytest.raises(ImportError, match=r"forward has no argument encoder_hidden_states, .*reference_points"):
        import_parts()


def test_missing_transformers_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="the MaskDINO head needs transformers and scipy"):
        import_parts()


@pytest.mark.parametrize("name", FILES)
def test_bfloat16_is_near_the_original(name):
    golden = read(name)
    head = golden.head().eval()
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        memory = head.pixel_decoder(golden.features())
    for number, level in enumerate(memory[1]):
        expected = golden.tensors[f"eval.levels.{number}"]
        assert (level - expected).norm() < 0.05 * expected.norm()
