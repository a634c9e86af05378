"""What of a model's output is explained: from words on the command line to what a pass starts from.

| target | explains | maps a sample |
| --- | --- | --- |
| `predicted` | the class with the highest score | 1 |
| `second` | the one with the next | 1 |
| `label` | the sample's own class | 1 |
| `top-5` | the five classes with the highest scores | 5 |
| `281`, `tabby` | a class by number or name | 1 |
| `A-vs-B` | score of A less score of B, each one of the above but `top` | 1 |
| `features.28:17` | a neuron of an operator behind its gate, all its positions together | 1 |

A model that gives one number for each sample (a binary or regression head) is explained by that number.
"""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patterns import Network, UserError

Labels = Sequence[int | None]
Pick = Callable[[Tensor, Labels], Tensor]  # of each sample's scores (N, classes) and label: its class, int64 (N,)

AGAINST = "-vs-"
RANKS = {"predicted": 0, "second": 1}


@dataclass(frozen=True)
class Target:
    """operator: where the explained network ends; None: at its classes.

    picks: the classes that are meant; two that are `against` each other make one map, else each makes its own.
    """

    picks: tuple[Pick, ...]
    operator: str | None = None
    against: bool = False
    needs_label: bool = False

    @property
    def maps(self) -> int:
        """Maps of a sample for each method."""
        return 1 if self.against else len(self.picks)

    def classes(self, scores: Tensor, labels: Labels) -> Tensor:
        """The classes that are meant, int64 (N, picks)."""
        return torch.stack([pick(scores, labels) for pick in self.picks], 1)

    def targets(self, scores: Tensor, labels: Labels) -> Tensor:
        """What `Explainer` takes for targets."""
        classes = self.classes(scores, labels)
        if self.against:
            one, other = (torch.zeros_like(scores).scatter_(1, c[:, None], 1.0) for c in classes.unbind(1))
            return one - other
        return classes[:, 0] if self.maps == 1 else classes

    def score(self, scores: Tensor, classes: Tensor) -> Tensor:
        """What each map explains, (N, maps): a class's score, a difference of two, or a neuron's sum over positions."""
        values = scores.flatten(2).sum(2) if scores.dim() > 2 else scores
        values = values.gather(1, classes)
        return values[:, :1] - values[:, 1:] if self.against else values


def target_of(spec: str, network: Network, names: Mapping[str, int]) -> Target:
    """The target that some words mean. names: the numbers of the model's classes by name.

    UserError for words that mean nothing for this model.
    """
    operator, colon, neuron = spec.rpartition(":")
    if colon and operator in network.operators:
        count = network.operators[operator].neurons
        if not neuron.isdecimal() or int(neuron) >= count:
            raise UserError(f"--target {spec}", f"no neuron {neuron!r}", f"{operator} has 0 to {count - 1}.")
        return Target((fixed(int(neuron)),), operator)
    if len(network.output_shape) != 1:
        what = f"the model gives outputs of shape {network.output_shape}, not a score for each class"
        raise UserError(f"--target {spec}", what, "Explain a neuron: OPERATOR:NEURON, see `patternnet plan`.")
    (classes,) = network.output_shape
    if match := re.fullmatch(r"top-(\d+)", spec):
        count = int(match[1])
        if not 1 <= count <= classes:
            raise UserError(f"--target {spec}", f"the model has {classes} classes", f"Take top-1 to top-{classes}.")
        return Target(tuple(rank(place) for place in range(count)))
    if classes == 1:
        if spec not in ("predicted", "label", "0"):
            what = "the model gives one number for each sample, which is all that can be explained"
            raise UserError(f"--target {spec}", what, "Leave out --target, or explain a neuron: OPERATOR:NEURON.")
        return Target((fixed(0),))
    one, against, other = spec.partition(AGAINST)
    words = [one, other] if against else [spec]
    picks = tuple(pick(word, spec, classes, names, network) for word in words)
    if against and one == other:
        raise UserError(f"--target {spec}", "a class against itself is 0", "Name two classes.")
    return Target(picks, against=bool(against), needs_label="label" in words)


def pick(word: str, spec: str, classes: int, names: Mapping[str, int], network: Network) -> Pick:
    """The class that one word means."""
    if word in RANKS:
        if RANKS[word] >= classes:
            raise UserError(f"--target {spec}", f"the model has {classes} classes", "Explain `predicted`.")
        return rank(RANKS[word])
    if word == "label":
        return lambda scores, labels: torch.tensor(labels, device=scores.device)
    number = int(word) if word.isdecimal() else names.get(word)
    if number is None:
        near = difflib.get_close_matches(word, [*names, *network.operators])
        hint = f"Did you mean {', '.join(near)}?" if near else "Name a class, or its number; --classes reads names."
        raise UserError(f"--target {spec}", f"{word!r} is no class", hint)
    if number >= classes:
        raise UserError(f"--target {spec}", f"no class {number}", f"The model's are 0 to {classes - 1}.")
    return fixed(number)


def named(spec: str) -> bool:
    """Whether a target may name a class by more than its number."""
    words = spec.split(AGAINST)
    return not re.fullmatch(r"top-\d+", spec) and any(
        not word.isdecimal() and word not in {*RANKS, "label"} for word in words
    )


def rank(place: int) -> Pick:
    """The class with the highest score, the next, …; of equal ones, that of the lower number first."""
    return lambda scores, _: scores.sort(dim=1, descending=True, stable=True).indices[:, place]


def fixed(number: int) -> Pick:
    return lambda scores, _: torch.full((len(scores),), number, device=scores.device)
