import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from huggingface_hub import try_to_load_from_cache

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
            ("swin_tiny_fdconv.ms_in1k_converted", {"timm/swin_tiny_patch4_window7_224.ms_in1k"}),
            ("resnet18_kw_4x.a1_in1k_converted", {"timm/resnet18.a1_in1k"}),
            ("*", {source.repo for source in manifest()}),
        ],
    )
    def test_patterns(self, pattern, repos):
        assert {source.repo for source in mirror.select([pattern], manifest())} == repos

    def test_wildcard_does_not_spill_over(self):
        chosen = mirror.select(["resnet50_fdconv*"], manifest())
        assert all(source.repo.startswith("timm/resnet50.") for source in chosen)
        assert len(chosen) > 10

    def test_model_without_a_tag_is_all_of_its_tags(self):
        repos = {source.repo for source in mirror.select(["swin_base_384_fdconv"], manifest())}
        assert repos == {
            f"timm/swin_base_patch4_window12_384.{tag}" for tag in ("ms_in1k", "ms_in22k", "ms_in22k_ft_in1k")
        }

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

    def test_folder_may_have_any_name(self, hub, tmp_path):
        folder = tmp_path / "snapshots" / "mirror"
        mirror.main(["--output", str(folder), "org/tiny"])
        assert mirror.read_index(folder)["org/tiny", FILE].commit == hub.repos["org/tiny"].refs["main"]

    def test_two_commits_of_a_repository(self, hub, tmp_path, capsys):
        first = hub.repos["org/tiny"].refs["main"]
        hub.add("org/tiny", {FILE: weights(0.03)})
        second = hub.repos["org/tiny"].refs["main"]
        pinned, beside_main = [f"org/tiny@{first}", f"org/tiny@{second}"], [f"org/tiny@{first}", "org/tiny"]
        for wanted, main in ((pinned, []), (beside_main, [second])):
            cache = tmp_path / f"cache{len(main)}"
            mirror.main(["--cache-dir", str(cache), *wanted])
            assert {path.name for path in cache.glob("models--*/snapshots/*")} == {first, second}
            assert [path.read_text() for path in cache.glob("models--*/refs/*")] == main
        with pytest.raises(SystemExit) as stop:
            mirror.main(["--output", str(tmp_path / "folder"), f"org/tiny@{first}", "org/tiny"])
        assert stop.value.code == 2
        assert f"is wanted at {second} and at {first}, but a folder holds one" in capsys.readouterr().err
        assert not (tmp_path / "folder").exists()

    def test_two_at_a_time_keep_what_the_other_wrote(self, hub, tmp_path, monkeypatch):
        """The other one mirrors its file, from first to last, while this one's is on its way."""
        first, other = (mirror.select([name], manifest())[-1] for name in ("org/tiny", "org/other"))
        download = mirror.download_verified

        def meanwhile(source, folder):
            path = download(source, folder)
            if source is first:
                mirror.copy_to_folder(other, tmp_path)
            return path

        monkeypatch.setattr(mirror, "download_verified", meanwhile)
        mirror.copy_to_folder(first, tmp_path)
        assert set(mirror.read_index(tmp_path)) == {("org/tiny", FILE), ("org/other", FILE)}
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


@pytest.mark.parametrize("named", [False, True])
def test_cache_bundle_of_a_repository_is_its_main_branch_offline(hub, tmp_path, named):
    commit = hub.repos["org/tiny"].refs["main"]
    mirror.main(["--cache-dir", str(tmp_path), f"org/tiny@{commit}" if named else "org/tiny"])
    found = try_to_load_from_cache("org/tiny", FILE, tmp_path)
    assert found is None if named else Path(found).read_bytes() == weights()


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
