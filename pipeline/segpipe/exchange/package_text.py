"""What a package says in words: its README, and what to cite."""

from __future__ import annotations

from collections.abc import Iterator

from segpipe.models.card import ModelCard
from segpipe.models.geometry import ModelGeometry

UNET = (
    "Ronneberger, Fischer, Brox: U-Net: Convolutional Networks for Biomedical Image Segmentation, 2015",
    "10.1007/978-3-319-24574-4_28",
)
PAPERS = {
    "unet": UNET,
    "unetplusplus": (
        "Zhou et al.: UNet++: A Nested U-Net Architecture for Medical Image Segmentation, 2018",
        "10.1007/978-3-030-00889-5_1",
    ),
    "unet3plus": (
        "Huang et al.: UNet 3+: A Full-Scale Connected UNet for Medical Image Segmentation, 2020",
        "10.48550/arXiv.2004.08790",
    ),
    "resunet": (
        "Zhang, Liu, Wang: Road Extraction by Deep Residual U-Net, 2018",
        "10.48550/arXiv.1711.10684",
    ),
    "mobileunet": (
        "Sandler et al.: MobileNetV2: Inverted Residuals and Linear Bottlenecks, 2018",
        "10.48550/arXiv.1801.04381",
    ),
    "effunet": (
        "Tan, Le: EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks, 2019",
        "10.48550/arXiv.1905.11946",
    ),
}
"""Architecture -> its paper and DOI; every one is a U-Net besides."""


def citations(architecture: str) -> list[dict[str, str]]:
    """Entries of `cite`."""
    papers = dict.fromkeys([PAPERS.get(architecture, UNET), UNET])
    return [{"text": text, "doi": doi} for text, doi in papers]


def readme(card: ModelCard, geometry: ModelGeometry) -> str:
    """The card as Markdown, with what the description cannot say."""
    return "\n".join(_lines(card, geometry)) + "\n"


def _lines(card: ModelCard, geometry: ModelGeometry) -> Iterator[str]:
    architecture = card.architecture
    parameters = ", ".join(f"{key} {value}" for key, value in architecture.parameters.items())
    yield f"# {card.name}"
    yield ""
    yield f"{architecture.name} ({parameters or 'default parameters'}), made with segpipe."
    yield f"Input channels: {', '.join(card.channels)}. Outputs: {', '.join(card.outputs)}."
    if card.pixel_size_um is not None:
        yield f"Trained at {card.pixel_size_um:g} um a pixel."
    if card.object_diameter_px is not None:
        yield f"Objects of the training images: about {card.object_diameter_px:g} px across."
    yield ""
    yield "## Training data"
    yield ""
    yield card.training_data
    yield ""
    yield "## Validation"
    yield ""
    if card.figures:
        yield from (f"- {what}: {figure}" for what, figure in card.figures.items())
        yield ""
    yield "To validate it on your own images with true masks: `segpipe predict IMAGES -o OUT -m MODEL`,"
    yield "then `segpipe evaluate OUT TRUTH`. Figures are of all that segpipe does, decode included."
    yield ""
    yield "## Limits"
    yield ""
    yield card.limits or "None are recorded."
    yield ""
    yield "## From probabilities to objects"
    yield ""
    yield from _decode(card)
    yield ""
    yield "## Tiling"
    yield ""
    yield from _tiling(geometry)
    yield ""
    yield "## What this description cannot say"
    yield ""
    yield from _shortfalls(card)
    yield ""
    yield "## Licence"
    yield ""
    yield card.licence


def _decode(card: ModelCard) -> Iterator[str]:
    if card.classes:
        yield "Of each pixel, the output with the highest probability is its class."
        return
    decode = card.decode
    yield "The package gives probabilities, not objects. segpipe makes objects of them in integers, of"
    yield "probabilities times 255, rounded:"
    interior = "interior" if "interior" in card.outputs else "foreground"
    levels = ", ".join(f"{level:g}" for level in decode.interior)
    yield f"- pixels of `foreground` >= {decode.foreground:g} belong to objects;"
    yield f"- seeds are 4-connected components of `{interior}` >= {levels}, the highest first, and"
    yield f"  last of the foreground, of at least {decode.min_area} px, that hold no seed found before;"
    growth = ", ".join(f"{level:g}" for level in decode.growth_levels)
    yield f"- labels grow over the foreground, level by level of `{interior}` ({growth}), at most"
    yield f"  {decode.growth_steps} px at each level but the last."


def _tiling(geometry: ModelGeometry) -> Iterator[str]:
    context, halo, stride = geometry.context, geometry.halo, geometry.stride
    yield f"- Heights and widths are {2 * halo} + n * {stride} px, n from 1."
    yield f"- An output pixel depends on {context} px to each side; the halo is {halo} px, of which the"
    yield f"  network itself cuts off {geometry.margin}."
    if geometry.exact:
        yield f"- Tiles that begin at multiples of {stride} px and whose halo is cut off give what the"
        yield "  whole image would, to rounding: every operation is local and shift-equivariant."
    else:
        yield "- Not exact: some operation looks at all of a window, so tiles may show in the result."
    yield "- At the border of an image, mirror it by the halo without repeating the edge (numpy's"
    yield "  `reflect`). Zeros there, or no padding at all, give other probabilities within the halo."


def _shortfalls(card: ModelCard) -> Iterator[str]:
    rule = card.normalisation
    span = f"{rule.low:g} and {rule.high:g}"
    if rule.kind == "percentile":
        yield f"- Percentiles {span} are of each channel of the whole image, never of a tile. segpipe"
        yield "  takes order statistics without interpolation, over the tiles that are not constant, and"
        yield "  the maximum where both coincide; other software interpolates, over all pixels."
    else:
        yield f"- Intensities {span} become 0 and 1, in every image; nothing is clipped."
    yield "- segpipe turns NaN and infinity into the low value before it scales; nothing here does."
    yield "- The test image is synthetic: it shows that software runs the model right, not how good it"
    yield "  is. Its test output is of the bare window, with no mirror around it."
