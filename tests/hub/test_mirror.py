import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from fdconv_zoo.download import Source, download_verified
from fdconv_zoo.integrity import check_repo_path
from fdconv_zoo.pretrained import manifest
from hub import mirror
from tests.fakehub import FakeHub, as_endpoint, sha256
from tests.tiny_model import weights

FILE = "model.safetensors"


@pytest.fixture
def hub():
    with as_endpoint(FakeHub()) as hub:
        hub.add("org/tiny", {FILE: weights(), "config.json": b"{}", "pytorch_model.bin": b"pickle", "notes.txt": b""})
        hub.add("org/other", {FILE: weights(0.02)})
        yield hub


class TestSelect:
    @pytest.mark.parametrize(
        ("pattern", "repos"),
        [
            ("resnet50_fdconv.a1_in1k_converted", {"timm/resnet50.a1_in1k"}),
            ("resnet50.a1_in1k", {"timm/resnet50.a1_in1k"}),
            ("timm/resnet50.a1_in1k", {"timm/resnet50.a1_in1k"}),
            ("mobilenetv2_100_fdconv", {"timm/mobilenetv2_100.ra_in1k"}),
            ("*", {source.repo for source in manifest()}),
        ],
    )
    def test_patterns(self, pattern, repos):
        assert {source.repo for source in mirror.select([pattern], manifest())} == repos

    def test_wildcard_does_not_spill_over(self):
        chosen = mirror.select(["resnet50_fdconv*"], manifest())
        assert all(source.repo.startswith("timm/resnet50.") for source in chosen)
        assert len(chosen) > 10

    def test_repository_gives_weights_and_config_at_its_commit_but_no_pickle(self, hub):
        chosen = mirror.select(["org/tiny"], manifest())
        assert [source.file for source in chosen] == ["config.json", FILE]
        assert {source.commit for source in chosen} == {hub.repos["org/tiny"].refs["main"]}

    def test_nothing_matches(self):
        with pytest.raises(ValueError, match="'alexnet'"):
            mirror.select(["alexnet"], manifest())


class TestFolder:
    def test_fills_resumes_and_repairs(self, hub, tmp_path, capsys):
        run = ["--output", str(tmp_path), "org/tiny", "org/other"]
        hub.faults.append({"match": "org/other", "mode": 404, "methods": ("HEAD",)})
        with pytest.raises(SystemExit) as caught:
            mirror.main(run)
        assert caught.value.code == 1
        assert "run the same command again" in capsys.readouterr().err
        assert (tmp_path / "org/tiny" / FILE).read_bytes() == weights()

        transfers = len(hub.requests("GET", "org/tiny/resolve"))
        mirror.main(run)
        assert len(hub.requests("GET", "org/tiny/resolve")) == transfers
        assert (tmp_path / "org/other" / FILE).read_bytes() == weights(0.02)

        (tmp_path / "org/other" / FILE).write_bytes(b"spoilt")
        mirror.main(run)
        assert (tmp_path / "org/other" / FILE).read_bytes() == weights(0.02)
        index = mirror.read_index(tmp_path)
        assert index["org/other", FILE].sha256 == sha256(weights(0.02))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["mirror.json", "org"]

    def test_dry_run_fetches_nothing(self, hub, tmp_path, capsys):
        mirror.main(["--output", str(tmp_path), "--dry-run", "org/tiny"])
        assert "org/tiny/model.safetensors" in capsys.readouterr().out
        assert not list(tmp_path.iterdir())
        assert hub.requests("GET", "resolve") == []

    @pytest.mark.parametrize(
        "path",
        ["../evil.safetensors", "/evil.safetensors", "a/../../evil.safetensors", "C:\\evil", "..\\evil", "\\\\h\\s"],
    )
    def test_paths_of_a_listing_can_not_leave_the_folder(self, hub, tmp_path, capsys, path):
        hub.add("org/evil", {path: weights(), FILE: weights()})
        with pytest.raises(ValueError, match="leaves its folder"):
            check_repo_path(path)
        with pytest.raises(SystemExit):
            mirror.main(["--output", str(tmp_path / "mirror"), "org/evil"])
        assert "leaves its folder" in capsys.readouterr().err
        assert not list(tmp_path.rglob("*evil*"))


def test_cache_bundle_works_without_a_network(hub, tmp_path):
    mirror.main(["--cache-dir", str(tmp_path), "org/tiny"])
    source = Source("org/tiny", FILE, hub.repos["org/tiny"].refs["main"])
    requests = len(hub.log)
    assert download_verified(source, tmp_path).read_bytes() == weights()
    assert len(hub.log) == requests
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    overlay = f"pretrained_cfg_overlay=dict(hf_hub_id='org/tiny@{source.commit}')"
    script = f"import timm, tests.tiny_model; timm.create_model('tiny_resnet', pretrained=True, {overlay})"
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)


@pytest.fixture
def served(hub, tmp_path):
    """A mirror folder served by the real command in a process of its own; its address."""
    mirror.main(["--output", str(tmp_path / "mirror"), "org/tiny", "org/other"])
    command = [sys.executable, "-m", "hub.mirror", "--output", str(tmp_path / "mirror"), "--serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        yield re.search(r"HF_ENDPOINT=(\S+)", process.stdout.readline())[1]
        process.terminate()


def test_served_folder_is_an_endpoint(hub, served, tmp_path):
    commit = hub.repos["org/tiny"].refs["main"]
    requests = len(hub.log)
    for source in (Source("org/tiny"), Source("org/tiny", commit=commit), Source("org/other")):
        path = download_verified(source, tmp_path / "cache", endpoint=served)
        assert path.read_bytes() == weights(0.02 if source.repo == "org/other" else 0.01)
    assert commit in path.parts or path.parts[-2] == hub.repos["org/other"].refs["main"]
    assert len(hub.log) == requests

    with urllib.request.urlopen(f"{served}/api/models/org/tiny") as answer:
        info = json.load(answer)
    assert info["sha"] == commit and {"rfilename": FILE} in info["siblings"]
    for path in (
        "mirror.json",
        "org/tiny/resolve/main/../../../../mirror.json",
        "org/tiny/resolve/v2/model.safetensors",
    ):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{served}/{path}")


def test_mirror_killed_in_mid_file_goes_on_where_it_was(hub, tmp_path):
    hub.faults.append({"match": "org/other/resolve", "mode": "stall"})
    command = [sys.executable, "-m", "hub.mirror", "--output", str(tmp_path), "org/tiny", "org/other"]
    process = subprocess.Popen(command, env={**os.environ, "HF_ENDPOINT": hub.url}, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not hub.requests("GET", "org/other/resolve") and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert set(mirror.read_index(tmp_path)) == {("org/tiny", FILE), ("org/tiny", "config.json")}
    mirror.main(["--output", str(tmp_path), "org/tiny", "org/other"])
    assert (tmp_path / "org/other" / FILE).read_bytes() == weights(0.02)
    assert len(hub.requests("GET", "org/tiny/resolve/.*safetensors")) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mirror.json", "org"]
