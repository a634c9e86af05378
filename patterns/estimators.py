"""Signal estimators: from an operator's moments and weight to its neurons' patterns.

All work on weights flattened to (K, D) in float64 and give patterns of that shape with wᵀa = 1 for
every live neuron, and 0 for a neuron that is dead, constant or degenerate.
"""

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from patterns.errors import UserError
from patterns.moments import Moments, Sums, Wanted, required
from patterns.operators import Operator

# A denominator below this share of what it is made of is rounding, not signal.
VANISHING = 1e-9


@dataclass(frozen=True)
class Problem:
    """What an estimator may look at. weight: (K, D) float64; `seed` and `name` make `random` reproducible."""

    moments: Moments
    weight: Tensor
    name: str = ""
    seed: int = 0


def filter_(problem: Problem) -> Tensor:
    """S_w: a = w / wᵀw (Kindermans et al. 2018, §3.1)."""
    return normalised(problem.weight, problem.weight)


def random(problem: Problem) -> Tensor:
    """S_u: a = u / wᵀu, u drawn once from a normal seeded by seed and operator; the baseline of §4."""
    digest = hashlib.sha256(f"{problem.seed}/{problem.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    direction = torch.randn(problem.weight.shape, generator=generator, dtype=torch.float64)
    return normalised(direction, problem.weight)


def linear(problem: Problem) -> Tensor:
    """S_a: a = cov[x, y] / var[y] (eq. 4)."""
    return regressed(problem, problem.moments.total)


def positive(problem: Problem) -> Tensor:
    """a₊ of S_a±: (E₊[xy] - E₊[x]E[y]) / wᵀ(…) over the open gate, E[y] over all samples (eq. 7)."""
    return regressed(problem, required(problem.moments.open))


def negative(problem: Problem) -> Tensor:
    """a₋ of S_a±: as `positive`, over the closed gate."""
    return regressed(problem, problem.moments.closed)


def regressed(problem: Problem, sums: Sums) -> Tensor:
    """(E[xy] - E[x]E[y]) / wᵀ(…), with E[xy] and E[x] over some samples and E[y] over all.

    Over all samples this is cov[x, y] / var[y], since wᵀcov[x, y] = var[y]. The denominator is taken
    from the numerator, so that wᵀa = 1 holds to the last digit.
    """
    xy, x = sums.mean_xy(), sums.mean_x() * problem.moments.total.mean_y()[:, None]
    return normalised(xy - x, problem.weight, xy.norm(dim=1) + x.norm(dim=1))


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
    """A row of the table. `sums`: the large sums it needs."""

    solve: Callable[[Problem], Tensor]
    sums: Wanted

    @property
    def learns(self) -> bool:
        """Whether it looks at data: then a neuron that never opened or never varied has pattern 0."""
        return self.sums.total or self.sums.open


ESTIMATORS: dict[str, Estimator] = {
    "filter": Estimator(filter_, Wanted(total=False, open=False)),
    "random": Estimator(random, Wanted(total=False, open=False)),
    "linear": Estimator(linear, Wanted(total=True, open=False)),
    "positive": Estimator(positive, Wanted(total=False, open=True)),
    "negative": Estimator(negative, Wanted(total=True, open=True)),
}

# What a user may ask for: patterns for operators with a gate, and for those without.
CHOICES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "filter": (("filter",), ("filter",)),
    "random": (("random",), ("random",)),
    "linear": (("linear",), ("linear",)),
    "two-component": (("positive", "negative"), ("linear",)),
    "default": (("positive",), ("linear",)),
}


def chosen(operator: Operator, choices: Collection[str]) -> list[str]:
    """The rows of ESTIMATORS that the user's choices mean for an operator, each once."""
    names = (name for choice in choices for name in CHOICES[choice][operator.gate is None])
    return list(dict.fromkeys(names))


def wanted(operator: Operator, choices: Collection[str]) -> Wanted:
    """The large sums that the user's choices need of an operator."""
    rows = [ESTIMATORS[name].sums for name in chosen(operator, choices)]
    return Wanted(any(r.total for r in rows), any(r.open for r in rows))


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


def solve(operator: Operator, moments: Moments, choices: Collection[str] = ("default",), seed: int = 0) -> Solution:
    """Patterns of an operator, in the weight's dtype or float32, whichever is wider.

    Raises UserError for an estimator that is not in CHOICES.
    """
    if unknown := sorted(set(choices) - set(CHOICES)):
        raise UserError("--estimators", f"no estimator {unknown[0]!r}", f"Choose from {', '.join(CHOICES)}.")
    shape = operator.weight.shape
    total, opened = moments.total, moments.open
    n_positive, var_y = total.n if opened is None else opened.n, total.var_y()
    problem = Problem(moments, operator.weight.detach().cpu().double().flatten(1), operator.name, seed)
    seen = ((n_positive > 0) & (var_y > 0))[:, None]
    solved = {}
    for name in chosen(operator, choices):
        row = ESTIMATORS[name]
        solved[name] = torch.where(seen, row.solve(problem), 0.0) if row.learns else row.solve(problem)
    dtype = torch.promote_types(operator.weight.dtype, torch.float32)
    return Solution(
        {name: pattern.reshape(shape).to(dtype) for name, pattern in solved.items()},
        flags(operator, n_positive, var_y, solved),
        total.n,
        n_positive,
        total.mean_y(),
        var_y,
    )


def flags(operator: Operator, n_positive: Tensor, var_y: Tensor, solved: Mapping[str, Tensor]) -> list[str]:
    """Why a neuron has pattern 0, or ok: judged by the default choice where it was solved, else by the first."""
    preferred = chosen(operator, ["default"])[0]
    judged = solved.get(preferred, next(iter(solved.values())))
    vanished = (judged == 0).all(1)
    found = ["ok"] * len(n_positive)
    for neuron in range(len(found)):
        if n_positive[neuron] == 0:
            found[neuron] = "dead"
        elif var_y[neuron] == 0:
            found[neuron] = "constant"
        elif vanished[neuron]:
            found[neuron] = "degenerate"
    return found
