"""The images of XAI-TRIS with their ground truth (Clark et al. 2024, arXiv 2306.12816).

An image of 8×8 pixels shows tetrominoes on a background. The class depends on the tetrominoes only. CORR backgrounds
are smooth, so that pixels outside of the tetrominoes help to subtract the background: they are suppressors.

What the paper leaves open follows the code of its authors (github.com/braindatalab/xai-tris): rows and columns of the
tetrominoes, the norms over the whole data set, one factor for the whole data set that makes the largest |value| 1.
"""

from dataclasses import dataclass

import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

SIDE = 8
IMAGES = 10_000
SHARES = 0.9, 0.05, 0.05  # of the images, for training, validation and test
SIGMA = 3.0  # pixels, of the Gaussian filter of CORR
T = torch.tensor([[1, 0], [1, 1], [1, 0]], dtype=torch.float64)
L = torch.tensor([[1, 0], [1, 0], [1, 1]], dtype=torch.float64)
T_AT, L_AT = (1, 1), (4, 5)  # row and column of the top left corner
# The weight α of the signal, by scenario and background.
ALPHAS = {
    "linear": {"WHITE": 0.18, "CORR": 0.0125},
    "multiplicative": {"WHITE": 0.7, "CORR": 0.1},
    "translations-rotations": {"WHITE": 0.65, "CORR": 0.2},
    "XOR": {"WHITE": 0.35, "CORR": 0.15},
}
BACKGROUNDS = "WHITE", "CORR"


@dataclass(frozen=True)
class Samples:
    """Images of one scenario.

    Attributes:
        images: float64, shape (N, 1, SIDE, SIDE).
        labels: The class of each image, 0 or 1, shape (N,).
        own: The pixels of the image's own tetrominoes, bool, shape (N, SIDE, SIDE).
        both: The ground truth of the authors' code, bool, shape (N, SIDE, SIDE): the pixels of both tetrominoes if
            their places are fixed, because a missing tetromino is as informative as a present one; `own` otherwise.
    """

    images: Tensor
    labels: Tensor
    own: Tensor
    both: Tensor

    def select(self, index: Tensor) -> "Samples":
        """Return some of the samples: positions, or a mask of shape (N,)."""
        return Samples(self.images[index], self.labels[index], self.own[index], self.both[index])

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Split:
    """Three disjoint sets of samples of one scenario."""

    training: Samples
    validation: Samples
    test: Samples


def place(tetromino: Tensor, row: int, column: int) -> Tensor:
    """Return an image of zeros with a tetromino whose top left corner is at a pixel."""
    image = torch.zeros(SIDE, SIDE, dtype=torch.float64)
    height, width = tetromino.shape
    image[row : row + height, column : column + width] = tetromino
    return image


BOTH = (place(T, *T_AT) + place(L, *L_AT)) > 0


def place_anywhere(tetromino: Tensor, generator: torch.Generator) -> Tensor:
    """Return an image with a tetromino that is rotated by a random multiple of 90° and placed at random."""
    turns = int(torch.randint(4, (), generator=generator))
    turned = torch.rot90(tetromino, turns)
    row, column = (int(torch.randint(SIDE - size + 1, (), generator=generator)) for size in turned.shape)
    return place(turned, row, column)


def draw_signals(scenario: str, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Draw the tetrominoes of images, shape (N, SIDE, SIDE): 1 or -1 on their pixels and 0 elsewhere.

    Args:
        scenario: A name from `ALPHAS`.
        labels: The class of each image, shape (N,).
        generator: Generator of the places, rotations and signs.
    """
    t, l_ = place(T, *T_AT), place(L, *L_AT)
    if scenario == "translations-rotations":
        return torch.stack([place_anywhere(L if label else T, generator) for label in labels.tolist()])
    one = labels[:, None, None].double()
    if scenario == "XOR":  # one sign for both tetrominoes in class 0, opposite signs in class 1; both halves balanced
        order = torch.empty_like(labels)
        for label in (0, 1):
            members = (labels == label).nonzero()[:, 0]
            order[members] = torch.arange(len(members))[torch.randperm(len(members), generator=generator)]
        sign = 1 - 2 * (order % 2)[:, None, None].double()
        return sign * (t + (1 - 2 * one) * l_)
    return (1 - one) * t + one * l_


def draw_backgrounds(background: str, count: int, generator: torch.Generator) -> Tensor:
    """Draw normal noise, smoothed by a Gaussian filter for CORR, shape (count, SIDE, SIDE)."""
    noise = torch.randn(count, SIDE, SIDE, generator=generator, dtype=torch.float64)
    if background == "CORR":
        return torch.from_numpy(gaussian_filter(noise.numpy(), SIGMA, axes=(1, 2)))
    return noise


def mix(scenario: str, signals: Tensor, backgrounds: Tensor, alpha: float) -> Tensor:
    """Mix tetrominoes and backgrounds, each divided by its Frobenius norm over all images.

    Multiplicative signals attenuate the background on the tetromino: 1 - α·signal is normalized, not the signal.
    """
    backgrounds = backgrounds / backgrounds.norm()
    if scenario == "multiplicative":
        attenuation = 1 - alpha * signals
        return attenuation / attenuation.norm() * backgrounds
    return alpha * signals / signals.norm() + (1 - alpha) * backgrounds


def draw_samples(scenario: str, background: str, generator: torch.Generator, count: int = IMAGES) -> Samples:
    """Draw images of one scenario in a random order, half of them of each class.

    Args:
        scenario: A name from `ALPHAS`.
        background: A name from `BACKGROUNDS`.
        generator: Generator of all random numbers.
        count: Number of images.
    """
    labels = (torch.arange(count) % 2)[torch.randperm(count, generator=generator)]
    signals = draw_signals(scenario, labels, generator)
    images = mix(scenario, signals, draw_backgrounds(background, count, generator), ALPHAS[scenario][background])
    own = signals != 0
    both = own if scenario == "translations-rotations" else BOTH.expand_as(own)
    return Samples((images / images.abs().max())[:, None], labels, own, both)


def split_samples(samples: Samples) -> Split:
    """Split samples by `SHARES`, the classes balanced in each set."""
    parts: list[list[Tensor]] = [[], [], []]
    for label in (0, 1):
        members = (samples.labels == label).nonzero()[:, 0]
        sizes = [round(share * len(members)) for share in SHARES[:-1]]
        for part, some in zip(parts, members.split([*sizes, len(members) - sum(sizes)])):
            part.append(some)
    return Split(*(samples.select(torch.cat(part).sort().values) for part in parts))
