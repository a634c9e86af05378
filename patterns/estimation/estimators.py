"""Signal estimators: from an operator's moments and weight to its neurons' patterns.

All work on weights flattened to (K, D) in float64 and give patterns of that shape with wᵀa = 1 for
every live neuron (but `multivariate`), and 0 for a neuron that is dead, constant or degenerate.
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

# A denominator below this share of what it is made of is rounding, not signal.
VANISHING = 1e-9


# Added to every output's variance, as a share of it, before Cov[y] is inverted.
RIDGE = 1e-6
# Elements of a large operator's patterns that are worked on in float64 at a time.
BLOCK_ELEMENTS = 2**23


@dataclass(frozen=True)
class Problem:
    """What an estimator may look at. weight: (K, D) float64; seed: for `random`, with the operator's name."""

    operator: Operator
    moments: Moments
    weight: Tensor
    seed: int = 0


def filter_(problem: Problem) -> Tensor:
    """S_w: a = w / wᵀw (Kindermans et al. 2018, §3.1)."""
    return normalised(problem.weight, problem.weight)


def random(problem: Problem) -> Tensor:
    """S_u: a = u / wᵀu, u drawn once from a normal seeded by seed and operator; the baseline of §4."""
    digest = hashlib.sha256(f"{problem.seed}/{problem.operator.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    direction = torch.randn(problem.weight.shape, generator=generator, dtype=torch.float64)
    return normalised(direction, problem.weight)


def linear(problem: Problem) -> Tensor:
    """S_a: a = cov[x, y] / var[y] (eq. 4).

    Invariant: a constant added to x (with the bias that keeps y) leaves it as it is.
    """
    total = problem.moments.total
    return regressed(problem, total, total.mean_y())


def positive(problem: Problem) -> Tensor:
    """a₊ of S_a±: (E₊[xy] - E₊[x]E[y]) / wᵀ(…) over the open gate, E[y] over all samples (eq. 7).

    Not invariant to a constant c added to x, since E₊[x]E[y] does not centre E₊[xy]: the direction moves by
    c(E₊[y] - E[y]). That is the paper's form, and its authors' code.
    """
    return regressed(problem, require(problem.moments.open), problem.moments.total.mean_y())


def negative(problem: Problem) -> Tensor:
    """a₋ of S_a±: as `positive`, over the closed gate."""
    return regressed(problem, problem.moments.closed, problem.moments.total.mean_y())


def positive_own_mean(problem: Problem) -> Tensor:
    """cov₊[x, y] / var₊[y]: `positive` with E[y] taken within the open gate. Invariant as `linear` is."""
    opened = require(problem.moments.open)
    return regressed(problem, opened, opened.mean_y())


def negative_own_mean(problem: Problem) -> Tensor:
    """As `positive_own_mean`, over the closed gate."""
    closed = problem.moments.closed
    return regressed(problem, closed, closed.mean_y())


def regressed(problem: Problem, sums: Sums, mean_y: Tensor) -> Tensor:
    """(E[xy] - E[x]·mean_y) / wᵀ(…), with E[xy] and E[x] over some samples.

    Over all samples and with their mean this is cov[x, y] / var[y], since wᵀcov[x, y] = var[y]. The
    denominator is taken from the numerator, so that wᵀa = 1 holds to the last digit.
    """
    xy, x = sums.mean_xy(), sums.mean_x() * mean_y[:, None]
    return normalised(xy - x, problem.weight, xy.norm(dim=1) + x.norm(dim=1))


def multivariate(problem: Problem) -> Tensor:
    """A = Cov[x, y] Cov[y]⁻¹ (Haufe et al. 2014, eq. 6), over the positions that see an input (see `windows.overlap`).

    Regresses x on all outputs of a group at once, so that what several neurons tell is counted once; a dead
    neuron tells nothing. As y = wᵀx, Cov[y] is wᵀCov[x, y]. A ridge of RIDGE times its variance is added to each
    output. Up to the ridge, WᵀA is the identity before the division by the positions, and an invertible mixing of
    the outputs mixes the patterns alone: A(WM) = A(W)M⁻ᵀ. Invariant to a constant added to x as `linear` is.
    """
    total, groups = problem.moments.total, (problem.operator.groups, -1)
    cov_xy = total.mean_xy().sub_(total.mean_x().mul_(total.mean_y()[:, None])).unflatten(0, groups)
    cov_y = cov_xy @ problem.weight.unflatten(0, groups).mT
    var = cov_y.diagonal(dim1=1, dim2=2)
    opened = total if problem.moments.open is None else problem.moments.open
    tells = ((total.var_y() > 0) & (opened.n > 0)).unflatten(0, groups) & (var > 0)
    unit = torch.where(tells, var, 1.0).rsqrt() * tells
    # Not made symmetric: its errors are then those of Cov[x, y], and none is blown up where outputs are dependent.
    correlation = unit[..., None] * cov_y * unit[:, None]
    # In units in which every output has variance 1; one that tells nothing stands alone, and has pattern 0.
    correlation.diagonal(dim1=1, dim2=2).copy_(torch.full_like(unit, 1 + RIDGE))
    factors, pivots = torch.linalg.lu_factor(correlation)
    for inputs in cov_xy.split(max(1, BLOCK_ELEMENTS // cov_xy.shape[1]), 2):
        inputs.copy_(unit[..., None] * torch.linalg.lu_solve(factors, pivots, unit[..., None] * inputs))
    a = cov_xy
    seen = mean_overlap(problem.operator).expand(1, *problem.operator.weight.shape[1:])
    return a.flatten(0, 1).div_(seen.flatten(1))


def normalised(direction: Tensor, weight: Tensor, size: Tensor | None = None) -> Tensor:
    """direction / wᵀdirection for each neuron; 0 where the denominator vanishes.

    size: of what the direction was computed from, shape (K,), where its terms may cancel.
    """
    denominator = (direction * weight).sum(1, keepdim=True)
    size = direction.norm(dim=1) if size is None else size
    live = denominator.abs() > VANISHING * (size * weight.norm(dim=1))[:, None]
    return torch.where(live, direction / torch.where(live, denominator, 1.0), 0.0)


@dataclass(frozen=True)
class Estimator:
    """A row of the table. `sums`: the large sums it needs.  `joint`: whether it takes all neurons at once."""

    solve: Callable[[Problem], Tensor]
    sums: RequiredSums
    joint: bool = False

    @property
    def learns(self) -> bool:
        """Whether it looks at data: then a neuron that never opened or never varied has pattern 0."""
        return self.sums.total or self.sums.open


NOTHING, TOTAL, OPEN, BOTH = (
    RequiredSums(False, False),
    RequiredSums(open=False),
    RequiredSums(total=False),
    RequiredSums(),
)

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

# What a user may ask for: patterns for operators with a gate, and for those without. The identity,
# S(x) = x, has none. The first pattern is the one that explanations take.
CHOICES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "identity": ((), ()),
    "filter": (("filter",), ("filter",)),
    "random": (("random",), ("random",)),
    "linear": (("linear",), ("linear",)),
    "two-component": (("positive", "negative"), ("linear",)),
    "two-component-own-mean": (("positive-own-mean", "negative-own-mean"), ("linear",)),
    "multivariate": (("multivariate",), ("multivariate",)),
    "default": (("positive",), ("linear",)),
}


# Those with a pattern for each side of the gate.
PAIRS = {name: rows for name, (rows, _) in CHOICES.items() if len(rows) == 2}

# `ESTIMATOR`, for all operators, or `OPERATORS=ESTIMATOR`, for those whose name matches a pattern such as
# `features.*`; several, or one text with commas. Operators that none is meant for have the default.
Choices = str | Iterable[str]


def parse_estimators(choices: Choices, operators: Collection[str] | None = None) -> list[tuple[str, str]]:
    """Choices as pairs: a pattern of operators' names, and a row of CHOICES.

    UserError for an estimator that is not in CHOICES, and for a pattern that matches none of these operators.
    """
    listed = choices.split(",") if isinstance(choices, str) else choices
    pairs = []
    for choice in listed:
        pattern, _, name = choice.strip().rpartition("=")
        if name not in CHOICES:
            raise UserError("--estimators", f"no estimator {name!r}", f"Choose from {', '.join(CHOICES)}.")
        if pattern and operators is not None and not any(fnmatchcase(o, pattern) for o in operators):
            raise UserError("--estimators", f"no operator matches {pattern!r}", "`patternnet plan` lists their names.")
        pairs.append((pattern or "*", name))
    return pairs


def select_choices(operator: str, choices: Choices) -> list[str]:
    """The rows of CHOICES that are meant for an operator of this name, in order."""
    return [name for pattern, name in parse_estimators(choices) if fnmatchcase(operator, pattern)] or ["default"]


def select_estimators(operator: Operator, choices: Choices) -> list[str]:
    """The rows of ESTIMATORS that some choices mean for an operator, in their order, each once."""
    rows = (row for name in select_choices(operator.name, choices) for row in CHOICES[name][operator.gate is None])
    return list(dict.fromkeys(rows))


def required_sums(operator: Operator, choices: Choices) -> RequiredSums:
    """The large sums that some choices need of an operator."""
    rows = [ESTIMATORS[name].sums for name in select_estimators(operator, choices)]
    return RequiredSums(any(r.total for r in rows), any(r.open for r in rows))


@dataclass(frozen=True)
class Solution:
    """What the moments of one operator say about its neurons.

    patterns: by row of ESTIMATORS, float32, in the weight's shape.
    flags: one of ok, dead, constant, degenerate for each neuron.
    n_positive: samples that open the gate, int64 (K,); all samples where there is no gate.
    """

    patterns: dict[str, Tensor]
    flags: list[str]
    n: Tensor
    n_positive: Tensor
    mean_y: Tensor
    var_y: Tensor


def solve(operator: Operator, moments: Moments, choices: Choices = "default", seed: int = 0) -> Solution:
    """Patterns of an operator, in the weight's dtype or float32, whichever is wider.

    Raises UserError for an estimator that is not in CHOICES, ValueError for moments without the sums that
    it needs.
    """
    total, opened = moments.total, moments.open
    n_positive, var_y = total.n if opened is None else opened.n, total.var_y()
    seen = ((n_positive > 0) & (var_y > 0))[:, None]
    dtype = torch.promote_types(operator.weight.dtype, torch.float32)
    preferred, names = select_estimators(operator, "default")[0], select_estimators(operator, choices)
    judged = preferred if preferred in names else next(iter(names), None)
    patterns, vanished = {}, torch.zeros_like(var_y, dtype=torch.bool)
    for name in names:
        row = ESTIMATORS[name]
        patterns[name] = torch.empty(operator.weight.shape, dtype=dtype)
        for rows in [slice(None)] if row.joint else blocks(operator):
            weight = operator.weight[rows].detach().cpu().double().flatten(1)
            pattern = row.solve(Problem(operator, moments.select_neurons(rows), weight, seed))
            if row.learns:
                pattern = torch.where(seen[rows], pattern, 0.0)
            if name == judged:
                vanished[rows] = (pattern == 0).all(1)
            patterns[name][rows] = pattern.view_as(operator.weight[rows])
    return Solution(patterns, flags(n_positive, var_y, vanished), total.n, n_positive, total.mean_y(), var_y)


def blocks(operator: Operator) -> list[slice]:
    """Neurons that are solved for at a time; all where groups of them see different inputs, which are small."""
    count = operator.neurons if operator.groups > 1 else max(1, BLOCK_ELEMENTS // operator.inputs_per_neuron)
    return [slice(start, start + count) for start in range(0, operator.neurons, count)]


def flags(n_positive: Tensor, var_y: Tensor, vanished: Tensor) -> list[str]:
    """Why a neuron has pattern 0, or ok; vanished: those whose default choice, else the first, came out as 0."""
    found = ["ok"] * len(n_positive)
    for neuron in range(len(found)):
        if n_positive[neuron] == 0:
            found[neuron] = "dead"
        elif var_y[neuron] == 0:
            found[neuron] = "constant"
        elif vanished[neuron]:
            found[neuron] = "degenerate"
    return found
