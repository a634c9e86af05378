"""The configs of a model with its weights and of its preprocessing. Manifests hold their JSON."""

from dataclasses import dataclass, field

from ray_jobs.config.option import Validated, option, required
from ray_jobs.config.parsing import parse_function, parse_input

CROP_MODES = ("center", "squash", "border")
INTERPOLATIONS = ("nearest", "nearest-exact", "bilinear", "bicubic", "box", "hamming", "lanczos")
PRECISIONS = ("float32", "tf32", "float64", "bfloat16")
SPECS = (
    "torchvision:NAME, timm:NAME, transformers:FOLDER_OR_ID, module:factory, file.py:factory, "
    "file.pt2 (torch.export) or file.onnx"
)


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """From an image to the model's input: resize, crop the center, (x - mean) / std per channel.

    Attributes:
        image_size: Height and width of the input.
        resize: Length that `crop_mode` resizes a side to.
        interpolation: A value of torchvision's InterpolationMode, as Pillow computes it.
        mean: Means of pixels in [0, 1]: one for gray images, three for RGB. Ready tensors may have any number.
        std: Standard deviations, as many as means.
        crop_mode: `center`: the shorter side is resized. `squash`: both sides are resized, and the aspect ratio
            changes. `border`: the longer side is resized, and the rest of the input is filled with the mean.
    """

    image_size: int
    resize: int
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_mode: str = "center"  # absent in the manifests of version 0.2.0

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Return the shape (C, H, W) of the input."""
        return (len(self.mean), self.image_size, self.image_size)


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Validated):
    """A model with its weights. A field that is None has the value of the model's library."""

    spec: str = field(
        metadata=required(
            f"Model: {SPECS}.",
            flag="--model",
            parse="name",
        )
    )
    weights: str = option(
        "default",
        "Weights: file or URL of a state dict, a name of torchvision's weights, `default` (the library's, or as the "
        "factory made them) or `random` (drawn from the seed).",
        parse="path",
    )
    precision: str = option(
        "float32", "Precision of the model. tf32 has faster matrix products on a GPU.", choices=PRECISIONS
    )
    seed: int = option(0, "Seed of all random numbers.", min=0)
    image_size: int | None = option(None, "Height and width of the input (default: the library's).", min=1)
    resize: int | None = option(
        None, "Length of the shorter side before the center crop (default: the library's).", min=1
    )
    mean: tuple[float, ...] | None = option(
        None, "Mean per channel for pixels in [0, 1]: 0.5,0.5,0.5 (default: the library's)."
    )
    std: tuple[float, ...] | None = option(
        None, "Standard deviation per channel: 0.5,0.5,0.5 (default: the library's)."
    )
    pass_through: tuple[str, ...] = option(
        (), "Operations without a pattern whose gradient is used instead: gelu,layer_norm."
    )
    strip_softmax: bool = option(False, "Remove the softmax, log-softmax or sigmoid at the end of the model.")
    output: str | None = option(
        None,
        "Output to explain, by name or number (default: logits, image_embeds, pooler_output, or the first tensor).",
        flag="--model-output",
    )
    inputs: tuple[tuple[str, str], ...] = option(
        (),
        "Further input of the model with the same value for every sample: a number, true, false, none or FILE.npy. "
        "Repeatable.",
        flag="--input",
        parse=parse_input,
        repeated=True,
        metavar="NAME=VALUE",
    )
    decoder: str | None = option(
        None,
        "Function that makes the input of a sample from its files: module:function or file.py:function. Every worker "
        "imports it.",
        parse=parse_function,
        metavar="FUNCTION",
    )
