import json
import logging
import os
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import timm
import torch
from huggingface_hub import hf_hub_download, scan_cache_dir
from safetensors.torch import load, save, save_file

from fdconv_zoo.download import Source, download_verified, redact
from fdconv_zoo.integrity import MAX_HEADER_BYTES, check_safetensors
from fdconv_zoo.pretrained import PretrainedError, find_source, manifest, resolve_pretrained
from tests.fakehub import FakeHub, as_endpoint, sha256
from tests.tiny_model import tiny_resnet, weights

TOKEN = "hf_" + "SecretSecretSecretSecretSecretSecr"
FILE = "model.safetensors"


@pytest.fixture
def hub(monkeypatch):
    with as_endpoint(FakeHub()) as hub:
        hub.add("org/tiny", {FILE: weights()})
        yield hub


def value(model):
    """The one number that `weights` filled the parameters with."""
    (number,) = {p.flatten()[0].item() for p in model.parameters()}
    return round(number, 6)


class TestSources:
    def test_loads_from_the_hub_and_keeps_the_config_as_timm_users_know_it(self, hub, tmp_path):
        model = timm.create_model("tiny_resnet", pretrained=True, cache_dir=tmp_path)
        assert value(model) == 0.01
        assert model.pretrained_cfg["hf_hub_id"] == "org/tiny"
        assert model.pretrained_cfg["tag"] == "hub"

    def test_new_head_and_features_only(self, hub, tmp_path):
        assert timm.create_model("tiny_resnet", pretrained=True, num_classes=3, cache_dir=tmp_path).fc.out_features == 3
        features = timm.create_model("tiny_resnet", pretrained=True, features_only=True, cache_dir=tmp_path)
        assert len(features.eval()(torch.zeros(1, 3, 32, 32))) == 5

    def test_repository_of_the_overlay(self, hub, tmp_path):
        hub.add("me/mine", {FILE: weights(0.02)})
        overlay = {"hf_hub_id": "me/mine"}
        model = timm.create_model("tiny_resnet", pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path)
        assert value(model) == 0.02

    @pytest.mark.parametrize("kind", ["safetensors", "pth", "state_dict", "repository"])
    def test_classifier_of_other_classes_than_the_tag_comes_along(self, hub, tmp_path, kind):
        state = {key: torch.full_like(value, 0.02) for key, value in tiny_resnet(num_classes=6).state_dict().items()}
        save_file(state, tmp_path / "mine.safetensors")
        torch.save({"state_dict": state}, tmp_path / "mine.pth")
        hub.add("me/mine", {FILE: save(state)})
        overlay = {
            "state_dict": {"state_dict": state},
            "repository": {"hf_hub_id": "me/mine"},
        }.get(kind, {"file": str(tmp_path / f"mine.{kind}")})
        build = partial(timm.create_model, "tiny_resnet", pretrained=True, cache_dir=tmp_path)
        for model in (build(pretrained_cfg_overlay=overlay), build(pretrained_cfg_overlay=overlay, num_classes=6)):
            assert value(model) == 0.02 and model.num_classes == 6
        fresh = build(pretrained_cfg_overlay=overlay, num_classes=4)
        assert fresh.num_classes == 4 and fresh.fc.weight.std() > 0
        with pytest.raises(RuntimeError, match=r"fc\.weight"):  # as the caller says, so that it does not fit
            build(pretrained_cfg_overlay={**overlay, "num_classes": 5}, num_classes=5)

    def test_commit_in_the_name_asks_nothing_of_the_network_twice(self, hub, tmp_path):
        commit = hub.add("me/mine", {FILE: weights(0.03)})
        hub.add("me/mine", {FILE: weights(0.04)})
        overlay = {"hf_hub_id": f"me/mine@{commit}"}
        for _ in range(2):
            requests = len(hub.log)
            model = timm.create_model("tiny_resnet", True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path)
            assert value(model) == 0.03
        assert len(hub.log) == requests

    def test_hf_hub_name_is_verified_too(self, hub, tmp_path):
        config = {"architecture": "tiny_resnet", "num_classes": 10, "pretrained_cfg": {"classifier": "fc"}}
        hub.add("me/mine", {FILE: weights(0.05), "config.json": json.dumps(config).encode()})
        hub.faults.append({"match": "safetensors", "mode": "flip"})
        model = timm.create_model("hf-hub:me/mine", pretrained=True, cache_dir=tmp_path)
        assert value(model) == 0.05
        assert len(hub.requests("GET", "safetensors")) == 2

    @pytest.mark.parametrize("name", ["tiny_resnet", "hf-hub:me/mine"])
    def test_file_of_the_overlay_wins(self, hub, tmp_path, name):
        hub.add("me/mine", {"config.json": b'{"architecture": "tiny_resnet", "pretrained_cfg": {"num_classes": 10}}'})
        path = tmp_path / "local.safetensors"
        path.write_bytes(weights(0.06))
        model = timm.create_model(name, True, pretrained_cfg_overlay={"file": str(path)}, cache_dir=tmp_path)
        assert value(model) == 0.06
        assert hub.requests("GET", "safetensors") == []

    def test_state_dict_of_the_overlay(self, hub):
        overlay = {"state_dict": load(weights(0.07))}
        assert value(timm.create_model("tiny_resnet", pretrained=True, pretrained_cfg_overlay=overlay)) == 0.07
        assert hub.log == []

    def test_local_dir(self, hub, tmp_path):
        (tmp_path / FILE).write_bytes(weights(0.08))
        (tmp_path / "config.json").write_text('{"architecture": "tiny_resnet", "pretrained_cfg": {"num_classes": 10}}')
        assert value(timm.create_model(f"local-dir:{tmp_path}", pretrained=True)) == 0.08
        assert hub.log == []

    def test_overlay_comes_back_unchanged_where_the_hub_is_not_asked(self, tmp_path):
        path = tmp_path / "some.pth"
        path.touch()
        for overlay in ({"file": str(path)}, {"state_dict": {"a": 1}}):
            assert resolve_pretrained("tiny_resnet", None, overlay) == overlay
        assert resolve_pretrained("tiny_resnet", "untrained") == {}

    def test_environment_is_honoured(self, hub, tmp_path):
        script = "import timm, tests.tiny_model; timm.create_model('tiny_resnet', pretrained=True)"
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-c", script], env=environment, check=True)
        assert next(tmp_path.glob("models--org--tiny/snapshots/*/model.safetensors")).read_bytes() == weights()


