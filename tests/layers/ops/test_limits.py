import pytest
import torch

from fdconv_zoo.layers.ops.eager import limits


@pytest.mark.parametrize(("value", "count"), [("0", 0), ("1", 1), (None, 1)])
def test_freed_memory_is_kept_once_unless_turned_off(value, count, monkeypatch):
    name = "FDCONV_ZOO_KEEP_FREED_MEMORY"
    monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    made = []
    monkeypatch.setattr(torch, "empty", lambda *size, **kwargs: made.append(size))
    limits.keep_freed_memory.cache_clear()
    for _ in range(2):
        limits.keep_freed_memory()
    assert made == [(31 << 20,)] * count
