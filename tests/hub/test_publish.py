import json
import os
import re
import subprocess
import sys

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from hub import publish
from tests.fakehub import sha256
from tests.hub.conftest import TOKEN
from tests.tiny_model import tiny_resnet, weights


def published(hub, repo):
    repo = hub.repos[repo]
    return repo.commits[repo.refs["main"]]


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        publish.main(list(arguments))
    assert caught.value.code
    return capsys.readouterr().err


class TestRun:
    def test_publishes_the_best_weights_with_all_that_a_user_needs(self, hub, run):
        publish.main([str(run), "--repo", "me/flowers", "--license", "apache-2.0"])
        files = published(hub, "me/flowers")
        assert set(files) == {".gitattributes", *publish.PUBLISHED}

        best = load_file(run / "model_best.safetensors")
        model = timm.create_model("hf-hub:me/flowers", pretrained=True, cache_dir=run / "cache")
        assert all(torch.equal(value, best[name]) for name, value in model.state_dict().items())
        assert model.num_classes == 6 and model.pretrained_cfg["crop_pct"] == 0.9
        assert model.pretrained_cfg.get("tag") != "hub"

        config = json.loads(files["config.json"])
        assert config["num_classes"] == 6 and "num_classes" not in config.get("model_args", {})

    def test_card(self, hub, run, tmp_path):
        publish.main([str(run), "--repo", "me/flowers", "--license", "mit"])
        files = published(hub, "me/flowers")
        (tmp_path / "card.md").write_bytes(files["README.md"])
        card = ModelCard.load(tmp_path / "card.md")
        assert (card.data.license, card.data.base_model, card.data.library_name) == ("mit", "org/tiny", "timm")
        assert card.data.datasets == ["me/flowers"]
        assert {result.metric_name: result.metric_value for result in card.data.eval_results} == {
            "Top 1 Accuracy": 71.25,
            "Top 5 Accuracy": 99.0,
        }
        assert sha256(files["model.safetensors"]) in card.text
        assert "/home/me" not in card.content

    def test_code_of_the_card_runs(self, hub, run, tmp_path):
        publish.main([str(run), "--repo", "me/flowers", "--license", "mit"])
        code = re.search(r"```python\n(.*?)```", published(hub, "me/flowers")["README.md"].decode(), re.S)[1]
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
        script = "import tests.tiny_model\n" + code
        result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert "indices" in result.stdout

    @pytest.mark.parametrize("size", [None, 24])
    def test_model_of_one_channel(self, hub, run, size):
        options = yaml.safe_load((run / "args.yaml").read_text())
        (run / "args.yaml").write_text(yaml.safe_dump({**options, "in_chans": 1, "img_size": size}))
        for path in run.glob("*.safetensors"):
            state = load_file(path)
            with safe_open(path, "pt") as file:
                header = file.metadata()
            save_file({**state, "conv1.weight": state["conv1.weight"].sum(1, keepdim=True)}, path, header)
        publish.main([str(run), "--repo", "me/grey", "--license", "mit"])
        model = timm.create_model("hf-hub:me/grey", pretrained=True, cache_dir=run / "cache")
        config = timm.data.resolve_model_data_config(model)
        assert config["input_size"] == (1, size or 32, size or 32) and len(config["mean"]) == 1
        assert model.conv1.in_channels == 1

    def test_last_weights_have_the_last_results(self, run):
        release = publish.read_run(run, "last.safetensors")
        assert release.results == {"top1": 70.0, "top5": 99.5}

    def test_averaged_weights_have_the_averaged_results(self, run):
        (run / "summary.csv").write_text("epoch,eval_top1,eval_ema_top1\n1,60,65\n2,61,66")
        assert publish.read_run(run, None).results == {"top1": 65.0}
        assert publish.read_run(run, "last.safetensors").results == {"top1": 61.0}

    def test_top_5_of_five_classes_is_not_told(self, run):
        save_file(tiny_resnet(num_classes=5).state_dict(), run / "model_best.safetensors", {"epoch": "1"})
        options = yaml.safe_load((run / "args.yaml").read_text())
        (run / "args.yaml").write_text(yaml.safe_dump({**options, "num_classes": 5}))
        assert publish.read_run(run, None).results == {"top1": 71.25}

    def test_weights_of_an_epoch_not_yet_validated_have_no_results(self, run):
        (run / "summary.csv").write_text("epoch,eval_top1\n0,60")
        assert publish.read_run(run, None).results == {}

    def test_local_pth_tar_is_read_with_weights_only_and_published_as_safetensors(self, hub, run):
        for path in run.glob("*.safetensors"):
            torch.save({"state_dict": load_file(path), "epoch": 1}, path.with_name(f"{path.stem}.pth.tar"))
            path.unlink()
        publish.main([str(run), "--repo", "me/flowers", "--license", "mit"])
        assert set(published(hub, "me/flowers")) == {".gitattributes", *publish.PUBLISHED}

    def test_pickle_with_code_is_refused(self, hub, run, capsys):
        (run / "model_best.safetensors").unlink()
        torch.save({"state_dict": timm.create_model}, run / "model_best.pth.tar")
        assert "weights_only" in fails(capsys, str(run), "--repo", "me/x", "--license", "mit")
        assert "me/x" not in hub.repos

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((), "--license"),
            (("--license", "mit", "--weights", "other.safetensors"), "has none of other.safetensors"),
        ],
    )
    def test_what_is_missing_is_named(self, hub, run, capsys, arguments, message):
        assert message in fails(capsys, str(run), "--repo", "me/x", *arguments)

    def test_sources_that_are_not_there(self, hub, run, capsys):
        where = ("--repo", "me/x", "--license", "mit", "--dataset", "mine")
        assert "unknown model resnet18_fdcon, did you mean resnet18_fdconv" in fails(capsys, "resnet18_fdcon", *where)
        file = str(run / "model_best.safetensors")
        assert "did you mean resnet18_fdconv" in fails(capsys, file, "--model", "resnet18_fdcon", *where)
        assert "there is no folder or file outputs/mines" in fails(capsys, "outputs/mines", *where)
        error = fails(capsys, "resnet18_fdconv.a1_in1k_converted", *where)  # this hub does not have them
        assert "python -m hub.publish weights.safetensors --model NAME" in error
        assert "pretrained_cfg_overlay" not in error

    def test_folder_data_set_must_be_named(self, hub, run, capsys):
        options = yaml.safe_load((run / "args.yaml").read_text())
        (run / "args.yaml").write_text(yaml.safe_dump({**options, "dataset": ""}))
        assert "--dataset" in fails(capsys, str(run), "--repo", "me/x", "--license", "mit")

    def test_weights_that_do_not_fit(self, hub, run, capsys):
        options = yaml.safe_load((run / "args.yaml").read_text())
        (run / "args.yaml").write_text(yaml.safe_dump({**options, "num_classes": 4}))
        assert "does not fit tiny_resnet.hub" in fails(capsys, str(run), "--repo", "me/x", "--license", "mit")

    @pytest.mark.parametrize("recorded", [True, False])
    def test_a_run_from_a_file_is_not_from_scratch(self, hub, run, capsys, recorded):
        # as `--config finetune_converted.yaml --initial-checkpoint FILE` leaves it, with and without its start.json
        options = yaml.safe_load((run / "args.yaml").read_text())
        (run / "args.yaml").write_text(yaml.safe_dump({**options, "initial_checkpoint": "/home/me/static.safetensors"}))
        if recorded:
            (run / "start.json").write_text(json.dumps({"from": "file", "name": "static.safetensors"}))
        arguments = [str(run), "--repo", "me/flowers", "--license", "mit"]
        error = fails(capsys, *arguments)
        assert "static.safetensors: name their repository with --base-model" in error
        publish.main([*arguments, "--base-model", "org/static"])
        card = published(hub, "me/flowers")["README.md"].decode()
        assert "Fine-tuned from [org/static]" in card and "base_model: org/static" in card
        assert "`start` | `static.safetensors`" in card and "`pretrained`" not in card
        publish.main([*arguments, "--base-model", "none"])
        card = published(hub, "me/flowers")["README.md"].decode()
        assert "Fine-tuned from weights that are in no repository" in card and "base_model" not in card

    def test_start_of_a_run_wins_over_the_options_of_its_resume(self, hub, run, capsys):
        (run / "start.json").write_text(json.dumps({"from": "random"}))
        publish.main([str(run), "--repo", "me/flowers", "--license", "mit"])
        card = published(hub, "me/flowers")["README.md"].decode()
        assert "Trained from scratch." in card and "base_model" not in card
        (run / "start.json").write_text(json.dumps({"from": "unknown"}))
        assert "which nobody knows: name their repository" in fails(capsys, str(run), "--repo", "me/x")

    def test_names_of_the_classes(self, hub, run):
        names = ["ant", "bee", "cat|tom", "dog", "eel", "fox"]
        (run / "classes.txt").write_text("\n".join(names))
        publish.main([str(run), "--repo", "me/flowers", "--license", "mit"])
        files = published(hub, "me/flowers")
        assert json.loads(files["config.json"])["label_names"] == names
        assert "| Classes | 6: ant, bee, cat\\|tom, dog, eel, fox |" in files["README.md"].decode()
        model = timm.create_model("hf-hub:me/flowers", pretrained=True, cache_dir=run / "cache")
        assert model.pretrained_cfg["label_names"] == names

    def test_no_run(self, hub, tmp_path, capsys):
        assert "no args.yaml" in fails(capsys, str(tmp_path), "--repo", "me/x")


