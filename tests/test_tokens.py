"""Causal and sequence-first blocks are refused by name; encoders are not."""

import pytest
import torch
from torch import nn

from fdconv_zoo import FDLinear, convert_to_fdconv, summary
from fdconv_zoo.choice import named_fd_layers
from tests.compare import randomise

REFUSED = {"causal": "later one, or padding, would change", "sequence_first": "one sample would change another"}


class Block(nn.Module):
    def __init__(self, width=32, **attention):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, 4, **attention)
        self.mlp = nn.Sequential(nn.Linear(width, 48), nn.GELU(), nn.Linear(48, width))

    def forward(self, x):
        x = x + self.attn(x, x, x, need_weights=False)[0]
        return x + self.mlp(x)


class CausalSelfAttention(nn.Module):
    """Known by its name."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)


class Masked(nn.Module):
    """Known by its mask."""

    def __init__(self, mask):
        super().__init__()
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)
        self.register_buffer("mask", mask, persistent=False)


class Asking(nn.Module):
    """Known by its source."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    def attend(self, x, mask):
        q, k, v = self.qkv(x).chunk(3, -1)
        return (q @ k.mT + mask).softmax(-1) @ v


class Upper(Attention):
    def forward(self, x):
        return self.attend(x, torch.full((x.shape[1],) * 2, float("-inf")).triu(1))


class Lower(Attention):
    """Makes its mask in a method."""

    def mask(self, length):
        return torch.ones(length, length).tril().log()

    def forward(self, x):
        return self.attend(x, self.mask(x.shape[1]))


class OfAnother(Lower):
    """Inherits it."""


class Square(Attention):
    def forward(self, x):
        return self.attend(x, nn.Transformer.generate_square_subsequent_mask(x.shape[1]))


class AskingByPlace(Attention):
    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return nn.functional.scaled_dot_product_attention(q, k, v, None, 0.0, True)


class ByFunction(Attention):
    """Has its mask from a function, whose name tells."""

    def forward(self, x):
        return self.attend(x, make_causal_mask(x.shape[1]))


def make_causal_mask(length):
    return torch.ones(length, length).tril().log()


class Kept(Attention):
    """Keeps a mask that is no buffer."""

    def __init__(self):
        super().__init__()
        self.mask = TRIANGLE


class Flash(Attention):
    """As in x-transformers."""

    def __init__(self, causal=True):
        super().__init__()
        self.causal = causal


class Flagged(nn.Module):
    """Known by Hugging Face's attribute."""

    def __init__(self, is_causal=True):
        super().__init__()
        self.q, self.is_causal = nn.Linear(32, 32), is_causal


class Around(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention, self.mlp = attention, nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32))


TRIANGLE = torch.ones(6, 6).tril()
INFINITE = torch.full((6, 6), float("-inf")).triu(1)
DISTANCE = torch.arange(6.0).view(-1, 1) - torch.arange(6.0)
CAUSAL = {
    "name": CausalSelfAttention,
    "mask of ones": lambda: Masked(TRIANGLE.view(1, 1, 6, 6)),
    "mask of truths": lambda: Masked(TRIANGLE.bool()),
    "mask of infinities": lambda: Masked(INFINITE),
    "mask of each head's distances (ALiBi)": lambda: Masked(torch.stack([-DISTANCE, -DISTANCE / 2]) + INFINITE),
    "mask of positions (BLOOM)": lambda: Masked(torch.arange(6.0) + INFINITE),
    "decay (RetNet)": lambda: Masked(torch.where(DISTANCE < 0, 0.0, 0.9**DISTANCE)[None]),
    "function": ByFunction,
    "source": Asking,
    "attribute": Flagged,
    "upper triangle": Upper,
    "lower triangle": Lower,
    "inherited": OfAnother,
    "torch's mask": Square,
    "sixth argument": AskingByPlace,
    "mask kept": Kept,
    "another attribute": Flash,
}


class Decorrelation(nn.Module):
    """A loss that takes a triangle for another reason."""

    def forward(self, x):
        return torch.cov(x.flatten(0, -2).T).triu(1).square().sum()


