"""The quality ρ of signal estimators (Kindermans et al. 2018, §4), from moments alone.

ρ(S) = 1 - max_v corr(y, vᵀd) for each neuron, with the distractor d = x - S(x) and y = wᵀx without
bias: what a linear regression still finds of the output in what the estimator takes for distractor.
Three sets of samples enter it: the patterns were fitted on A, v is regressed on B, and the
correlation is taken on C. Where B and C are one set, 0 ≤ ρ ≤ 1; on disjoint sets 0 ≤ ρ ≤ 2.

Write S(x) = A s with s = y for one pattern, and s = (m·y, (1 - m)·y), A = [a₊ a₋] for the two-component
estimator with gate m; `q` is the number of components. Then

    Cov[d] = Cov[x] - A Cov[s, x] - Cov[x, s] Aᵀ + A Cov[s] Aᵀ,   cov[d, y] = cov[x, y] - A cov[s, y]
    v = Cov_B[d]⁺ cov_B[d, y],   corr = vᵀcov_C[d, y] / √(vᵀCov_C[d] v · var_C[y])

In coordinates x̃ that whiten Cov_B[x], Cov[d̃] is I but for a change in the span of the 2q columns of
Ã and Cov[x̃, s], and cov[d̃, y] lies in that span, so that the regression is one of 2q unknowns. One of
them, along w̃ = cov[x̃, y], is the kernel: wᵀa = 1 makes wᵀd = 0 for every sample, so a v without it
loses nothing. One decomposition of Cov_B[x] hence serves all neurons and estimators;
all else is products of (K, D) with (D, D) matrices.

The pseudo-inverse leaves out directions of x whose variance is at most `cutoff` times the largest.
Where x spans fewer than D dimensions and a pattern leads out of them by more than that, vᵀd along its
outer part is y itself, and ρ is 0 on B, as the definition has it (each component outside is one more
unknown).

Patterns rounded to float32 are judged as they are: in a badly conditioned Cov[x] the rounding alone is
a distractor, and ρ of `linear` on its own data is then a little less than 1.
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

# Directions with at most this share of the largest variance of x are left out of the pseudo-inverse.
CUTOFF = 1e-10
TINY = torch.finfo(torch.float64).tiny

Components = tuple[Tensor, ...]
T = TypeVar("T")


def group_by_estimator(patterns: Mapping[str, T]) -> dict[str, tuple[T, ...]]:
    """The estimators that some solved patterns make up: name → their patterns, as `rho` takes them.

    The patterns of both sides of the gate together are an estimator, and neither is one alone. `multivariate`
    is none of a neuron: its S(x) = A y is of all neurons at once, and leaves a distractor that is uncorrelated
    with each of them by construction.
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
    """ρ of every estimator among an operator's patterns, each float64 of shape (K,).

    patterns: by row of ESTIMATORS, as `Solution.patterns` has them, fitted on A.  weight: the operator's.
    regressed, evaluated: of B and C; may be one.  cutoff: see the module.
    """
    whitening = whiten(regressed, cutoff)
    return {
        name: rho(components, weight, whitening, evaluated) for name, components in group_by_estimator(patterns).items()
    }