class TestOtherSources:
    def test_model_name(self, hub, monkeypatch, tmp_path):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        publish.main(["tiny_resnet.hub", "--repo", "me/tiny", "--license", "mit", "--dataset", "imagenet-1k"])
        card = published(hub, "me/tiny")["README.md"].decode()
        assert "base_model: org/tiny" in card and "The weights of [org/tiny]" in card
        assert "Fourier" not in card  # a static model

    def test_fdconv_model(self, hub, monkeypatch, tmp_path):
        torch.manual_seed(0)
        static = timm.create_model("mobilenetv2_100").eval()
        hub.add("timm/mobilenetv2_100.ra_in1k", {"model.safetensors": save(static.state_dict())})
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        publish.main(["mobilenetv2_100_fdconv.ra_in1k_converted", "--repo", "me/mobile"])
        card = published(hub, "me/mobile")["README.md"].decode()
        assert "base_model: timm/mobilenetv2_100.ra_in1k" in card and "license: apache-2.0" in card
        assert "moved into the Fourier domain" in card
        image = torch.randn(1, 3, 64, 64)
        model = timm.create_model("hf-hub:me/mobile", pretrained=True, cache_dir=tmp_path).eval()
        with torch.no_grad():
            expected = static(image)
            assert (model(image) - expected).abs().max() <= 1e-4 * expected.abs().max()

    def test_lone_file(self, hub, tmp_path, capsys):
        path = tmp_path / "w.safetensors"
        path.write_bytes(weights())
        arguments = [str(path), "--repo", "me/tiny", "--license", "mit", "--dataset", "mine"]
        assert "--model" in fails(capsys, *arguments)
        publish.main([*arguments, "--model", "tiny_resnet", "--model-kwargs", "stem_width=64", "num_classes=10"])
        assert json.loads(published(hub, "me/tiny")["config.json"])["model_args"]["stem_width"] == 64
        assert "base_model" not in published(hub, "me/tiny")["README.md"].decode()

    def test_lone_pickle_is_refused(self, hub, tmp_path, capsys):
        path = tmp_path / "w.pth"
        torch.save({}, path)
        assert "no pickle" in fails(capsys, str(path), "--repo", "me/x", "--model", "tiny_resnet")


