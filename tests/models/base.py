"""What timm 1.0.31's own tests ask of a model, and what this package asks on top; each family inherits it."""

import copy
import ctypes
import gc
import io
import math
import platform
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import timm
import torch
from timm.layers import get_notrace_functions, get_notrace_modules
from timm.models import GraphExtractNet, group_parameters, load_checkpoint, save_for_hf
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import fdconv_zoo
from fdconv_zoo.choice import named_dynamic_layers
from fdconv_zoo.conversion import init_static
from tests.compare import randomise_norms, relative_error
from tests.models.stirring import stir

CLASSES = 7


def gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and the gradient of a fixed function of it for every parameter, which must have one."""
    model.zero_grad()
    output = model(x)
    (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)).sum().backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing, f"no gradient for {missing}"
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(grad.isfinite().all() for grad in grads.values())
    return output.detach(), grads


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], tol: float) -> None:
    """Compares gradients by name; those that vanish but for rounding are measured against the largest one."""
    assert actual.keys() == expected.keys()
    scale = max(grad.norm().item() for grad in expected.values())
    errors = {
        name: ((actual[name] - grad).norm() / (grad.norm() + 1e-3 * scale)).item() for name, grad in expected.items()
    }
    assert max(errors.values()) < tol, {name: error for name, error in errors.items() if error >= tol}


def trace(model: nn.Module, train: bool = False) -> nn.Module:
    """The model as an FX graph, traced as timm's tests do."""
    options = dict(
        leaf_modules=get_notrace_modules(), autowrap_functions=get_notrace_functions(), param_shapes_constant=True
    )
    train_nodes, eval_nodes = get_graph_node_names(model, tracer_kwargs=options)
    return create_feature_extractor(
        model,
        train_return_nodes=[(train_nodes if train else eval_nodes)[-1]],
        eval_return_nodes=[eval_nodes[-1]],
        tracer_kwargs=options,
    )


