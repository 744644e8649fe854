"""What all dynamic convolutions promise: exact starts, no kernels kept, learning, dtypes, errors."""

import copy
import io

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from timm.layers import CondConv2d as TimmCondConv2d
from torch import nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

import fdconv_zoo
from fdconv_zoo.layers import FDConv2d
from fdconv_zoo.layers.base import DynamicLayer
from fdconv_zoo.layers.dynamic import (
    Annealed,
    CondConv2d,
    DCDClassifier,
    DCDConv2d,
    DYConv2d,
    KWConv2d,
    ODConv2d,
    Warehouse,
)
from fdconv_zoo.layers.ops import mixed_conv2d
from fdconv_zoo.layers.ops.eager import limits
from fdconv_zoo.layers.ops.types import Geometry
from tests.compare import randomise, relative_error

LAYERS = [CondConv2d, DYConv2d, DCDConv2d, ODConv2d, KWConv2d]
MIXED = [CondConv2d, DYConv2d, ODConv2d, KWConv2d]
ALL = [*LAYERS, FDConv2d]
ANNEALED = [DYConv2d, ODConv2d, KWConv2d]


def conv(kernel=3, **kwargs):
    return nn.Conv2d(24, 32, kernel, padding=kernel // 2, **kwargs)


def images(batch=3, size=9, channels=24):
    return torch.randn(batch, channels, size, size)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("cls", ALL)
def test_starts_as_the_static_convolution(cls, kernel):
    static = conv(kernel, stride=2, dtype=torch.float64).eval()
    layer, x = cls.from_conv(static), images().double()
    assert isinstance(layer, DynamicLayer)
    assert relative_error(layer(x), static(x)) < 1e-12
    assert relative_error(cls.from_conv(static.float())(x.float()), static(x.float())) < 1e-5
    assert layer.static_shape == tuple(static.weight.shape)


@pytest.mark.parametrize("cls", ALL)
def test_a_trained_layer_goes_back_to_its_static_weight(cls):
    layer, x = cls(24, 32, 3, padding=1, dtype=torch.float64).eval(), images().double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    twin = layer.static_twin()
    assert relative_error(layer(x), twin(x)) > 1e-3
    layer.reset_modulation()
    assert relative_error(layer(x), twin(x)) < 1e-12
    assert relative_error(layer.static_twin()(x), twin(x)) < 1e-12


@pytest.mark.parametrize("cls", ALL)
def test_samples_come_apart_by_training(cls):
    """What starts equal does not stay so: kernels differ, and each sample has its own, after some steps."""
    torch.manual_seed(0)
    layer = cls.from_conv(conv()).train()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    x = images(8) + torch.randn(8, 24, 1, 1)
    target = torch.randn(8, 32, 9, 9)
    for _ in range(20):
        optimizer.zero_grad()
        F.mse_loss(layer(x), target).backward()
        optimizer.step()
    layer.eval()
    assert relative_error(layer(x), layer.static_twin()(x)) > 1e-4
    if hasattr(layer, "bank") and len(layer.bank()) > 1:
        bank = layer.bank().flatten(1)
        assert (bank - bank.mean(0)).norm() > 1e-4 * bank.norm()


@pytest.mark.parametrize("cls", MIXED)
def test_no_kernels_are_kept_for_the_backward_pass(cls):
    """A batch of kernels is B times the layer; of all that is saved nothing grows so with B."""
    layer = cls(32, 32, 3, padding=1).train()
    kernel, sizes = layer.static_weight().numel(), {}
    for batch in (4, 8):
        x, saved = images(batch, 4, 32).requires_grad_(), {}

        def pack(tensor, saved=saved):
            saved[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layer(x)
        sizes[batch] = sum(saved.values())
    assert sizes[8] - sizes[4] < 4 * kernel / 2, sizes


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("with_positions", [False, True])
def test_mixing_operator_has_the_plain_operations_gradients(groups, with_positions):
    torch.manual_seed(0)
    shape, geometry = [8, 8 // groups, 3, 3], Geometry((3, 3), (2, 1), (1, 1, 2, 2), (1, 2))
    inputs = [torch.randn(5, 8, 5, 4), torch.rand(5, 1, 3), torch.randn(3, *shape)]
    inputs += [torch.rand(5, 9)] if with_positions else []
    inputs = [tensor.double().requires_grad_() for tensor in inputs]

    def function(x, attention, cells, positions=None):
        return mixed_conv2d(x, attention, cells, positions, shape, geometry, groups)

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)
    expected = []
    x, attention, cells = inputs[:3]
    for i in range(5):
        kernel = (attention[i, 0, :, None, None, None, None] * cells).sum(0)
        kernel = kernel * inputs[3][i].view(3, 3) if with_positions else kernel
        expected.append(F.conv2d(x[i : i + 1], kernel, None, (2, 1), (2, 1), (1, 2), groups))
    assert relative_error(function(*inputs), torch.cat(expected)) < 1e-12


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("cls", MIXED)
def test_chunks_of_samples_give_what_one_gives(cls, kernel, monkeypatch):
    """Output and gradients, of a batch in chunks of two samples, the last of one."""
    torch.manual_seed(0)
    layer, x = cls(24, 32, kernel, padding=kernel // 2, dtype=torch.float64).eval(), images(5).double()
    found = []
    for chunk in (1 << 30, 2 * layer.static_weight().numel() + 1):
        monkeypatch.setattr(limits, "CPU", limits.CPU._replace(chunk=chunk))
        inputs = [x.clone().requires_grad_(), *layer.parameters()]
        output = layer(inputs[0])
        found.append([output.detach(), *torch.autograd.grad(output.square().sum(), inputs)])
    assert all(relative_error(chunked, whole) < 1e-12 for whole, chunked in zip(*found, strict=True))
    assert found[0][1].abs().max() > 0


@pytest.mark.parametrize("groups", [4, 24])
@pytest.mark.parametrize("cls", [CondConv2d, DYConv2d, ODConv2d])
def test_groups(cls, groups):
    static = nn.Conv2d(24, 24, 3, padding=1, groups=groups)
    layer, x = cls.from_conv(static), images()
    assert relative_error(layer.eval()(x), static(x)) < 1e-5
    if cls is ODConv2d and groups == 24:
        assert layer.attention.sections[1] == 0  # a depthwise layer has no gate of filters
    with pytest.raises(ValueError, match="only groups=1"):
        KWConv2d(24, 24, 3, groups=groups)
    with pytest.raises(ValueError, match="only groups=1"):
        DCDConv2d(24, 24, 3, padding=1, groups=groups)


@pytest.mark.parametrize("cls", LAYERS)
def test_dtypes_autocast_and_channels_last(cls):
    layer, x = cls(24, 32, 3, padding=1).eval(), images()
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    assert relative_error(output, expected) < 0.03
    assert layer(x.to(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)
    assert relative_error(layer(x.to(memory_format=torch.channels_last)), expected) < 1e-5
    assert relative_error(copy.deepcopy(layer).to(torch.bfloat16)(x.bfloat16()), expected) < 0.1
    moved = copy.deepcopy(layer).to(memory_format=torch.channels_last)
    assert relative_error(moved(x), expected) < 1e-5
    assert {name: p.shape for name, p in moved.named_parameters()} == {n: p.shape for n, p in layer.named_parameters()}
    assert layer(x[:0]).shape == (0, 32, 9, 9)
    for wrong in (x[0], x[:, :3], x.int()):
        with pytest.raises(ValueError, match="takes"):
            layer(wrong)


@pytest.mark.parametrize("cls", LAYERS)
def test_vmap(cls):
    layer, x = cls(24, 32, 3, padding=1).eval(), torch.randn(2, 3, 24, 9, 9)
    assert relative_error(torch.func.vmap(layer)(x), torch.stack([layer(part) for part in x])) < 1e-5


def test_a_layer_s_reset_leaves_the_cells_of_others():
    warehouse = Warehouse([(24, 24, 3, 3), (24, 24, 1, 1)], cell_num_ratio=1.5)
    first, second = KWConv2d(24, 24, 3, warehouse=warehouse), KWConv2d(24, 24, 1, warehouse=warehouse)
    before = first.cells.detach().clone()
    assert before.flatten(1).norm(dim=1).min() > 0
    first.reset_parameters()
    changed = (first.cells != before).flatten(1).any(1).tolist()
    assert changed == [True] * 9 + [False] + [True] * 5
    assert second.bank() is first.cells


@pytest.mark.parametrize("cls", LAYERS)
def test_a_parametrised_static_weight_is_no_modulation(cls):
    layer = cls(24, 32, 3, padding=1)
    expected = [name for name, _ in layer.modulation()]
    path, _, name = layer.held[0].rpartition(".")
    parametrize.register_parametrization(layer.get_submodule(path), name, nn.Tanh())
    assert [name for name, _ in layer.modulation()] == expected
    twin = layer.static_twin()
    assert relative_error(twin.weight, layer.static_weight()) < 1e-6
    before = copy.deepcopy(layer.state_dict())
    for change in (layer.reset_modulation, lambda: layer.set_static(twin.weight, twin.bias)):
        with pytest.raises(ValueError, match=f"{layer.held[0]} is made by a parametrization"):
            change()
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


@pytest.mark.parametrize("cls", LAYERS)
def test_a_static_state_can_be_saved_and_assigned(cls):
    """Whole tensors of their own, no views of one static kernel."""
    static, x = conv().eval(), images()
    layer = cls(24, 32, 3, padding=1).eval()
    state = fdconv_zoo.convert_static_state_dict(static.state_dict(), layer)
    assert len(safetensors.torch.save(state)) > 0
    layer.load_state_dict(state, assign=True)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3, momentum=0.9)
    assert relative_error(layer(x), static(x)) < 1e-5
    layer(x).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("assign", [True, False], ids=["assigned", "to_empty"])
@pytest.mark.parametrize("cls", ALL)
def test_a_layer_of_the_meta_device_is_right_once_it_is_loaded(cls, assign):
    layer, x = cls(24, 32, 3, padding=1).eval(), images()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    with torch.device("meta"):
        other = cls(24, 32, 3, padding=1).eval()
    if not assign:
        other.to_empty(device="cpu")
    other.load_state_dict(layer.state_dict(), assign=assign)
    assert not any(buffer.is_meta for buffer in other.buffers())
    assert relative_error(other(x), layer(x)) < 1e-6


def keep_elsewhere(model, how):
    """Puts parameters in place for the forward of the module that has them alone: accelerate's way, and FSDP2's."""

    def hook(module):
        kept = {name: p.detach().clone() for name, p in module._parameters.items() if p is not None}

        def put(module, _):
            module._parameters.update({name: nn.Parameter(value.clone()) for name, value in kept.items()})

        def take(module, *_):
            for name, value in kept.items():
                if how == "freed":
                    module._parameters[name].data.fill_(torch.nan)
                left = value.to("meta") if how == "offloaded" else value.flatten()[::2]
                module._parameters[name] = nn.Parameter(left)

        module.register_forward_pre_hook(put)
        module.register_forward_hook(take)
        take(module)

    for module in model.modules():
        hook(module)
    return model


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("cls", MIXED)
def test_parameters_in_bfloat16_and_statistics_in_single_precision(cls, training):
    """As FSDP2's mixed precision casts them. DCD's norms are of maps: as a network's own, they want to be left out."""
    torch.manual_seed(0)
    layer, x = randomise(cls(24, 32, 3, padding=1)).train(training), images().bfloat16()
    for parameter in layer.parameters():
        parameter.data = parameter.data.bfloat16()
    expected, output = copy.deepcopy(layer).float()(x.float()), layer(x)
    assert output.dtype == torch.bfloat16
    assert relative_error(output.float(), expected) < 3e-2
    output.float().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("how", ["offloaded", "freed"])
@pytest.mark.parametrize("cls", [*LAYERS, DCDClassifier])
def test_parameters_are_read_in_the_forward_of_the_part_that_has_them(cls, how):
    torch.manual_seed(0)
    layer = randomise(cls(24, 32) if cls is DCDClassifier else cls(24, 32, 3, padding=1)).eval()
    x = torch.randn(3, 24) if cls is DCDClassifier else images()
    with torch.no_grad():
        expected = layer(x)
        elsewhere = keep_elsewhere(copy.deepcopy(layer), how)
        for _ in range(2):
            assert relative_error(elsewhere(x), expected) < 1e-6


def layers_of_a_warehouse():
    warehouse = Warehouse([(24, 24, 3, 3), (24, 24, 1, 1), (32, 24, 3, 3)])
    layers = [KWConv2d(24, 24, 3, padding=1, warehouse=warehouse), KWConv2d(24, 24, 1, warehouse=warehouse)]
    model = randomise(nn.Sequential(*layers, KWConv2d(24, 32, 3, padding=1, warehouse=warehouse))).eval()
    fdconv_zoo.set_temperature(model, 0.5)
    return model


@pytest.mark.parametrize("how", ["offloaded", "freed"])
def test_layers_of_a_warehouse_have_the_cells_put_in_place(how):
    model, x = layers_of_a_warehouse(), images()
    with torch.no_grad():
        expected = model(x)
        elsewhere = keep_elsewhere(copy.deepcopy(model), how)
        for _ in range(2):
            assert relative_error(elsewhere(x), expected) < 1e-6


@pytest.mark.parametrize("how", ["offloaded", "freed"])
def test_cells_that_nobody_puts_in_place_are_refused(how):
    """Those that the hooks of a block keep, which a layer in another block knows nothing of."""
    model, x = layers_of_a_warehouse(), images()
    cells = model[0].cells
    model[0].cells = nn.Parameter(cells.to("meta") if how == "offloaded" else cells.flatten()[::2].detach())
    place = "on meta" if how == "offloaded" else r"of \[\d+\] on cpu"
    for layer in model[:2]:
        with pytest.raises(RuntimeError, match=f"{place}, not in place for a layer that computes on cpu"):
            layer(x)


def test_pickles_from_before_parts_had_a_type_of_their_own():
    for cls in (CondConv2d, ODConv2d):
        layer, x = randomise(cls(24, 32, 3, padding=1)).eval(), images()
        fdconv_zoo.set_temperature(layer, 5)
        expected = layer(x)
        if cls is CondConv2d:
            layer.conv.__class__ = TimmCondConv2d
        else:
            del layer.attention._buffers["square"]
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=False).train().eval()(x), expected)


@pytest.mark.parametrize("cls", LAYERS)
def test_export_and_compile(cls):
    layer, x = cls(24, 32, 3, padding=1).eval(), images()
    batch, side = torch.export.Dim("batch", min=2), torch.export.Dim("side", min=4)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: batch, 2: side},))
    other = torch.randn(5, 24, 12, 9)
    assert relative_error(program.module()(other), layer(other)) < 1e-5
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert relative_error(compiled(x), layer(x)) < 1e-5


