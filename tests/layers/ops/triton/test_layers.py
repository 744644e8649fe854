"""Whole layers by Triton's kernels, forward and every gradient, against the literal equations."""

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fdconv_zoo import FDConv2d, FDConv3d, FDLinear, drop_banks, keep_banks
from fdconv_zoo.layers.ops import triton
from fdconv_zoo.layers.ops.triton import conv
from tests.compare import assert_matches, randomise, relative_error
from tests.layers.fdconv_configs import CONFIGS, draw_config, layer_and_input, reference_of
from tests.layers.test_golden import GOLDEN, below, load, spectrum_gradient

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


@pytest.fixture
def calls(monkeypatch):
    """Names of the passes that the kernels computed."""
    made = []
    for name in ("forward", "backward"):
        original = getattr(conv, name)
        monkeypatch.setattr(conv, name, lambda *a, _n=name, _f=original, **k: made.append(_n) or _f(*a, **k))
    return made


# Each thing that the kernels treat apart; the interpreter is slow, and the others wait for `make test-slow`.
QUICK = [
    "3x3", "3x3 stride", "2x3 same", "3x3 dilations, large map", "1x1 odd", "1x1 stride and padding", "1x3",
    "more samples than groups", "one channel", "one filter", "no ksm", "fdw only",
]  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in CONFIGS]
)
def test_conv_matches_the_reference(name, calls):
    config = CONFIGS[name]
    # Layers and directions of the gradient are drawn. For some, the sum that a scalar's gradient is cancels, and
    # PyTorch's operations are as far off.
    torch.manual_seed(0)
    layer, x = layer_and_input(config, torch.float32)
    torch.manual_seed(5)
    assert_matches(layer.eval(), x, reference_of(layer, config), tol=2e-5)
    assert calls == ["forward", "backward"]


