"""Signal estimators: compute the patterns of an operator from its moments and its weight.

Estimators work on weights flattened to (K, D) in float64 and return patterns of that shape. Except for
`multivariate`, wᵀa = 1 for every neuron that has a pattern. The pattern is 0 if the neuron's gate never opened (dead),
its output never varied (constant), or the denominator of its pattern vanishes (degenerate).
"""

import hashlib
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from patterns.errors import UserError
from patterns.moments.moments import Moments, RequiredSums, Sums, require
from patterns.operators.operator import Operator
from patterns.operators.receptive_fields import mean_overlap

# A denominator below this share of the size of its terms is rounding.
VANISHING = 1e-9
# Share of an output's variance that is added to it before Cov[y] is inverted.
RIDGE = 1e-6
# Elements of a large operator's patterns that are computed in float64 at once.
BLOCK_ELEMENTS = 2**23


@dataclass(frozen=True)
class Problem:
    """Input of an estimator.

    Attributes:
        operator: The operator.
        moments: The moments of the neurons to solve for.
        weight: Their weights, float64, shape (K, D).
        seed: Seed of the `random` estimator, in addition to the operator's name.
    """

    operator: Operator
    moments: Moments
    weight: Tensor
    seed: int = 0


def filter_(problem: Problem) -> Tensor:
    """Return a = w / wᵀw, the pattern of S_w (Kindermans et al. 2018, §3.1)."""
    return normalize(problem.weight, problem.weight)


