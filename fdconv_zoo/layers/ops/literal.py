"""FDConv in plain words: one sample, one frequency group and one band at a time.

Slow on purpose. Written from the paper (CVPR 2025, https://arxiv.org/abs/2503.18783), importing nothing of this
package; the layers are tested against it, forward and backward.
"""

import math
from fractions import Fraction
from functools import lru_cache
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor


@lru_cache(maxsize=8)
def places_in_matrix(out_channels: int, in_channels: int, kh: int, kw: int) -> Tensor:
    """Where weight element [o, c, i, j] stands in the flattened matrix: row o*kh+i, column c*kw+j."""
    places = torch.empty(out_channels, in_channels, kh, kw, dtype=torch.long)
    for o, c, i, j in product(range(out_channels), range(in_channels), range(kh), range(kw)):
        places[o, c, i, j] = (o * kh + i) * in_channels * kw + c * kw + j
    return places


def matrix_of(weight: Tensor) -> Tensor:
    """The matrix (Cout*kh, Cin*kw) of a weight (Cout, Cin, kh, kw)."""
    out_channels, in_channels, kh, kw = weight.shape
    flat = weight.new_empty(weight.numel())
    flat[places_in_matrix(*weight.shape).flatten()] = weight.flatten()
    return flat.view(out_channels * kh, in_channels * kw)


