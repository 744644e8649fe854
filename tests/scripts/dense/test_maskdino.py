"""MaskDINO in scripts/train_dense.py: targets, losses and results of both tasks, and that they learn."""

import pytest
import torch
from dense_data import SMALL, SMALL_MASKDINO, boxes, masks, write_data

import train_dense
from dense import args as dense_args
from dense.args import parse_args
from dense.maskdino import class_targets, normalised
from dense.optim import parameter_groups

SEMANTIC = ["--head", "maskdino", *SMALL, *SMALL_MASKDINO]
INSTANCE = ["--head", "maskdino_instance", *SMALL, *SMALL_MASKDINO]
LEARNING = ["--batch-size", "2", "--opt", "adamw", "--lr", "0.002", "--sched", "constant", "--warmup-steps", "0"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("dense"), train=4, val=2)


def create(options):
    args = parse_args(options)
    train_set, _ = train_dense.create_datasets(args)
    return train_dense.create_module(args, train_set, resumed=False).model


def best_score(output, monitor):
    callbacks = torch.load(output / "best.ckpt", weights_only=True)["callbacks"]
    return next(float(state["best_model_score"]) for state in callbacks.values() if state.get("monitor") == monitor)


def test_scores_of_classes(data):
    model = create([*SEMANTIC, *masks(data)]).eval()
    with torch.inference_mode():
        scores = model(torch.rand(2, 3, 64, 96))
    assert scores.shape == (2, 3, 64, 96)
    # probabilities of a class in any of 5 queries
    assert scores.min() >= 0 and scores.max() <= 5


def test_boxes_of_classes_are_around_their_last_row_and_column():
    labels = torch.full((2, 8, 16), 255)
    labels[0, 2:4, 4:12] = 1
    labels[0, 7, 15] = 0
    first, second = class_targets(labels, 255)
    assert first.labels.tolist() == [0, 1] and first.masks.sum((1, 2)).tolist() == [1, 16]
    assert first.boxes.tolist() == [[15.5 / 16, 7.5 / 8, 1 / 16, 1 / 8], [0.5, 0.375, 0.5, 0.25]]
    assert second.labels.shape == (0,) and second.boxes.shape == (0, 4) and second.masks.shape == (0, 8, 16)


@pytest.mark.parametrize("pixels", [(), (0,), (0, 1)], ids=["none", "one image", "both"])
def test_loss_of_images_without_classes_is_finite(pixels, data):
    model = create([*SEMANTIC, *masks(data)])
    labels = torch.full((2, 64, 64), 255)
    labels[list(pixels), :32] = 1
    loss = model.loss(torch.rand(2, 3, 64, 64), labels)
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert loss.isfinite() and all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def test_detector_is_called_as_torchvisions_are(data):
    model = create([*INSTANCE, *boxes(data)])
    images = [torch.rand(3, 90, 96), torch.rand(3, 40, 80)]
    found = torch.zeros(1, 90, 96, dtype=torch.uint8)
    found[:, 10:40, 20:60] = 1
    # COCO's boxes may reach over the border by parts of a pixel
    object_ = {"boxes": torch.tensor([[20.0, 10, 96.4, 40]]), "labels": torch.tensor([2]), "masks": found}
    nothing = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "masks": torch.zeros(0, 40, 80, dtype=torch.uint8),
    }
    losses = model(images, [object_, nothing])
    assert losses.keys() == {"loss_ce", "loss_bbox", "loss_giou", "loss_mask", "loss_dice"}
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())

    model.eval()
    with torch.inference_mode():
        results = model(images)
    for image, result in zip(images, results, strict=True):
        height, width = image.shape[1:]
        assert result["masks"].shape == (10, 1, height, width)  # 5 queries of 2 classes
        assert set(result["labels"].tolist()) <= {1, 2}
        assert result["scores"].tolist() == sorted(result["scores"].tolist(), reverse=True)
        assert (result["boxes"] >= 0).all() and (result["boxes"] <= torch.tensor([width, height] * 2)).all()