@dataclass(frozen=True)
class Whitening:
    """The decomposition of Cov[x] of a set of samples; all float64.

    moments: of the set.  cov: Cov[x], shape (G, D, D).
    basis: orthonormal columns, and 0 for those left out, shape (G, D, D).
    scale: 1 / deviation along each column, and 0 for those left out, shape (G, D).
    floor: the variance that does not count any more, shape (G,).
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
        """Vectors of x, shape (G, …, D), in the coordinates in which Cov[x] = 1."""
        return along_groups(vectors, self.basis) * per_group(self.scale, vectors)

    def functionals(self, whitened: Tensor) -> Tensor:
        """v with vᵀx = tᵀx̃ for t of shape (G, …, D)."""
        return along_groups(whitened * per_group(self.scale, whitened), self.basis.mT)

    def outside(self, vectors: Tensor) -> Tensor:
        """The part of vectors, shape (G, …, D), along directions that were left out."""
        return vectors - along_groups(along_groups(vectors, self.basis), self.basis.mT)


def whiten(moments: PatchMoments, cutoff: float = CUTOFF) -> Whitening:
    """The decomposition of Cov[x]: the one step of order D³."""
    cov = cov_xx(moments)
    variances, vectors = torch.linalg.eigh(cov)
    # Below this a variance is the rounding of the sums that it is a difference of.
    mean_square = (moments.xx.diagonal(dim1=1, dim2=2) / samples(moments)).amax(1)
    rounding = torch.finfo(torch.float64).eps * cov.shape[1] * mean_square
    floor = torch.maximum(cutoff * variances[:, -1], rounding)
    kept = variances > floor[:, None]
    scale = torch.where(kept, variances.clamp(min=TINY).rsqrt(), 0.0)
    return Whitening(moments, cov, vectors * kept[:, None], scale, floor, cutoff)


def rho(components: Components, weight: Tensor, regressed: Whitening, evaluated: PatchMoments) -> Tensor:
    """ρ of one estimator for each neuron, float64, shape (K,).

    components: (a,), or (a₊, a₋) for an operator with a gate, each of the weight's shape, of any length
    (they are taken with wᵀa = 1, as solved patterns have it to the rounding of their dtype); () for the
    identity.  regressed, evaluated: of B and C, of the same operator.

    NaN, which files should write as null, where ρ is undefined: for the identity; where d = 0 on B
    though S is not the identity (as for D = 1); where y does not vary on B or C; and for a neuron with
    pattern 0 (dead, constant, degenerate), except on a side of the gate that no sample of B and C is on.

    Raises ValueError for two components and moments without a gate.
    """
    if not components:
        return torch.full((len(weight),), torch.nan, dtype=torch.float64)
    # On a single set a negative correlation is rounding: v and -v were both to be had.
    lowest = 0 if evaluated is regressed.moments else -1
    return 1 - correlation(components, weight, regressed, evaluated).clamp(lowest, 1)


def correlation(components: Components, weight: Tensor, regressed: Whitening, evaluated: PatchMoments) -> Tensor:
    """corr(y, vᵀd) of one estimator for each neuron, in [-1, 1] to rounding; NaN where `rho` is."""
    groups = len(regressed.scale)
    w = weight.detach().cpu().double().flatten(1).unflatten(0, (groups, -1))
    a, live = normalised(components, w, regressed.moments, evaluated)
    q = len(components)
    on_b, on_c = covariances(regressed.moments, q), covariances(evaluated, q)
    v = regression(a, w, regressed, on_b)

    inner = (a * v[:, :, None]).sum(-1)  # Aᵀv
    along_v = (v * on_c.sx.sum(2)).sum(-1) - (inner * on_c.sy).sum(-1)
    x_v = (v * along_groups(v, regressed.cov if evaluated is regressed.moments else cov_xx(evaluated))).sum(-1)
    cross = (inner * (on_c.sx * v[:, :, None]).sum(-1)).sum(-1)
    var_v = x_v - 2 * cross + quadratic(on_c.ss, inner)
    # No variance along v is no correlation either: v = 0 where d and y are uncorrelated on B.
    found = var_v > 0
    corr = torch.where(found, along_v / (torch.where(found, var_v, 1.0) * on_c.yy).sqrt(), 0.0)

    var_x, var_s = regressed.cov.diagonal(dim1=1, dim2=2).sum(1)[:, None], (on_b.ss * (a @ a.mT)).sum((2, 3))
    var_d = var_x - 2 * (a * on_b.sx).sum((2, 3)) + var_s
    varies = [m.moments.total.var_y().view(groups, -1) > 0 for m in (regressed.moments, evaluated)]
    defined = live & varies[0] & varies[1] & (var_d > regressed.cutoff * (var_x + var_s))
    return torch.where(defined, corr, torch.nan).flatten()


def regression(a: Tensor, w: Tensor, whitening: Whitening, cov: "Covariances") -> Tensor:
    """v = Cov[d]⁺cov[d, y] for each neuron, shape (G, k, D); a: (G, k, q, D) with wᵀa = 1, w: (G, k, D)."""
    q = a.shape[2]
    a_white, s_white = whitening(a), whitening(cov.sx)
    # Orthonormal directions of the span, w̃ first and then dropped. cov[x̃, y] is the sum of cov[x̃, s].
    columns = [s_white.sum(2, keepdim=True), a_white, s_white[:, :, : q - 1]]
    span = torch.linalg.qr(torch.cat(columns, 2).mT).Q[..., 1:].mT * (whitening.scale > 0)[:, None, None]
    a_in, s_in, cov_x = span @ a_white.mT, span @ s_white.mT, span @ span.mT
    outer = None if whitening.complete else outer_functionals(whitening.outside(a), cov.ss, whitening.floor)
    if outer is not None:
        # Out there x has no variance and no covariance, but A s has.
        a_in = torch.cat([a_in, outer @ a.mT], 2)
        s_in = F.pad(s_in, (0, 0, 0, q))
        cov_x = F.pad(cov_x, (0, q, 0, q))
    cross = a_in @ s_in.mT
    cov_d = cov_x - cross - cross.mT + a_in @ cov.ss @ a_in.mT
    cov_dy = -(a_in @ cov.sy[..., None]).squeeze(-1)  # the span is orthogonal to cov[x̃, y]
    t, kernel = least_squares(cov_d, cov_dy)
    if outer is None:
        return whitening.functionals(combined(t, span))
    functionals = torch.cat([whitening.functionals(span), outer], 2)
    # On B any v of the kernel can be added; on a C that spans more than B it matters, and the
    # pseudo-inverse has none of it. That is w, less what it has along what was left out, and, where B
    # has too few samples, more.
    unit = F.normalize(outer, dim=-1)
    w_inside = w - whitening.outside(w) + combined((unit * w[:, :, None]).sum(-1), unit)
    return without(combined(t, functionals), torch.cat([w_inside[:, :, None], kernel @ functionals], 2))


def outer_functionals(a: Tensor, ss: Tensor, floor: Tensor) -> Tensor:
    """Orthogonal vectors u in the span of a's rows with Cov[uᵀA s] = 1, shape (G, k, q, D).

    a: (G, k, q, D).  ss: Cov[s], (G, k, q, q).  0 in place of those along which A s varies by at most
    `floor`, shape (G,): the rounding of a pattern that leads nowhere outside.
    """
    values, vectors = torch.linalg.eigh(ss)
    moved = values.clamp(min=0).sqrt()[..., None] * (vectors.mT @ a)
    variances, axes = torch.linalg.eigh(moved @ moved.mT)
    kept = variances > floor[:, None, None]
    return torch.where(kept, 1 / torch.where(kept, variances, 1.0), 0.0)[..., None] * (axes.mT @ moved)


def least_squares(cov: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """cov⁺target for covariances (…, m, m) and targets (…, m), in units in which every variance is 1.

    And the rows, (…, m, m), that span the kernel; 0 for those that would not.
    """
    variances = cov.diagonal(dim1=-2, dim2=-1)
    unit = torch.where(variances > 0, variances.clamp(min=TINY).rsqrt(), 0.0)
    values, vectors = torch.linalg.eigh(unit[..., None] * cov * unit[..., None, :])
    kept = values > CUTOFF * values[..., -1:]
    rows = vectors.mT * unit[..., None, :]
    inverse = torch.where(kept, 1 / torch.where(kept, values, 1.0), 0.0)
    return combined(inverse * (rows @ target[..., None]).squeeze(-1), rows), rows * ~kept[..., None]


def without(v: Tensor, rows: Tensor) -> Tensor:
    """v (…, D) less its projection on the span of rows (…, r, D)."""
    rows = F.normalize(rows, dim=-1, eps=TINY)
    shares = torch.linalg.pinv(rows @ rows.mT, rtol=CUTOFF, hermitian=True) @ (rows @ v[..., None])
    return v - combined(shares.squeeze(-1), rows)


def normalised(components: Components, w: Tensor, *sets: PatchMoments) -> tuple[Tensor, Tensor]:
    """The patterns, (G, k, q, D), each with wᵀa = 1, and which neurons have them, bool (G, k)."""
    a = torch.stack([c.detach().cpu().double().flatten(1).view_as(w) for c in components], 2)
    length = (a * w[:, :, None]).sum(-1, keepdim=True)
    live = length.abs() > VANISHING * a.norm(dim=-1, keepdim=True) * w[:, :, None].norm(dim=-1, keepdim=True)
    a = torch.where(live, a / torch.where(live, length, 1.0), 0.0)
    if len(components) == 1:
        return a, live.squeeze(-1).squeeze(-1)
    # A pattern of a side that no sample is on multiplies zeros; any will do that keeps wᵀd = 0.
    sides = [(require(m.moments.open).n, m.moments.closed.n) for m in sets]
    unused = torch.stack([sum(side).view(w.shape[:2]) == 0 for side in zip(*sides)], -1)[..., None]
    replaced = ~live & unused & live.flip(2)
    return torch.where(replaced, a.flip(2), a), (live | replaced).all(2).squeeze(-1)


# --- covariances of a set of samples --------------------------------------------------------------


@dataclass(frozen=True)
class Covariances:
    """Of the signal's components s with each other, with x and with y = Σs.

    sx: Cov[s, x], (G, k, q, D).  ss: Cov[s], (G, k, q, q).  sy: cov[s, y], (G, k, q).  yy: var[y], (G, k).
    """

    sx: Tensor
    ss: Tensor

    @property
    def sy(self) -> Tensor:
        return self.ss.sum(-1)

    @property
    def yy(self) -> Tensor:
        return self.ss.sum((-1, -2))


def covariances(moments: PatchMoments, components: int) -> Covariances:
    """With s = y for one component, s = (m·y, (1 - m)·y) for two."""
    total, groups = moments.moments.total, len(moments.xx)
    parts: list[Sums] = [total] if components == 1 else [require(moments.moments.open), moments.moments.closed]
    n = samples(moments)
    x = (require(total.x) / n)[:, None, None]
    y = torch.stack([part.y for part in parts], -1).unflatten(0, (groups, -1)) / n
    yy = torch.stack([part.yy for part in parts], -1).unflatten(0, (groups, -1)) / n
    xy = torch.stack([require(part.xy) for part in parts], 1).unflatten(0, (groups, -1)) / n
    # The components are never both different from 0.
    return Covariances(xy - x * y[..., None], torch.diag_embed(yy) - y[..., None] * y[..., None, :])


def cov_xx(moments: PatchMoments) -> Tensor:
    """Cov[x], (G, D, D)."""
    mean = require(moments.moments.total.x) / samples(moments)
    return moments.xx / samples(moments) - mean[:, :, None] * mean[:, None]


def samples(moments: PatchMoments) -> int:
    """Patches seen, the same for every neuron; 1 for none."""
    return max(1, int(moments.moments.total.n[0]))


# --- products -------------------------------------------------------------------------------------


def along_groups(vectors: Tensor, matrices: Tensor) -> Tensor:
    """Vectors (G, …, D) times their group's matrix (G, D, D)."""
    return (vectors.flatten(1, -2) @ matrices).view(vectors.shape)


def per_group(values: Tensor, like: Tensor) -> Tensor:
    """Values (G, D), shaped to multiply vectors (G, …, D)."""
    return values.view(len(values), *[1] * (like.dim() - 2), -1)


def combined(coefficients: Tensor, vectors: Tensor) -> Tensor:
    """Σᵢ cᵢ vᵢ for coefficients (…, m) and vectors (…, m, D)."""
    return (coefficients[..., None, :] @ vectors).squeeze(-2)


def quadratic(matrices: Tensor, vectors: Tensor) -> Tensor:
    """vᵀMv for matrices (…, q, q) and vectors (…, q)."""
    return (vectors * (matrices @ vectors[..., None]).squeeze(-1)).sum(-1)
