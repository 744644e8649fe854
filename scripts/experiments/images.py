"""Pictures larger than PIL opens from strangers."""

from pathlib import Path

from PIL import Image


def read_image(path: Path) -> Image.Image:
    """Open a trusted picture of any size.

    Raises:
        ValueError: It is no picture that can be read.
    """
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        image = Image.open(path)
        image.load()
    except OSError as error:
        raise ValueError(f"can't read {path}: {error}") from error
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    return image