class TestUpload:
    def test_again_changes_nothing(self, hub, run, capsys):
        arguments = [str(run), "--repo", "me/flowers", "--license", "mit"]
        publish.main(arguments)
        head = hub.repos["me/flowers"].refs["main"]
        publish.main(arguments)
        assert hub.repos["me/flowers"].refs["main"] == head
        first, second = [line for line in capsys.readouterr().out.splitlines() if "@" in line]
        assert first == f"published: hf-hub:me/flowers@{head}"
        assert second == f"already up to date: hf-hub:me/flowers@{head}"

    def test_new_weights_make_a_new_commit(self, hub, run):
        arguments = [str(run), "--repo", "me/flowers", "--license", "mit"]
        publish.main(arguments)
        publish.main([*arguments, "--weights", "last.safetensors"])
        first, second = list(hub.repos["me/flowers"].commits.values())[-2:]
        assert all(first[name] != second[name] for name in ("model.safetensors", "README.md", publish.FORWARD_PASS))

    def test_a_commit_in_between_is_not_overwritten(self, hub, run, capsys, monkeypatch):
        arguments = [str(run), "--repo", "me/flowers", "--license", "mit"]
        publish.main(arguments)
        create_commit = publish.HfApi.create_commit

        def late(api, *args, **kwargs):
            hub.add("me/flowers", {"README.md": b"---\nlicense: mit\n---\nmine"})
            return create_commit(api, *args, **kwargs)

        monkeypatch.setattr(publish.HfApi, "create_commit", late)
        assert "someone else committed" in fails(capsys, *arguments, "--weights", "last.safetensors")
        assert published(hub, "me/flowers")["README.md"].endswith(b"mine")

    def test_dry_run_uploads_nothing_and_needs_no_hub(self, hub, run, tmp_path, capsys):
        output = tmp_path / "files"
        publish.main([str(run), "--repo", "me/x", "--license", "mit", "--dry-run", "--output", str(output)])
        assert hub.log == []
        assert {path.name for path in output.iterdir()} == set(publish.PUBLISHED)
        assert "nothing uploaded" in capsys.readouterr().out

    def test_interrupted_upload_leaves_the_repository_as_it_was(self, hub, run, capsys):
        publish.main([str(run), "--repo", "me/flowers", "--license", "mit"])
        head = hub.repos["me/flowers"].refs["main"]
        hub.faults.append({"match": "/commit/", "mode": 403, "methods": ("POST",)})
        error = fails(capsys, str(run), "--repo", "me/flowers", "--license", "mit", "--weights", "last.safetensors")
        assert "403" in error and TOKEN not in error
        assert hub.repos["me/flowers"].refs["main"] == head

    def test_token_goes_to_the_hub_and_nowhere_else(self, hub, run, capfd, caplog):
        caplog.set_level("DEBUG")
        publish.main([str(run), "--repo", "me/flowers", "--license", "mit"])
        assert any(headers.get("authorization") == f"Bearer {TOKEN}" for _, _, headers in hub.log)
        assert TOKEN not in caplog.text + "".join(capfd.readouterr())
        assert not any(TOKEN.encode() in content for content in published(hub, "me/flowers").values())


