"""Errors in one line."""

import pytest
from torch.utils.data import DataLoader, Dataset

from common.command_line import fail


class Broken(Dataset):
    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 2

    def __getitem__(self, index):
        try:
            raise OSError("first: another")
        except OSError:
            raise self.error  # noqa: B904, an error while another is handled, with a traceback of both


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("images/a.png: can't be read,\nnot an image"), "images/a.png: can't be read, not an image"),
        (ValueError("a.png can't be read\nhint: look"), "a.png can't be read hint: look"),
        (TypeError("a.png: bad\nannotation: missing\n"), "a.png: bad annotation: missing"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_an_error_of_a_loader_process_is_told_without_its_traceback(error, told):
    with pytest.raises(type(error)) as raised:
        next(iter(DataLoader(Broken(error), num_workers=1)))
    assert "Traceback" in str(raised.value)
    assert fail("name.py", raised.value).code == f"name.py: error: {told}"


def test_any_other_error_is_told_whole():
    assert fail("name.py", OSError("ValueError: of:\n two lines")).code == "name.py: error: ValueError: of: two lines"
