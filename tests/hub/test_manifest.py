import json

import pytest

from fdconv_zoo.pretrained import Source, manifest
from hub import manifest as command
from tests.fakehub import FakeHub, as_endpoint, sha256


def test_manifest_is_current():
    assert command.render(command.sources(manifest())) == command.PATH.read_text(encoding="utf-8")


def test_what_is_known_is_kept_and_new_tags_start_unknown():
    known = Source("timm/resnet18.a1_in1k", sha256="0" * 64)
    entries = {source.repo: source for source in command.sources([known, Source("timm/no-longer-there")])}
    assert entries["timm/resnet18.a1_in1k"] is known
    assert entries["timm/resnet18.a2_in1k"] == Source("timm/resnet18.a2_in1k")
    assert "timm/no-longer-there" not in entries


def test_ask_hub_fills_in_and_refuses_what_differs():
    with as_endpoint(FakeHub()) as hub:
        commit = hub.add("timm/net", {"model.safetensors": b"weights"})
        filled = command.ask_hub(Source("timm/net"))
        assert (filled.commit, filled.size, filled.sha256) == (commit, 7, sha256(b"weights"))
        with pytest.raises(SystemExit, match="pinned"):
            command.ask_hub(Source("timm/net", sha256="0" * 64))


def test_command_checks_and_writes(tmp_path, capsys):
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({"sources": []}))
    with pytest.raises(SystemExit, match="out of date"):
        command.main(["--output", str(path), "--check"])
    command.main(["--output", str(path)])
    command.main(["--output", str(path), "--check"])
    assert f"{len(manifest())} sources, 0 with a sha256" in capsys.readouterr().out
