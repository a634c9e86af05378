"""Quality ρ of signal estimators (Kindermans et al. 2018, §4), from moments.

For each neuron, ρ(S) = 1 - max_v corr(y, vᵀd) with the distractor d = x - S(x), and y = wᵀx without bias: how well a
linear regression still predicts the output from what the estimator takes for the distractor. Three sets of samples
enter it: the patterns are fitted on A, v is fitted on B, and the correlation is computed on C. If B and C are the same
set, 0 ≤ ρ ≤ 1; if they are disjoint, 0 ≤ ρ ≤ 2.

Write S(x) = A s with s = y for one pattern, and s = (m·y, (1 - m)·y), A = [a₊ a₋] for the two-component estimator with
gate m; q is the number of components. Then

    Cov[d] = Cov[x] - A Cov[s, x] - Cov[x, s] Aᵀ + A Cov[s] Aᵀ,   cov[d, y] = cov[x, y] - A cov[s, y]
    v = Cov_B[d]⁺ cov_B[d, y],   corr = vᵀcov_C[d, y] / √(vᵀCov_C[d] v · var_C[y])

In coordinates x̃ that whiten Cov_B[x], Cov[d̃] is the identity except in the span of the 2q columns of Ã and Cov[x̃, s].
cov[d̃, y] is in this span too, so the regression has 2q unknowns. One of them, along w̃ = cov[x̃, y], is the kernel:
wᵀa = 1 makes wᵀd = 0 for every sample, so it can be left out of v. So one decomposition of Cov_B[x] serves all neurons
and estimators, and the rest are products of (K, D) with (D, D) matrices.

The pseudo-inverse leaves out directions of x whose variance is at most `cutoff` times the largest. If x spans fewer
than D dimensions, and a pattern leaves this span by more than that, vᵀd along its outer part is y itself, and ρ is 0
on B, as defined (each component outside is one more unknown).

Patterns rounded to float32 are judged as they are. If Cov[x] is badly conditioned, this rounding alone is a
distractor, and ρ of `linear` on its own data is then a little less than 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from patterns.estimation.estimators import PAIRS, VANISHING
from patterns.moments.gram import PatchMoments
from patterns.moments.moments import Sums, require

# The pseudo-inverse leaves out directions with at most this share of the largest variance of x.
CUTOFF = 1e-10
TINY = torch.finfo(torch.float64).tiny

Components = tuple[Tensor, ...]
T = TypeVar("T")


def group_by_estimator(patterns: Mapping[str, T]) -> dict[str, tuple[T, ...]]:
    """Group patterns into the components of signal estimators.

    The patterns of both sides of a gate make one estimator together, and none alone. `multivariate` is left out: its
    signal S(x) = A y depends on all neurons at once, and leaves a distractor that is uncorrelated with each output by
    construction.

    Args:
        patterns: Patterns by name from `ESTIMATORS`.

    Returns:
        The components of each estimator by its name.

    Example:
        >>> group_by_estimator({"linear": "a", "positive": "b", "negative": "c"})
        {'linear': ('a',), 'two-component': ('b', 'c')}
    """
    others = {"multivariate", *(row for pair in PAIRS.values() for row in pair)}
    found: dict[str, tuple[T, ...]] = {name: (a,) for name, a in patterns.items() if name not in others}
    pairs = {name: pair for name, pair in PAIRS.items() if patterns.keys() >= set(pair)}
    return found | {name: tuple(patterns[row] for row in pair) for name, pair in pairs.items()}


def quality(
    patterns: Mapping[str, Tensor],
    weight: Tensor,
    regressed: PatchMoments,
    evaluated: PatchMoments,
    cutoff: float = CUTOFF,
) -> dict[str, Tensor]:
    """Compute ρ of every estimator that has patterns for an operator.

    Args:
        patterns: The operator's patterns by name from `ESTIMATORS`, as in `Solution.patterns`, fitted on set A.
        weight: The operator's weight.
        regressed: Moments of set B, on which v is fitted.
        evaluated: Moments of set C, on which the correlation is computed; may be those of B.
        cutoff: Share of the largest variance of x at which directions are left out.

    Returns:
        ρ by estimator, float64, shape (K,); NaN if it is undefined: see `rho`.

    Raises:
        ValueError: If there are patterns of both sides of a gate, and the moments have no gate.

    Example:
        >>> import patterns
        >>> network = patterns.trace(torch.nn.Linear(3, 2).double(), torch.zeros(2, 3).double())
        >>> moments = patterns.accumulate_patches(network, [torch.rand(50, 3).double()], ["linear.0"])["linear.0"]
        >>> operator = network.operators["linear.0"]
        >>> fitted = patterns.solve(operator, moments.moments, "linear").patterns
        >>> quality(fitted, operator.weight, moments, moments)["linear"].round(decimals=4)
        tensor([1., 1.], dtype=torch.float64)
    """
    whitening = whiten(regressed, cutoff)
    estimators = group_by_estimator(patterns)
    return {name: rho(components, weight, whitening, evaluated) for name, components in estimators.items()}


@dataclass(frozen=True)
class Whitening:
    """Decomposition of Cov[x] of a set of samples; all tensors float64.

    Attributes:
        moments: The moments of the set.
        cov: Cov[x], shape (G, D, D).
        basis: Orthonormal columns, and 0 for the directions left out, shape (G, D, D).
        scale: 1 / standard deviation along each column, and 0 for the directions left out, shape (G, D).
        floor: The variance at and below which a direction is left out, shape (G,).
        cutoff: The share of the largest variance that was asked for.
    """

    moments: PatchMoments
    cov: Tensor
    basis: Tensor
    scale: Tensor
    floor: Tensor
    cutoff: float

    @property
    def complete(self) -> bool:
        """Whether no direction of any group was left out."""
        return bool((self.scale > 0).all())

    def __call__(self, vectors: Tensor) -> Tensor:
        """Transform vectors of x, shape (G, …, D), to the coordinates in which Cov[x] = 1."""
        return multiply_groups(vectors, self.basis) * expand_groups(self.scale, vectors)

    def functionals(self, whitened: Tensor) -> Tensor:
        """Return v with vᵀx = tᵀx̃, for t of shape (G, …, D)."""
        return multiply_groups(whitened * expand_groups(self.scale, whitened), self.basis.mT)

    def outside(self, vectors: Tensor) -> Tensor:
        """Return the part of vectors, shape (G, …, D), along the directions left out."""
        return vectors - multiply_groups(multiply_groups(vectors, self.basis), self.basis.mT)


def whiten(moments: PatchMoments, cutoff: float = CUTOFF) -> Whitening:
    """Decompose Cov[x]: the only step of order D³."""
    cov = cov_xx(moments)
    variances, vectors = torch.linalg.eigh(cov)
    # A variance below this is rounding of the sums of which it is a difference.
    mean_square = (moments.xx.diagonal(dim1=1, dim2=2) / count_samples(moments)).amax(1)
    rounding = torch.finfo(torch.float64).eps * cov.shape[1] * mean_square
    floor = torch.maximum(cutoff * variances[:, -1], rounding)
    kept = variances > floor[:, None]
    scale = torch.where(kept, variances.clamp(min=TINY).rsqrt(), 0.0)
    return Whitening(moments, cov, vectors * kept[:, None], scale, floor, cutoff)


def rho(components: Components, weight: Tensor, regressed: Whitening, evaluated: PatchMoments) -> Tensor:
    """Compute ρ of one estimator.

    ρ is undefined, and NaN (files should store null), for the identity; if d = 0 on B although S is not the identity
    (for example if D = 1); if y does not vary on B or C; and for a neuron with pattern 0 (dead, constant or
    degenerate), except if no sample of B and C is on the side of the gate that the pattern is for.

    Args:
        components: (a,), or (a₊, a₋) for an operator with a gate, each of the weight's shape and of any length (they
            are scaled to wᵀa = 1, which solved patterns have up to the rounding of their dtype); () for the identity.
        weight: The operator's weight.
        regressed: The decomposition of Cov[x] on B.
        evaluated: Moments of the same operator on C.

    Returns:
        ρ of each neuron, float64, shape (K,).

    Raises:
        ValueError: If there are two components and the moments have no gate.
    """
    if not components:
        return torch.full((len(weight),), torch.nan, dtype=torch.float64)
    # On a single set, a negative correlation is rounding, because both v and -v are candidates.
    lowest = 0 if evaluated is regressed.moments else -1
    return 1 - correlation(components, weight, regressed, evaluated).clamp(lowest, 1)


def correlation(components: Components, weight: Tensor, regressed: Whitening, evaluated: PatchMoments) -> Tensor:
    """Return corr(y, vᵀd) for each neuron, in [-1, 1] up to rounding, and NaN if `rho` is; arguments as for `rho`."""
    groups = len(regressed.scale)
    w = weight.detach().cpu().double().flatten(1).unflatten(0, (groups, -1))
    a, has_pattern = normalize_components(components, w, regressed.moments, evaluated)
    q = len(components)
    on_b, on_c = signal_covariances(regressed.moments, q), signal_covariances(evaluated, q)
    v = regress_distractor(a, w, regressed, on_b)

    inner = (a * v[:, :, None]).sum(-1)  # Aᵀv
    along_v = (v * on_c.sx.sum(2)).sum(-1) - (inner * on_c.sy).sum(-1)
    x_v = (v * multiply_groups(v, regressed.cov if evaluated is regressed.moments else cov_xx(evaluated))).sum(-1)
    cross = (inner * (on_c.sx * v[:, :, None]).sum(-1)).sum(-1)
    var_v = x_v - 2 * cross + quadratic_form(on_c.ss, inner)
    # v = 0 if d and y are uncorrelated on B. So no variance along v means no correlation.
    varies = var_v > 0
    corr = torch.where(varies, along_v / (torch.where(varies, var_v, 1.0) * on_c.yy).sqrt(), 0.0)

    var_x, var_s = regressed.cov.diagonal(dim1=1, dim2=2).sum(1)[:, None], (on_b.ss * (a @ a.mT)).sum((2, 3))
    var_d = var_x - 2 * (a * on_b.sx).sum((2, 3)) + var_s
    y_varies = [m.moments.total.var_y().view(groups, -1) > 0 for m in (regressed.moments, evaluated)]
    defined = has_pattern & y_varies[0] & y_varies[1] & (var_d > regressed.cutoff * (var_x + var_s))
    return torch.where(defined, corr, torch.nan).flatten()


def regress_distractor(a: Tensor, w: Tensor, whitening: Whitening, cov: "Covariances") -> Tensor:
    """Return v = Cov[d]⁺cov[d, y] for each neuron, (G, k, D), given a (G, k, q, D) with wᵀa = 1 and w (G, k, D)."""
    q = a.shape[2]
    a_white, s_white = whitening(a), whitening(cov.sx)
    # Orthonormal directions of the span, of which w̃ is the first and is dropped. cov[x̃, y] is the sum of cov[x̃, s].
    columns = [s_white.sum(2, keepdim=True), a_white, s_white[:, :, : q - 1]]
    span = torch.linalg.qr(torch.cat(columns, 2).mT).Q[..., 1:].mT * (whitening.scale > 0)[:, None, None]
    a_in, s_in, cov_x = span @ a_white.mT, span @ s_white.mT, span @ span.mT
    outer = None if whitening.complete else outer_functionals(whitening.outside(a), cov.ss, whitening.floor)
    if outer is not None:
        # Along these, x has no variance and no covariance, but A s has.
        a_in = torch.cat([a_in, outer @ a.mT], 2)
        s_in = F.pad(s_in, (0, 0, 0, q))
        cov_x = F.pad(cov_x, (0, q, 0, q))
    cross = a_in @ s_in.mT
    cov_d = cov_x - cross - cross.mT + a_in @ cov.ss @ a_in.mT
    cov_dy = -(a_in @ cov.sy[..., None]).squeeze(-1)  # the span is orthogonal to cov[x̃, y]
    t, kernel = least_squares(cov_d, cov_dy)
    if outer is None:
        return whitening.functionals(combine(t, span))
    functionals = torch.cat([whitening.functionals(span), outer], 2)
    # On B, any v of the kernel could be added. On a C that spans more than B it makes a difference, and the
    # pseudo-inverse has no part in the kernel: w without its part along the directions left out and, if B has too
    # few samples, more.
    unit = F.normalize(outer, dim=-1)
    w_inside = w - whitening.outside(w) + combine((unit * w[:, :, None]).sum(-1), unit)
    return project_out(combine(t, functionals), torch.cat([w_inside[:, :, None], kernel @ functionals], 2))


def outer_functionals(a: Tensor, ss: Tensor, floor: Tensor) -> Tensor:
    """Return orthogonal vectors u in the span of a's rows with Cov[uᵀA s] = 1, shape (G, k, q, D).

    Args:
        a: The parts of patterns that are outside of the span of the inputs, (G, k, q, D).
        ss: Cov[s], (G, k, q, q).
        floor: The largest variance of A s that counts as rounding, (G,). A vector with a smaller variance is 0.
    """
    values, vectors = torch.linalg.eigh(ss)
    moved = values.clamp(min=0).sqrt()[..., None] * (vectors.mT @ a)
    variances, axes = torch.linalg.eigh(moved @ moved.mT)
    kept = variances > floor[:, None, None]
    return torch.where(kept, 1 / torch.where(kept, variances, 1.0), 0.0)[..., None] * (axes.mT @ moved)


def least_squares(cov: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return cov⁺target for covariances (…, m, m) and targets (…, m), in units in which every variance is 1.

    Returns:
        The solution (…, m), and (…, m, m) whose rows span the kernel or are 0.
    """
    variances = cov.diagonal(dim1=-2, dim2=-1)
    unit = torch.where(variances > 0, variances.clamp(min=TINY).rsqrt(), 0.0)
    values, vectors = torch.linalg.eigh(unit[..., None] * cov * unit[..., None, :])
    kept = values > CUTOFF * values[..., -1:]
    rows = vectors.mT * unit[..., None, :]
    inverse = torch.where(kept, 1 / torch.where(kept, values, 1.0), 0.0)
    return combine(inverse * (rows @ target[..., None]).squeeze(-1), rows), rows * ~kept[..., None]


