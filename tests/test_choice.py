"""What is replaced is chosen by structure, and does not depend on names or wrappers."""

from itertools import pairwise

import pytest
import timm
import torch
import torchvision
from torch import nn

import fdconv_zoo
from fdconv_zoo import FDConv2d, FDLinear, convert_static_state_dict, convert_to_fdconv, summary
from fdconv_zoo.choice import named_fd_layers
from tests.compare import randomise, relative_error
from tests.small_net import Net


def reasons(model):
    return {report.name: report.reason for report in summary(model)}


def replaced(model):
    return [report.name for report in summary(model) if report.replaced]


def on_meta(name, **kwargs):
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


# --- MLPs


class Gated(nn.Module):
    """A gate and a value, as in language models and SwiGLU."""

    def __init__(self):
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(20, 48), nn.Linear(20, 48), nn.Linear(48, 20)
        self.act_fn = nn.functional.silu


class Halved(nn.Module):
    """One layer makes value and gate."""

    def __init__(self):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(20, 96), nn.SiLU(), nn.Linear(48, 20)


class GEGLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(20, 96)


class Intermediate(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.dense, self.intermediate_act_fn = nn.Linear(20, 48), act


class Output(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.dropout = nn.Linear(48, 20), nn.Dropout()


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(20, 20) for _ in range(4))
        self.dropout = nn.Dropout()


class Parts(nn.Module):
    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def linears(*widths):
    """Linear layers with an activation between."""
    layers = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.GELU())]
    return layers[:-1]


def layer_of_two_blocks(act):
    return Parts(attention=Attention(), intermediate=Intermediate(act), output=Output())


MLPS = {
    "sequential": (lambda: nn.Sequential(nn.LayerNorm(20), *linears(20, 48, 20)), ["1", "3"]),
    "three layers": (lambda: nn.Sequential(*linears(20, 48, 48, 20)), ["0", "2", "4"]),
    "gated": (Gated, ["w1", "w2", "w3"]),
    "halved": (Halved, ["up", "down"]),
    "function": (lambda: nn.TransformerEncoderLayer(20, 2, 48, batch_first=True), ["linear1", "linear2"]),
    "two blocks": (lambda: layer_of_two_blocks(nn.GELU()), ["intermediate.dense", "output.dense"]),
    "two blocks, function": (lambda: layer_of_two_blocks(nn.functional.gelu), ["intermediate.dense", "output.dense"]),
    "diffusers": (lambda: nn.ModuleList([GEGLU(), nn.Dropout(), nn.Linear(48, 20)]), ["0.proj", "2"]),
    "attention in block": (lambda: Parts(block=nn.ModuleList([Attention(), Halved()])), ["block.1.up", "block.1.down"]),
}  # fmt: skip


def of_kernels(**layers):
    """Attention with an activation on queries and keys."""
    return Parts(**layers, proj=nn.Linear(20, 20), act=nn.GELU())


def activated():
    return nn.Sequential(nn.Linear(20, 20), nn.ReLU())


ATTENTIONS = {
    "queries, keys, values": lambda: of_kernels(q=nn.Linear(20, 20), k=nn.Linear(20, 20), v=nn.Linear(20, 20)),
    "queries; keys with values": lambda: of_kernels(q=nn.Linear(20, 20), kv=nn.Linear(20, 40)),
    "activated": lambda: Parts(q=activated(), k=activated(), v=nn.Linear(20, 20), proj=nn.Linear(20, 20)),
}


@pytest.mark.parametrize("make", ATTENTIONS.values(), ids=ATTENTIONS.keys())
def test_projections_of_attention_with_an_activation_stay(make):
    assert replaced(Parts(attn=make(), body=Halved())) == ["body.up", "body.down"]


def test_projections_of_linear_pvt_stay():
    names = replaced(on_meta("pvt_v2_b2_li", depths=(1, 1, 1, 1)))
    assert {name.rpartition(".")[2] for name in names if ".attn." in name} == {"sr"}