ENCODERS = {
    "a loss beside": lambda: Around(Decorrelation()),
    "another attribute": lambda: Around(Flash(causal=False)),
    "batch first": lambda: Block(batch_first=True),
    "attribute": lambda: Around(Flagged(is_causal=False)),
    "mask of padding": lambda: Around(Masked(torch.ones(6, 6))),
    "mask of distances": lambda: Around(Masked(-DISTANCE.abs())),
    "factor of Cholesky": lambda: Around(Masked(torch.rand(6, 6).tril() + 1e-3 * torch.ones(6, 6).tril())),
    "full relative positions": lambda: Around(Masked(torch.arange(36).view(6, 6))),
}


@pytest.mark.parametrize("make", CAUSAL.values(), ids=CAUSAL.keys())
def test_causal_blocks_are_refused(make):
    model = nn.ModuleList([Around(make()), Around(Flagged(is_causal=False))])
    with pytest.raises(ValueError, match=rf"{REFUSED['causal']}.*allow=\('causal',\)"):
        convert_to_fdconv(model, num_bands=8)
    assert not list(named_fd_layers(model))
    causal = {report.name for report in summary(model) if report.reason.startswith("causal")}
    assert {"0.mlp.0", "0.mlp.2"} <= causal
    assert not any(name.startswith("1.") for name in causal)
    convert_to_fdconv(model, include=lambda name, _: False if name in causal else None, num_bands=8)
    assert [name for name, _ in named_fd_layers(model)] == ["1.mlp.0", "1.mlp.2"]


class Residual(nn.Module):
    """Norm and residual around a part, as in many a transformer."""

    def __init__(self, part):
        super().__init__()
        self.norm, self.part = nn.LayerNorm(32), part

    def forward(self, x):
        return x + self.part(self.norm(x))


class Projected(nn.Module):
    """Attention of torch's in a module with a layer of its own."""

    def __init__(self):
        super().__init__()
        self.attn, self.proj = nn.MultiheadAttention(32, 4), nn.Linear(32, 32)

    def forward(self, x):
        return self.proj(self.attn(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize(("make", "keyword"), [(Asking, "causal"), (Projected, "sequence_first")])
def test_attention_in_modules_of_its_own_is_seen(make, keyword):
    """Beside the attention there is no MLP: it is beside what holds the attention."""
    mlp = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32))
    model = nn.Sequential(Residual(nn.Sequential(make())), nn.Sequential(Residual(mlp)))
    with pytest.raises(ValueError, match=rf"2 layers \(1.0.part.0, 1.0.part.2\) .*{REFUSED[keyword]}"):
        convert_to_fdconv(model, num_bands=8)
    assert len(list(named_fd_layers(convert_to_fdconv(model, allow=(keyword,), num_bands=8)))) == 2


@pytest.mark.parametrize("kind", [nn.TransformerEncoderLayer, nn.TransformerEncoder])
def test_encoders_that_are_called_with_a_causal_mask_are_refused(kind):
    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
            self.body = layer if kind is nn.TransformerEncoderLayer else kind(layer, 2)

        def forward(self, x):
            mask = torch.triu(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool), diagonal=1)
            return self.body(x, mask)

    with pytest.raises(ValueError, match="are causal"):
        convert_to_fdconv(Language(), num_bands=8)


def test_decoder_layers_are_refused():
    with pytest.raises(ValueError, match=r"2 layers \(linear1, linear2\) are causal"):
        convert_to_fdconv(nn.TransformerDecoderLayer(32, 4, 48, batch_first=True))


def decoder_layer():
    return nn.TransformerDecoderLayer(32, 4, 48, batch_first=True, dropout=0.0)


class Detector(nn.Module):
    """Queries that see each other, as of DETR."""

    def __init__(self):
        super().__init__()
        self.query = nn.Embedding(5, 32)
        self.decoder = nn.TransformerDecoder(decoder_layer(), 2)

    def forward(self, memory, padding_mask=None):
        query = self.query.weight.unsqueeze(0).expand(len(memory), -1, -1)
        return self.decoder(query, memory, memory_key_padding_mask=padding_mask)


