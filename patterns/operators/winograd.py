"""Weight gradient of a 3 × n convolution with half of the products, for CPUs.

Three sums over four rows of outputs, Σ_h x[i + h]·g[h] for i = 0, 1, 2, take twelve products of rows. As coefficients
of a product of polynomials they take six (Toom and Cook; Winograd 1980; Lavin & Gray 2016, "Fast algorithms for
convolutional neural networks"): rows are combined before the multiplication, here for the points 0, ±1, ±2 and ∞, and
the six products, summed over all images, are combined after it. Along the width, each column of weights is a matrix
product with shifted inputs.

The error in float32 is about 1e-6 of a sum. It is no larger than that of oneDNN's gradient, and smaller for large
images, because the sums of four rows are taken before they are added up.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

ROWS, POINTS = 4, 6  # output rows that are combined, and the products that they take
PRODUCTS_TO_SUMS = [[1 / 4, -1 / 6, -1 / 6, 1 / 24, 1 / 24, 0],
           [0, -1 / 6, 1 / 6, 1 / 12, -1 / 12, 0],
           [0, -1 / 6, -1 / 6, 1 / 6, 1 / 6, 1]]  # fmt: skip

# Numbers that are combined at once. The operations of a block wait for all threads, which is slow on cores that do not
# share a cache: with an eighth of this size, a fit of VGG-16 took 15 % longer there, and no longer on other cores.
BLOCK = 2**22
# The method pays off from this product on: the smaller number of channels (inputs or outputs) times the output's width.
MIN_CHANNEL_COLUMNS = 3500

# One operation for tracing and for counting: its blocks would be hundreds of operations.
LIBRARY = torch.library.Library("patternnet", "FRAGMENT")
LIBRARY.define("winograd_weight_gradient(Tensor x, Tensor grad, int[] kernel, int[] padding) -> Tensor")
OPERATION = torch.ops.patternnet.winograd_weight_gradient


def is_faster(x: Tensor, grad: Tensor, kernel: tuple[int, ...]) -> bool:
    """Return whether this computes the gradient faster, for a convolution of stride 1 and dilation 1 in one group."""
    return kernel[0] == 3 and min(x.shape[1], grad.shape[1]) * grad.shape[3] >= MIN_CHANNEL_COLUMNS


def weight_gradient(x: Tensor, grad: Tensor, kernel: Sequence[int], padding: Sequence[int]) -> Tensor:
    """Return Σ g·x, shape (K, C, 3, width), for inputs x (N, C, H, W) and an output gradient g (N, K, H', W')."""
    return OPERATION(x, grad, kernel, padding)


@torch.library.impl(LIBRARY, "winograd_weight_gradient", "CPU")
def compute_in_blocks(x: Tensor, grad: Tensor, kernel: Sequence[int], padding: Sequence[int]) -> Tensor:
    """Compute the weight gradient block by block."""
    width, columns, tiles = kernel[1], x.shape[3] + 2 * padding[1], -(-grad.shape[2] // ROWS)
    room = max(1, BLOCK // (POINTS * columns * max(x.shape[1], grad.shape[1])))
    images, groups = split_evenly(len(x), max(1, room // tiles)), split_evenly(tiles, room)
    block = (images, groups, columns)
    combine_x = RowCombiner(x, combine_inputs, ROWS + 2, block, tuple(padding))
    combine_grad = RowCombiner(grad, combine_gradients, ROWS, block, (0, 0))
    sums = x.new_zeros(width, POINTS, grad.shape[1], x.shape[1])
    for image in range(0, len(x), images):
        for row in range(0, grad.shape[2], ROWS * groups):
            v, g = combine_x(image, row), combine_grad(image, row)
            # The gradient's rows end in zeros up to the length of the inputs' rows. Shifted inputs that run into the
            # next row meet these zeros.
            count = g.shape[2] - (width - 1)
            for offset, total in enumerate(sums):
                total.baddbmm_(g[..., :count], v[..., offset : offset + count].mT)
    rows = x.new_tensor(PRODUCTS_TO_SUMS) @ sums.flatten(2)
    return rows.view(width, 3, *sums.shape[2:]).permute(2, 3, 1, 0)


@torch.library.register_fake("patternnet::winograd_weight_gradient", lib=LIBRARY)
def fake_weight_gradient(x: Tensor, grad: Tensor, kernel: Sequence[int], padding: Sequence[int]) -> Tensor:
    """Return a tensor of the result's shape, for torch's fake tensors."""
    return x.new_empty(kernel[1], 3, grad.shape[1], x.shape[1]).permute(2, 3, 1, 0)


def split_evenly(total: int, limit: int) -> int:
    """Return a block size of at most `limit` that splits `total` into blocks of about equal size."""
    return -(-total // -(-total // limit))


class RowCombiner:
    """Combines rows of images block by block, in memory that all blocks share."""

    def __init__(
        self,
        values: Tensor,
        combine: Callable[[list[Tensor], Tensor], None],
        span: int,
        block: tuple[int, int, int],
        padding: tuple[int, ...],
    ) -> None:
        """Allocate the memory.

        Args:
            values: Images, shape (N, channels, height, width).
            combine: Combines `span` successive rows to the six points. A group of rows starts every `ROWS` rows.
            span: Number of rows in a group.
            block: Images, groups of rows, and columns of a block.
            padding: Zeros above and at the sides of the images.
        """
        (images, groups, columns), (self._above, side) = block, padding
        self._values, self._combine = values, combine
        channels, width, first = values.shape[1], values.shape[3], ROWS * (groups - 1)
        rows = values.new_zeros(channels, images, first + span, columns)
        self._inside = rows[..., side : side + width]
        self._groups = [rows[:, :, i : first + i + 1 : ROWS] for i in range(span)]
        self._combined = values.new_empty(POINTS, channels, *block)

    def __call__(self, image: int, row: int) -> Tensor:
        """Return the combined rows from an image and an output row on.

        The shape is (6, channels, images · groups · columns). Rows and images beyond the end are 0.
        """
        first = row - self._above
        images, last = self._inside.shape[1], first + self._inside.shape[2]
        found = self._values[image : image + images, :, max(first, 0) : last].transpose(0, 1)
        begin = max(-first, 0)
        end = begin + found.shape[2]
        self._inside[:, : found.shape[1], begin:end] = found
        self._inside[:, :, :begin] = 0
        self._inside[:, :, end:] = 0
        self._inside[:, found.shape[1] :] = 0
        self._combine(self._groups, self._combined)
        return self._combined.flatten(2)


def combine_inputs(x: list[Tensor], out: Tensor) -> None:
    """Combine six successive rows of inputs into the first factors at the six points."""
    even_part, odd_part = out[0], out[5]  # opposite points share these parts
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
    """Evaluate the polynomial whose coefficients are four successive rows of the output gradient at the six points."""
    even_part, odd_part = out[0], out[5]
    torch.add(g[0], g[2], out=even_part)
    torch.add(g[1], g[3], out=odd_part)
    evaluate_opposite(even_part, odd_part, 1, out[1:3])
    torch.add(g[0], g[2], alpha=4, out=even_part)
    torch.add(g[1], g[3], alpha=4, out=odd_part)
    evaluate_opposite(even_part, odd_part, 2, out[3:5])
    out[0], out[5] = g[0], g[3]


def evaluate_opposite(even_part: Tensor, odd_part: Tensor, point: int, out: Tensor) -> None:
    """Evaluate a polynomial at a point and at the opposite point, from its even and odd part."""
    torch.add(even_part, odd_part, alpha=point, out=out[0])
    torch.sub(even_part, odd_part, alpha=point, out=out[1])
