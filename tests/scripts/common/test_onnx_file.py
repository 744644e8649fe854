"""ONNX files: within the standard, constants once, the same numbers in ONNX Runtime and OpenVINO."""

import onnx
import pytest
import timm
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.export import Dim

import fdconv_zoo  # noqa: F401, registers the models
from common.onnx_file import check_onnx, open_onnxruntime, open_openvino, write_onnx
from common.onnx_layers import fbm_kinds, kinds_of
from fdconv_zoo import FDConv2d
from tests.compare import randomise, relative_error
from tests.models.stirring import stir

RUNTIMES = {"onnxruntime": open_onnxruntime, "openvino": open_openvino}
NARROW = dict(channels=(20, 24, 32, 40), layers=(1, 1, 1, 1), num_classes=7)
CONVNEXT = dict(depths=(1, 1, 1, 1), dims=(24, 32, 40, 48), num_classes=7)
SWIN = dict(img_size=64, window_size=4, embed_dim=24, depths=(1, 2, 1, 1), num_heads=(2, 2, 4, 4), num_classes=7)
# The models of the cards, small and whole.
CARDS = {
    "resnet": ("resnet50_fdconv", NARROW),
    "convnext": ("convnext_tiny_fdconv", CONVNEXT),
    "swin": ("swin_tiny_fdconv", SWIN),
    "resnet50": ("resnet50_fdconv", {}),
    "convnext_tiny": ("convnext_tiny_fdconv", {}),
    "swin_tiny": ("swin_tiny_fdconv", dict(img_size=64)),
}
FREE = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}


@pytest.fixture(autouse=True)
def quiet():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def compare(model, path, shapes, dtype, tolerance):
    """In each runtime, with the model in single precision."""
    for load in RUNTIMES.values():
        run = load(path, 1)
        for shape in shapes:
            x = torch.randn(shape).to(dtype)
            (output,) = run(x)
            assert output.dtype == dtype
            assert relative_error(output, model(x.float())) < tolerance


@torch.no_grad()
def test_a_layer_in_both_runtimes(tmp_path):
    layer, path = randomise(FDConv2d(18, 20, 3, stride=2, padding=1, num_bands=8)).eval(), tmp_path / "layer.onnx"
    write_onnx(layer, torch.randn(2, 18, 12, 13), path, FREE)
    compare(layer, path, [(2, 18, 12, 13), (1, 18, 7, 16), (3, 18, 20, 5)], torch.float32, 1e-5)


def layer(**kwargs):
    return randomise(FDConv2d(20, 20, 3, padding=kwargs.get("dilation", 1), num_bands=8, **kwargs)).eval()