def project_out(v: Tensor, rows: Tensor) -> Tensor:
    """Subtract from v (…, D) its projection on the span of rows (…, r, D)."""
    rows = F.normalize(rows, dim=-1, eps=TINY)
    coefficients = torch.linalg.pinv(rows @ rows.mT, rtol=CUTOFF, hermitian=True) @ (rows @ v[..., None])
    return v - combine(coefficients.squeeze(-1), rows)


def normalize_components(components: Components, w: Tensor, *sets: PatchMoments) -> tuple[Tensor, Tensor]:
    """Return the patterns (G, k, q, D), each with wᵀa = 1, and which neurons have all of them, bool (G, k)."""
    a = torch.stack([c.detach().cpu().double().flatten(1).view_as(w) for c in components], 2)
    length = (a * w[:, :, None]).sum(-1, keepdim=True)
    valid = length.abs() > VANISHING * a.norm(dim=-1, keepdim=True) * w[:, :, None].norm(dim=-1, keepdim=True)
    a = torch.where(valid, a / torch.where(valid, length, 1.0), 0.0)
    if len(components) == 1:
        return a, valid.squeeze(-1).squeeze(-1)
    # The pattern of a side of the gate without samples is multiplied by zeros. Any pattern with wᵀd = 0 can replace it.
    sides = [(require(m.moments.open).n, m.moments.closed.n) for m in sets]
    unused = torch.stack([sum(side).view(w.shape[:2]) == 0 for side in zip(*sides)], -1)[..., None]
    replaced = ~valid & unused & valid.flip(2)
    return torch.where(replaced, a.flip(2), a), (valid | replaced).all(2).squeeze(-1)


