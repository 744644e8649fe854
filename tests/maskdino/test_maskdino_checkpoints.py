"""The official checkpoints' key map: what it takes, what it refuses, and the configuration it reads."""

from dataclasses import replace

import pytest
import torch

from fdconv_zoo.maskdino import MaskDino, MaskDinoConfig, convert_official_state_dict, official_config
from fdconv_zoo.maskdino.checkpoints import official_name
from tests.maskdino_files import FILES, read

SMALL = {"num_classes": 4, "in_channels": (8, 12, 16, 20), "num_queries": 6, "hidden_dim": 32, "mask_dim": 24}
SMALL |= {"encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 24}
CONFIGS = {
    "learnt": MaskDinoConfig(**SMALL),
    "fine first, extra": MaskDinoConfig(**SMALL, select_queries=True, extra_levels=1, coarse_first=False),
    "all maps, extra": MaskDinoConfig(
        **SMALL, select_queries=True, softmax_classes=False, extra_levels=1, encoder_maps=4, coarse_first=False
    ),
}


def official(head):
    """A checkpoint as detectron2 writes it, with copies and the backbone."""
    state = {official_name(name): value.clone() for name, value in head.state_dict().items()}
    copies = {"predictor.decoder_norm.": ["predictor.decoder.norm."]}
    copies["predictor._bbox_embed."] = ["predictor.bbox_embed.0.", "predictor.decoder.bbox_embed.1."]
    for prefix, others in copies.items():
        for key in [key for key in state if key.startswith(prefix)]:
            state |= {key.replace(prefix, other): state[key].clone() for other in others}
    model = {f"sem_seg_head.{key}": value for key, value in state.items()}
    return {"model": {**model, "backbone.stem.weight": torch.zeros(3), "criterion.empty_weight": torch.ones(5)}}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_checkpoint_loads_whole_and_tells_its_configuration(config):
    head, other = MaskDino(config), MaskDino(config)
    checkpoint = official(head)
    other.load_state_dict(convert_official_state_dict(checkpoint, other))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in head.state_dict().items())
    read_config = official_config(checkpoint, num_queries=config.num_queries)
    assert read_config == config


@pytest.mark.parametrize("name", FILES)
def test_configuration_of_the_original_weights(name):
    golden = read(name)
    config = golden.config()
    training = ("num_points", "denoising_queries", "noise_scale")
    choices = {"initial_boxes": config.initial_boxes, "num_queries": config.num_queries}
    found = official_config(golden.below("state."), **choices, **{key: getattr(config, key) for key in training})
    assert found == config
    assert any("predictor.decoder.norm." in key for key in golden.below("state.")) == (name == FILES[0])


def test_what_does_not_fit_is_named():
    head = MaskDino(CONFIGS["learnt"])

    def refused(change):
        checkpoint = official(head)
        change(checkpoint["model"])
        with pytest.raises(ValueError, match="the checkpoint does not fit the head") as error:
            convert_official_state_dict(checkpoint, head)
        return str(error.value)

    prefix = "sem_seg_head.predictor."
    unknown = refused(lambda model: model.update({f"{prefix}resizer.weight": torch.zeros(1)}))
    assert "predictor.resizer.weight fits nothing" in unknown
    # not numbers of the official MLPs, though layers of them here
    assert "fits nothing" in refused(lambda model: model.update({f"{prefix}mask_embed.layers.7.bias": torch.zeros(1)}))
    assert "class_embed.bias is missing" in refused(lambda model: model.pop(f"{prefix}class_embed.bias"))
    assert "is (7,)" in refused(lambda model: model.update({f"{prefix}class_embed.bias": torch.zeros(7)}))
    assert "norm.bias differs from its copy" in refused(lambda model: model[f"{prefix}decoder.norm.bias"].add_(1))
    with pytest.raises(ValueError, match="no MaskDINO head"):
        convert_official_state_dict({"model": {"backbone.stem.weight": torch.zeros(3)}}, head)
    with pytest.raises(ValueError, match="no MaskDINO head"):
        official_config({"fc.weight": torch.zeros(3)})


def test_another_configuration_is_refused():
    head = MaskDino(CONFIGS["learnt"])
    wider = MaskDino(replace(CONFIGS["learnt"], num_classes=5))
    with pytest.raises(ValueError, match=r"label_enc.weight is \(4, 32\)"):
        convert_official_state_dict(official(head), wider)