@lru_cache(maxsize=8)
def groups_of_coefficients(rows: int, columns: int, num_bands: int) -> Tensor:
    """The frequency group of every coefficient of the half spectrum: sort by radius, cut into contiguous groups."""
    vertical, horizontal = torch.fft.fftfreq(rows), torch.fft.rfftfreq(columns)
    radii = (vertical[:, None] ** 2 + horizontal[None, :] ** 2).sqrt().flatten().tolist()
    order = sorted(range(len(radii)), key=radii.__getitem__)
    size, left_over = divmod(len(order), num_bands)
    groups = torch.empty(len(order), dtype=torch.int32)
    start = 0
    for band in range(num_bands):
        end = start + size + (1 if band < left_over else 0)
        for coefficient in order[start:end]:
            groups[coefficient] = band
        start = end
    return groups.view(rows, columns // 2 + 1)


def parseval_factor(rows: int, columns: int) -> Tensor:
    """What rfft2 is multiplied by, column for column, so that the norm of the spectrum is that of the matrix."""
    factors = []
    for v in range(columns // 2 + 1):
        is_its_own_mirror = v == 0 or 2 * v == columns
        factors.append((1.0 if is_its_own_mirror else math.sqrt(2)) / math.sqrt(rows * columns))
    return torch.tensor(factors, dtype=torch.float64)


def spectrum_of(weight: Tensor) -> Tensor:
    """The parameter T (R, C//2+1, 2) of a weight (Cout, Cin, kh, kw)."""
    matrix = matrix_of(weight)
    return torch.view_as_real(torch.fft.rfft2(matrix) * parseval_factor(*matrix.shape).to(matrix.dtype))


def fdw_matrix(spectrum: Tensor, columns: int, gains: Tensor) -> Tensor:
    """One sample's weight matrix (R, C): the inverse transforms of all groups, each times its gain."""
    rows = spectrum.shape[0]
    half = torch.complex(spectrum[..., 0], spectrum[..., 1]) / parseval_factor(rows, columns).to(spectrum.dtype)
    groups = groups_of_coefficients(rows, columns, len(gains))
    matrix = torch.zeros(rows, columns, dtype=spectrum.dtype)
    for band, gain in enumerate(gains):
        of_this_band = torch.where(groups == band, half, torch.zeros_like(half))
        matrix = matrix + gain * torch.fft.irfft2(of_this_band, s=(rows, columns))
    return matrix


def ksm_gates(state: dict[str, Tensor], pooled: Tensor, sizes: list[int], training: bool) -> list[tuple[Tensor, ...]]:
    """Each sample's global gates (bands, channels, filters, positions), as many as `sizes`; BatchNorm, StarReLU."""
    hidden = pooled @ state["ksm.fc.weight"].T
    mean, variance = state["ksm.norm.running_mean"], state["ksm.norm.running_var"]
    if training:
        mean = hidden.mean(0)
        variance = ((hidden - mean) ** 2).mean(0)
    hidden = (hidden - mean) / (variance + 1e-5).sqrt() * state["ksm.norm.weight"] + state["ksm.norm.bias"]
    hidden = state["ksm.act.scale"] * hidden.clamp(min=0) ** 2 + state["ksm.act.bias"]
    gates = []
    for h in hidden:
        all_gates = 2 * torch.sigmoid(state["ksm.heads.weight"] @ h + state["ksm.heads.bias"])
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        gates.append(tuple(all_gates[end - size : end] for end, size in zip(ends, sizes, strict=True)))
    return gates


def dense_gate(state: dict[str, Tensor], pooled: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """One sample's dense gate (Cout, Cin, kh, kw) from its pooled input (Cin,)."""
    out_channels, _, kh, kw = shape
    mean = pooled.mean()
    variance = ((pooled - mean) ** 2).mean()
    normalised = (pooled - mean) / (variance + 1e-5).sqrt() * state["ksm.local_norm.weight"]
    normalised = normalised + state["ksm.local_norm.bias"]
    kernels = state["ksm.local_conv.weight"]
    logits = F.conv1d(normalised[None, None], kernels, padding=kernels.shape[2] // 2)[0]
    rows = [
        torch.stack([torch.stack([logits[(o * kh + i) * kw + j] for j in range(kw)], -1) for i in range(kh)], -2)
        for o in range(out_channels)
    ]
    return 2 * torch.sigmoid(torch.stack(rows))


def box_mask(height: int, width: int, cutoff: float) -> Tensor:
    """The coefficients (H, W//2+1) with max(|fu|, |fv|) below the cutoff, in exact arithmetic."""
    limit = Fraction(str(cutoff))
    mask = torch.zeros(height, width // 2 + 1, dtype=torch.bool)
    for u, v in product(range(height), range(width // 2 + 1)):
        mask[u, v] = max(Fraction(min(u, height - u), height), Fraction(v, width)) < limit
    return mask


def grid_mask(height: int, width: int, cutoff: float, grid: int) -> Tensor:
    """The official mask: made in float32 on a square grid, then resized to the half spectrum of the map."""
    vertical, horizontal = torch.fft.fftfreq(grid).abs(), torch.fft.rfftfreq(grid).abs()
    radius = torch.maximum(vertical[:, None].expand(grid, grid // 2 + 1), horizontal.expand(grid, grid // 2 + 1))
    mask = (radius < cutoff + 1e-8).float()
    return F.interpolate(mask[None, None], size=(height, width // 2 + 1), mode="nearest")[0, 0] > 0


def low_pass(x: Tensor, mask: Tensor) -> Tensor:
    """What a mask of the half spectrum leaves of maps (..., H, W)."""
    return torch.fft.irfft2(torch.fft.rfft2(x) * mask, s=x.shape[-2:])


def fbm(x: Tensor, weight: Tensor, bias: Tensor, cutoffs: tuple[float, ...], grid: int | None = None) -> Tensor:
    """One sample's feature map (C, H, W), each band gated place by place, the lowest left as it is."""
    height, width = x.shape[-2:]
    maps = 2 * torch.sigmoid(F.conv2d(x[None], weight, bias, padding=1)[0])
    remaining, total = x, torch.zeros_like(x)
    for band, cutoff in enumerate(cutoffs):
        mask = box_mask(height, width, cutoff) if grid is None else grid_mask(height, width, cutoff, grid)
        low = low_pass(x, mask)
        total = total + maps[band] * (remaining - low)
        remaining = low
    return total + remaining


def weight_of_sample(
    state: dict[str, Tensor], pooled: Tensor, gates: tuple[Tensor, ...], shape: tuple[int, int, int, int]
) -> Tensor:
    """One sample's weight (Cout, Cin, kh, kw), with all gates applied to it."""
    out_channels, in_channels, kh, kw = shape
    bands, *others = gates
    matrix = fdw_matrix(state["fdw.spectrum"], in_channels * kw, bands)
    weight = matrix.flatten()[places_in_matrix(*shape)]
    if others:
        channels, filters, *positions = others
        weight = weight * dense_gate(state, pooled, shape)
        weight = weight * channels.view(1, in_channels, 1, 1) * filters.view(out_channels, 1, 1, 1)
        for gate in positions:  # of kernels larger than 1
            weight = weight * gate.view(1, 1, kh, kw)
    return weight


def gate_sizes(num_bands: int, shape: tuple[int, int, int, int], ksm: bool) -> list[int]:
    """Numbers of global gates: bands, channels, filters and, for kernels larger than 1, positions."""
    out_channels, in_channels, kh, kw = shape
    if not ksm:
        return [num_bands]
    return [num_bands, in_channels, out_channels] + ([kh * kw] if kh * kw > 1 else [])


def fdconv2d(
    state: dict[str, Tensor],
    x: Tensor,
    shape: tuple[int, int, int, int],
    num_bands: int,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    cutoffs: tuple[float, ...] = (1 / 4, 1 / 8, 1 / 16),
    ksm: bool = True,
    training: bool = False,
) -> Tensor:
    """FDConv2d of x (B, Cin, H, W) with a static weight of `shape`, from the layer's parameters and buffers by name."""
    pooled = x.mean((2, 3))
    gates = ksm_gates(state, pooled, gate_sizes(num_bands, shape, ksm), training)
    outputs = []
    for b in range(len(x)):
        modulated = x[b]
        if "fbm.weight" in state:
            modulated = fbm(x[b], state["fbm.weight"], state["fbm.bias"], cutoffs)
        weight = weight_of_sample(state, pooled[b], gates[b], shape)
        outputs.append(F.conv2d(modulated[None], weight, state.get("bias"), stride, padding, dilation)[0])
    return torch.stack(outputs)


def fdlinear(
    state: dict[str, Tensor],
    x: Tensor,
    shape: tuple[int, int],
    num_bands: int,
    ksm: bool = True,
    training: bool = False,
) -> Tensor:
    """FDLinear of x (B, ..., Cin), pooled over all middle dimensions."""
    kernel_shape = (*shape, 1, 1)
    pooled = torch.stack([sample.reshape(-1, sample.shape[-1]).mean(0) for sample in x])
    gates = ksm_gates(state, pooled, gate_sizes(num_bands, kernel_shape, ksm), training)
    outputs = []
    for b in range(len(x)):
        weight = weight_of_sample(state, pooled[b], gates[b], kernel_shape)[:, :, 0, 0]
        output = x[b] @ weight.T
        outputs.append(output + state["bias"] if "bias" in state else output)
    return torch.stack(outputs)
