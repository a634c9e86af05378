"""The first convolution's neurons as pictures: what they weigh, beside what makes them fire."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from patterns import UserError
from patterns.attribution import centred, coloured, png
from ray_jobs.config import ModelConfig
from ray_jobs.models import loading
from ray_jobs.runs.run_folder import Run, load_patterns
from ray_jobs.views.report.samples import encoded

MOST = 64  # neurons
WEIGHT = "w"
# Rows of `patterns.estimation.estimators.ESTIMATORS` as they are shown, in this order.
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
    """pictures: data URIs, by row; None where there is no pattern.  cosine: between w and the first pattern."""

    number: int
    pictures: list[str | None]
    cosine: float | None


@dataclass(frozen=True)
class Filters:
    """rows: what the pictures of a neuron show, with the estimator.  total: neurons, of which the first are shown."""

    operator: str
    kernel: str
    rows: list[tuple[str, str]]
    neurons: list[Neuron]
    total: int
    weights_missing: str  # why w is not shown, if it is not


def filters(run: Run, manifest: Mapping[str, Any]) -> Filters | None:
    """The first convolution's. None where there is none, or none that can be seen as pictures."""
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
    neurons = [neuron(number, shown) for number in range(min(MOST, out))]
    return Filters(name, " × ".join(map(str, kernel)), rows, neurons, out, why)


def weight_of(run: Run, operator: str, digest: str) -> tuple[Tensor | None, str]:
    """The operator's weight in the run's model; or why there is none."""
    try:
        loaded = loading.load(ModelConfig(**run.fitted_model()))
    except UserError as error:
        return None, f"the model cannot be loaded here ({error.what})"
    if loaded.digest != digest:
        return None, "the model here has other weights than the run's"
    return loaded.network.operators[operator].weight.detach().cpu(), ""


def neuron(number: int, shown: Mapping[str, Tensor]) -> Neuron:
    values = {row: tensor[number].float() for row, tensor in shown.items()}
    pictures = [None if not bool(v.any()) else encoded("png", png(drawn(v.numpy()))) for v in values.values()]
    return Neuron(number, pictures, cosine(values))


def cosine(values: Mapping[str, Tensor]) -> float | None:
    """Between w and the first pattern that is not zero."""
    others: Sequence[Tensor] = [v for row, v in values.items() if row != WEIGHT and bool(v.any())]
    if WEIGHT not in values or not others:
        return None
    w, a = (torch.flatten(v).double() for v in (values[WEIGHT], others[0]))
    return float(F.cosine_similarity(w, a, dim=0))


def drawn(values: np.ndarray) -> Image.Image:
    """A neuron's weights (C, H, W), each at its own contrast: grey is nothing."""
    return coloured(centred(values))