@pytest.mark.parametrize("cls", ANNEALED)
def test_temperature_neither_is_saved_nor_compiles_anew(cls):
    torch.compiler.reset()
    layer, x, graphs = cls(24, 32, 3, padding=1).eval(), images(), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(layer, backend=backend)
    end, start = (0, 1) if cls is KWConv2d else (1, 30)
    outputs = {}
    for value in (start, (start + end) / 2, end):
        assert fdconv_zoo.set_temperature(layer, value) == 1
        outputs[value] = compiled(x)
        assert torch.equal(outputs[value], layer(x))
    assert len(graphs) == 1
    assert relative_error(outputs[start], outputs[end]) > 1e-3
    assert not any("temperature" in key for key in layer.state_dict())
    fdconv_zoo.set_temperature(layer, start)
    fresh = cls(24, 32, 3, padding=1).eval()
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), outputs[end])
    (module,) = (module for module in layer.modules() if isinstance(module, Annealed))
    assert copy.deepcopy(layer).half().get_submodule("attention").temperature == start
    for wrong in (-1, float("nan"), 1e9):
        with pytest.raises(ValueError, match="temperature"):
            fdconv_zoo.set_temperature(layer, wrong)
    assert module.temperature == start


@pytest.mark.parametrize("cls", ANNEALED)
def test_an_average_of_temperatures_is_none(cls):
    """Nor does `train` or `eval` change one that was set, or that an average has copied."""
    layer, x = randomise(cls(24, 32, 3, padding=1)).eval(), images()
    start, middle, end = (1, 0.5, 0) if cls is KWConv2d else (30, 15, 1)
    fdconv_zoo.set_temperature(layer, start)
    average, copying = AveragedModel(layer, use_buffers=True), AveragedModel(layer)
    for value in (start, middle, end, middle):
        fdconv_zoo.set_temperature(layer, value)
        average.update_parameters(layer)
        copying.update_parameters(layer)
    fresh = cls(24, 32, 3, padding=1).eval()
    fresh.load_state_dict(average.module.state_dict())
    assert relative_error(average(x), fresh(x)) > 1e-3
    assert torch.equal(copy.deepcopy(average).double().float().eval()(x), fresh(x))
    with torch.inference_mode():
        assert torch.equal(average.train().eval()(x), fresh(x))
    for other in (layer, copying.module, copy.deepcopy(layer).double().float()):
        assert other.train().eval().attention.temperature == middle
        assert torch.equal(other(x), layer(x))
    fdconv_zoo.set_temperature(average, middle)
    assert torch.equal(average.eval()(x), layer(x))


