"""State dicts from elsewhere: prefixes of wrappers, causes of misfits, static weights for models of the zoo."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.optim.swa_utils import AveragedModel

import fdconv_zoo
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


def test_a_cause_is_named_for_static_weights_and_for_other_options(static):
    model = timm.create_model("resnet18_fdconv", **SMALL)
    assert "weights of a static model" in describe_misfits(static.state_dict(), model)
    bands = timm.create_model("resnet18_fdconv", num_bands=2, **SMALL)
    assert "other options there, such as num_bands" in describe_misfits(bands.state_dict(), model)
    swin = {"embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2), "num_classes": 5}
    small, large = (timm.create_model("swin_tiny_patch4_window7_224", img_size=size, **swin) for size in (32, 224))
    assert "of another img_size or window_size" in describe_misfits(large.state_dict(), small)


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


def test_create_model_strips_prefixes_and_names_few_keys(static, tmp_path):
    path = tmp_path / "weights.safetensors"
    images = torch.rand(2, 3, 64, 64)
    for net in (static, timm.create_model("resnet18_fdconv", **SMALL).eval()):
        save_file({f"backbone.{key}": value.contiguous() for key, value in net.state_dict().items()}, path)
        model = timm.create_model("resnet18_fdconv", checkpoint_path=str(path), **SMALL).eval()
        with torch.no_grad():
            torch.testing.assert_close(model(images), net(images), rtol=1e-4, atol=1e-5)
    for name, cause in (("test_vit", "another architecture's"), ("resnet18_fdconv", "The classifier only")):
        save_file(timm.create_model(name, **(SMALL | {"num_classes": 7} if "res" in name else {})).state_dict(), path)
        with pytest.raises(RuntimeError, match=f"the state dict does not fit: .*{cause}") as caught:
            timm.create_model("resnet18_fdconv", checkpoint_path=str(path), **SMALL)
        assert len(str(caught.value)) < 400


def test_not_strict_is_as_torchs(static):
    """Odd keys are told, and sizes that differ are errors, as of any module."""
    model = timm.create_model("resnet18_fdconv", **SMALL).eval()
    state = {**static.state_dict(), "odd": torch.zeros(1), "layer1.0.conv1.odd": torch.zeros(1)}
    del state["fc.bias"]
    found = model.load_state_dict(state, strict=False)
    assert found.unexpected_keys == ["odd", "layer1.0.conv1.odd"]
    assert found.missing_keys == ["fc.bias"]
    model.fc.bias.data.copy_(static.fc.bias)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(images), static(images), rtol=1e-4, atol=1e-5)
    for strict in (False, True):
        with pytest.raises(RuntimeError, match=r"does not fit: 1 static .*layer1.0.conv1.weight .* instead of"):
            model.load_state_dict({**static.state_dict(), "layer1.0.conv1.weight": torch.zeros(1)}, strict=strict)


def test_absorbed_norms_are_named(static):
    """Whether the weights or the model were fused, and converted as static ones or not."""
    plain, fused = (timm.create_model("resnet18_fdconv", **SMALL).eval() for _ in range(2))
    block = fused.layer1[0]
    block.conv1.absorb_batch_norm(block.bn1)
    block.bn1 = torch.nn.Identity()
    assert "absorbed into layers of these weights (fuse()), not of this model" in describe_misfits(
        fused.state_dict(), plain
    )
    assert "absorbed into layers of this model (fuse()), not of these weights" in describe_misfits(
        plain.state_dict(), fused
    )
    assert describe_misfits(fused.state_dict(), fused) == ""
    for state, model, odd in ((fused.state_dict(), plain, "conv1.bias"), (static.state_dict(), fused, "bn1.weight")):
        with pytest.raises(ValueError, match=rf"fit nothing in the model: .*layer1.0.{odd}"):
            fdconv_zoo.convert_static_state_dict(state, model)
        with pytest.raises(RuntimeError, match=rf"layer1.0.{odd}"):
            model.load_state_dict(state)


def test_its_own_state_dict_is_loaded_as_it_is(static):
    model, other = (timm.create_model("resnet18_fdconv", **SMALL) for _ in range(2))
    other.load_state_dict(model.state_dict())
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())
    state = model.state_dict()
    del state["bn1.num_batches_tracked"]  # torch makes it up where the versions of modules are lost
    with pytest.raises(RuntimeError, match=r"bn1\.num_batches_tracked"):
        other.load_state_dict(state)
    found = other.load_state_dict({}, strict=False)
    assert len(found.missing_keys) > 10 and not found.unexpected_keys
