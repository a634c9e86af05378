"""A small convolutional network and its training, for the paper's experiments on small images."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPOCHS, BATCH, RATE = 4, 64, 2e-3
SPEC = "ray_jobs.studies.small_cnn:small_cnn"


def small_cnn() -> nn.Module:
    """Return an untrained network for gray images of 28×28 pixels and 10 classes.

    It is a small VGG: two blocks of two 3×3 convolutions with ReLU and max pooling, and two dense layers.
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
    log: Callable[[str], None] = print,
    make: Callable[[], nn.Module] = small_cnn,
) -> nn.Module:
    """Return a trained network, the same for the same seed.

    The loss is the cross entropy. Adam's learning rate falls to 0 along a half cosine.

    Args:
        batches: Returns the batches of an epoch, images (N, 1, 28, 28) and labels (N,); each epoch has as many.
        seed: The seed of the initial weights.
        epochs: The number of epochs.
        log: Prints a line after each epoch.
        make: Returns the untrained network, by default a `small_cnn`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    schedule = None
    for epoch in range(epochs):
        count, total = 0, 0.0
        listed = list(batches())
        if schedule is None:
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(listed))
        for images, labels in listed:
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            count, total = count + len(images), total + float(loss.detach()) * len(images)
        log(f"train: epoch {epoch + 1} of {epochs}, cross entropy {total / count:.4f}")
    return model.eval()
