"""Errors in one line."""

import pytest
from torch.utils.data import DataLoader, Dataset

from common.command_line import fail


class Broken(Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        raise ValueError("images/a.png: can't be read,\nnot an image")


def test_an_error_of_a_loader_process_is_told_without_its_traceback():
    with pytest.raises(ValueError) as raised:
        next(iter(DataLoader(Broken(), num_workers=1)))
    assert "Traceback" in str(raised.value)
    assert fail("name.py", raised.value).code == "name.py: error: images/a.png: can't be read, not an image"


def test_any_other_error_is_told_whole():
    assert fail("name.py", OSError("ValueError: of:\n two lines")).code == "name.py: error: ValueError: of: two lines"
