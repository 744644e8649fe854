"""MaskDINO's head, matching, losses and gradients against the original code's."""

import pytest
import torch

from fdconv_zoo.maskdino import MaskDinoLoss, instances, match, noise_targets, one_image, panoptic, semantic
from fdconv_zoo.maskdino.attention import flatten
from fdconv_zoo.maskdino.checkpoints import official_name
from fdconv_zoo.maskdino.decoder import hidden_keys
from fdconv_zoo.maskdino.positions import logit
from tests.compare import relative_error
from tests.maskdino_files import FILES, FOLDER, fixed_chance, read

VALUES, GRADIENTS = 1e-4, 1e-3


@pytest.fixture(scope="module", params=FILES)
def golden(request):
    return read(request.param)


@pytest.fixture
def chance(monkeypatch):
    fixed_chance(monkeypatch)


def difference(found, expected):
    """Largest difference over the largest value."""
    assert found.shape == expected.shape
    return float((found.detach().double() - expected.double()).abs().max() / expected.double().abs().max())


def differences(prefix, prediction, golden):
    """Those of the parts of a prediction that the file has."""
    stored = golden.below(prefix)
    parts = zip(("pred_logits", "pred_boxes", "pred_masks"), prediction, strict=True)
    return {f"{prefix}{name}": difference(part, stored[name]) for name, part in parts if name in stored}


def assert_small(errors, tolerance):
    assert errors
    assert max(errors.values()) < tolerance, {name: error for name, error in errors.items() if error >= tolerance}


def test_all_files_are_here():
    assert {path.stem for path in FOLDER.glob("*.safetensors")} == set(FILES)


def test_pixel_decoder(golden):
    mask_features, levels = golden.head().pixel_decoder(golden.features())
    errors = {f"level {i}": difference(level, golden.tensors[f"eval.levels.{i}"]) for i, level in enumerate(levels)}
    if "eval.mask_features" in golden.tensors:
        errors["mask features"] = difference(mask_features, golden.tensors["eval.mask_features"])
    assert len(levels) == golden.facts["num_levels"]
    assert_small(errors, VALUES)


def test_decoder_states_and_every_prediction(golden):
    head, errors = golden.head(), {}

    def compare(number):
        def hook(layer, inputs, state):
            y, positions, boxes = inputs[:3]
            errors[f"state {number}"] = difference(state, golden.tensors[f"eval.decoder.{number}"])
            errors[f"position {number}"] = difference(positions, golden.tensors[f"eval.query_position.{number}"])
            if not number:
                errors["query"] = difference(y, golden.tensors["eval.query"])
                errors["reference"] = difference(boxes, golden.tensors["eval.reference_logits"].sigmoid())

        return hook

    for number, layer in enumerate(head.layers):
        layer.register_forward_hook(compare(number))
    with torch.no_grad():
        # in training the head gives all predictions, and has no part that training changes
        outputs = head.train()(golden.features())
        (last,) = head.eval()(golden.features()).predictions
    errors |= differences("eval.", last, golden)
    for number, prediction in enumerate(outputs.predictions[:-1]):
        errors |= differences(f"eval.aux.{number}.", prediction, golden)
    if golden.facts["two_stage"]:
        errors |= differences("eval.selection.", outputs.selection, golden)
    assert len(outputs.predictions) == golden.facts["decoder_layers"] + 1
    assert_small(errors, VALUES)


def test_selected_places_are_the_original_ones(golden):
    if not golden.facts["two_stage"]:
        pytest.skip("learnt queries")
    head = golden.head()
    memory = flatten(head.pixel_decoder(golden.features())[1][::-1])
    _, _, scores = head.propose(memory)
    assert difference(scores, golden.tensors["eval.selection.scores"]) < VALUES
    index = scores.topk(head.config.num_queries, 1).indices
    assert index.tolist() == golden.tensors["eval.selection.index"].tolist()


