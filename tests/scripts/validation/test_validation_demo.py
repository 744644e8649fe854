"""The picture of `validate.py --demo` without what it needs."""

import sys

import pytest
import torch

from validation.demo import draw_picture


def test_missing_matplotlib_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        draw_picture(torch.rand(3, 32, 32), torch.randn(32, 3, 3, 3), tmp_path / "picture.png")
