"""State dicts from elsewhere: prefixes of wrappers, causes of misfits, static weights for models of the zoo."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.optim.swa_utils import AveragedModel

import fdconv_zoo  # noqa: F401, registers the models
from fdconv_zoo.checkpoint import describe_misfits, strip_prefixes

SMALL = {"layers": (1, 1, 1, 1), "channels": (20, 24, 32, 40), "num_classes": 5}


@pytest.fixture(scope="module")
def static():
    return timm.create_model("resnet18", **SMALL).eval()


def test_prefixes_of_wrappers_go(static):
    for wrapped in (AveragedModel(torch.nn.DataParallel(static)), torch.nn.ModuleDict({"model": static})):
        state = strip_prefixes(wrapped.state_dict(), static)
        assert state.keys() == static.state_dict().keys()
        assert describe_misfits(state, static) == ""


def test_prefixes_stay_where_the_model_has_them_or_not_all_keys_do(static):
    holder = torch.nn.ModuleDict({"backbone": static, "head": torch.nn.Linear(2, 2)})
    assert strip_prefixes(holder.state_dict(), static).keys() == holder.state_dict().keys()
    outer = torch.nn.ModuleDict({"backbone": static})
    assert strip_prefixes(outer.state_dict(), outer).keys() == outer.state_dict().keys()


def test_keys_of_a_misfit_are_few_and_the_cause_is_named(static):
    others = {**SMALL, "num_classes": 7}
    message = describe_misfits(timm.create_model("resnet18", **others).state_dict(), static)
    assert message.startswith("other shapes (2): fc.weight (7, 40) instead of (5, 40), .... The classifier only")
    message = describe_misfits({"optimizer": torch.zeros(1), "epoch": torch.zeros(1)}, static)
    assert "It is a training state" in message and len(message) < 300


def test_create_model_takes_a_static_checkpoint(static, tmp_path):
    path = tmp_path / "static.safetensors"
    save_file(static.state_dict(), path)
    model = timm.create_model("resnet18_fdconv", checkpoint_path=str(path), **SMALL).eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(images), static(images), rtol=1e-4, atol=1e-5)
    save_file({**static.state_dict(), "odd": torch.zeros(1)}, path)
    with pytest.raises(RuntimeError, match="does not fit") as caught:
        timm.create_model("resnet18_fdconv", checkpoint_path=str(path), **SMALL)
    assert len(str(caught.value)) < 400


def test_its_own_state_dict_is_loaded_as_it_is(static):
    model, other = (timm.create_model("resnet18_fdconv", **SMALL) for _ in range(2))
    other.load_state_dict(model.state_dict())
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())
    found = other.load_state_dict({}, strict=False)
    assert len(found.missing_keys) > 10 and not found.unexpected_keys