@pytest.mark.parametrize(("make", "names"), MLPS.values(), ids=MLPS.keys())
def test_mlps_are_known_by_structure(make, names):
    model = make()
    found = reasons(model)
    assert [name for name, reason in found.items() if not reason] == names
    convert_to_fdconv(model, num_bands=8)
    assert [name for name, _ in named_fd_layers(model)] == names
    assert reasons(model) == found


NO_MLPS = {
    "attention": Attention,
    "no activation": lambda: nn.Sequential(nn.Linear(20, 48), nn.Dropout(), nn.Linear(48, 20)),
    "squeezing": lambda: nn.Sequential(nn.Linear(80, 20), nn.ReLU(), nn.Linear(20, 80), nn.Sigmoid()),
    "classifier": lambda: nn.Sequential(nn.Linear(80, 96), nn.ReLU(), nn.Linear(96, 20)),
    "of coordinates": lambda: Parts(mlp=nn.Sequential(nn.Linear(2, 48), nn.ReLU(), nn.Linear(48, 24))),
}


@pytest.mark.parametrize("make", NO_MLPS.values(), ids=NO_MLPS.keys())
def test_other_linear_layers_stay(make):
    assert replaced(make()) == []


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("mixer_s32_224", ("mlp_tokens.fc1", "mlp_tokens.fc2", "mlp_channels.fc1", "mlp_channels.fc2")),
        ("resmlp_12_224", ("mlp_channels.fc1", "mlp_channels.fc2")),
        ("gmlp_ti16_224", ("mlp_channels.fc1", "mlp_channels.fc2")),
        ("sequencer2d_s", ("mlp_channels.fc1", "mlp_channels.fc2")),
    ],
)
def test_networks_of_mlps(name, parts):
    found = replaced(on_meta(name))
    assert found
    assert {".".join(layer.split(".")[-2:]) for layer in found if "conv" not in layer} == set(parts)


def test_mambaout():
    found = replaced(on_meta("mambaout_femto"))
    assert "stages.0.blocks.0.fc1" in found
    assert "stages.0.blocks.0.fc2" in found
    assert not any(name.startswith(("stem", "head")) for name in found)


def test_hugging_face_encoders():
    from transformers import GLPNConfig, GLPNModel, PvtConfig, PvtModel, T5Config, T5EncoderModel, ViTConfig, ViTModel

    pvt = PvtModel(PvtConfig(hidden_sizes=[24, 32, 48, 64], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 3, 4]))
    glpn = GLPNModel(GLPNConfig(hidden_sizes=[24, 32, 48, 64], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 3, 4]))
    t5 = T5EncoderModel(T5Config(vocab_size=32, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4))
    vit = ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64))
    for model, count in ((pvt, 8), (glpn, 8), (t5, 4), (vit, 4)):
        linear = [n for n in replaced(model) if isinstance(model.get_submodule(n), nn.Linear)]
        assert len(linear) == count, (type(model), linear)
        assert not [name for name in linear if "attention" in name.lower()]


# --- attention over channels


@pytest.mark.parametrize("name", ["skresnet18", "resnest14d", "gcresnet33ts", "seresnet33ts", "mobilenetv3_small_100"])
def test_convolutions_of_pooled_maps_stay(name):
    found = reasons(on_meta(name))
    pooled = ("fc1", "fc2", "fc_reduce", "fc_select", "mlp_add", "conv_reduce", "conv_expand", "conv_head")
    names = [layer for layer in found if any(part in layer for part in pooled) and layer != "fc"]
    assert names
    assert all(found[layer] for layer in names)
    assert any(not reason for reason in found.values())


def test_a_bottleneck_is_no_attention_over_channels():
    for name, layer in (
        ("resnet26d", "layer1.0.conv1"),
        ("resnest14d", "layer2.0.conv1"),
        ("skresnet50", "layer2.0.conv3"),
    ):
        found = {key.removesuffix(".conv"): reason for key, reason in reasons(on_meta(name)).items()}
        assert found[layer] == ""


