"""Deployment: compiled, exported and ONNX models compute what the model computes, at any batch and image size."""

import onnxruntime
import pytest
import timm
import torch
from torch import nn
from torch.export import Dim

import fdconv_zoo  # noqa: F401, registers the models
from tests.compare import relative_error
from tests.models.base import assert_same_gradients, gradients
from tests.models.stirring import stir

NARROW = dict(channels=(20, 24, 32, 40), num_classes=7)
SWIN = dict(img_size=64, window_size=4, embed_dim=24, depths=(1, 2, 1, 1), num_heads=(2, 2, 4, 4), num_classes=7)
CONVNEXT = dict(depths=(1, 1, 1, 1), dims=(24, 32, 40, 48), num_classes=7)
SMALL = [
    pytest.param("resnet18_fdconv", NARROW | dict(layers=(1, 1, 1, 1)), id="resnet"),
    pytest.param("convnext_atto_fdconv", CONVNEXT, id="convnext_conv_mlp"),
    pytest.param("swin_tiny_fdconv", SWIN, id="swin"),
]
FULL = [
    pytest.param("convnext_tiny_fdconv", CONVNEXT, id="convnext"),
    pytest.param("resnet18_fdconv", NARROW | dict(layers=(1, 1, 1, 1), mask_grid=64), id="resnet_official_masks"),
    pytest.param("resnet18_fdconv", {}, id="resnet18"),
    pytest.param("resnet50_fdconv", {}, id="resnet50"),
    pytest.param("mobilenetv2_100_fdconv", {}, id="mobilenetv2_100"),
    pytest.param("convnext_atto_fdconv", {}, id="convnext_atto"),
    pytest.param("swin_tiny_fdconv", dict(img_size=64), id="swin_tiny"),
]


def every_model(*quick: str) -> pytest.MarkDecorator:
    """All cases; those named, a minute of compilers each at most, go with every run."""
    return pytest.mark.parametrize(
        ("name", "kwargs"),
        [
            pytest.param(*case.values, id=case.id, marks=() if case.id in quick else pytest.mark.slow)
            for case in SMALL + FULL
        ],
    )


@pytest.fixture(autouse=True)
def forget_compiled():
    torch.compiler.reset()


def build(name, kwargs) -> nn.Module:
    return stir(timm.create_model(name, **kwargs)).eval()


def free_dimensions(name) -> dict[int, Dim]:
    """A Swin Transformer takes one image size, timm's static one too: its windows are laid out when it is built."""
    return {0: Dim.DYNAMIC} | ({} if "swin" in name else {2: Dim.DYNAMIC, 3: Dim.DYNAMIC})


def inputs(name):
    """Batches of one and more; odd, tall and large images.

    None below the example's 64 x 64, where a last map of one pixel makes exporters draw a line.
    """
    sizes = [(2, 64, 64), (1, 64, 64), (5, 64, 64)]
    if "swin" not in name:
        sizes += [(3, 96, 64), (1, 65, 131), (1, 224, 288)]
    return [torch.randn(batch, 3, *size) for batch, *size in sizes]


@every_model("resnet")
def test_compile_without_graph_breaks(name, kwargs):
    model = build(name, kwargs)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = inputs(name)[0]
    with torch.no_grad():
        assert relative_error(compiled(x), model(x)) < 1e-4
        with torch.autocast("cpu", torch.bfloat16):
            assert relative_error(compiled(x).float(), model(x).float()) < 1e-2
    model.train()
    for module in model.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    _, expected = gradients(model, x)
    actual = {key.removeprefix("_orig_mod."): grad for key, grad in gradients(compiled, x)[1].items()}
    assert_same_gradients(actual, expected, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kwargs"), SMALL)
@torch.no_grad()
def test_inductor(name, kwargs):
    model = build(name, kwargs)
    compiled = torch.compile(model, fullgraph=True)
    for x in inputs(name):
        assert relative_error(compiled(x), model(x)) < 1e-4


@every_model("convnext_conv_mlp", "swin")
@torch.no_grad()
def test_exported_program(name, kwargs, tmp_path):
    """In float64, where no error hides behind rounding."""
    model = build(name, kwargs).double()
    images = [x.double() for x in inputs(name)]
    program = torch.export.export(model, (images[0],), dynamic_shapes=(free_dimensions(name),))
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for x in images:
        assert relative_error(loaded(x), model(x)) < 1e-9


@every_model("convnext_conv_mlp")
@torch.no_grad()
def test_onnx(name, kwargs, tmp_path):
    model = build(name, kwargs)
    file = tmp_path / "model.onnx"
    # ONNX Runtime optimises the graph when it loads it; PyTorch's optimiser takes minutes for that.
    torch.onnx.export(
        model,
        (inputs(name)[0],),
        file,
        dynamo=True,
        dynamic_shapes=(free_dimensions(name),),
        optimize=False,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(file)
    for x in inputs(name):
        (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert relative_error(torch.from_numpy(output), model(x)) < 1e-4