@pytest.mark.parametrize("cls", [DYConv2d, ODConv2d])
def test_a_scripted_layer_can_be_put_into_training_and_back(cls):
    layer, x = randomise(cls(24, 32, 3, padding=1)).eval(), images()
    scripted = torch.jit.script(layer)
    assert relative_error(scripted.train().eval()(x), layer(x)) < 1e-6


def test_what_has_no_temperature_says_so():
    assert fdconv_zoo.set_temperature(nn.Sequential(FDConv2d(24, 32, 3), CondConv2d(24, 32, 3)), 1) == 0


def test_a_lone_sample_in_training_takes_running_statistics():
    for cls in (ODConv2d, KWConv2d):
        layer = cls(24, 32, 3, padding=1).train()
        with pytest.warns(UserWarning) if not _warned() else _nothing():
            output = layer(images(1))
        assert output.isfinite().all()


def _warned():
    from fdconv_zoo.layers.ksm import _warn_once

    return _warn_once.cache_info().currsize > 0


def _nothing():
    from contextlib import nullcontext

    return nullcontext()


@pytest.mark.parametrize("ratio", [1, 4])
def test_layers_of_a_warehouse_share_cells_and_keep_their_static_weights(ratio):
    statics = [nn.Conv2d(24, 24, 3, padding=1), nn.Conv2d(24, 48, 1), nn.Conv2d(48, 24, 3, padding=1, stride=2)]
    warehouse = Warehouse([tuple(static.weight.shape) for static in statics], cell_num_ratio=ratio)
    layers = nn.Sequential(*(KWConv2d.from_conv(static, warehouse=warehouse) for static in statics)).eval()
    x = images()
    assert relative_error(layers(x), nn.Sequential(*statics)(x)) < 1e-5
    assert [name for name, _ in layers.named_parameters() if "cells" in name] == ["0.cells"]
    if ratio == 1:
        assert layers[0].cells.numel() == sum(static.weight.numel() for static in statics)
    expected = layers(x)
    file = io.BytesIO()
    torch.save(layers, file)
    file.seek(0)
    for twin in (copy.deepcopy(layers), torch.load(file, weights_only=False)):
        assert twin[2].bank() is twin[0].cells is not layers[0].cells
        assert torch.equal(twin(x), expected)
    layers(x).sum().backward()
    assert layers[0].cells.grad.isfinite().all()
    with pytest.raises(ValueError, match="no more"):
        KWConv2d(24, 24, 3, warehouse=warehouse)