class TestZooModel:
    """A model of the zoo gets its static twin's file and computes the twin's function."""

    @pytest.fixture
    def static(self, hub):
        torch.manual_seed(0)
        model = timm.create_model("mobilenetv2_100").eval()
        hub.add("org/static", {FILE: save(model.state_dict())})
        return model

    def create(self, cache_dir):
        overlay = {"hf_hub_id": "org/static"}  # the default's pinned digest is that of trained weights
        model = timm.create_model(
            "mobilenetv2_100_fdconv", pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=cache_dir
        )
        return model.eval()

    @torch.no_grad()
    def test_function(self, static, tmp_path):
        image = torch.randn(2, 3, 64, 64)
        expected = static(image)
        assert (self.create(tmp_path)(image) - expected).abs().max() <= 1e-4 * expected.abs().max()

    def test_flip_on_the_way(self, hub, static, tmp_path):
        hub.faults.append({"match": "safetensors", "mode": "flip"})
        model = self.create(tmp_path)
        assert torch.equal(model.classifier.weight, static.classifier.weight)
        assert len(hub.requests("GET", "safetensors")) == 2

    def test_error_passes_through_timm(self, hub, tmp_path):
        with pytest.raises(PretrainedError, match="org/static"):
            self.create(tmp_path)


class TestErrors:
    def test_message_says_what_was_tried_and_the_ways_out(self, hub, tmp_path):
        hub.faults.append({"match": FILE, "mode": 503, "times": 9, "methods": ("HEAD",)})
        with pytest.raises(PretrainedError) as caught:
            download_verified(Source("org/tiny"), tmp_path, attempts=2, backoff=0.01)
        message = str(caught.value)
        parts = ("org/tiny/model.safetensors at main", hub.url, str(tmp_path), "attempts: 2", "503")
        ways = ("HF_ENDPOINT", "hub.mirror", "pretrained_cfg_overlay=dict(file=", "HF_HUB_OFFLINE=1", "cache_dir")
        for part in parts + ways:
            assert part in message
        assert not isinstance(caught.value, TypeError)  # timm swallows those

    def test_401_hints_at_the_login(self, hub, tmp_path):
        hub.repos["org/tiny"].private = True
        with pytest.raises(PretrainedError, match="hf auth login"):
            download_verified(Source("org/tiny"), tmp_path)

    def test_missing_local_file(self, tmp_path):
        with pytest.raises(PretrainedError, match=r"absent\.safetensors"):
            resolve_pretrained("tiny_resnet", None, {"file": str(tmp_path / "absent.safetensors")})

    def test_no_weights_at_all_is_left_to_timm(self):
        with pytest.raises(RuntimeError, match="No pretrained weights exist"):
            timm.create_model("tiny_resnet.untrained", pretrained=True)

    def test_what_answers_is_no_hub(self, hub, tmp_path):
        hub.repos["org/tiny"].commits[hub.repos["org/tiny"].refs["main"]].clear()
        hub.faults.append({"match": FILE, "mode": 200, "times": 9, "methods": ("HEAD",)})  # as a login page would
        with pytest.raises(PretrainedError, match="not a Hub"):
            download_verified(Source("org/tiny"), tmp_path)

    @pytest.mark.parametrize("attempts", [0, -1])
    def test_attempts(self, attempts):
        with pytest.raises(ValueError, match=f"attempts must be at least 1, got {attempts}"):
            download_verified(Source("org/tiny"), attempts=attempts)

    def test_cut_on_the_content_server(self, tmp_path):
        with as_endpoint(FakeHub(cdn=True)) as hub:
            hub.add("org/tiny", {FILE: weights()})
            hub.faults.append({"match": "_cdn", "mode": "reset"})
            path = download_verified(Source("org/tiny"), tmp_path, backoff=0.01)
        assert path.read_bytes() == weights()

    def test_what_timm_has_cached_before_is_taken_where_the_digest_fits(self, hub, tmp_path):
        hf_hub_download("org/tiny", FILE, cache_dir=tmp_path)
        requests = len(hub.log)
        source = Source("org/tiny", commit="1" * 40, sha256=sha256(weights()))
        assert download_verified(source, tmp_path).read_bytes() == weights()
        assert len(hub.log) == requests
        with pytest.raises(PretrainedError):  # other content on the main branch is not mistaken for it
            download_verified(replace(source, sha256="0" * 64), tmp_path)

    def test_leftovers_of_killed_downloads_go_and_live_ones_stay(self, hub, tmp_path):
        blobs = tmp_path / "models--org--tiny" / "blobs"
        blobs.mkdir(parents=True)
        old, live = (blobs / f"{sha256(weights())}.{name}.incomplete" for name in ("0a1b2c3d", "4e5f6a7b"))
        for path in (old, live):
            path.write_bytes(b"half")
        os.utime(old, (0, 0))
        download_verified(Source("org/tiny"), tmp_path)
        assert not old.exists() and live.exists()

    def test_cache_stays_readable_for_huggingface_hub(self, hub, tmp_path):
        download_verified(Source("org/tiny"), tmp_path)
        report = scan_cache_dir(tmp_path)
        assert [repo.repo_id for repo in report.repos] == ["org/tiny"]
        assert report.warnings == []