def test_noised_targets(golden, chance):
    noised = noise_targets(golden.targets(), golden.config())
    assert noised.groups == golden.facts["denoising_groups"]
    assert noised.labels.shape == (2, golden.facts["denoising_slots"])
    # the file has them group by group, in each the images in order
    by_group = [part.unflatten(1, (noised.groups, -1)).transpose(0, 1) for part in noised[:3]]
    filled = by_group[2].flatten()
    assert by_group[0].flatten()[filled].tolist() == golden.tensors["dn.labels"].tolist()
    assert difference(by_group[1].flatten(0, 2)[filled], golden.tensors["dn.boxes"]) < VALUES
    table = golden.head().label_enc
    assert difference(table(noised.labels) * noised.filled[..., None], golden.tensors["dn.query"]) < VALUES
    assert difference(logit(noised.boxes) * noised.filled[..., None], golden.tensors["dn.reference_logits"]) < VALUES
    hidden = hidden_keys(noised.labels.shape[1], noised.groups, golden.facts["num_queries"], torch.device("cpu"))
    assert hidden.tolist() == golden.tensors["dn.attention_mask"].bool().tolist()


def test_predictions_in_training(golden, chance):
    noised = noise_targets(golden.targets(), golden.config())
    outputs = golden.head()(golden.features(), noised)
    errors = {}
    for prefix, predictions in (("train.", outputs.predictions), ("train.dn.", outputs.noised)):
        errors |= differences(prefix, predictions[-1], golden)
        for number, prediction in enumerate(predictions[:-1]):
            errors |= differences(f"{prefix}aux.{number}.", prediction, golden)
    assert_small(errors, VALUES)


def test_matching(golden, chance):
    outputs = golden.head()(golden.features())
    named = {"final": outputs.predictions[-1], "selection": outputs.selection}
    named |= {f"aux.{number}": prediction for number, prediction in enumerate(outputs.predictions[:-1])}
    for name, prediction in named.items():
        if prediction is not None:
            for image, pairs in enumerate(match(prediction, golden.targets(), golden.config())):
                assert torch.stack(pairs).tolist() == golden.tensors[f"matching.{name}.{image}"].tolist(), name


def test_losses_and_every_gradient(golden, chance):
    head, features, targets = golden.head(), golden.features(), golden.targets()
    features = [feature.requires_grad_() for feature in features]
    criterion = MaskDinoLoss(head.config)
    noised = noise_targets(targets, head.config)
    terms = criterion(head(features, noised), targets, noised)
    total = criterion.total(terms)
    total.backward()

    stored = golden.below("loss.")
    # with learnt queries there is no loss of the noised slots before the first layer
    assert terms.keys() == stored.keys() and ("loss_ce_dn_0" in terms) == golden.facts["two_stage"]
    errors = {name: difference(term, stored[name]) for name, term in terms.items()}
    assert_small({**errors, "total": difference(total, golden.tensors["loss"])}, VALUES)

    found = {official_name(name): parameter.grad for name, parameter in head.named_parameters()}
    found |= {f"input.res{stage}": feature.grad for stage, feature in enumerate(features, 2)}
    errors = {key: relative_error(found[key], value) for key, value in golden.below("grad.").items()}
    for key, norm in golden.below("gradnorm.").items():
        errors[f"norm of {key}"] = relative_error(found[key].norm(), norm)
    assert_small(errors, GRADIENTS)


def test_inference(golden):
    head, size = golden.head().eval(), tuple(golden.facts["image_size"])
    with torch.inference_mode():
        (prediction,) = head(golden.features()).predictions
        scores = semantic(prediction, head.config, size)[..., ::4, ::4]
        assert difference(scores, golden.tensors["infer.semantic"]) < VALUES
        if head.config.softmax_classes:
            return
        for image in range(2):
            alone = one_image(prediction, image, size, size, size)
            found = instances(alone, head.config, golden.facts["topk_instances"])
            stored = golden.below(f"infer.instances.{image}.")
            assert found.labels.tolist() == stored["labels"].tolist()
            assert difference(found.scores, stored["scores"]) < VALUES
            assert difference(found.boxes, stored["boxes"]) < VALUES
            segments, classes = panoptic(alone, head.config, set(golden.facts["thing_classes"]))
            stored = golden.below(f"infer.panoptic.{image}.")
            assert classes == stored["classes"].tolist()
            assert segments.tolist() == stored["map"].tolist()
