"""How results files are written."""

import json

import pytest

from common.record import write_json


def test_results_are_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_json(path, {"rows": [1]})
    with pytest.raises(TypeError):
        write_json(path, {"rows": object()})
    assert json.loads(path.read_text()) == {"rows": [1]}
    assert list(tmp_path.iterdir()) == [path]