# --- covariances of a set of samples --------------------------------------------------------------


@dataclass(frozen=True)
class Covariances:
    """Covariances of the signal's components s with each other, with x, and with y = Σs.

    Attributes:
        sx: Cov[s, x], (G, k, q, D).
        ss: Cov[s], (G, k, q, q).
    """

    sx: Tensor
    ss: Tensor

    @property
    def sy(self) -> Tensor:
        """Covariance cov[s, y], (G, k, q)."""
        return self.ss.sum(-1)

    @property
    def yy(self) -> Tensor:
        """Variance var[y], (G, k)."""
        return self.ss.sum((-1, -2))


def signal_covariances(moments: PatchMoments, components: int) -> Covariances:
    """Return the covariances of the signal's components with the inputs, the output and each other.

    Args:
        moments: The moments of one set of samples.
        components: 1 for s = y, or 2 for s = (m·y, (1 - m)·y), where m is the weight of the gate.
    """
    total, groups = moments.moments.total, len(moments.xx)
    sides: list[Sums] = [total] if components == 1 else [require(moments.moments.open), moments.moments.closed]
    n = count_samples(moments)
    x = (require(total.x) / n)[:, None, None]
    y = torch.stack([side.y for side in sides], -1).unflatten(0, (groups, -1)) / n
    yy = torch.stack([side.yy for side in sides], -1).unflatten(0, (groups, -1)) / n
    xy = torch.stack([require(side.xy) for side in sides], 1).unflatten(0, (groups, -1)) / n
    products = torch.diag_embed(yy)  # at most one of the components is different from 0 in each sample
    if components == 2 and moments.squared is not None:  # Σm(1 - m)y² of a smooth gate
        crossed = yy[..., 0] - moments.squared.unflatten(0, (groups, -1)) / n
        products += crossed[..., None, None] * torch.tensor([[-1.0, 1.0], [1.0, -1.0]], dtype=crossed.dtype)
    return Covariances(xy - x * y[..., None], products - y[..., None] * y[..., None, :])


