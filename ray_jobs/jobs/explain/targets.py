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
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patterns import Network, UserError
from ray_jobs.models.class_names import Names, class_names

Labels = Sequence[int | None]
Pick = Callable[[Tensor, Labels], Tensor]  # of each sample's scores (N, classes) and label: its class, int64 (N,)

AGAINST = "-vs-"
RANKS = {"predicted": 0, "second": 1}
WORDS = {*RANKS, "label"}
TOP = r"top-(\d+)"


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


def target_of(spec: str, network: Network, names: Names) -> Target:
    """Return the target that some words mean.

    Args:
        spec: The words; see the table above.
        network: The network to explain.
        names: The names of its classes.

    Raises:
        UserError: If the words mean nothing for this network, or more than one thing.
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
    if match := re.fullmatch(TOP, spec):
        refuse_two_meanings(spec, spec, names)
        count = int(match[1])
        if not 1 <= count <= classes:
            raise UserError(f"--target {spec}", f"the model has {classes} classes", f"Take top-1 to top-{classes}.")
        return Target(tuple(rank(place) for place in range(count)))
    if classes == 1:
        if spec not in ("predicted", "label", "0"):
            what = "the model gives one number for each sample, which is all that can be explained"
            raise UserError(f"--target {spec}", what, "Leave out --target, or explain a neuron: OPERATOR:NEURON.")
        return Target((fixed(0),))
    words = split(spec, {name for name, _ in names})
    picks = tuple(pick(word, spec, classes, names, network) for word in words)
    if len(words) == 2 and words[0] == words[1]:
        raise UserError(f"--target {spec}", "a class against itself is 0", "Name two classes.")
    return Target(picks, against=len(words) == 2, needs_label="label" in words)


def split(spec: str, names: Collection[str]) -> list[str]:
    """Return the one or two words of a target; names of classes may hold `-vs-` themselves."""
    if spec in names or AGAINST not in spec:
        return [spec]
    places = [place for place in range(len(spec)) if spec.startswith(AGAINST, place)]
    pairs = [[spec[:place], spec[place + len(AGAINST) :]] for place in places]
    return next((pair for pair in pairs if all(w in names or not named(w) for w in pair)), pairs[0])


def pick(word: str, spec: str, classes: int, names: Names, network: Network) -> Pick:
    """Return the class that one word means."""
    if word in WORDS:
        refuse_two_meanings(word, spec, names)
    if word in RANKS:
        if RANKS[word] >= classes:
            raise UserError(f"--target {spec}", f"the model has {classes} classes", "Explain `predicted`.")
        return rank(RANKS[word])
    if word == "label":
        return lambda scores, labels: torch.tensor(labels, device=scores.device)
    numbers = [int(word)] if word.isdecimal() else numbers_of(word, names)
    if not numbers:
        near = difflib.get_close_matches(word, [*dict(names), *network.operators])
        hint = f"Did you mean {', '.join(near)}?" if near else "Name a class, or its number; --classes reads names."
        raise UserError(f"--target {spec}", f"{word!r} is no class", hint)
    if len(numbers) > 1:
        what = f"{word!r} is the name of the classes {', '.join(map(str, numbers))}"
        raise UserError(f"--target {spec}", what, "Give the number of the class instead of its name.")
    (number,) = numbers
    if number >= classes:
        raise UserError(f"--target {spec}", f"no class {number}", f"The model's are 0 to {classes - 1}.")
    return fixed(number)


def numbers_of(name: str, names: Names) -> list[int]:
    """Return the numbers of all classes that have a name."""
    return sorted({number for other, number in names if other == name})


def refuse_two_meanings(word: str, spec: str, names: Names) -> None:
    """Raise UserError if a word of `--target` is the name of a class too."""
    if numbers := numbers_of(word, names):
        what = f"{word!r} is a word of --target, and the name of class {numbers[0]}"
        raise UserError(f"--target {spec}", what, "Give the number of the class, or leave --classes out.")


def named(spec: str) -> bool:
    """Return whether a target may name a class by more than its number."""
    return not re.fullmatch(TOP, spec) and any(
        not word.isdecimal() and word not in WORDS for word in spec.split(AGAINST)
    )


def names_for(target: str, spec: str, file: str | None) -> Names:
    """Return the names of classes that a target may need.

    A file of names is read for every target, because a name in it may be a word that targets use, but then only such
    names are returned.
    """
    if named(target):
        return class_names(spec, file)
    found = () if file is None else class_names(spec, file)
    return tuple((name, number) for name, number in found if name in (target, *target.split(AGAINST)))


def rank(place: int) -> Pick:
    """The class with the highest score, the next, …; of equal ones, that of the lower number first."""
    return lambda scores, _: scores.sort(dim=1, descending=True, stable=True).indices[:, place]


def fixed(number: int) -> Pick:
    return lambda scores, _: torch.full((len(scores),), number, device=scores.device)
