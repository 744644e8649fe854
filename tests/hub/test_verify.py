import pytest
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file, save_file

from fdconv_zoo.download import Source, download_verified
from fdconv_zoo.pretrained import manifest
from hub import mirror, publish, verify
from tests.fakehub import sha256
from tests.tiny_model import weights


@pytest.fixture
def folder(run, tmp_path):
    publish.main([str(run), "--repo", "me/x", "--license", "mit", "--dry-run", "--output", str(tmp_path / "out")])
    return tmp_path / "out"


def verdict(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        verify.main(list(arguments))
    output = capsys.readouterr()
    return caught.value.code, output.out + output.err


def test_published_folder(folder, capsys):
    code, output = verdict(capsys, "--folder", str(folder))
    assert code == 0 and "2 checked, 0 bad" in output


def test_flipped_bit(folder, capsys):
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    code, output = verdict(capsys, "--folder", str(folder))
    assert code == 1 and "corrupt: sha256" in output


def test_weights_that_compute_something_else(folder, capsys):
    """Digest right, output wrong: as with code that has changed since."""
    stored = load_file(folder / verify.FORWARD_PASS)
    stored["output"] *= 1.01
    digest = sha256((folder / "model.safetensors").read_bytes())
    save_file(stored, folder / verify.FORWARD_PASS, {"sha256": digest})
    code, output = verdict(capsys, "--folder", str(folder))
    assert code == 1 and "largest difference 9.9e-03" in output


def test_repository(hub, run, tmp_path, capsys):
    publish.main([str(run), "--repo", "me/flowers", "--license", "mit"])
    arguments = ("--repo", "me/flowers", "--cache-dir", str(tmp_path / "cache"))
    code, output = verdict(capsys, *arguments)
    assert code == 0 and "2 checked, 0 bad" in output


def test_repository_with_nothing_to_check_it_by(hub, capsys):
    code, output = verdict(capsys, "--repo", "org/tiny")
    assert code == 1 and "nothing to check it by" in output


def test_repository_against_the_manifest(hub, capsys):
    hub.add("timm/resnet50.a1_in1k", {"model.safetensors": b"something else"})
    code, output = verdict(capsys, "--repo", "timm/resnet50.a1_in1k")
    assert code == 1 and "not as pinned" in output


def test_cache(hub, tmp_path, capsys):
    hub.add("timm/resnet18.a1_in1k", {"model.safetensors": weights()})
    path = download_verified(Source("timm/resnet18.a1_in1k"), tmp_path)
    arguments = ("--cache", "--cache-dir", str(tmp_path))
    assert verdict(capsys, *arguments)[0] == 0
    path.write_bytes(weights(0.02))
    code, output = verdict(capsys, *arguments)
    assert code == 1 and "timm/resnet18.a1_in1k/model.safetensors: corrupt" in output


def test_copy_of_the_main_branch_that_loading_takes(hub, tmp_path, capsys):
    """Another commit than the manifest's, but its file: a pinned source is found there too."""
    source = next(source for source in manifest() if source.repo == "timm/resnet50.a1_in1k" and source.pinned)
    hub.add(source.repo, {source.file: b"not what is pinned"})
    hf_hub_download(source.repo, source.file, cache_dir=tmp_path)
    code, output = verdict(capsys, "--cache", "--cache-dir", str(tmp_path))
    assert code == 1 and f"{source.repo}/{source.file}: corrupt" in output


def test_mirror_folder(hub, tmp_path, capsys):
    mirror.main(["--output", str(tmp_path / "mirror"), "org/tiny"])
    assert verdict(capsys, "--folder", str(tmp_path / "mirror"))[0] == 0
    (tmp_path / "mirror/org/tiny/model.safetensors").unlink()
    code, output = verdict(capsys, "--folder", str(tmp_path / "mirror"))
    assert code == 1 and "missing" in output


def test_strange_folder(tmp_path, capsys):
    code, output = verdict(capsys, "--folder", str(tmp_path))
    assert code == 2 and "holds neither" in output
    code, output = verdict(capsys, "--folder", str(tmp_path / "nope"))
    assert code == 2 and output.endswith(f"there is no folder {tmp_path / 'nope'}\n")


def test_dry_run(capsys):
    verify.main(["--cache", "--dry-run"])
    assert "would check" in capsys.readouterr().out