def test_a_warehouse_below_one_can_t_hold_static_weights():
    static = conv()
    with pytest.raises(ValueError, match=r"cell_num_ratio=0\.5"):
        KWConv2d.from_conv(static, warehouse=Warehouse([tuple(static.weight.shape)], cell_num_ratio=0.5))
    with pytest.raises(ValueError, match=r"cell_num_ratio=0\.5"):
        fdconv_zoo.convert(nn.Sequential(conv(), nn.ReLU(), nn.Conv2d(32, 24, 1)), "kw", cell_num_ratio=0.5)


def test_the_dynamic_classifier_s_size():
    """Of a ResNet-50: the paper's 4.3 M are 4,049,032 in the branches, and this."""
    extra = sum(p.numel() for p in DCDClassifier(2048, 1000).parameters()) - (2048 * 1000 + 1000)
    assert 4_049_032 + extra == 4_278_024


@pytest.mark.parametrize("cls", [*LAYERS, DCDClassifier])
def test_a_layer_of_the_meta_device_is_whole_after_every_module_s_reset(cls):
    """The recipe of FSDP2's guide."""
    with torch.device("meta"):
        layer = cls(24, 32) if cls is DCDClassifier else cls(24, 32, 3, padding=1)
    layer.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(torch.nan)
        for module in layer.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    assert all(tensor.isfinite().all() for tensor in layer.state_dict().values())
    assert layer.eval()(torch.randn(3, 24) if cls is DCDClassifier else images()).isfinite().all()


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (CondConv2d, {"num_experts": 0}, "num_experts=0"),
        (DYConv2d, {"reduction": 0}, "reduction=0"),
        (DCDConv2d, {"padding": 0}, "padding = dilation"),
        (DCDConv2d, {"pool": 0}, "pool=0"),
        (ODConv2d, {"num_kernels": 0}, "num_kernels=0"),
        (ODConv2d, {"reduction": -1}, "reduction=-1"),
        (KWConv2d, {"nonlocal_basis_ratio": 0}, "nonlocal_basis_ratio=0"),
        (CondConv2d, {"groups": 5}, "groups=5"),
    ],
)
def test_options_out_of_range(cls, options, message):
    with pytest.raises(ValueError, match=message):
        cls(24, 32, 3, **{"padding": 1, **options})


def test_a_temperature_stays_where_the_layer_was_built_in_half_precision():
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = ODConv2d(24, 32, 3)
    finally:
        torch.set_default_dtype(torch.float32)
    fdconv_zoo.set_temperature(layer.float(), 29.3)
    assert layer.train().eval().attention.temperature.item() == pytest.approx(29.3)
