"""Mask2Former in scripts/train_dense.py, and data in Cityscapes' folders."""

import subprocess
import sys

import pytest
import torch
from dense_data import SMALL, SMALL_MASK2FORMER, cityscapes, masks, write_cityscapes, write_data
from train_runs import SCRIPTS

import train_dense
from dense import args as dense_args
from dense.args import parse_args
from dense.masks import class_masks

CONFIG = SCRIPTS / "configs" / "dense" / "mask2former_cityscapes.yaml"
OPTIONS = ["--head", "mask2former", *SMALL, *SMALL_MASK2FORMER]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("dense"), train=4, val=2)


@pytest.fixture(scope="module")
def city_folder(tmp_path_factory):
    return write_cityscapes(tmp_path_factory.mktemp("cityscapes"))


def create(data, more=()):
    args = parse_args([*OPTIONS, *masks(data), *more])
    return train_dense.create_module(args, None, resumed=False).model


def test_backbone_is_timms_with_its_options(data):
    model = create(data).eval()
    encoder = model.network.model.pixel_level_module.encoder
    assert encoder.channels == [24, 32, 48, 64]
    with torch.inference_mode():
        scores = model(torch.rand(2, 3, 64, 96))
    assert scores.shape == (2, 3, 64, 96)
    # probabilities of a class in any of 5 queries
    assert scores.min() >= 0 and scores.max() <= 5


def test_class_masks_leave_out_pixels_without_a_class():
    labels = torch.tensor([[[2, 255], [0, 2]], [[255, 255], [255, 255]]])
    found, classes = class_masks(labels, 255)
    assert [present.tolist() for present in classes] == [[0, 2], []]
    assert found[0].tolist() == [[[0, 0], [1, 0]], [[1, 0], [0, 1]]]
    assert found[1].shape == (0, 2, 2)


@pytest.mark.parametrize("pixels", [(), (0,), (0, 1)], ids=["none", "one image", "both"])
def test_loss_of_images_without_classes_is_finite(pixels, data):
    model = create(data)
    labels = torch.full((2, 64, 64), 255)
    labels[list(pixels), :32] = 1
    loss = model.loss(torch.rand(2, 3, 64, 64), labels)
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert loss.isfinite() and all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def test_it_learns_from_one_image_at_a_time(data, tmp_path):
    more = ["--batch-size", "1", "--freeze-bn", "--opt", "adamw", "--lr", "0.002", "--sched", "constant"]
    more += ["--scale", "1", "1", "--epochs", "12", "--val-interval", "12", "--output", str(tmp_path)]
    train_dense.main([*OPTIONS, *masks(data), *more])
    best = torch.load(tmp_path / "best.ckpt", weights_only=True)["callbacks"]
    score = next(float(state["best_model_score"]) for state in best.values() if state.get("monitor") == "val/mIoU")
    # the background alone is less than 0.3
    assert score > 0.5


def test_one_image_at_a_time_without_frozen_norms(data, tmp_path):
    train_dense.main([*OPTIONS, *masks(data), "--batch-size", "1", "--output", str(tmp_path)])
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert all(value.isfinite().all() for value in state.values())


@pytest.mark.parametrize(
    "more", [[], ["--mask-suffix", "_gtFine_labelTrainIds.png", "--mask-values"]], ids=["labelIds", "labelTrainIds"]
)
def test_cityscapes_folders_give_the_19_classes(more, city_folder):
    args = parse_args(["--config", str(CONFIG), *cityscapes(city_folder), *more])
    train_set, val_set = train_dense.create_datasets(args)
    assert (len(train_set), len(val_set)) == (2, 2)
    image, mask = val_set[1]
    assert (image.shape, mask.shape) == ((3, 48, 96), (48, 96))
    assert (mask[:4] == 255).all() and (mask[10:30, 21:60] == 13).all() and (mask[30:] == 0).all()


def test_missing_cityscapes_mask_is_named(city_folder, tmp_path):
    more = ["--mask-suffix", "_gtFine_instanceIds.png"]
    args = parse_args(["--config", str(CONFIG), *cityscapes(city_folder), *more])
    with pytest.raises(ValueError, match=r"2 of 2 images .* have no mask: .*000000_gtFine_instanceIds.png"):
        train_dense.create_datasets(args)
    args = parse_args(["--config", str(CONFIG), *cityscapes(city_folder), "--image-suffix", "_rightImg8bit.png"])
    with pytest.raises(ValueError, match=r"no images in .* whose names end in _rightImg8bit.png"):
        train_dense.create_datasets(args)


@pytest.mark.parametrize("values", [["0", "1"], ["-1", "0", "1"]])
def test_mask_values_that_do_not_fit_are_refused(values, data, capsys):
    with pytest.raises(SystemExit):
        parse_args(["--head", "unet", *masks(data), "--mask-values", *values])
    assert "must be --num-classes 3 values, from 0 up" in capsys.readouterr().err


def test_missing_transformers_is_one_line(data, capsys, monkeypatch):
    monkeypatch.setattr(dense_args, "find_spec", lambda name: None if name == "transformers" else object())
    with pytest.raises(SystemExit):
        parse_args([*OPTIONS, *masks(data)])
    assert "error: mask2former needs transformers: pip install transformers\n" in capsys.readouterr().err
    parse_args(["--head", "upernet", *masks(data)])


@pytest.mark.slow
def test_other_heads_do_not_import_mask2former(data):
    code = f"""
import sys
sys.path.insert(0, {str(SCRIPTS)!r})
import train_dense
train_dense.create_module(train_dense.parse_args({["--head", "unet", *SMALL, *masks(data)]!r}), None, False)
# torchmetrics imports transformers where it is installed, so that this can't be looked for
assert not [name for name in sys.modules if "mask2former" in name]
"""
    subprocess.run([sys.executable, "-c", code], check=True)