class Boom:
    """Runs when unpickled."""

    def __reduce__(self):
        return (exec, ("import os; os.environ['FDCONV_ZOO_PWNED'] = '1'",))


@pytest.fixture
def pickle_bomb(monkeypatch):
    monkeypatch.delenv("FDCONV_ZOO_PWNED", raising=False)
    yield pickle.dumps({"state_dict": Boom()})
    assert "FDCONV_ZOO_PWNED" not in os.environ


class TestSecurity:
    @pytest.mark.parametrize("file", ["pytorch_model.bin", "weights.pth", "weights.npz"])
    def test_no_pickle_from_the_network(self, hub, tmp_path, pickle_bomb, file):
        hub.add("org/evil", {file: pickle_bomb})
        overlay = {"hf_hub_id": "org/evil", "hf_hub_filename": file}
        with pytest.raises(PretrainedError, match="never a pickle"):
            timm.create_model("tiny_resnet", True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path)
        assert hub.log == []

    def test_repository_with_nothing_but_a_pickle(self, hub, tmp_path, pickle_bomb):
        hub.add("org/evil", {"pytorch_model.bin": pickle_bomb})
        overlay = {"hf_hub_id": "org/evil", "hf_hub_filename": None}
        with pytest.raises(PretrainedError, match="404"):
            timm.create_model("tiny_resnet", True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path)
        assert hub.requests("GET", "") == []

    def test_pickle_under_a_safetensors_name(self, hub, tmp_path, pickle_bomb):
        hub.add("org/evil", {FILE: pickle_bomb})
        with pytest.raises(PretrainedError, match="no safetensors file"):
            timm.create_model("tiny_resnet", True, pretrained_cfg_overlay={"hf_hub_id": "org/evil"}, cache_dir=tmp_path)

    def test_no_pickle_from_a_url(self):
        with pytest.raises(PretrainedError, match="bare URL"):
            timm.create_model("tiny_resnet.url", pretrained=True)

    def test_local_pickle_only_with_weights_only(self, tmp_path, pickle_bomb):
        evil, good = tmp_path / "evil.pth", tmp_path / "good.pth"
        torch.save({"state_dict": Boom()}, evil)
        torch.save({"state_dict": load(weights(0.09)), "epoch": 3}, good)
        with pytest.raises(RuntimeError, match="weights_only"):
            timm.create_model("tiny_resnet", pretrained=True, pretrained_cfg_overlay={"file": str(evil)})
        assert value(timm.create_model("tiny_resnet", True, pretrained_cfg_overlay={"file": str(good)})) == 0.09

    @pytest.mark.parametrize("length", [0, 1, 300, MAX_HEADER_BYTES + 1, 2**63])
    def test_absurd_header_is_refused(self, hub, tmp_path, length):
        hub.add("org/evil", {FILE: length.to_bytes(8, "little") + b"{" + b" " * 200})
        with pytest.raises(PretrainedError, match=rf"header claims {length} bytes"):
            timm.create_model("tiny_resnet", True, pretrained_cfg_overlay={"hf_hub_id": "org/evil"}, cache_dir=tmp_path)

    def test_huge_header_is_refused_even_where_the_file_is_as_large(self, tmp_path):
        path = tmp_path / FILE
        with path.open("wb") as file:  # sparse
            file.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{")
            file.truncate(2 * MAX_HEADER_BYTES)
        with pytest.raises(ValueError, match="header claims"):
            check_safetensors(path)

    def test_real_header_passes(self, tmp_path):
        save_file({"a": torch.zeros(3)}, tmp_path / FILE)
        check_safetensors(tmp_path / FILE)

    @pytest.mark.parametrize("file", ["../../outside.safetensors", "/tmp/outside.safetensors", "a/../../b.safetensors"])
    def test_file_names_can_not_leave_the_cache(self, hub, tmp_path, file):
        cache = tmp_path / "cache"
        hub.add("org/evil", {file: weights()})
        overlay = {"hf_hub_id": "org/evil", "hf_hub_filename": file}
        with pytest.raises(PretrainedError, match="leaves its folder"):
            timm.create_model("tiny_resnet", True, pretrained_cfg_overlay=overlay, cache_dir=cache)
        assert not list(tmp_path.rglob("*outside*"))
        assert not list(tmp_path.rglob("b.safetensors"))

    @pytest.mark.parametrize("status", [None, 401, 404, 503])
    def test_token_is_sent_but_never_shown_nor_written(self, hub, tmp_path, monkeypatch, caplog, capfd, status):
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        caplog.set_level(logging.DEBUG)
        hub.faults += [{"match": FILE, "mode": status, "times": 9, "methods": ("HEAD",)}] if status else []
        message = ""
        try:
            download_verified(Source("org/tiny"), tmp_path, attempts=2, backoff=0.01)
        except PretrainedError as error:
            message = str(error)
        assert bool(message) == bool(status)
        assert hub.log[0][2]["authorization"] == f"Bearer {TOKEN}"
        written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
        shown = message + caplog.text + "".join(capfd.readouterr())
        assert TOKEN not in shown
        assert TOKEN.encode() not in written

    def test_redact(self, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", "not-of-the-usual-form")
        text = f"{TOKEN} not-of-the-usual-form https://me:pw@mirror.org/a?X-Amz-Signature=abc#d hf_hub_download"
        assert redact(text) == "*** *** https://***@mirror.org/a?*** hf_hub_download".replace("***", "hf_***", 1)


class TestManifest:
    def test_entries_are_well_formed_and_unique(self):
        assert len({(source.repo, source.file) for source in manifest()}) == len(manifest())
        for source in manifest():
            assert source.file.endswith(".safetensors")
            assert source.sha256 is None or re.fullmatch("[0-9a-f]{64}", source.sha256)
            assert source.commit is None or re.fullmatch("[0-9a-f]{40}", source.commit)
            assert (source.checked is None) == (source.sha256 is None and source.commit is None)

    def test_default_resnet50_is_pinned(self):
        source = find_source("timm/resnet50.a1_in1k")
        assert source.sha256.startswith("773525d5") and source.commit.startswith("5d9e13b8") and source.pinned

    def test_pin_does_not_hold_for_another_revision(self):
        commit = find_source("timm/resnet50.a1_in1k").commit
        assert find_source(f"timm/resnet50.a1_in1k@{commit}").sha256
        assert find_source("timm/resnet50.a1_in1k@v2") == Source("timm/resnet50.a1_in1k", commit="v2")
        assert not find_source("timm/resnet50.a1_in1k@v2").pinned

    def test_pinned_digest_is_what_counts(self, hub, tmp_path):
        with pytest.raises(PretrainedError, match="the manifest pins"):
            download_verified(Source("org/tiny", sha256="0" * 64), tmp_path)
        assert download_verified(Source("org/tiny", sha256=sha256(weights())), tmp_path).exists()


def test_model_without_pretrained_asks_nothing(hub):
    tiny_resnet()
    assert hub.log == []