class TestCleanliness:
    @pytest.mark.parametrize(
        ("text", "kind"),
        [
            ("trained on /home/me/data", "a path of this machine"),
            ("see C:\\data", "a path of this machine"),
            (f"token {TOKEN}", "an access token"),
            ("ask me@example.org", "an e-mail address"),
        ],
    )
    def test_dirt_is_refused_and_not_repeated(self, tmp_path, text, kind):
        (tmp_path / "README.md").write_text(text)
        with pytest.raises(ValueError, match=f"README.md holds {kind}") as caught:
            publish.check_clean(tmp_path)
        assert TOKEN not in str(caught.value)

    def test_dirt_in_the_header_of_weights(self, tmp_path):
        save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors", {"from": "/root/run/last.pth"})
        with pytest.raises(ValueError, match=r"model\.safetensors holds a path"):
            publish.check_clean(tmp_path)

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pth", "last.state.pt", "args.yaml"])
    def test_strange_files_are_refused(self, tmp_path, name):
        (tmp_path / name).touch()
        with pytest.raises(ValueError, match=f"{name} does not belong"):
            publish.check_clean(tmp_path)

    def test_weights_that_are_not_finite(self, run):
        state = load_file(run / "model_best.safetensors")
        state["fc.bias"][0] = float("nan")
        save_file(state, run / "model_best.safetensors")
        with pytest.raises(ValueError, match=r"fc\.bias holds values that are not finite"):
            publish.write_folder(publish.read_run(run, None), "me/x", run / "out")

    def test_header_of_the_source_does_not_travel(self, run, tmp_path):
        publish.main([str(run), "--repo", "me/x", "--license", "mit", "--dry-run", "--output", str(tmp_path / "out")])
        with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
            assert file.metadata() == {"format": "pt"}