def random(problem: Problem) -> Tensor:
    """Return a = u / wᵀu for a standard normal u that follows from the seed and the operator: the baseline of §4."""
    digest = hashlib.sha256(f"{problem.seed}/{problem.operator.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    direction = torch.randn(problem.weight.shape, generator=generator, dtype=torch.float64)
    return normalize(direction, problem.weight)


def linear(problem: Problem) -> Tensor:
    """Return a = cov[x, y] / var[y], the pattern of S_a (Kindermans et al. 2018, eq. 4).

    It is invariant to a constant added to x (if the bias is changed to keep the outputs).
    """
    total = problem.moments.total
    return regress(problem, total, total.mean_y())


def positive(problem: Problem) -> Tensor:
    """Return a₊ of S_a±, (E₊[xy] - E₊[x]E[y]) / wᵀ(…) over the open gate, with E[y] over all samples (eq. 7).

    It is not invariant to a constant c added to x, because E₊[x]E[y] does not center E₊[xy]: the direction changes
    by c(E₊[y] - E[y]). This is the form in the paper, and in its authors' code.
    """
    return regress(problem, require(problem.moments.open), problem.moments.total.mean_y())


def negative(problem: Problem) -> Tensor:
    """Return a₋ of S_a±: like `positive`, over the closed gate."""
    return regress(problem, problem.moments.closed, problem.moments.total.mean_y())


def positive_own_mean(problem: Problem) -> Tensor:
    """Return cov₊[x, y] / var₊[y]: `positive` with E[y] over the open gate.

    It is invariant to a constant added to x in the same way as `linear`.
    """
    opened = require(problem.moments.open)
    return regress(problem, opened, opened.mean_y())


def negative_own_mean(problem: Problem) -> Tensor:
    """Return cov₋[x, y] / var₋[y]: like `positive_own_mean`, over the closed gate."""
    closed = problem.moments.closed
    return regress(problem, closed, closed.mean_y())


def regress(problem: Problem, sums: Sums, mean_y: Tensor) -> Tensor:
    """Return (E[xy] - E[x]·mean_y) / wᵀ(…), with E[xy] and E[x] from `sums`.

    Over all samples and with their mean, this is cov[x, y] / var[y], because wᵀcov[x, y] = var[y]. The denominator is
    computed from the numerator, so that wᵀa = 1 to the last digit.
    """
    xy, x = sums.mean_xy(), sums.mean_x() * mean_y[:, None]
    return normalize(xy - x, problem.weight, xy.norm(dim=1) + x.norm(dim=1))


def multivariate(problem: Problem) -> Tensor:
    """Return A = Cov[x, y] Cov[y]⁻¹ (Haufe et al. 2014, eq. 6), divided by `receptive_fields.mean_overlap`.

    It regresses x on all outputs of a group at once, so that information in several outputs is counted once. Dead and
    constant neurons are left out. Because y = wᵀx, Cov[y] is wᵀCov[x, y]. A ridge of RIDGE times its variance is added
    to each output. Except for the ridge, WᵀA is the identity before the division, and an invertible mixing of the
    outputs mixes only the patterns: A(WM) = A(W)M⁻ᵀ. It is invariant to a constant added to x in the same way as
    `linear`.
    """
    total, groups = problem.moments.total, (problem.operator.groups, -1)
    cov_xy = total.mean_xy().sub_(total.mean_x().mul_(total.mean_y()[:, None])).unflatten(0, groups)
    cov_y = cov_xy @ problem.weight.unflatten(0, groups).mT
    var = cov_y.diagonal(dim1=1, dim2=2)
    opened = total if problem.moments.open is None else problem.moments.open
    informative = ((total.var_y() > 0) & (opened.n > 0)).unflatten(0, groups) & (var > 0)
    unit = torch.where(informative, var, 1.0).rsqrt() * informative
    # Not made symmetric: so its errors are those of Cov[x, y], and dependent outputs do not amplify them.
    correlation = unit[..., None] * cov_y * unit[:, None]
    # In units in which every output has variance 1. An output left out correlates with no other and has pattern 0.
    correlation.diagonal(dim1=1, dim2=2).copy_(torch.full_like(unit, 1 + RIDGE))
    factors, pivots = torch.linalg.lu_factor(correlation)
    for inputs in cov_xy.split(max(1, BLOCK_ELEMENTS // cov_xy.shape[1]), 2):
        inputs.copy_(unit[..., None] * torch.linalg.lu_solve(factors, pivots, unit[..., None] * inputs))
    a = cov_xy
    overlap = mean_overlap(problem.operator).expand(1, *problem.operator.weight.shape[1:])
    return a.flatten(0, 1).div_(overlap.flatten(1))


def normalize(direction: Tensor, weight: Tensor, size: Tensor | None = None) -> Tensor:
    """Divide each neuron's direction by wᵀdirection, shapes (K, D); return 0 if the denominator vanishes.

    Args:
        direction: The directions.
        weight: The weights.
        size: The size of the terms that a direction is a difference of, shape (K,), if they may cancel.
    """
    denominator = (direction * weight).sum(1, keepdim=True)
    size = direction.norm(dim=1) if size is None else size
    informative = denominator.abs() > VANISHING * (size * weight.norm(dim=1))[:, None]
    return torch.where(informative, direction / torch.where(informative, denominator, 1.0), 0.0)


@dataclass(frozen=True)
class Estimator:
    """Estimator of one pattern per neuron.

    Attributes:
        solve: Computes the patterns, float64, shape (K, D).
        sums: The large sums that it needs.
        joint: Whether it needs all neurons of an operator at once.
    """

    solve: Callable[[Problem], Tensor]
    sums: RequiredSums
    joint: bool = False

    @property
    def uses_data(self) -> bool:
        """Whether patterns depend on data. If so, neurons that never open or never vary have pattern 0."""
        return self.sums.total or self.sums.open


NOTHING, TOTAL = RequiredSums(total=False, open=False), RequiredSums(open=False)
OPEN, BOTH = RequiredSums(total=False), RequiredSums()

ESTIMATORS: dict[str, Estimator] = {
    "filter": Estimator(filter_, NOTHING),
    "random": Estimator(random, NOTHING, joint=True),
    "linear": Estimator(linear, TOTAL),
    "positive": Estimator(positive, OPEN),
    "negative": Estimator(negative, BOTH),
    "positive-own-mean": Estimator(positive_own_mean, OPEN),
    "negative-own-mean": Estimator(negative_own_mean, BOTH),
    "multivariate": Estimator(multivariate, TOTAL, joint=True),
}

# By name of a choice: the estimators for operators with a gate, and for operators without. Explanations use the
# pattern of the first. The identity, S(x) = x, has no pattern. `default` has what every preset needs.
CHOICES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "identity": ((), ()),
    "filter": (("filter",), ("filter",)),
    "random": (("random",), ("random",)),
    "linear": (("linear",), ("linear",)),
    "two-component": (("positive", "negative"), ("linear",)),
    "two-component-own-mean": (("positive-own-mean", "negative-own-mean"), ("linear",)),
    "multivariate": (("multivariate",), ("multivariate",)),
    "default": (("positive", "positive-own-mean"), ("linear",)),
}
# The choices with a pattern for each side of the gate.
PAIRS = {name: rows for name, (rows, _) in CHOICES.items() if len(rows) == 2 and name != "default"}

# Comma-separated names from CHOICES, for all operators, or `glob=name` pairs, for operators whose name matches a glob
# such as `features.*`; or an iterable of such names and pairs. Other operators have the choice `default`.
Choices = str | Iterable[str]


def parse_estimators(
    estimators: Choices, operators: Collection[str] | None = None, parameter: str = "estimators"
) -> list[tuple[str, str]]:
    """Parse choices of estimators.

    Args:
        estimators: Comma-separated names from `CHOICES`, or `glob=name` pairs for the operators that match.
        operators: The names of all operators, if each glob must match one.
        parameter: The name of the caller's parameter, for errors.

    Returns:
        A pair for each choice: a glob of operator names, and a name from `CHOICES`.

    Raises:
        UserError: If a name is not in `CHOICES`, or if a glob matches no operator.

    Example:
        >>> parse_estimators("layer4.*=linear, two-component")
        [('layer4.*', 'linear'), ('*', 'two-component')]
    """
    pairs = []
    for choice in split_choices(estimators):
        glob, _, name = choice.rpartition("=")
        if name not in CHOICES:
            raise UserError("", f"no estimator {name!r}", f"Choose from {', '.join(CHOICES)}.", parameter)
        if glob and operators is not None and not any(fnmatchcase(o, glob) for o in operators):
            raise UserError("", f"no operator matches {glob!r}", f"Operators are {name_some(operators)}.", parameter)
        pairs.append((glob or "*", name))
    return pairs


def split_choices(estimators: Choices) -> list[str]:
    """Return the single choices of a comma-separated text, or of an iterable of choices."""
    return [choice.strip() for choice in (estimators.split(",") if isinstance(estimators, str) else estimators)]


def name_some(operators: Collection[str], limit: int = 5) -> str:
    """Return the names of some operators for a message."""
    names = list(operators)
    return ", ".join(names[:limit] + ([f"and {len(names) - limit} more"] if len(names) > limit else []))


def select_choices(operator: str, estimators: Choices) -> list[str]:
    """Return the names from `CHOICES` that apply to an operator, in order; `["default"]` if no choice applies.

    Args:
        operator: The operator's name.
        estimators: The choices of estimators; see `parse_estimators`.

    Raises:
        UserError: If a name is not in `CHOICES`.

    Example:
        >>> select_choices("layer4.0", "layer4.*=linear,filter"), select_choices("stem", "layer4.*=linear")
        (['linear', 'filter'], ['default'])
    """
    return [name for glob, name in parse_estimators(estimators) if fnmatchcase(operator, glob)] or ["default"]


def select_estimators(operator: Operator, estimators: Choices) -> list[str]:
    """Return the names from `ESTIMATORS` that apply to an operator, in order and without duplicates.

    Args:
        operator: The operator.
        estimators: The choices of estimators; see `parse_estimators`.

    Raises:
        UserError: If a name is not in `CHOICES`.

    Example:
        >>> import patterns
        >>> network = patterns.trace(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU()), torch.zeros(2, 3))
        >>> select_estimators(network.operators["0"], "two-component,filter")
        ['positive', 'negative', 'filter']
    """
    rows = (row for name in select_choices(operator.name, estimators) for row in CHOICES[name][operator.gate is None])
    return list(dict.fromkeys(rows))


def required_sums(operator: Operator, estimators: Choices) -> RequiredSums:
    """Return which large sums of an operator the estimators need.

    Args:
        operator: The operator.
        estimators: The choices of estimators; see `parse_estimators`.

    Raises:
        UserError: If a name is not in `CHOICES`.

    Example:
        >>> import patterns
        >>> network = patterns.trace(torch.nn.Linear(3, 2), torch.zeros(2, 3))
        >>> required_sums(network.operators["linear.0"], "linear")
        RequiredSums(total=True, open=False)
    """
    rows = [ESTIMATORS[name].sums for name in select_estimators(operator, estimators)]
    return RequiredSums(any(r.total for r in rows), any(r.open for r in rows))
