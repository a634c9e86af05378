"""Grid pointing game: does the map of a class point to the image of this class in a grid of four images?

Boehle et al. 2021 (CVPR, arXiv 2104.00032) and Rao et al. 2022 (CVPR, arXiv 2205.10435): four images of different
classes are composed into one. Each of the four classes is explained, and the score of a map is the share of its
positive relevance in the quarter that shows the class. A map without information about the class has 0.25.

The quarters are numbered by rows: 0 top left, 1 top right, 2 bottom left, 3 bottom right.

Example:
    >>> import torch
    >>> images, classes = torch.rand(8, 3, 4, 4), torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    >>> quadruples = draw_quadruples(classes, count=2)
    >>> grids, targets = make_grids(images[quadruples]), classes[quadruples]
    >>> grids.shape, targets.shape  # `Explainer` accepts several targets per sample and gives maps (2, 4, 3, 8, 8)
    (torch.Size([2, 3, 8, 8]), torch.Size([2, 4]))
    >>> relevance = torch.rand(2, 4, 8, 8)  # of each target's map, see `compute_relevance`
    >>> pointing_shares(relevance.flatten(0, 1), torch.arange(4).repeat(2)).shape
    torch.Size([8])
"""

from bisect import bisect_right
from collections.abc import Sequence

import torch
from torch import Tensor

from patterns.errors import UserError

QUARTERS = 4


def make_grids(images: Tensor) -> Tensor:
    """Compose groups of four images into grids of 2×2 images.

    Args:
        images: Shape (N, 4, C, h, w), images of half the height and width of the model's input, for example
            `images[quadruples]` of images (M, C, h, w). The order is that of the quarters: top left, top right, bottom
            left, bottom right.

    Returns:
        Grids of shape (N, C, 2h, 2w), in the dtype and on the device of the images.

    Raises:
        ValueError: If the images have another shape.

    Example:
        >>> make_grids(torch.arange(4.0).view(1, 4, 1, 1, 1).expand(1, 4, 1, 1, 2))
        tensor([[[[0., 0., 1., 1.],
                  [2., 2., 3., 3.]]]])
    """
    if images.dim() != 5 or images.shape[1] != QUARTERS:
        raise ValueError(f"images of shape {tuple(images.shape)}, but a grid needs the shape (N, {QUARTERS}, C, h, w)")
    count, _, channels, height, width = images.shape
    rows = images.unflatten(1, (2, 2)).permute(0, 3, 1, 4, 2, 5)  # (N, C, row, h, column, w)
    return rows.reshape(count, channels, 2 * height, 2 * width)


def pointing_shares(relevance: Tensor, quarters: Tensor) -> Tensor:
    """Return the share of each map's positive relevance that is in the right quarter.

    A map without positive relevance gets 0, because it points nowhere. Any other value would reward it: with 0.25 it
    would beat a map that points to a wrong quarter, and if it was left out of the mean, a method could improve by
    returning nothing for difficult images.

    Args:
        relevance: The relevance of each pixel, shape (N, H, W), H and W even, any floating-point dtype; see
            `compute_relevance`.
        quarters: The quarter that shows the class of each map, int64, shape (N,), 0 to 3.

    Returns:
        float64, shape (N,), in [0, 1]; NaN if the map has a NaN.

    Raises:
        UserError: If the height or width is odd, so that there are no equal quarters.
        ValueError: If the shapes differ, or there is no such quarter.

    Example:
        >>> relevance = torch.tensor([[[3.0, 1.0], [-9.0, 0.0]], [[-1.0, 0.0], [0.0, 0.0]]])
        >>> pointing_shares(relevance, torch.tensor([0, 0]))
        tensor([0.7500, 0.0000], dtype=torch.float64)

    Source: Boehle et al. 2021; Rao et al. 2022.
    """
    if relevance.dim() != 3 or quarters.shape != relevance.shape[:1]:
        raise ValueError(f"relevance of shape {tuple(relevance.shape)} and quarters of shape {tuple(quarters.shape)}")
    if len(quarters) and not (int(quarters.min()) >= 0 and int(quarters.max()) < QUARTERS):
        raise ValueError(f"quarters from {int(quarters.min())} to {int(quarters.max())}, but they are 0 to 3")
    height, width = relevance.shape[1:]
    if height % 2 or width % 2:
        what = f"maps of {height}×{width} pixels have no four equal quarters"
        raise UserError("", what, "Use a model with an input of even height and width.", "relevance")
    positive = relevance.clamp(min=0).double()
    masses = positive.unflatten(2, (2, -1)).unflatten(1, (2, -1)).sum((2, 4)).flatten(1)  # (N, 4)
    total, right = masses.sum(1), masses.gather(1, quarters[:, None].to(masses.device))[:, 0]
    return torch.where(total == 0, 0.0, right / total)


