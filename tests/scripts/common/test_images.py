"""Images are decoded to the right 8 bits, left out by name, or refused."""

import pickle
from functools import partial

import numpy as np
import pytest
import torch
from image_files import write_images, write_sixteen_bits
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms.functional import pil_to_tensor

from common.image_folders import FolderReader
from common.images import CorruptImageError, ImageSet, ReadableImages, UnusableImagesError, collate_readable, load_image

collate = partial(collate_readable, channels=3)


@pytest.mark.parametrize("ending", [".png", ".tif"])
@pytest.mark.parametrize(("value", "expected"), [(0, 0), (255, 1), (257 * 100, 100), (65535, 255)])
def test_sixteen_bits_become_eight_over_the_whole_range(tmp_path, ending, value, expected):
    write_sixteen_bits(tmp_path / f"image{ending}", value)
    image = load_image(str(tmp_path / f"image{ending}"), "RGB")
    assert image.getextrema() == ((expected, expected),) * 3


@pytest.mark.parametrize(
    ("header", "pixel", "expected"),
    [("P5 2 1 65535 ", b"\x64\x64", 100), ("P5 2 1 4095 ", b"\x0f\xff", 255), ("P2 2 1 65535 ", b"25700 ", 100)],
)
def test_sixteen_bits_of_pgm_files(tmp_path, header, pixel, expected):
    (tmp_path / "image.pgm").write_bytes(header.encode() + 2 * pixel)
    assert load_image(str(tmp_path / "image.pgm"), "L").getextrema() == (expected, expected)


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_pixels_of_unknown_range_are_refused_by_name(tmp_path, kind):
    Image.fromarray(np.full((8, 8), 1, kind)).save(tmp_path / "image.tif")
    with pytest.raises(UnusableImagesError, match=r"image\.tif has .* pixels, whose black and white nobody knows"):
        load_image(str(tmp_path / "image.tif"), "RGB")


@pytest.mark.parametrize("ending", [".png", ".jpg", ".webp", ".bmp", ".tif", ".ppm"])
def test_usual_formats_are_read(tmp_path, ending):
    Image.new("RGB", (8, 8), (10, 200, 30)).save(tmp_path / f"image{ending}", quality=100)
    pixel = load_image(str(tmp_path / f"image{ending}"), "RGB").getpixel((0, 0))
    assert np.abs(np.subtract(pixel, (10, 200, 30))).max() <= 3


def test_refusal_from_a_loader_process_is_one_line(tmp_path):
    write_images(tmp_path, "a")
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "a" / "float.tif")
    images = ImageSet(FolderReader(tmp_path))
    images.transform = pil_to_tensor
    with pytest.raises(UnusableImagesError) as caught:
        list(DataLoader(images, num_workers=1, batch_size=None))
    assert str(caught.value).startswith("a/float.tif has floating-point pixels")


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_cannot_be_read_are_left_out_and_named(tmp_path, workers):
    write_images(tmp_path, "a", "b", count=3)
    (tmp_path / "a" / "1.png").write_text("no image")
    whole = (tmp_path / "b" / "0.png").read_bytes()
    (tmp_path / "b" / "0.png").write_bytes(whole[: len(whole) // 2])
    images = ReadableImages(ImageSet(FolderReader(tmp_path)))
    images.transform = pil_to_tensor
    loader = DataLoader(images, batch_size=2, num_workers=workers, collate_fn=collate)
    batches = list(loader) + list(loader)
    assert torch.cat([labels for _, labels in batches]).tolist() == [0, 0, 1, 1] * 2
    assert images.corrupt.names() == ["a/1.png", "b/0.png"]


def test_a_batch_without_a_readable_image_is_empty():
    images, labels = collate([None, None])
    assert len(images) == len(labels) == 0


def test_errors_name_the_image(tmp_path):
    write_images(tmp_path, "a")
    (tmp_path / "a" / "0.png").write_text("no image")
    images = pickle.loads(pickle.dumps(ImageSet(FolderReader(tmp_path))))  # as a spawned loader process gets it
    with pytest.raises(CorruptImageError, match=r"^a/0\.png: "):
        images[0]