def test_targets_are_relative_to_the_padded_images(data):
    model = create([*INSTANCE, *boxes(data)])
    seen = []
    model.criterion.register_forward_hook(lambda criterion, inputs, terms: seen.append(inputs[1]))
    mask = torch.zeros(1, 48, 48, dtype=torch.uint8)
    mask[:, :24, 24:] = 1
    square = {"boxes": torch.tensor([[24.0, 0, 48, 24]]), "labels": torch.tensor([1]), "masks": mask}
    wide = {"boxes": torch.tensor([[0.0, 0, 64, 48]]), "labels": torch.tensor([2])}
    model([torch.rand(3, 48, 48), torch.rand(3, 48, 64)], [square, {**wide, "masks": torch.ones(1, 48, 64).byte()}])
    # twice as large, and padded to 96 x 128
    first, second = seen[0]
    assert first.labels.tolist() == [0] and second.labels.tolist() == [1]
    assert first.boxes.tolist() == [[72 / 128, 0.25, 48 / 128, 0.5]] and second.boxes.tolist() == [[0.5, 0.5, 1, 1]]
    assert first.masks.shape == (1, 96, 128) and first.masks[0, :48, 48:96].all() and first.masks.sum() == 48 * 48
    assert normalised(torch.tensor([[96.0, 0, 192, 96]]), (192, 256)).tolist() == [[144 / 256, 0.25, 96 / 256, 0.5]]


def test_embeddings_are_not_decayed(data):
    model = create([*SEMANTIC, *masks(data)])
    groups = parameter_groups(model, model.backbone, weight_decay=0.05, lr=1e-3, static_lr_scale=0.1)
    decayed = {id(parameter) for group in groups if group["weight_decay"] for parameter in group["params"]}
    kept = {name for name, parameter in model.named_parameters() if id(parameter) not in decayed}
    tables = {"label_enc.weight", "query_feat.weight", "query_embed.weight", "pixel_decoder.level_embed"}
    assert {f"head.{name}" for name in tables} <= kept
    assert "head.class_embed.weight" not in kept and "head.layers.0.norm1.weight" in kept


def test_options_that_are_none_are_named(data):
    for options, message in (
        ([*SEMANTIC, *masks(data), "--head-kwargs", "hidden=32"], "--head-kwargs hidden: maskdino has box_weight, "),
        ([*INSTANCE, *boxes(data), "--head-kwargs", "softmax_classes=True"], "needs softmax_classes=False"),
    ):
        with pytest.raises(ValueError, match=message):
            create(options)


@pytest.mark.parametrize("options", [SEMANTIC, INSTANCE], ids=["maskdino", "maskdino_instance"])
def test_missing_transformers_is_one_line(options, data, capsys, monkeypatch):
    monkeypatch.setattr(dense_args, "find_spec", lambda name: None if name == "transformers" else object())
    with pytest.raises(SystemExit):
        parse_args([*options, *masks(data), *boxes(data)])
    assert f"error: {options[1]} needs transformers: pip install transformers\n" in capsys.readouterr().err


def test_one_epoch_of_instances_has_scores_of_boxes_and_masks(data, tmp_path, capsys):
    train_dense.main([*INSTANCE, *boxes(data), "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "val/box_mAP " in printed and "val/mask_mAP " in printed


def test_one_epoch_in_bfloat16(data, tmp_path, capsys):
    train_dense.main([*SEMANTIC, *masks(data), "--precision", "bf16-mixed", "--output", str(tmp_path)])
    assert "val/mIoU " in capsys.readouterr().out


@pytest.mark.slow
def test_it_learns_classes_of_pixels(tmp_path):
    data = write_data(tmp_path, train=8, val=5)
    more = ["--scale", "1", "1", "--epochs", "30", "--val-interval", "30", "--output", str(tmp_path / "run")]
    train_dense.main([*SEMANTIC, *masks(data), *LEARNING, *more])
    # the background alone is less than 0.3
    assert best_score(tmp_path / "run", "val/mIoU") > 0.5


@pytest.mark.slow
def test_it_learns_instances(tmp_path):
    data = write_data(tmp_path, train=8, val=5)
    more = ["--epochs", "60", "--val-interval", "60", "--output", str(tmp_path / "run")]
    train_dense.main([*INSTANCE, *boxes(data), *LEARNING, *more])
    assert best_score(tmp_path / "run", "val/box_mAP") > 0.2