def cov_xx(moments: PatchMoments) -> Tensor:
    """Return Cov[x], (G, D, D)."""
    mean = require(moments.moments.total.x) / count_samples(moments)
    return moments.xx / count_samples(moments) - mean[:, :, None] * mean[:, None]


def count_samples(moments: PatchMoments) -> int:
    """Return the number of patches, which is the same for all neurons; 1 if there are none."""
    return max(1, int(moments.moments.total.n[0]))


# --- products -------------------------------------------------------------------------------------


def multiply_groups(vectors: Tensor, matrices: Tensor) -> Tensor:
    """Multiply vectors (G, …, D) by the matrix of their group, (G, D, D)."""
    return (vectors.flatten(1, -2) @ matrices).view(vectors.shape)


def expand_groups(values: Tensor, like: Tensor) -> Tensor:
    """Reshape values (G, D) so that they multiply vectors (G, …, D)."""
    return values.view(len(values), *[1] * (like.dim() - 2), -1)


def combine(coefficients: Tensor, vectors: Tensor) -> Tensor:
    """Return Σᵢ cᵢ vᵢ for coefficients (…, m) and vectors (…, m, D)."""
    return (coefficients[..., None, :] @ vectors).squeeze(-2)


def quadratic_form(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Return vᵀMv for matrices (…, q, q) and vectors (…, q)."""
    return (vectors * (matrices @ vectors[..., None]).squeeze(-1)).sum(-1)