class Branches(nn.Module):
    """Layers side by side, some of them on maps of half the height; the last one on both."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        maps = [self.layers[-1](x)] + [layer(x[:, :, i % 2 :: 1 + i % 2]) for i, layer in enumerate(self.layers)]
        return torch.cat([y.mean([2, 3]) for y in maps], dim=1)


@torch.no_grad()
@pytest.mark.parametrize("free", [FREE, pytest.param({}, marks=pytest.mark.slow)], ids=["dynamic", "fixed"])
def test_layers_of_the_same_parameters_that_are_not_the_same_function(free, tmp_path):
    options = [{}, {"cutoffs": (0.3, 0.2, 0.1)}, {"stride": 2}, {"stride": 2}, {}, {}, {}, {}]
    model, path = Branches([layer(**kwargs) for kwargs in options]).eval(), tmp_path / "layers.onnx"
    model.layers[4].ksm.norm.eps = 0.5
    model.layers[5].ksm.register_forward_hook(lambda _, args, gates: gates._replace(bands=gates.bands * 1.5))
    x = torch.randn(2, 20, 14, 11)
    write_onnx(model, x, path, free)
    shapes = [(2, 20, 14, 11), (1, 20, 8, 16), (3, 20, 21, 7)] if free else [(2, 20, 14, 11)]
    compare(model, path, shapes, torch.float32, 1e-5)
    kinds = kinds_of(model, x, free)
    # A hooked layer has none; nor has the last one, where sizes are not free, as two of them reach it.
    assert list(kinds) == [f"layers.{i}" for i in ((0, 1, 2, 3, 4, 6, 7) if free else (0, 1, 2, 3, 4, 6))]
    assert len(set(map(id, kinds.values()))) == (4 if free else 5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("free", "count"), [(FREE, 2), pytest.param({}, 3, marks=pytest.mark.slow)], ids=["dynamic", "fixed"]
)
def test_fbm_of_any_channels_is_exported_once(free, count, tmp_path):
    options = dict(num_bands=8, padding=1)
    layers = [
        FDConv2d(20, 24, 3, **options),
        FDConv2d(24, 20, 3, stride=2, **options),
        FDConv2d(20, 18, 3, **options),
        FDConv2d(18, 18, 3, cutoffs=(0.3, 0.2, 0.1), **options),
        FDConv2d(18, 18, 3, fbm=False, **options),
    ]
    # Norms between them: gates of numbers without bounds are steps.
    parts = [part for layer in layers for part in (randomise(layer), nn.GroupNorm(1, layer.out_channels))]
    model, path = nn.Sequential(*parts).eval(), tmp_path / "layers.onnx"
    x = torch.randn(2, 20, 14, 11)
    write_onnx(model, x, path, free)
    compare(model, path, [(2, 20, 14, 11)] + [(1, 20, 8, 16), (3, 20, 21, 7)] * bool(free), torch.float32, 1e-5)
    kinds = fbm_kinds(kinds_of(model, x, free).values(), free)
    assert [fbm for fbm, _ in kinds] == [layer.fbm for layer in layers[:4]]
    assert len({id(kind) for _, kind in kinds}) == count


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("free", [True, False], ids=["dynamic", "fixed"])
@pytest.mark.parametrize(("name", "kwargs"), CARDS.values(), ids=CARDS)
@torch.no_grad()
def test_models_in_both_runtimes(name, kwargs, free, precision, tmp_path):
    model, path, dtype = stir(timm.create_model(name, **kwargs)).eval(), tmp_path / "m.onnx", getattr(torch, precision)
    dims = FREE if "swin" not in name else {0: Dim.DYNAMIC}
    shapes = [(2, 3, 64, 64)]
    if free:
        shapes += [(1, 3, 64, 64)] if "swin" in name else [(1, 3, 96, 64), (3, 3, 65, 131)]
    expected = timm.create_model(name, **kwargs).eval()
    expected.load_state_dict(model.state_dict())
    write_onnx(model.to(dtype), torch.randn(shapes[0]).to(dtype), path, dims if free else {})
    compare(expected, path, shapes, dtype, 1e-4 if precision == "float32" else 3e-2)


@torch.no_grad()
def test_constants_are_stored_once(tmp_path):
    layers = [randomise(FDConv2d(64, 64, 1, num_bands=8)) for _ in range(3)]
    model, path = nn.Sequential(*layers).eval(), tmp_path / "model.onnx"
    write_onnx(model, torch.randn(2, 64, 3, 3), path, {0: Dim.DYNAMIC})
    constants = onnx.load(path).graph.initializer
    assert len({(tuple(c.dims), c.data_type, c.raw_data) for c in constants}) == len(constants)
    assert not [node for node in onnx.load(path).graph.node if node.op_type == "Constant"]
    # Parameters, and little beside them: no weight, no matrix of a whole size.
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    assert sum(len(constant.raw_data) for constant in constants) < 1.25 * parameters
    # Nor the lines of code that nodes are from.
    assert b"fdconv.py" not in path.read_bytes()


def save(path, nodes, constants=()):
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, 3]) for name in ("x", "y")]
    graph = helper.make_graph(
        nodes, "graph", ends[:1], ends[1:], [numpy_helper.from_array(torch.tensor(v).numpy(), k) for k, v in constants]
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_what_breaks_the_standard_is_refused(tmp_path):
    path = tmp_path / "m.onnx"
    check_onnx(save(path, [helper.make_node("Expand", ["x", "shape"], ["y"])], [("shape", [1, 3])]))
    with pytest.raises(ValueError, match="Expand wide takes shape of 0 dimensions, not a vector"):
        check_onnx(save(path, [helper.make_node("Expand", ["x", "shape"], ["y"], name="wide")], [("shape", 3)]))
    with pytest.raises(onnx.checker.ValidationError, match="No Op registered for Unknown"):
        check_onnx(save(path, [helper.make_node("Unknown", ["x"], ["y"])]))
    with pytest.raises(Exception, match="Reshape"):
        check_onnx(save(path, [helper.make_node("Reshape", ["x", "shape"], ["y"])], [("shape", [[1, 3]])]))
