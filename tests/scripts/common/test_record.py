"""What results files tell, and how they are written."""

import json
from datetime import datetime, timedelta

import pytest

from common.record import run_record, write_json


def test_results_are_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_json(path, {"rows": [1]})
    with pytest.raises(TypeError):
        write_json(path, {"rows": object()})
    assert json.loads(path.read_text()) == {"rows": [1]}
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_tells_how_it_was_made():
    found = run_record("train.py --lr 0.1", "cpu", 2)
    assert list(found) == ["command", "date", "versions", "commit", "cpu", "device", "threads"]
    assert (found["command"], found["device"], found["threads"]) == ("train.py --lr 0.1", "cpu", 2)
    assert datetime.fromisoformat(found["date"]).utcoffset() == timedelta(0)