@pytest.mark.slow
@settings(max_examples=15, derandomize=True, deadline=None)
@given(data=st.data())
def test_conv_matches_the_reference_on_random_configurations(data):
    config = draw_config(data.draw, channels=20, side=9, bands=64)
    torch.manual_seed(0)
    layer, x = layer_and_input(config, torch.float32, recompute=data.draw(st.booleans()))
    assert_matches(layer.eval(), x, reference_of(layer, config), tol=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_output_and_every_gradient_are_the_official_ones(path):
    layer, tensors = load(path)
    x = tensors["input"].requires_grad_()
    output = layer(x)
    grads = torch.autograd.grad(output, [x, layer.fdw.spectrum], tensors["grad_output"])
    assert relative_error(output, tensors["output"]) < 1e-4
    assert relative_error(grads[0], tensors["grad_input"]) < 1e-4
    expected = spectrum_gradient(layer, below("grad.", tensors)["dft_weight"])
    assert relative_error(grads[1], expected) < 1e-4


def gradients_of(layer, x):
    x = x.detach().requires_grad_()
    output = layer(x)
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(output.shape, generator=generator).to(output.dtype)
    return output, torch.autograd.grad(output, [x, *(p for p in layer.parameters() if p.requires_grad)], direction)


def assert_as_without_kernels(layer, x, tol):
    """Output and gradients in float64 by PyTorch's operations: the kernels are as close, or within `tol`."""
    found = gradients_of(layer, x)
    layer.fused = False
    plain = gradients_of(layer, x)
    expected = gradients_of(layer.double(), x.double())
    for value, other, wanted in zip(*([output, *grads] for output, grads in (found, plain, expected)), strict=True):
        assert value.isfinite().all()
        assert value.dtype == other.dtype
        assert relative_error(value, wanted) < max(tol, 1.5 * relative_error(other, wanted))


@pytest.mark.parametrize("num_bands", [4, 16], ids=["bank", "transforms"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_half_precision(kernel, dtype, num_bands):
    torch.manual_seed(2)  # with some layers the sums that scalars' gradients are cancel: noise beside noise
    layer = randomise(FDConv2d(18, 6, kernel, padding=kernel // 2, num_bands=num_bands)).eval()
    x = torch.randn(6, 18, 7, 6).to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        found = layer(x)
    assert found.dtype == dtype
    assert_as_without_kernels(layer.to(dtype), x, 0.02 if dtype == torch.bfloat16 else 0.003)


@pytest.mark.parametrize(
    "keywords", [{}, *(pytest.param({name: False}, marks=pytest.mark.slow) for name in ("ksm", "recompute"))]
)
@pytest.mark.parametrize("num_bands", [3, 40], ids=["bank", "transforms"])
def test_samples_in_chunks(num_bands, keywords, monkeypatch):
    for name in ("MIXED", "TRANSFORMED"):
        monkeypatch.setattr(conv, name, 2 * 17 * 4 * 2)
    layer = randomise(FDConv2d(17, 4, (1, 2), padding="same", num_bands=num_bands, fbm=False, **keywords)).eval()
    assert_as_without_kernels(layer, torch.randn(3, 17, 3, 4), 1e-4)


@pytest.mark.parametrize("num_bands", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_channels_last_slices_and_frozen_parts(num_bands):
    layer = randomise(FDConv2d(18, 2, (1, 2), padding=1, stride=2, num_bands=num_bands)).eval()
    whole = torch.randn(2, 40, 3, 4).contiguous(memory_format=torch.channels_last)
    assert layer(whole[:, :18].contiguous(memory_format=torch.channels_last)).is_contiguous(
        memory_format=torch.channels_last
    )
    assert_as_without_kernels(layer, whole[:, 3:21], 1e-4)
    layer = randomise(FDConv2d(18, 2, (2, 1), padding=1, num_bands=num_bands, fbm=False)).eval()
    layer.fdw.spectrum.requires_grad_(False)
    layer.bias.requires_grad_(False)
    assert_as_without_kernels(layer, whole[:, :18], 1e-4)


def test_tokens():
    layer = randomise(FDLinear(24, 5, num_bands=3)).eval()
    assert_as_without_kernels(layer, torch.randn(4, 5, 3, 24), 1e-4)


def test_a_bank_that_does_not_fit_is_not_made(monkeypatch):
    layer, x = randomise(FDConv2d(18, 5, 1, num_bands=2)).eval(), torch.randn(4, 18, 5, 5)
    with torch.no_grad():
        expected = layer(x)
        monkeypatch.setattr(triton, "total_memory", lambda device: 0)
        monkeypatch.setattr(torch.ops.fdconv_zoo, "bank", None)
        assert relative_error(layer(x), expected) < 1e-5


def test_kept_banks_are_used_and_given_up(monkeypatch):
    layer, x = randomise(FDConv2d(18, 2, 1, num_bands=4)).eval(), torch.randn(4, 18, 2, 3)
    with torch.no_grad():
        expected = layer(x)
        layer.fdw.keep_bank(torch.float32)
        assert relative_error(layer(x), expected) < 1e-5
        kept = layer.fdw.kept_bank.weights
        kept.zero_()
        assert (layer(x) - layer.bias[:, None, None]).abs().max() == 0
        layer.fdw.spectrum.mul_(1)
        assert relative_error(layer(x), expected) < 1e-5  # the version changed
        for give_up in (
            lambda: layer.train().eval(),
            lambda: layer.double().float(),
            lambda: layer.load_state_dict(layer.state_dict()),
        ):
            layer.fdw.keep_bank(torch.float32)
            give_up()
            assert layer.fdw.kept_bank is None
        layer.fdw.keep_bank(torch.bfloat16)
        assert relative_error(layer(x), expected) < 1e-5
    x.requires_grad_()
    layer.fdw.keep_bank(torch.float32)
    assert torch.autograd.grad(layer(x).sum(), layer.fdw.spectrum)[0].abs().max() > 0


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}], ids=str)
def test_no_kept_bank_is_older_than_an_update_in_eval(options):
    """Fused optimisers leave the version of a parameter as it is."""
    layer, x = randomise(FDConv2d(18, 2, 1, num_bands=4)).eval(), torch.randn(4, 18, 2, 3)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.05, **options)
    layer.fdw.keep_bank(torch.float32)
    layer(x).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        assert relative_error(layer(x), copy.deepcopy(layer)(x)) < 1e-5
    layer.fdw.keep_bank(torch.float32)
    layer.fdw.matrix().square().mean().backward()  # a loss of the weight itself
    assert layer.fdw.kept_bank is None
    layer.fdw.keep_bank(torch.float32)
    hook = layer.fdw.register_forward_hook(lambda *_: None)
    layer(x).sum().backward()
    hook.remove()
    assert layer.fdw.kept_bank is None
    layer.fdw.keep_bank(torch.float32)
    layer.fdw.spectrum.requires_grad_(False)  # frozen: a pass with other gradients keeps it
    layer(x).sum().backward()
    assert layer.fdw.kept_bank is not None


def test_banks_of_a_model_are_kept_in_eval_alone():
    model = torch.nn.Sequential(FDConv2d(17, 3, 1, num_bands=4), FDLinear(5, 4, num_bands=3))
    with pytest.raises(ValueError, match=r"call model\.eval"):
        keep_banks(model, torch.float32)
    assert keep_banks(model.eval(), torch.bfloat16) == 2 * (4 * 3 * 17 + 3 * 4 * 5)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=False)[0].fdw.kept_bank is None
    assert copy.deepcopy(model)[0].fdw.kept_bank is None
    drop_banks(model)
    assert all(layer.fdw.kept_bank is None for layer in model)


@pytest.mark.parametrize("training", [pytest.param(False, marks=pytest.mark.slow), True])
def test_compiled_for_any_batch(training):
    """A graph for batches that make a bank, and one for batches that do not."""
    torch.compiler.reset()
    layer = randomise(FDConv2d(17, 3, 1, num_bands=4, recompute=training)).train(training)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 3, 5, 7):
        x = torch.randn(batch, 17, 3, 4)
        expected = gradients_of(copy.deepcopy(layer), x)
        found = gradients_of(compiled, x)
        for value, wanted in zip([found[0], *found[1]], [expected[0], *expected[1]], strict=True):
            assert relative_error(value, wanted) < 1e-5


def test_no_bank_is_kept_that_nothing_reads(monkeypatch):
    layers = [kind(17, 3, *size, num_bands=4) for kind, size in ((FDConv2d, [1]), (FDLinear, []), (FDConv3d, [1]))]
    layers[0].fused = layers[1].fused = False
    assert keep_banks(torch.nn.ModuleList(layers).eval(), torch.float32) == 0
    assert all(layer.fdw.kept_bank is None for layer in layers)
    monkeypatch.setattr(triton, "IS_INSTALLED", False)
    assert keep_banks(FDConv2d(17, 3, 1, num_bands=4).eval(), torch.float32) == 0
