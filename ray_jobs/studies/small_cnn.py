"""A small convolutional network, and its training: for the paper's experiments on small images."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPOCHS, BATCH, RATE = 4, 64, 2e-3
SPEC = "ray_jobs.studies.small_cnn:small_cnn"


def small_cnn() -> nn.Module:
    """VGG in small, for grey images of 28×28 and 10 classes: two blocks of two 3×3 convolutions with ReLU and max
    pooling, and two dense layers.
    """
    layers: list[nn.Module] = []
    for channels, more in ((1, 16), (16, 32)):
        layers += [nn.Conv2d(channels, more, 3, padding=1), nn.ReLU(), nn.Conv2d(more, more, 3, padding=1), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 7 * 7, 128), nn.ReLU(), nn.Linear(128, 10))


def train(
    batches: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    seed: int,
    epochs: int = EPOCHS,
    say: Callable[[str], None] = print,
) -> nn.Module:
    """A trained `small_cnn`, the same for the same seed: Adam with a rate that falls to 0 along a half cosine, by
    cross entropy.

    batches: makes one epoch's images (N, 1, 28, 28) and labels (N,); so many in each epoch.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = small_cnn()
    optimiser = torch.optim.Adam(model.parameters(), RATE)
    schedule = None
    for epoch in range(epochs):
        seen, lost = 0, 0.0
        listed = list(batches())
        if schedule is None:
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * len(listed))
        for images, labels in listed:
            loss = F.cross_entropy(model(images), labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            seen, lost = seen + len(images), lost + float(loss.detach()) * len(images)
        say(f"train: epoch {epoch + 1} of {epochs}, cross entropy {lost / seen:.4f}")
    return model.eval()