class ModelTester:
    """Tests of one family; a case is a registered name and the keyword arguments that make a small model of it.

    Attributes:
        module: timm's name of the family's module: every model that it registers is tested.
        small: Cases of the default suite. Every other model, as it is registered, is for `make test-all`.
        size: Height and width of the input.
        other_sizes: Further ones that the same model takes.
        large: Keyword arguments of the full models at this input size.
        shallow: Keyword arguments that leave a full model few blocks of each stage, in their own widths.
        pool_types: Poolings of the head.
        output_fmt: Layout of the model's own feature map.
        output_strides: Strides that `features_only` can be held to, besides 32.
        early_head: The head works on pooled features, so there is none without pooling.
    """

    module: ClassVar[str]
    small: ClassVar[dict[str, dict[str, Any]]]
    size: ClassVar[tuple[int, int]] = (64, 64)
    other_sizes: ClassVar[tuple[tuple[int, int], ...]] = ((96, 64), (75, 65))
    large: ClassVar[dict[str, Any]] = {}
    shallow: ClassVar[dict[str, Any]] = {}
    pool_types: ClassVar[tuple[str, ...]] = ("avg", "max", "avgmax")
    output_fmt: ClassVar[str] = "NCHW"
    output_strides: ClassVar[tuple[int, ...]] = ()

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "case" not in metafunc.fixturenames:
            return
        names = timm.list_models(module=self.module)
        # With pytest-xdist, one worker runs all tests of a model: they share it.
        cases = [
            pytest.param((name, kwargs), id=f"{name}-small", marks=pytest.mark.xdist_group(f"{name}-small"))
            for name, kwargs in self.small.items()
        ]
        cases += [
            pytest.param((name, self.large), id=name, marks=(pytest.mark.slow, pytest.mark.xdist_group(name)))
            for name in names
            if self.small.get(name) != self.large
        ]
        metafunc.parametrize("case", cases, scope="class")

    @pytest.fixture(scope="class")
    @classmethod
    def full(cls, case) -> bool:
        """A full model, for `make test-all`: what its size decides is tested on it, the rest on fewer blocks."""
        return cls.small.get(case[0]) != case[1]

    @pytest.fixture(scope="class")
    @classmethod
    def light(cls, case, full) -> tuple[str, dict[str, Any]]:
        """The case, of a full model with few blocks: for what timm's tests do not ask, and size does not decide."""
        return (case[0], case[1] | cls.shallow) if full else case

    @pytest.fixture(scope="class")
    @classmethod
    def precision(cls, full) -> tuple[torch.dtype, float]:
        """Dtype and tolerance of comparisons; copies of the full models in float64 would take gigabytes."""
        return (torch.float32, 1e-4) if full else (torch.float64, 1e-9)

    @pytest.fixture(autouse=True)
    def economy(self, full) -> Iterator[None]:
        # As timm's tests do: profiles, and the graphs optimised for them, take longer than all else in TorchScript.
        profiling = torch._C._jit_set_profiling_mode(not full)
        yield
        torch._C._jit_set_profiling_mode(profiling)
        if full:
            # glibc keeps freed blocks of less than 32 MiB: gigabytes after a large model.
            gc.collect()
            if platform.libc_ver()[0] == "glibc":
                ctypes.CDLL(None).malloc_trim(0)

    @pytest.fixture(scope="class")
    @classmethod
    def shared(cls, case) -> nn.Module:
        torch.manual_seed(0)
        return stir(cls.build(case)).eval()

    @pytest.fixture
    def model(self, shared) -> nn.Module:
        return copy.deepcopy(shared)

    @pytest.fixture(scope="class")
    @classmethod
    def pair(cls) -> Tensor:
        """Input in training mode: statistics of a batch take two samples."""
        return torch.randn(2, 3, *cls.size, generator=torch.Generator().manual_seed(0))

    @pytest.fixture(scope="class")
    @classmethod
    def x(cls, pair, full) -> Tensor:
        return pair[:1] if full else pair

    @pytest.fixture(scope="class")
    @classmethod
    def output(cls, shared, x) -> Tensor:
        with torch.no_grad():
            return shared(x)

    @pytest.fixture(scope="class")
    @classmethod
    def trained(cls, shared, pair) -> tuple[Tensor, dict[str, Tensor]]:
        """Output and gradients in training mode."""
        return gradients(copy.deepcopy(shared).train(), pair)

    @staticmethod
    def build(case: tuple[str, dict[str, Any]], **kwargs: Any) -> nn.Module:
        name, own = case
        return timm.create_model(name, **({"num_classes": CLASSES} | own | kwargs))

    def channels(self, features: Tensor) -> int:
        return features.shape[self.output_fmt.index("C")]

    # Forward and backward

    @torch.no_grad()
    def test_forward_treats_every_sample_alone(self, model, full, precision):
        dtype, tol = precision
        model.to(dtype)
        for size in (self.size, *self.other_sizes):
            batch = 3 if size == self.size and not full else 2
            x = torch.randn(batch, 3, *size, dtype=dtype)
            output = model(x)
            assert output.shape == (batch, CLASSES)
            assert output.isfinite().all()
            for i in range(1 if full else batch):
                assert relative_error(model(x[i : i + 1]), output[i : i + 1]) < tol

    @torch.no_grad()
    def test_samples_get_weights_of_their_own(self, model, x, output):
        """With the gates at rest the model is its static twin; stirred, it is not."""
        for _, layer in named_dynamic_layers(model):
            layer.reset_modulation()
        dynamic = model(x)
        init_static(model, lambda: None)
        assert relative_error(model(x), dynamic) < 1e-4
        assert relative_error(output, dynamic) > 1e-3

    def test_backward_reaches_every_parameter(self, model, trained):
        _, grads = trained
        assert sum(grad.numel() for grad in grads.values()) == sum(p.numel() for p in model.parameters())
        dynamic = [
            f"{name}.{key}" for name, layer in named_dynamic_layers(model) for key, _ in layer.named_parameters()
        ]
        assert dynamic
        silent = [name for name in dynamic if grads[name].abs().max() == 0]
        assert not silent, f"gradient always zero for {silent}"

    def test_checkpointing_changes_neither_output_nor_gradients(self, model, pair, trained):
        # Batch statistics are updated twice by it, in timm too: they do not enter the output in training.
        model.train()
        model.set_grad_checkpointing()
        output, actual = gradients(model, pair)
        assert relative_error(output, trained[0]) < 1e-6
        assert_same_gradients(actual, trained[1], 1e-4)
        model.set_grad_checkpointing(False)

    @torch.no_grad()
    def test_bfloat16(self, model, x):
        # Stirred gates see normalised pooled inputs, which may be next to nothing, rounded: compare them at rest.
        assert copy.deepcopy(model).to(torch.bfloat16)(x.to(torch.bfloat16)).isfinite().all()
        for _, layer in named_dynamic_layers(model):
            layer.reset_modulation()
        expected = model(x)
        output = model.to(torch.bfloat16)(x.to(torch.bfloat16))
        assert output.dtype == torch.bfloat16
        # MobileNet's static twin is off by 0.1.
        assert relative_error(output, expected) < 0.15

    @torch.no_grad()
    def test_deepcopy_after_forward(self, model, x):
        expected = model(x)
        twin = copy.deepcopy(model)
        assert torch.equal(twin(x), expected)
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(twin(x), expected)

    # Classifier, pooling, input channels

    @torch.no_grad()
    def test_classifier(self, model, x, output):
        features = model.forward_features(x)
        assert self.channels(features) == model.num_features
        pooled = model.forward_head(features, pre_logits=True)
        assert pooled.shape == (len(x), model.head_hidden_size)
        assert relative_error(model.forward_head(features), output) < 1e-6
        assert isinstance(model.get_classifier(), nn.Linear)
        for pool in self.pool_types:
            model.reset_classifier(5, pool)
            assert model.num_classes == 5
            assert model.forward_head(features).shape == (len(x), 5)
        model.reset_classifier(0, "avg")
        assert model.num_classes == 0
        assert torch.equal(model(x), pooled)
        model.reset_classifier(0, "")
        assert model(x).shape == features.shape

    @torch.no_grad()
    def test_no_classifier_from_the_start(self, case, x):
        model = self.build(case, num_classes=0).eval()
        assert model(x).shape == (len(x), model.head_hidden_size)
        model = self.build(case, num_classes=0, global_pool="").eval()
        assert model(x).shape == model.forward_features(x).shape

    @torch.no_grad()
    @pytest.mark.parametrize("in_chans", [1, 4])
    def test_input_channels(self, case, in_chans):
        assert self.build(case, in_chans=in_chans).eval()(torch.randn(1, in_chans, *self.size)).shape == (1, CLASSES)

    def test_config_of_every_tag(self, case):
        """What a tag's configuration says of the model is so, at its full input size."""
        if case[1] != self.large:
            return
        # A model is built by, and these checks read, no other fields.
        fields = "num_classes", "input_size", "fixed_input_size", "pool_size", "global_pool", "classifier", "first_conv"
        distinct = {}
        for tagged in timm.list_models(f"{case[0]}.*", include_tags=True):
            cfg = timm.get_pretrained_cfg(tagged).to_dict()
            distinct[tuple(str(cfg.get(field)) for field in fields)] = tagged
        for tagged in distinct.values():
            model = timm.create_model(tagged, device="meta").eval()
            cfg = model.pretrained_cfg
            height, width = (i for i, axis in enumerate(self.output_fmt) if axis in "HW")
            x = torch.empty(1, *cfg["input_size"], device="meta")
            features = model.forward_features(x)
            assert (features.shape[height], features.shape[width]) == tuple(cfg["pool_size"])
            assert model.forward_head(features).shape == (1, cfg["num_classes"])
            state = model.state_dict()
            assert f"{cfg['classifier']}.weight" in state
            assert f"{cfg['first_conv']}.weight" in state

    # Features

    @torch.no_grad()
    def check_features(self, net: nn.Module, x: Tensor) -> list[Tensor]:
        outputs = net.eval()(x)
        channels, reductions = net.feature_info.channels(), net.feature_info.reduction()
        assert len(outputs) == len(channels) >= 1
        axes = getattr(net, "output_fmt", None)
        layout = "NCHW" if axes is None else str(axes.value)
        for output, count, reduction in zip(outputs, channels, reductions, strict=True):
            shape = dict(zip(layout, output.shape, strict=True))
            assert shape["N"] == len(x)
            assert shape["C"] == count
            assert shape["H"] == math.ceil(x.shape[2] / reduction)
            assert shape["W"] == math.ceil(x.shape[3] / reduction)
            assert output.isfinite().all()
        return outputs

    def features(self, case, **kwargs: Any) -> nn.Module:
        own = {key: value for key, value in case[1].items() if key != "num_classes"}
        return stir(timm.create_model(case[0], features_only=True, **own, **kwargs))

    @pytest.mark.parametrize("feature_cls", [None, "getter", "list", "hook"])
    def test_features_only(self, case, x, full, feature_cls):
        kwargs = {} if feature_cls is None else {"feature_cls": feature_cls}
        net = self.features(case, **kwargs)
        outputs = self.check_features(net, x)
        assert len(outputs) >= 4
        # The wrappers' choice of maps is not a matter of size, and every choice is one more model to build.
        for indices in () if full and feature_cls else ((1, 3), (-3, -1)):
            part = self.features(case, out_indices=indices, **kwargs)
            missing, _ = part.load_state_dict(net.state_dict(), strict=False)
            assert not missing
            for index, features in zip(indices, self.check_features(part, x), strict=True):
                assert torch.equal(features, outputs[index])

    def test_output_stride(self, light, x):
        for stride in self.output_strides:
            net = self.features(light, output_stride=stride)
            assert max(net.feature_info.reduction()) == stride
            self.check_features(net, x)

    @torch.no_grad()
    def test_forward_intermediates(self, model, x):
        info = timm.models.FeatureInfo(model.feature_info, len(model.feature_info))
        final, maps = model.forward_intermediates(x, output_fmt="NCHW")
        assert len(maps) == len(info.channels()) >= 3
        for features, channels, reduction in zip(maps, info.channels(), info.reduction(), strict=True):
            assert features.shape == (len(x), channels, *(math.ceil(side / reduction) for side in self.size))
        assert torch.allclose(final, model.forward_features(x))
        only = model.forward_intermediates(x, indices=[0, -1], output_fmt="NCHW", intermediates_only=True)
        assert [torch.equal(a, b) for a, b in zip(only, (maps[0], maps[-1]), strict=True)] == [True, True]
        last = model.forward_intermediates(x, indices=2, output_fmt="NCHW", intermediates_only=True)
        assert [torch.equal(a, b) for a, b in zip(last, maps[-2:], strict=True)] == [True, True]
        model.set_grad_checkpointing()
        assert torch.allclose(model.forward_intermediates(x)[0], final)

    @torch.no_grad()
    @pytest.mark.parametrize("keep", [1, 2])
    def test_prune_intermediate_layers(self, model, x, keep):
        maps = model.forward_intermediates(x, intermediates_only=True)
        assert model.prune_intermediate_layers([keep], prune_norm=True, prune_head=True) == [keep]
        pruned = model.forward_intermediates(x, indices=[keep], intermediates_only=True)
        assert torch.equal(pruned[0], maps[keep])
        assert model.num_classes == 0
        assert model(x).isfinite().all()

    # Parameter groups

    @pytest.mark.parametrize("coarse", [False, True])
    def test_group_matcher_covers_all_parameters(self, model, coarse):
        groups = group_parameters(model, model.group_matcher(coarse=coarse))
        grouped = [name for names in groups.values() for name in names]
        assert sorted(grouped) == sorted(name for name, _ in model.named_parameters())
        group_of = {name: group for group, names in groups.items() for name in names}
        for name, layer in named_dynamic_layers(model):
            assert len({group_of[f"{name}.{key}"] for key, _ in layer.named_parameters()}) == 1

    def test_decay(self, model):
        skipped = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
        count = sum(p.numel() for p in model.parameters())
        for groups in (
            param_groups_weight_decay(model, 0.05, no_weight_decay_list=skipped),
            param_groups_layer_decay(model, 0.05, no_weight_decay_list=skipped, layer_decay=0.7),
        ):
            assert sum(p.numel() for group in groups for p in group["params"]) == count
            decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
            for _, layer in named_dynamic_layers(model):
                assert decay[id(layer.holder())] == 0.05
                assert {decay[id(p)] for p in layer.parameters() if p.ndim <= 1} == {0.0}

    # Construction and weights

    @torch.no_grad()
    def test_device_and_dtype(self, light, x):
        for kwargs in ({"device": "cpu", "dtype": torch.float64}, {"dtype": torch.bfloat16}):
            made = self.build(light, **kwargs).eval()
            assert {p.dtype for p in made.parameters()} == {kwargs["dtype"]}
            assert made(x.to(kwargs["dtype"])).dtype == kwargs["dtype"]

    @torch.no_grad()
    def test_construction_on_meta(self, case, shared, x, output):
        with torch.device("meta"):
            by_context = self.build(case)
        for made in (by_context, self.build(case, device="meta")):
            assert all(tensor.is_meta for tensor in (*made.parameters(), *made.buffers()))
            assert made.eval()(x.to("meta")).shape == (len(x), CLASSES)
        # As Hugging Face loads: buffers that no file holds are garbage until each module makes its own.
        made = made.to_empty(device="cpu")
        for tensor in (*made.parameters(), *made.buffers()):
            tensor.fill_(-1)
        for module in made.modules():
            if hasattr(module, "init_non_persistent_buffers"):
                module.init_non_persistent_buffers()
        made.load_state_dict(shared.state_dict())
        assert torch.equal(made(x), output)

    @torch.no_grad()
    def test_load_checkpoint(self, case, model, x, tmp_path):
        """A file of the static model and one of its own load by timm's function, and the filter is the module's."""
        filter_fn = getattr(fdconv_zoo, self.module).checkpoint_filter_fn
        static = timm.create_model(fdconv_zoo.static_name(case[0]), **({"num_classes": CLASSES} | case[1])).eval()
        randomise_norms(static)
        torch.save(static.state_dict(), tmp_path / "static.pth")
        expected = static(x)
        del static
        load_checkpoint(model, str(tmp_path / "static.pth"), filter_fn=filter_fn)
        for _, layer in named_dynamic_layers(model):
            layer.reset_modulation()
        assert relative_error(model(x), expected) < 1e-4
        stir(model)
        torch.save({"state_dict": model.state_dict()}, tmp_path / "own.pth")
        made = self.build(case).eval()
        load_checkpoint(made, str(tmp_path / "own.pth"), filter_fn=filter_fn)
        assert torch.equal(made(x), model(x))

    @torch.no_grad()
    def test_save_for_hf_and_local_dir(self, light, x, tmp_path):
        model = stir(self.build(light)).eval()
        output = model(x)
        save_for_hf(model, tmp_path, model_args=light[1], safe_serialization="both")
        made = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, **light[1]).eval()
        assert made.num_classes == CLASSES
        assert torch.equal(made(x), output)
        fresh = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3, **light[1]).eval()
        assert fresh(x).shape == (len(x), 3)
        # timm prefers the safetensors file as long as there is one.
        (tmp_path / "model.safetensors").unlink()
        made = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, **light[1]).eval()
        assert torch.equal(made(x), output)

    # Scripts and graphs

    def test_torchscript(self, light, shared, x, output, full, precision):
        if full:
            with torch.no_grad():
                assert relative_error(torch.jit.script(shared)(x), output) < 1e-4
        # The backward pass through plain operations keeps all weights and their spectra: those of few blocks.
        dtype, tol = precision
        model, x = stir(self.build(light)).eval().to(dtype), x.to(dtype)
        expected, expected_grads = gradients(model, x)
        scripted = torch.jit.script(model)
        # The first run is profiled, the second one is of the graph that was optimised for it.
        assert relative_error(scripted(x[:1]).detach(), expected[:1]) < tol
        output, grads = gradients(scripted, x)
        assert relative_error(output, expected) < tol
        assert_same_gradients(grads, expected_grads, max(tol, 1e-6))
        file = io.BytesIO()
        torch.jit.save(scripted, file)
        file.seek(0)
        with torch.no_grad():
            assert relative_error(torch.jit.load(file)(x), expected) < tol

    def test_fx_graph(self, model, x, pair, output, trained):
        with torch.inference_mode():
            assert torch.equal(torch.cat(tuple(trace(model)(x).values())), output)

        class Flat(nn.Module):
            def __init__(self, graph: nn.Module) -> None:
                super().__init__()
                self.graph = graph

            def forward(self, x: Tensor) -> Tensor:
                return torch.cat(tuple(self.graph(x).values()))

        _, actual = gradients(Flat(trace(model.train(), train=True).train()), pair)
        assert_same_gradients({name.removeprefix("graph."): grad for name, grad in actual.items()}, trained[1], 1e-5)

    @torch.no_grad()
    def test_fx_graph_in_torchscript(self, model, x, precision):
        dtype, tol = precision
        model, x = model.to(dtype), x.to(dtype)
        scripted = torch.jit.script(trace(model))
        assert relative_error(torch.cat(tuple(scripted(x).values())), model(x)) < tol

    @torch.no_grad()
    def test_fx_features(self, light, model, x, output):
        net = self.features(light, feature_cls="fx").double()
        outputs = self.check_features(net, x.double())
        for a, b in zip(torch.jit.script(net)(x.double()), outputs, strict=True):
            assert relative_error(a, b) < 1e-9
        node = get_graph_node_names(
            model, tracer_kwargs={"leaf_modules": get_notrace_modules(), "autowrap_functions": get_notrace_functions()}
        )[1][-1]
        assert torch.equal(GraphExtractNet(model, [node])(x), output)
