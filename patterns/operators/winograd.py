"""The weight gradient of a 3 × n convolution with half the products, for CPUs.

Three sums over four rows of outputs, Σ_h x[i + h]·g[h] for i = 0, 1, 2, take twelve products of a row each. As the
coefficients of a polynomial's product they take six (Toom and Cook; Winograd 1980; Lavin & Gray 2016, "Fast algorithms
for convolutional neural networks"): rows are combined before they are multiplied, here for the points 0, ±1, ±2 and ∞,
and the six products, summed over all images, after. Along the width, each weight is a matrix product with the inputs
moved by so much.

Float32 loses about 1e-6 of a sum, no more than in oneDNN's gradient, and less where images are large: four rows' sums
were taken before they are added up.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

ROWS, POINTS = 4, 6  # of outputs that are taken together, and their products
PRODUCTS_TO_SUMS = [[1 / 4, -1 / 6, -1 / 6, 1 / 24, 1 / 24, 0],
           [0, -1 / 6, 1 / 6, 1 / 12, -1 / 12, 0],
           [0, -1 / 6, -1 / 6, 1 / 6, 1 / 6, 1]]  # fmt: skip

# RowCombiner numbers at a time. Each block's operations wait for all threads, which takes long where these are cores that
# share no cache: a fit of VGG-16 took 15 % longer there with an eighth of it, and as long where they do.
BLOCK = 2**22
# Channels (of inputs or neurons, the fewer) × width from where half the products outweigh what combining costs.
MIN_CHANNEL_COLUMNS = 3500

# One operation to whoever traces or counts them: its blocks would be hundreds.
LIBRARY = torch.library.Library("patternnet", "FRAGMENT")
LIBRARY.define("winograd_weight_gradient(Tensor x, Tensor grad, int[] kernel, int[] padding) -> Tensor")
OPERATION = torch.ops.patternnet.winograd_weight_gradient


def is_faster(x: Tensor, grad: Tensor, kernel: tuple[int, ...]) -> bool:
    """Whether a convolution of stride 1, undilated and of one group, has its gradient sooner this way."""
    return kernel[0] == 3 and min(x.shape[1], grad.shape[1]) * grad.shape[3] >= MIN_CHANNEL_COLUMNS


def weight_gradient(x: Tensor, grad: Tensor, kernel: Sequence[int], padding: Sequence[int]) -> Tensor:
    """Σ g·x, shape (K, C, 3, width), of inputs (N, C, H, W) and a gradient of the outputs (N, K, H', W')."""
    return OPERATION(x, grad, kernel, padding)


@torch.library.impl(LIBRARY, "winograd_weight_gradient", "CPU")
def compute_in_blocks(x: Tensor, grad: Tensor, kernel: Sequence[int], padding: Sequence[int]) -> Tensor:
    width, columns, tiles = kernel[1], x.shape[3] + 2 * padding[1], -(-grad.shape[2] // ROWS)
    room = max(1, BLOCK // (POINTS * columns * max(x.shape[1], grad.shape[1])))
    images, at_once = split_evenly(len(x), max(1, room // tiles)), split_evenly(tiles, room)
    block = (images, at_once, columns)
    of_x = RowCombiner(x, combine_inputs, ROWS + 2, block, tuple(padding))
    of_grad = RowCombiner(grad, combine_gradients, ROWS, block, (0, 0))
    sums = x.new_zeros(width, POINTS, grad.shape[1], x.shape[1])
    for image in range(0, len(x), images):
        for row in range(0, grad.shape[2], ROWS * at_once):
            v, g = of_x(image, row), of_grad(image, row)
            # A gradient's row ends with as many zeros as the inputs' is longer: moved inputs meet no others.
            count = g.shape[2] - (width - 1)
            for offset, total in enumerate(sums):
                total.baddbmm_(g[..., :count], v[..., offset : offset + count].mT)
    rows = x.new_tensor(PRODUCTS_TO_SUMS) @ sums.flatten(2)
    return rows.view(width, 3, *sums.shape[2:]).permute(2, 3, 1, 0)


@torch.library.register_fake("patternnet::winograd_weight_gradient", lib=LIBRARY)
def fake_weight_gradient(x: Tensor, grad: Tensor, kernel: Sequence[int], padding: Sequence[int]) -> Tensor:
    """What it gives, without its numbers."""
    return x.new_empty(kernel[1], 3, grad.shape[1], x.shape[1]).permute(2, 3, 1, 0)


def split_evenly(total: int, most: int) -> int:
    """How many at a time, at most so many, for blocks of about one size."""
    return -(-total // -(-total // most))


class RowCombiner:
    """Images' rows, combined block by block in the same memory.

    combine: takes each `span` successive rows, of which every fourth begins such a run, to the six points.
    block: images, runs and columns of a block.  padding: zeros above and beside the images.
    """

    def __init__(
        self,
        values: Tensor,
        combine: Callable[[list[Tensor], Tensor], None],
        span: int,
        block: tuple[int, int, int],
        padding: tuple[int, ...],
    ) -> None:
        (images, runs, columns), (self._above, side) = block, padding
        self._values, self._combine = values, combine
        channels, width, first = values.shape[1], values.shape[3], ROWS * (runs - 1)
        rows = values.new_zeros(channels, images, first + span, columns)
        self._inside = rows[..., side : side + width]
        self._runs = [rows[:, :, i : first + i + 1 : ROWS] for i in range(span)]
        self._combined = values.new_empty(POINTS, channels, *block)

    def __call__(self, image: int, row: int) -> Tensor:
        """From an image and a row of outputs on: (6, channels, images · runs · columns), 0 where nothing is."""
        first = row - self._above
        images, last = self._inside.shape[1], first + self._inside.shape[2]
        found = self._values[image : image + images, :, max(first, 0) : last].transpose(0, 1)
        begin = max(-first, 0)
        end = begin + found.shape[2]
        self._inside[:, : found.shape[1], begin:end] = found
        self._inside[:, :, :begin] = 0
        self._inside[:, :, end:] = 0
        self._inside[:, found.shape[1] :] = 0
        self._combine(self._runs, self._combined)
        return self._combined.flatten(2)


def combine_inputs(x: list[Tensor], out: Tensor) -> None:
    """Six successive rows, and what is multiplied at each of the six points."""
    even_part, odd_part = out[0], out[5]  # of what opposite points share
    torch.sub(x[4], x[2], alpha=4, out=even_part)
    torch.sub(x[3], x[1], alpha=4, out=odd_part)
    evaluate_opposite(even_part, odd_part, 1, out[1:3])
    torch.sub(x[4], x[2], out=even_part)
    torch.sub(x[3], x[1], out=odd_part)
    evaluate_opposite(even_part, odd_part, 2, out[3:5])
    # 4 x₀ - 5 x₂ + x₄ and 4 x₁ - 5 x₃ + x₅
    even_part.add_(x[0], alpha=4).sub_(x[2], alpha=4)
    torch.sub(x[5], x[3], out=odd_part).add_(x[1], alpha=4).sub_(x[3], alpha=4)


def combine_gradients(g: list[Tensor], out: Tensor) -> None:
    """Four successive rows, and the polynomial of which they are the coefficients at the six points."""
    even_part, odd_part = out[0], out[5]
    torch.add(g[0], g[2], out=even_part)
    torch.add(g[1], g[3], out=odd_part)
    evaluate_opposite(even_part, odd_part, 1, out[1:3])
    torch.add(g[0], g[2], alpha=4, out=even_part)
    torch.add(g[1], g[3], alpha=4, out=odd_part)
    evaluate_opposite(even_part, odd_part, 2, out[3:5])
    out[0], out[5] = g[0], g[3]


def evaluate_opposite(even_part: Tensor, odd_part: Tensor, point: int, out: Tensor) -> None:
    """A polynomial at a point and at the one opposite."""
    torch.add(even_part, odd_part, alpha=point, out=out[0])
    torch.sub(even_part, odd_part, alpha=point, out=out[1])