class Loop(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(decoder_layer() for _ in range(2))

    def forward(self, x, memory):
        for layer in self.layers:
            x = layer(x, memory)
        return x


class WithMask(Loop):
    def forward(self, x, memory, tgt_mask=None):
        for layer in self.layers:
            x = layer(x, memory, tgt_mask=tgt_mask)
        return x


class WithThirdArgument(Loop):
    def forward(self, x, memory, allowed):
        for layer in self.layers:
            x = layer(x, memory, allowed)
        return x


class WithWhatever(Detector):
    def forward(self, x, memory, **kwargs):
        return self.decoder(x, memory, **kwargs)


class OwnDefaults(nn.TransformerDecoder):
    """torch's forward, whose caller hands over the masks."""

    def __init__(self):
        super().__init__(decoder_layer(), 2)


@pytest.mark.parametrize("make", [Detector, lambda: nn.Sequential(Detector()), Loop])
def test_decoders_that_no_mask_reaches_are_not_refused(make):
    model = make().eval()
    memory = torch.randn(2, 6, 32)
    inputs = (torch.randn(2, 5, 32), memory) if make is Loop else (memory,)
    with torch.no_grad():
        expected = model(*inputs)
        convert_to_fdconv(model, num_bands=8)
        assert len(list(named_fd_layers(model))) == 4
        assert torch.allclose(model(*inputs), expected, atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [WithMask, WithThirdArgument, WithWhatever, OwnDefaults, lambda: nn.Transformer(32, 4, 1, 1, 48, batch_first=True)],
)
def test_decoders_that_a_mask_may_reach_are_refused(make):
    model = make()
    with pytest.raises(ValueError, match=rf"causal if .*tgt_mask.*{REFUSED['causal']}.*allow=\('causal',\)"):
        convert_to_fdconv(model, num_bands=8)
    assert len(list(named_fd_layers(convert_to_fdconv(model, allow=("causal",), num_bands=8)))) >= 4


def test_detectors_of_transformers_are_not_refused_and_decoders_are():
    from transformers import BertConfig, BertModel
    from transformers.models.conditional_detr.modeling_conditional_detr import (
        ConditionalDetrConfig,
        ConditionalDetrDecoderLayer,
    )

    config = ConditionalDetrConfig(d_model=32, decoder_attention_heads=4, decoder_ffn_dim=48, use_timm_backbone=False)
    layer = ConditionalDetrDecoderLayer(config)
    assert len(list(named_fd_layers(convert_to_fdconv(layer, num_bands=8)))) == 2
    small = dict(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
    with pytest.raises(ValueError, match="are causal: FDConv pools"):
        convert_to_fdconv(BertModel(BertConfig(is_decoder=True, **small)))


class FlaggedDecoder(nn.Module):
    """Hugging Face's attention to an encoder: in a decoder, and not causal."""

    def __init__(self):
        super().__init__()
        self.q, self.is_decoder, self.is_causal = nn.Linear(32, 32), True, False


FlaggedDecoder.__module__ = "transformers.example"


def test_attention_of_a_decoder_may_say_that_it_is_not_causal():
    convert_to_fdconv(Around(FlaggedDecoder()), num_bands=8)
    silent = FlaggedDecoder()
    del silent.is_causal
    with pytest.raises(ValueError, match="are causal"):
        convert_to_fdconv(Around(silent), num_bands=8)


@pytest.mark.parametrize("make", ENCODERS.values(), ids=ENCODERS.keys())
def test_encoders_are_not(make):
    assert [name for name, _ in named_fd_layers(convert_to_fdconv(make(), num_bands=8))] == ["mlp.0", "mlp.2"]


@pytest.mark.parametrize(
    "matrix",
    [torch.eye(8).to_sparse(), torch.eye(8).to_sparse_csr(), torch.eye(8, dtype=torch.complex64)],
    ids=["sparse", "csr", "complex"],
)
def test_matrices_that_are_no_masks_are_no_hindrance(matrix):
    model = nn.Sequential(nn.Linear(20, 40), nn.GELU(), nn.Linear(40, 20))
    model.register_buffer("adjacency", matrix)
    convert_to_fdconv(model, num_bands=8)
    assert type(model[0]) is FDLinear


def test_sequence_first_blocks_are_refused():
    model = nn.Sequential(Block(), Block())
    with pytest.raises(ValueError, match=rf"4 layers .*{REFUSED['sequence_first']}.*allow=\('sequence_first',\)"):
        convert_to_fdconv(model, num_bands=8)
    with pytest.raises(ValueError, match="sequence first"):
        convert_to_fdconv(model, include=lambda name, _: "mlp" in name, num_bands=8)
    assert not list(named_fd_layers(model))
    with pytest.raises(ValueError, match="sequence first"):
        convert_to_fdconv(nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48), 2, enable_nested_tensor=False))
    convert_to_fdconv(model, allow=("sequence_first",), num_bands=8)
    assert len(list(named_fd_layers(model))) == 4


