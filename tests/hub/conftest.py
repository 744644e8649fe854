import pytest
import torch
import yaml
from safetensors.torch import save_file

from tests.fakehub import FakeHub, as_endpoint
from tests.tiny_model import tiny_resnet, weights

TOKEN = "hf_" + "SecretSecretSecretSecretSecretSecr"


@pytest.fixture
def hub(monkeypatch):
    """A Hub with one repository, which lets the holder of TOKEN write."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with as_endpoint(FakeHub(token=TOKEN, user="me")) as hub:
        hub.add("org/tiny", {"model.safetensors": weights()})
        yield hub


@pytest.fixture
def run(tmp_path):
    """A directory as scripts/train.py leaves it: fine-tuned to 6 classes, best in epoch 1 of 0..2."""
    folder = tmp_path / "run"
    folder.mkdir()
    torch.manual_seed(0)
    for name, epoch in (("model_best", 1), ("last", 2)):
        state = tiny_resnet(num_classes=6).state_dict()
        save_file(state, folder / f"{name}.safetensors", {"model": "tiny_resnet.hub", "epoch": str(epoch)})
    options = {"model": "tiny_resnet.hub", "pretrained": True, "num_classes": 6, "in_chans": 3, "model_kwargs": {}}
    options |= {"dataset": "hfds/me/flowers", "data_dir": "/home/me/flowers", "epochs": 3, "crop_pct": 0.9}
    (folder / "args.yaml").write_text(yaml.safe_dump(options))
    rows = ("epoch,train_loss,eval_top1,eval_top5,lr", "0,1,50.0,90,0.1", "1,1,71.25,99,0.1", "2,1,70.0,99.5,0.1")
    (folder / "summary.csv").write_text("\n".join(rows))
    return folder