def draw_quadruples(classes: Tensor | Sequence[int], count: int, seed: int = 0) -> Tensor:
    """Draw groups of four samples with four different classes that use each sample about equally often.

    The numbers of uses of two samples differ by at most 1, with one exception: a group has at most one sample of a
    class, so if a class would be used more than `count` times, its samples are used less often than the others.

    Args:
        classes: The class of each sample, int64, shape (M,).
        count: The number of groups.
        seed: The seed of the draw. The same arguments give the same groups.

    Returns:
        The indices of the samples of each group in random order, int64, shape (count, 4), on the CPU.

    Raises:
        UserError: If there are fewer than four classes, or the count is not positive.

    Example:
        >>> quadruples = draw_quadruples([0, 0, 1, 1, 2, 2, 3, 3], count=2)
        >>> sorted(quadruples.flatten().tolist())  # each sample once
        [0, 1, 2, 3, 4, 5, 6, 7]
    """
    classes = torch.as_tensor(classes, dtype=torch.int64).cpu()
    _, members = classes.unique(return_inverse=True)
    sizes = members.bincount()
    if len(sizes) < QUARTERS:
        what = f"samples of {len(sizes)} classes, but a grid shows four images of different classes"
        raise UserError("", what, "Use samples of at least four classes.", "classes")
    if count < 1:
        raise UserError("", f"{count} groups", "Draw at least one group.", "count")
    generator = torch.Generator().manual_seed(seed)
    left = count_uses(sizes, count, generator)
    orders = [(members == k).nonzero()[:, 0] for k in range(len(sizes))]
    orders = [order[torch.randperm(len(order), generator=generator)] for order in orders]
    used = [0] * len(sizes)
    groups = []
    for remaining in range(count, 0, -1):
        # A class with as many uses left as there are groups left must be in each of them. With these classes included,
        # no class ever has more uses than groups left, so a group of four classes always exists.
        forced = left == remaining
        chosen = forced.nonzero()[:, 0]
        if len(chosen) < QUARTERS:
            weights = torch.where(forced, 0, left).double()
            others = torch.multinomial(weights, QUARTERS - len(chosen), generator=generator)
            chosen = torch.cat([chosen, others])
        left[chosen] -= 1
        group = []
        for k in chosen[torch.randperm(QUARTERS, generator=generator)].tolist():
            group.append(int(orders[k][used[k] % len(orders[k])]))
            used[k] += 1
        groups.append(group)
    return torch.tensor(groups)


def count_uses(sizes: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return how often each class is used in groups of four different classes.

    Args:
        sizes: The number of samples of each class, int64, shape (K,), at least four classes.
        count: The number of groups.
        generator: Draws the samples that are used once more than the others.

    Returns:
        int64, shape (K,): numbers up to `count` that add up to 4 · count, proportional to the sizes up to rounding
        except for the classes at the upper limit.
    """

    def uses(each: int) -> Tensor:
        return (sizes * each).clamp(max=count)

    # The largest number of uses of all samples that does not give more than 4 · count in total.
    each = bisect_right(range(count + 1), QUARTERS * count, key=lambda n: int(uses(n).sum())) - 1
    found = uses(each)
    candidates = torch.arange(len(sizes)).repeat_interleave(uses(each + 1) - found)
    extra = torch.randperm(len(candidates), generator=generator)[: QUARTERS * count - int(found.sum())]
    return found + candidates[extra].bincount(minlength=len(sizes))