def test_an_unknown_allowance_is_named():
    with pytest.raises(ValueError, match=r"allow=.*'casual'.*'causal', 'sequence_first'"):
        convert_to_fdconv(Block(batch_first=True), allow=("casual",))


class Turning(nn.Module):
    """Attention of its own over (tokens, batch, channels), as XLNet's; the samples come first."""

    def __init__(self):
        super().__init__()
        self.query = nn.Linear(32, 32)
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, x):
        x = x.transpose(0, 1).contiguous()
        weights = torch.einsum("ibc,jbc->ijb", self.query(x), x).softmax(1)
        x = x + torch.einsum("ijb,jbc->ibc", weights, x)
        return (x + self.mlp(x)).transpose(0, 1)


@torch.no_grad()
def test_a_model_that_puts_its_tokens_first_is_refused():
    with pytest.raises(ValueError, match=rf"2 layers \(0.mlp.0, 0.mlp.2\).*{REFUSED['sequence_first']}"):
        convert_to_fdconv(nn.Sequential(Turning()), num_bands=8)
    insisted = convert_to_fdconv(nn.Sequential(Turning()), allow=("sequence_first",), num_bands=8)
    x = torch.randn(3, 6, 32)
    moved = randomise(insisted).eval()
    assert not torch.allclose(moved(x)[:1], moved(torch.cat([x[:1], x[:2]]))[:1], atol=1e-3)


@torch.no_grad()
def test_batch_first_samples_do_not_meet():
    model = randomise(convert_to_fdconv(nn.Sequential(Block(batch_first=True)), num_bands=8)).eval()
    x = torch.randn(3, 6, 32)
    assert torch.allclose(model(x)[:1], model(x[:1]), atol=1e-4)


@torch.no_grad()
def test_a_transformer_encoder_layer_converts():
    """Its own attention projections stay, and torch's fast path is not taken around FDLinear."""
    layer = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), 2).eval()
    x = torch.randn(3, 6, 32)
    expected = layer(x)
    convert_to_fdconv(layer, num_bands=8)
    assert [name.split(".")[-1] for name, _ in named_fd_layers(layer)] == ["linear1", "linear2"] * 2
    assert torch.allclose(layer(x), expected, atol=1e-5)
    for _, linear in named_fd_layers(layer):
        randomise(linear)
    moved = layer(x)
    assert not torch.allclose(moved, expected, atol=0.1)
    mask = torch.tensor([[False] * 6, [False] * 4 + [True] * 2, [False] * 6])
    assert layer(x, src_key_padding_mask=mask).shape == x.shape
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        assert torch.allclose(layer(x), moved, atol=1e-4)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_language_models_of_transformers_are_refused_and_encoders_not():
    from transformers import (
        BertConfig,
        BertModel,
        CLIPConfig,
        CLIPModel,
        Qwen2Config,
        Qwen2ForCausalLM,
        T5Config,
        T5ForConditionalGeneration,
    )

    small = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
    qwen = Qwen2ForCausalLM(Qwen2Config(vocab_size=64, num_key_value_heads=2, **small))
    with pytest.raises(ValueError, match=r"3 layers \(model.layers.0.mlp.gate_proj, .*causal"):
        convert_to_fdconv(qwen)
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4))
    with pytest.raises(ValueError, match=r"2 layers \(decoder.block.0.layer.2.*causal"):
        convert_to_fdconv(t5)
    convert_to_fdconv(t5.encoder, num_bands=8)
    bert = convert_to_fdconv(BertModel(BertConfig(vocab_size=64, **small)), num_bands=8)
    found = [name for name, _ in named_fd_layers(bert)]
    assert found == ["encoder.layer.0.intermediate.dense", "encoder.layer.0.output.dense"]
    vision = dict(image_size=32, patch_size=16, **small)
    clip = CLIPModel(CLIPConfig(text_config=dict(vocab_size=64, **small), vision_config=vision, projection_dim=32))
    with pytest.raises(ValueError, match=r"2 layers \(text_model.*causal"):
        convert_to_fdconv(clip)
    assert isinstance(convert_to_fdconv(clip.vision_model, num_bands=8).encoder.layers[0].mlp.fc1, FDLinear)
