"""The pictures of ``visualize.py`` and what is said of them."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from pictures.layer import Layer, LayerInputs, cosine_similarity, gates_of, largest_off_diagonal
from pictures.photos import draw_bands, draw_feature_spectrum, draw_gates, draw_layers
from pictures.report import Picture
from pictures.weights import Weights, draw_responses, draw_similarity, draw_spectrum, draw_tsne

# What float32 leaves of the cosine of two orthogonal weights.
ORTHOGONAL = 1e-4


def weight_pictures(layer: Layer) -> tuple[list[Picture], str]:
    """Draw what does not depend on a photo; return the pictures and a line on the similarity of the groups.

    Raises:
        RuntimeError: The weights of two groups without a common frequency are not orthogonal.
    """
    weights = Weights.of(layer)
    similarity = cosine_similarity(weights.fdw)
    apart = largest_off_diagonal(weights.without_cut_pairs(similarity))
    if not apart < ORTHOGONAL:
        raise RuntimeError(f"cosine of {apart:.2g} between the weights of two disjoint frequency groups, not 0")
    similar = f"largest |cosine| between the weights of two groups: {apart:.1e}"
    if len(weights.cut_pairs):
        similar += (
            f", and {largest_off_diagonal(similarity):.1e} among {len(weights.cut_pairs)} pair(s) of neighbours "
            "whose border cuts two mirrored coefficients, which are one frequency"
        )
    pictures = [
        Picture(
            file="similarity.png",
            title="Similarity of the parallel weights (after Figs. 1 and 5 of the paper)",
            caption=(
                "Cosine similarity between the spatial weights made from one frequency group each, beside a bank of "
                "static kernels as DY-Conv mixes them and the layer's own static filters; above of the weights, below "
                "of the magnitudes of their spectra. FDW's groups share no coefficient; random kernels are nearly "
                f"orthogonal too (the bank is not trained), but they all have the same frequencies. Here: {similar}."
            ),
            figure=draw_similarity(weights),
        ),
        Picture(
            file="spectrum.png",
            title="The spectrum and its groups (after Fig. 5)",
            caption=(
                "The weight, laid out as a matrix of Cout·kh rows and Cin·kw columns, as its half spectrum, and the "
                "rings of equal size into which FDW cuts it. Each group has its own range of frequencies where "
                "kernels of a bank have all of them; the last panel shows which groups carry the weight."
            ),
            figure=draw_spectrum(layer, weights),
        ),
    ]
    if layer.kernel_shape != (1, 1):
        pictures.append(
            Picture(
                file="responses.png",
                title="Frequency responses of the kernels (Figs. 1 and 5)",
                caption=(
                    "How strongly the kernels of one group pass each spatial frequency, from the lowest group to the "
                    "highest; below, the mean over rings of equal frequency, every curve over the peak of its "
                    "response. Groups go from smoothing to sharpening, the kernels of a bank are all alike."
                ),
                figure=draw_responses(weights),
            )
        )
    pictures.append(
        Picture(
            file="tsne.png",
            title="t-SNE of the filters (after Fig. 1)",
            caption=(
                "Each dot is a filter, placed by t-SNE so that like filters (cosine distance) are near each other. "
                "Filters of different groups keep apart, those of a bank's kernels mix; distances between clusters "
                "and between panels mean nothing."
            ),
            figure=draw_tsne(weights),
        )
    )
    return pictures, similar


def photo_pictures(
    layer: Layer, name: str, inputs: LayerInputs, photos: Tensor, titles: Sequence[str]
) -> Iterator[Picture]:
    """Draw what photos do in the layers: gates of one and of all, and the one's bands and spectra if it has FBM.

    Args:
        layer: The layer to draw.
        name: Its name in the model.
        inputs: What it and the other layers saw.
        photos: As the model sees them (B, 3, H, W) or grey (B, 1, H, W), values in [0, 1].
        titles: Their names.
    """
    yield Picture(
        file="gates.png",
        title="Gates of the layer (KSM)",
        caption=(
            "What KSM multiplies the weight by, for each photo: a gain for every frequency group, gates for input "
            "channels, filters, kernel positions and every single element. At 1 a gate leaves the static weight as it "
            "is; lines that differ between photos are what makes the layer dynamic."
        ),
        figure=draw_gates(gates_of(layer, inputs.kept), titles),
    )
    yield Picture(
        file="layers.png",
        title="Gates of all layers",
        caption=(
            "How far the gates of each layer are from 1, as the root mean square over all photos; the layer of the "
            "other pictures is in bold. Grey layers compute what the static model does; the bright ones have learnt "
            "to modulate."
        ),
        figure=draw_layers(inputs.deviation, name),
    )
    if layer.fbm is None:
        return
    for number, (photo, x, title) in enumerate(zip(photos, inputs.kept.float(), titles, strict=True), start=1):
        yield Picture(
            file=f"bands_{number}.png",
            title=f"Bands and modulation maps, {title} (Fig. 6)",
            caption=(
                "The layer's input cut into frequency bands (RMS over the channels, each with a scale of its own), f "
                "being max(|fx|, |fy|) in cycles per pixel of the feature map, and the map that FBM multiplies each "
                "band by. Red places keep more of the band than the static layer does, blue places less."
            ),
            figure=draw_bands(photo, layer.fbm, x),
        )
        yield Picture(
            file=f"feature_spectrum_{number}.png",
            title=f"Spectrum of the feature before and after FBM, {title} (Fig. 6)",
            caption=(
                "Mean magnitude of the input's spectrum over its channels, frequency 0 in the centre, the dotted "
                "squares the limits of the bands; on the left where in the picture the feature has grown (red) or "
                "shrunk (blue). The last panel shows which frequencies FBM has raised or lowered."
            ),
            figure=draw_feature_spectrum(layer.fbm, x),
        )
