"""Graphs without PyTorch's second trace: what leaves it out, what does not, and the same numbers either way."""

from unittest import mock

import onnx_ir
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim, ExportedProgram

from common.onnx_file import check_onnx, open_onnxruntime
from common.onnx_program import export_graph
from tests.compare import randomise, relative_error

FREE = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}


class Net(nn.Module):
    """A convolution, and what a test puts behind it."""

    def __init__(self, then):
        super().__init__()
        self.conv, self.norm, self.then = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), then

    def forward(self, x):
        return self.then(self, x)


def exported(model, path, free=FREE):
    """Writes a file; whether it took no second trace."""
    x = torch.randn(2, 3, 12, 12)
    original = ExportedProgram.run_decompositions
    with mock.patch.object(ExportedProgram, "run_decompositions", autospec=True, side_effect=original) as traced:
        model_ir = export_graph(model, (x,), (free,), None)
    model_ir.graph.inputs[0].name = "input"
    onnx_ir.save(model_ir, path)
    check_onnx(path)
    return traced.call_count == 0


def compare(model, path, shapes=((2, 3, 12, 12), (1, 3, 16, 9))):
    run = open_onnxruntime(path, 1)
    for shape in shapes:
        x = torch.randn(shape)
        (output,) = run(x)
        assert relative_error(output, model(x.clone())) < 1e-5


def block(net, x):
    """As ResNets have them: everything in place, a sum, a pool."""
    shortcut = F.relu(net.norm(net.conv(x)), inplace=True)
    y = net.norm(F.max_pool2d(shortcut, 3, 1, 1))
    y += shortcut
    y = F.dropout(F.relu_(y), 0.5, net.training)
    return F.adaptive_avg_pool2d(y, 1).flatten(1)


def seen_by_two(net, x):
    y = net.conv(x)
    other = y.flatten(1)  # a view
    return F.relu_(y).mean((2, 3)), other.mean(1)


def of_the_input(net, x):
    y = x.clone()
    z = F.dropout(y, 0.5, False)  # the same tensor
    z.mul_(-3)
    return net.conv(y)


def mixed(net, x):
    y = net.conv(x).half().float() + 0.0
    half = y.half() + 0.0
    half += y  # stays in half precision
    return half.float() * 3


def pools_of_four(net, x):
    return F.adaptive_avg_pool2d(net.conv(x), 2)


def two_casts(net, x):
    """A cast that does nothing is the output."""
    return net.conv(x).float()


@torch.no_grad()
@pytest.mark.parametrize(("then", "once"), [(block, True), (two_casts, True), (mixed, False)])
def test_same_numbers(then, once, tmp_path):
    model, path = randomise(Net(then)).eval(), tmp_path / "m.onnx"
    assert exported(model, path) == once
    if then is not mixed:
        return compare(model, path)
    x = torch.randn(2, 3, 12, 12)
    assert (open_onnxruntime(path, 1)(x)[0] - model(x)).abs().max() < 1e-2


def copied_by_a_cast(net, x):
    y = net.conv(x)
    z = y.to(torch.float32, copy=True)
    z.mul_(2)
    return y + z


def copied_by_a_layout(net, x):
    y = net.conv(x)
    z = y.to(memory_format=torch.channels_last)
    z.mul_(2)
    return y + z


def of_another_dtype(net, x):
    return net.conv(x).gt_(0).sum((2, 3))


def powers(net, x):
    return net.conv(x).pow_(2)


def an_argument(net, x):
    y = net.conv(x).mean((2, 3))
    return y + torch.arange(8, out=torch.empty(8))


@torch.no_grad()
@pytest.mark.parametrize(
    "then", [seen_by_two, of_the_input, copied_by_a_cast, copied_by_a_layout, of_another_dtype, powers, an_argument]
)
def test_other_operations_in_place_take_the_whole_way(then, tmp_path):
    model, path = randomise(Net(then)).eval(), tmp_path / "m.onnx"
    assert not exported(model, path)
    x = torch.randn(2, 3, 12, 12)
    wanted = model(x.clone())
    if then is of_the_input:
        decomposed = torch.export.export(model, (x,)).run_decompositions().module()
        if relative_error(decomposed(x), wanted) > 1e-5:
            pytest.skip("this PyTorch's own decompositions lose what a dropout's output shares (up to 2.11 at least)")
    outputs = zip(open_onnxruntime(path, 1)(x), [wanted] if torch.is_tensor(wanted) else wanted, strict=True)
    for output, expected in outputs:
        assert output.dtype == expected.dtype
        assert relative_error(output, expected) < 1e-5


@torch.no_grad()
def test_a_pool_of_a_map_without_a_batch(tmp_path):
    model, path = randomise(Net(lambda net, x: F.adaptive_avg_pool2d(net.conv(x)[0], 1))).eval(), tmp_path / "m.onnx"
    assert exported(model, path, {})
    compare(model, path, [(2, 3, 12, 12)])


@torch.no_grad()
def test_what_has_no_translation_is_decomposed(tmp_path):
    model, path = randomise(Net(pools_of_four)).eval(), tmp_path / "m.onnx"
    assert not exported(model, path, {0: Dim.DYNAMIC})
    compare(model, path, [(2, 3, 12, 12), (1, 3, 12, 12)])


@torch.no_grad()
@pytest.mark.parametrize(
    ("kwargs", "once"),
    [({}, True), ({"momentum": None}, True), ({"affine": False}, False), ({"track_running_stats": False}, False)],
    ids=str,
)
def test_batch_norms(kwargs, once, tmp_path):
    model, path = Net(lambda net, x: net.norm(net.conv(x))), tmp_path / "m.onnx"
    randomise(model).norm = nn.BatchNorm2d(8, eps=0.3, **kwargs)
    if model.norm.running_mean is not None:
        randomise(model)
    assert exported(model.eval(), path) == once
    compare(model, path)