def test_a_branch_after_global_pooling_stays():
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(32, 32, 1), nn.ReLU())
    assert reasons(model) == {"1": "attention over channels, of a pooled map"}
    assert reasons(nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Conv2d(32, 32, 1))) == {"1": ""}


def test_networks_in_networks_are_no_attention():
    """Pointwise convolutions on a map, also to fewer channels and back; the last one is the classifier."""
    nin = nn.Sequential(
        nn.Conv2d(20, 40, 3), nn.ReLU(), nn.Conv2d(40, 32, 1), nn.ReLU(), nn.Conv2d(32, 40, 1), nn.ReLU(),
        nn.Conv2d(40, 20, 1), nn.ReLU(), nn.Conv2d(20, 40, 1), nn.ReLU(),
        nn.Conv2d(40, 30, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    for model, prefix in ((nin, ""), (nn.Sequential(nin), "0.")):
        found = reasons(model)
        assert found.pop(f"{prefix}10") == "classifier"
        assert set(found.values()) == {""}
    squeezenet = reasons(torchvision.models.squeezenet1_1())
    assert squeezenet["features.6.squeeze"] == squeezenet["features.6.expand1x1"] == ""
    assert squeezenet["classifier.1"] == "classifier"


class Pools(nn.Module):
    """Attention over channels in functions."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(80, 20, 1), nn.Conv2d(20, 80, 1)

    def forward(self, x):
        return x * self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class Bottleneck(Pools):
    """The same layers on a map."""

    def forward(self, x):
        return x + self.up(self.down(x).relu())


class BranchOfConvolutions(nn.Module):
    """Pooling and gate around a block of its own (CBAM)."""

    def __init__(self):
        super().__init__()
        self.pool, self.gate = nn.AdaptiveMaxPool2d(1), nn.Sigmoid()
        self.fc = nn.Sequential(nn.Conv2d(80, 20, 1), nn.ReLU(), nn.Conv2d(20, 80, 1))


class OfOneWidth(nn.Module):
    """Linear layers that narrow nothing, of a maximum, with the gate beside them."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(80, 80), nn.ReLU(), nn.Linear(80, 80), nn.Sigmoid())

    def forward(self, x):
        return x * self.body(x.amax((2, 3)))[..., None, None]


class OfBranches(nn.Module):
    """A sequence, then a list of branches (SKNet)."""

    def __init__(self):
        super().__init__()
        self.pool, self.gate = nn.AdaptiveAvgPool2d(1), nn.Softmax(1)
        self.down = nn.Sequential(nn.Conv2d(80, 20, 1), nn.BatchNorm2d(20), nn.ReLU())
        self.ups = nn.ModuleList(nn.Conv2d(20, 80, 1) for _ in range(2))


@pytest.mark.parametrize("make", [Pools, BranchOfConvolutions, OfOneWidth, OfBranches])
def test_what_weights_a_map_is_attention(make):
    assert set(reasons(make()).values()) == {"attention over channels, of a pooled map"}
    assert set(reasons(nn.Sequential(nn.Conv2d(80, 80, 3), make())).values()) == {
        "",
        "attention over channels, of a pooled map",
    }


def test_a_bottleneck_of_pointwise_convolutions_is_replaced():
    assert replaced(Bottleneck()) == ["down", "up"]


def test_convolutions_after_the_last_pooling_are_a_classifier():
    model = nn.Sequential(nn.Conv2d(20, 40, 3), nn.AdaptiveAvgPool2d(1), nn.Conv2d(40, 40, 1), nn.Conv2d(40, 30, 1))
    assert list(reasons(model).values()) == ["", "classifier", "classifier"]
    gate = nn.Sequential(nn.Conv2d(20, 40, 3), nn.AdaptiveAvgPool2d(1), nn.Conv2d(40, 40, 1), nn.Sigmoid())
    assert reasons(gate)["2"] == "attention over channels, of a pooled map"
    assert reasons(on_meta("mobilenetv3_small_050"))["conv_head"] == "classifier"


def test_an_encoding_of_positions_stays():
    for name in ("edgenext_xx_small", "xcit_nano_12_p8_224"):
        found = reasons(on_meta(name))
        (position,) = [layer for layer in found if layer.endswith("token_projection")]
        assert found[position] == "encoding of positions, the same for every image"
        assert any(not reason for reason in found.values())


# --- wrappers


class Lightning(nn.Module):
    """As a LightningModule: the network, a loss, a metric."""

    def __init__(self, model):
        super().__init__()
        self.model, self.loss = model, nn.CrossEntropyLoss()


class TwoNetworks(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.encoder, self.projection = model, nn.Linear(32, 24)


NETWORKS = {
    "timm resnet": lambda: on_meta("resnet26d"),
    "timm regnet": lambda: on_meta("regnety_002"),
    "timm vit": lambda: on_meta("vit_tiny_patch16_224", depth=2),
    "timm swin": lambda: on_meta("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1)),
    "torchvision resnet": lambda: torchvision.models.resnet18(),
    "small": Net,
}
WRAPPERS = {
    "Sequential": lambda model: (nn.Sequential(model), "0."),
    "DataParallel": lambda model: (nn.DataParallel(model), "module."),
    "Lightning": lambda model: (Lightning(model), "model."),
    "twice": lambda model: (Lightning(nn.Sequential(model)), "model.0."),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS.keys())
def test_a_wrapper_changes_nothing(make, wrap):
    expected = reasons(make())
    wrapped, prefix = wrap(make())
    assert reasons(wrapped) == {f"{prefix}{name}": reason for name, reason in expected.items()}


@pytest.mark.parametrize("name", ["resnet26d", "mobilenetv3_small_100"])
def test_a_network_beside_another(name):
    expected = reasons(on_meta(name))
    found = reasons(TwoNetworks(on_meta(name)))
    assert found.pop("projection") == "linear layer outside an MLP"
    assert found == {f"encoder.{layer}": reason for layer, reason in expected.items()}


def test_the_first_convolution_of_a_lone_block_is_no_stem():
    block = timm.models.resnet.BasicBlock(24, 24)
    assert replaced(block) == ["conv1", "conv2"]
    assert replaced(nn.Sequential(block)) == ["0.conv1", "0.conv2"]


# --- include


def test_include_insists():
    found = {}

    def include(name, module):
        return {"conv1": True, "mlp.0": False, "fc": True}.get(name)

    model = Net()
    x = torch.randn(3, 3, 9, 9)
    with torch.no_grad():
        expected = model.eval()(x)
        found = {report.name: report.reason for report in summary(model, include)}
        convert_to_fdconv(model, include, num_bands=4)
        assert relative_error(model(x), expected) < 1e-5
    assert found == {"conv1": "", "conv2": "", "conv3": "", "mlp.0": "not included", "mlp.2": "", "fc": ""}
    assert [name for name, _ in named_fd_layers(model)] == ["conv1", "conv2", "conv3", "mlp.2", "fc"]
    assert isinstance(model.conv1, FDConv2d)
    assert isinstance(model.fc, FDLinear)


def test_include_cannot_insist_on_the_impossible():
    model = nn.Sequential(nn.Conv2d(32, 32, 3, groups=32), nn.Conv2d(32, 32, 1))
    with pytest.raises(ValueError, match=r"True for 0, which FDConv has no layer for: groups=32.*return None"):
        convert_to_fdconv(model, include=lambda name, module: True)
    assert isinstance(model[1], nn.Conv2d)


def test_a_summary_of_a_converted_model_says_what_was_replaced():
    model = torchvision.models.resnet18(num_classes=4)
    names = [f"layer4.{block}.conv{i}" for block in (0, 1) for i in (1, 2)]
    convert_to_fdconv(model, include=lambda name, module: None if name in names else False, num_bands=8)
    assert replaced(model) == names
    assert reasons(model)["layer1.0.conv1"] == "left when the model was converted"


@pytest.mark.parametrize(
    ("include", "names"),
    [
        ("mlp", ["mlp.0", "mlp.2"]),
        (["conv2", "mlp"], ["conv2", "mlp.0", "mlp.2"]),
        (("conv?", "fc"), ["conv2", "conv3"]),
        ("*.0", ["mlp.0"]),
    ],
)
def test_include_takes_names(include, names):
    model = Net()
    assert replaced_by(model, include) == names
    convert_to_fdconv(model, include, num_bands=4)
    assert [name for name, _ in named_fd_layers(model)] == names
    assert replaced_by(model, include) == names


def replaced_by(model, include):
    return [report.name for report in summary(model, include) if report.replaced]


def test_a_name_that_begins_like_another_is_another():
    model = nn.Sequential()
    model.layer1, model.layer10 = nn.Sequential(nn.Conv2d(20, 20, 1)), nn.Sequential(nn.Conv2d(20, 20, 1))
    assert replaced_by(model, "layer1") == ["layer1.0"]


@pytest.mark.parametrize("call", [summary, convert_to_fdconv])
def test_impossible_includes_are_named(call):
    with pytest.raises(
        ValueError, match=r"include names 'layer7', which is no module of Net; it has conv1, norm, conv2"
    ):
        call(Net(), include=["conv2", "layer7"])
    with pytest.raises(TypeError, match=r"include=\[2\], but it must be a function, a name or names"):
        call(Net(), include=[2])
    with pytest.raises(TypeError, match="include=2, but it must be a function"):
        call(Net(), include=2)


# --- other layers


def test_other_layers_are_listed_with_the_reason():
    model = nn.Sequential(
        nn.ConvTranspose2d(32, 32, 2),
        nn.LazyConv2d(32, 3),
        nn.LazyLinear(32),
        nn.Conv1d(32, 32, 3, groups=32),
        nn.Conv3d(32, 8, 3),
        nn.Conv3d(32, 32, (1, 2, 2), (1, 2, 2)),
    )
    assert [str(report) for report in summary(model)] == [
        "0: 32x32x2x2 a transposed convolution: FDConv has none",
        "1:  not initialised (LazyConv2d): run the model once before it is converted",
        "2:  not initialised (LazyLinear): run the model once before it is converted",
        "3: 32x1x3 groups=32",
        "4: 8x32x3x3x3 narrow: fewer than 17 channels",
        "5: 32x32x1x2x2 patch embedding or downsampling between stages",
    ]


@pytest.mark.parametrize("layer", [nn.ConvTranspose2d(32, 32, 2), nn.LazyConv2d(32, 3)])
def test_nothing_but_other_layers_is_an_error_that_says_so(layer):
    with pytest.raises(ValueError, match=r"replace in Sequential: 0: (a transposed convolution|not initialised)"):
        convert_to_fdconv(nn.Sequential(layer))


@pytest.mark.parametrize("dims", [1, 3])
@torch.no_grad()
def test_sequences_and_volumes(dims):
    conv, norm = getattr(nn, f"Conv{dims}d"), getattr(nn, f"BatchNorm{dims}d")

    def make():
        return nn.Sequential(
            conv(4, 20, 3), norm(20), nn.ReLU(), conv(20, 24, 3, 2, 1, bias=False), norm(24), conv(24, 20, 1)
        )

    model, x = make().eval(), torch.randn(2, 4, *[9] * dims)
    expected, state = model(x), model.state_dict()
    assert replaced(model) == ["3", "5"]
    convert_to_fdconv(model, num_bands=8)
    assert {type(layer) for _, layer in named_fd_layers(model)} == {getattr(fdconv_zoo, f"FDConv{dims}d")}
    assert replaced(model) == ["3", "5"]
    assert relative_error(model(x), expected) < 1e-5
    fresh = convert_to_fdconv(make(), num_bands=8).eval()
    fresh.load_state_dict(convert_static_state_dict(state, fresh))
    assert relative_error(fresh(x), expected) < 1e-5
    moved = randomise(model)(x)
    model[3].absorb_batch_norm(model[4])
    model[4] = nn.Identity()
    assert relative_error(model(x), moved) < 1e-5
