"""The kernels compile for a GPU without one, and keep their numbers in registers."""

import math
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
if find_spec("triton.backends.nvidia") is None:
    pytest.skip("Triton is built without CUDA", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from fdconv_zoo.layers.ops.triton import LARGEST_SIDE, bands, bank, gates, product, weight  # noqa: E402
from fdconv_zoo.layers.ops.triton.launch import next_block  # noqa: E402

HOPPER = GPUTarget("cuda", 90, 32)
NAMES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
EXACT = ("gains", "channel_gates", "filter_gates", "position_gates", "local_input", "local_weight")
EXACT += ("row_sums", "channel_sums", "bias", "projections")
NUMBERS = ("num_rows", "num_columns", "columns", "tiles_of_row", "first", "stop", "parts", "count", "logit_pixel")
GEOMETRY = product.constants([3, 3], [1, 1], [1, 1, 1, 1], [1, 1], torch.bfloat16)


def spilled_bytes(kernel, dtype, constants, folder, exact=EXACT):
    """Bytes of a thread that do not fit its registers, for pointers and counts that 16 divides."""
    warps = constants.pop("num_warps")
    names, types = kernel.arg_names, {}
    for name in names:
        if name in constants:
            types[name] = "constexpr"
        elif name in ("gain_index", "gain_tiles"):
            types[name] = "*i32"
        elif name in NUMBERS:
            types[name] = "i32"
        elif name in ("epsilon", "edge_scale", "inner_scale"):
            types[name] = "fp32"
        elif name == "kept":
            types[name] = ("i32",) * 6
        elif name in exact:
            types[name] = "*fp32"
        else:
            is_number = name.startswith(("num_", "batch")) or name.endswith(
                ("height", "width", "stride", "channels", "blocks", "_batch", "_channel", "_row", "_column", "_band")
            )
            types[name] = "i32" if is_number else NAMES[dtype]
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if str(types[name]).startswith("*") or name in ("num_filters", "num_channels", "num_bands", "batch")
    }
    source = ASTSource(kernel, types, constants, attrs=aligned)
    compiled = triton.compile(source, target=HOPPER, options={"num_warps": warps})
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    text = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    return int(text.split("STACK:")[1].split()[0])


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


by_dtype = pytest.mark.parametrize(
    "dtype",
    [
        torch.bfloat16,
        pytest.param(torch.float16, marks=pytest.mark.slow),
        pytest.param(torch.float32, marks=pytest.mark.slow),
    ],
)


def precision(dtype):
    return "ieee" if dtype == torch.float32 else "tf32"


@by_dtype
@pytest.mark.parametrize("kernel_size", [[3, 3], [1, 1]])
def test_weights(kernel_size, dtype, folder):
    bank, bands = torch.empty(64, 512 * math.prod(kernel_size), 512, dtype=dtype, device="meta"), torch.empty(64, 64)
    shape = torch.Size([64, 512, math.prod(kernel_size), 512])
    for kernel, tile in ((weight.gated_weights_kernel, weight.GATED), (weight.ungate_kernel, weight.UNGATED)):
        sizes = weight.layout(tile, bank, bands, torch.empty(1, 1, 5), shape, kernel_size, from_bank=True)
        assert spilled_bytes(kernel, dtype, sizes, folder) == 0


@by_dtype
@pytest.mark.parametrize(
    ("kernel", "summed"),
    [
        (product.convolve_kernel, "BLOCK_C"),
        (product.grad_input_kernel, "BLOCK_O"),
        (product.grad_weight_kernel, "BLOCK_P"),
    ],
)
def test_products(kernel, summed, dtype, folder):
    constants = {**GEOMETRY, "PRECISION": precision(dtype), **product.blocks(512, 784, 512, summed, dtype)}
    if "HAS_BIAS" in kernel.arg_names:
        constants["HAS_BIAS"] = True
    # The weight's gradient was the fastest on an H200 with steps so long that it spills a little.
    limit = 104 if kernel is product.grad_weight_kernel else 0
    assert spilled_bytes(kernel, dtype, constants, folder) <= limit


@by_dtype
@pytest.mark.parametrize("side", [14, 28, pytest.param(56, marks=pytest.mark.slow)])
def test_bands(side, dtype, folder):
    """A sine's path for large angles, never taken here, has 32 bytes; the largest maps spill, in float32 the most."""
    if side > LARGEST_SIDE[dtype]:
        pytest.skip("such maps are left to PyTorch's operations")
    x = torch.empty(1, 1, side, side, dtype=dtype)
    for kernel, more in (
        (bands.projections_kernel, {}),
        (bands.modulate_kernel, {"ADJOINT": False}),
        (bands.modulate_kernel, {"ADJOINT": True}),
        (bands.grad_factors_kernel, {"CHANNELS": bands.CHANNELS}),
    ):
        constants = {"BANDS": 3, **more, **bands.blocks(x)}
        exact = EXACT if kernel is bands.modulate_kernel else (*EXACT, "out")
        limits = {14: 32, 28: 528 if dtype == torch.float32 else 96, 56: 1024}
        assert spilled_bytes(kernel, dtype, constants, folder, exact) <= limits[side]


@pytest.mark.parametrize("batch", [1, 64])
def test_gates(batch, folder):
    constants = {
        "PRECISION": "ieee", "BLOCK_B": next_block(batch, 16, gates.LARGEST_BATCH), "BLOCK_O": gates.BLOCK_OUT,
        "BLOCK_H": 64, "num_warps": 4,
    }  # fmt: skip
    names = [name for name in gates.gates_kernel.arg_names if name not in ("batch", "num_hidden", "num_out", "epsilon")]
    assert spilled_bytes(gates.gates_kernel, torch.float32, constants, folder, names) == 0


@by_dtype
@pytest.mark.parametrize("ones", [(), ("num_rows", "num_columns", "columns", "tiles_of_row", "num_bands", "first")])
def test_bank(ones, dtype, folder):
    """Of an argument that is 1, Triton makes a constant."""
    for kernel in (bank.spread_kernel, bank.collect_kernel):
        constants = {"TILE": 8, "BLOCK": bank.BLOCK, "num_warps": 4, **dict.fromkeys(ones, 1)}
        assert spilled_bytes(kernel, dtype, constants, folder, (*EXACT, "out", "spectra")) == 0


@by_dtype
def test_logits_of_bands(dtype, folder):
    constants = {"BANDS": 3, "BLOCK": bands.PIXELS, "num_warps": 4}
    assert spilled_bytes(bands.grad_logits_kernel, dtype, constants, folder, (*EXACT, "out", "factors")) == 0
