"""Pictures of the first convolution's neurons: the weights and the patterns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from patterns import UserError
from patterns.attribution import center_values, encode_png, values_to_image
from ray_jobs.config import ModelConfig
from ray_jobs.models import loading
from ray_jobs.runs.run_folder import Run, load_patterns
from ray_jobs.views.report.samples import embed

MAX_NEURONS = 64
WEIGHT = "w"
# Titles of the shown estimators (rows of `patterns.ESTIMATORS`), in this order.
SHOWN = {
    "linear": "a",
    "positive": "a₊",
    "negative": "a₋",
    "positive-own-mean": "a₊, own mean",
    "negative-own-mean": "a₋, own mean",
    "multivariate": "A",
}


@dataclass(frozen=True)
class Neuron:
    """A neuron.

    Attributes:
        number: Its number in the operator.
        pictures: A data URI for each row; None if there is no pattern.
        cosine: Cosine similarity of w and the first pattern; None if one of them is missing.
    """

    number: int
    pictures: list[str | None]
    cosine: float | None


@dataclass(frozen=True)
class Filters:
    """The neurons of an operator.

    Attributes:
        operator: Name of the operator.
        kernel: Size of the kernel.
        rows: Symbol and estimator of each picture of a neuron.
        neurons: The first neurons.
        total: Number of neurons of the operator.
        weights_missing: The reason why w is not shown; empty if it is.
    """

    operator: str
    kernel: str
    rows: list[tuple[str, str]]
    neurons: list[Neuron]
    total: int
    weights_missing: str


def read_filters(run: Run, manifest: Mapping[str, Any]) -> Filters | None:
    """Return the neurons of the first convolution; None if its kernels cannot be shown as gray or color pictures."""
    first = next((op for op in manifest["operators"] if op["kind"] == "convolution"), None)
    if first is None or len(first["weight"]) != 4 or first["weight"][1] not in (1, 3) or max(first["weight"][2:]) < 2:
        return None
    name = first["name"]
    patterns = load_patterns(str(run.folder), manifest["model"]["digest"], [name]).get(name, {})
    chosen = {row: patterns[row] for row in SHOWN if row in patterns}
    if not chosen:
        return None
    weight, why = patterns.get("filter"), ""
    if weight is None:
        weight, why = weight_of(run, name, manifest["model"]["digest"])
    shown = ({} if weight is None else {WEIGHT: weight}) | chosen
    rows = [(SHOWN.get(row, WEIGHT), "weight" if row == WEIGHT else row) for row in shown]
    out, _, *kernel = first["weight"]
    neurons = [neuron(number, shown) for number in range(min(MAX_NEURONS, out))]
    return Filters(name, " × ".join(map(str, kernel)), rows, neurons, out, why)


def weight_of(run: Run, operator: str, digest: str) -> tuple[Tensor | None, str]:
    """Return the operator's weight in the run's model; or None and the reason why it is not available."""
    try:
        loaded = loading.open_model(ModelConfig(**run.read_fitted_model()), run.folder)
    except UserError as error:
        return None, f"the model cannot be loaded here ({error.what})"
    if loaded.digest != digest:
        return None, "the model has other weights than the run"
    return loaded.network.operators[operator].weight.detach().cpu(), ""


def neuron(number: int, shown: Mapping[str, Tensor]) -> Neuron:
    """Return one neuron with its pictures."""
    values = {row: tensor[number].float() for row, tensor in shown.items()}
    pictures = [
        None if not bool(v.any()) else embed("png", encode_png(draw_weights(v.numpy()))) for v in values.values()
    ]
    return Neuron(number, pictures, cosine(values))


def cosine(values: Mapping[str, Tensor]) -> float | None:
    """Return the cosine similarity of w and the first pattern that is not zero."""
    others: Sequence[Tensor] = [v for row, v in values.items() if row != WEIGHT and bool(v.any())]
    if WEIGHT not in values or not others:
        return None
    w, a = (torch.flatten(v).double() for v in (values[WEIGHT], others[0]))
    return float(F.cosine_similarity(w, a, dim=0))


def draw_weights(values: np.ndarray) -> Image.Image:
    """Return a neuron's weights (C, H, W) as a picture at its own contrast; gray is zero."""
    return values_to_image(center_values(values))
