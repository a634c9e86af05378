"""The MLP and the CNN of XAI-TRIS for 8×8 pixels, and their training (Clark et al. 2024)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F

from benchmarks.xai_tris.data import SIDE, Samples, Split

RATE, BATCH = 2e-3, 512
EPOCHS, PATIENCE = 150, 50  # training ends after this many epochs without a lower validation loss
NEEDED_ACCURACY = 0.8  # of a model on the test set; the maps of other models are not scored


def make_mlp(activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Return the MLP: layers of 32, 16 and 8 neurons and 2 scores."""
    widths = SIDE * SIDE, 32, 16, 8
    hidden = [each for n, k in pairwise(widths) for each in (nn.Linear(n, k), activation())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(8, 2))


def make_cnn() -> nn.Sequential:
    """Return the CNN: four convolutions with 4 channels, each with max pooling, and 2 scores.

    With padding 1, a 2×2 convolution makes an image one pixel larger: 8 → 9 → 4 → 5 → 2 → 3 → 1 → 2 → 1.
    """
    blocks = [
        each for channels in (1, 4, 4, 4) for each in (nn.Conv2d(channels, 4, 2, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    ]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(4, 2))


MODELS: dict[str, Callable[[], nn.Sequential]] = {
    "MLP": make_mlp,
    "CNN": make_cnn,
    "MLP-GELU": partial(make_mlp, nn.GELU),
}


@dataclass(frozen=True)
class Trained:
    """A trained model in float64, the epoch of its weights, and its accuracy on the test set."""

    model: nn.Sequential
    epoch: int
    accuracy: float


def train(architecture: str, splits: Sequence[Split], seed: int) -> list[Trained]:
    """Train a model on each of several data sets, all at once because these models are tiny.

    Each model is trained by Adam on the cross entropy and keeps its weights with the lowest validation loss.

    Args:
        architecture: A name from `MODELS`.
        splits: The images of each model, all of the same number.
        seed: Seed of the initial weights and of the order of the images.
    """
    torch.manual_seed(seed)
    models = [MODELS[architecture]() for _ in splits]
    for module in (module for model in models for module in model):
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    weights, _ = stack_module_state(models)

    def measure_loss(weights: dict[str, Tensor], x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(models[0], weights, x), labels)

    measure_losses = vmap(measure_loss)
    x, labels = stack([split.training for split in splits])
    validation = stack([split.validation for split in splits])
    optimizer = torch.optim.Adam(weights.values(), RATE)
    best = {name: values.detach().clone() for name, values in weights.items()}
    lowest, last = torch.full((len(splits),), float("inf")), torch.zeros(len(splits), dtype=torch.int64)
    for epoch in range(1, EPOCHS + 1):
        for batch in torch.randperm(x.shape[1]).split(BATCH):
            optimizer.zero_grad()
            measure_losses(weights, x[:, batch], labels[:, batch]).sum().backward()
            optimizer.step()
        with torch.no_grad():
            losses = measure_losses(weights, *validation)
        better = (losses < lowest) & (epoch - last < PATIENCE)  # a model whose training has ended keeps its weights
        lowest, last = torch.where(better, losses, lowest), torch.where(better, epoch, last)
        for name, values in weights.items():
            best[name][better] = values.detach()[better]
        if (epoch - last >= PATIENCE).all():
            break
    return [
        finish(model, {name: values[number] for name, values in best.items()}, int(last[number]), split)
        for number, (model, split) in enumerate(zip(models, splits))
    ]


def stack(sets: Sequence[Samples]) -> tuple[Tensor, Tensor]:
    """Return the images, float32, and labels of sets of the same size, stacked along a new first dimension."""
    return torch.stack([samples.images.float() for samples in sets]), torch.stack([each.labels for each in sets])


def finish(model: nn.Sequential, weights: Mapping[str, Tensor], epoch: int, split: Split) -> Trained:
    """Return a model with its final weights in float64."""
    model.load_state_dict(weights)
    model.double().eval().requires_grad_(False)
    return Trained(model, epoch, float(is_correct(model, split.test).double().mean()))


def is_correct(model: nn.Module, samples: Samples) -> Tensor:
    """Return whether a model predicts the class of each sample, bool, shape (N,)."""
    correct: Tensor = model(samples.images).argmax(1) == samples.labels
    return correct
