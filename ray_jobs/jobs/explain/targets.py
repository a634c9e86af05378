"""Parse `--target`: the part of a model's output that is explained.

| target | explains | maps for a sample |
| --- | --- | --- |
| `predicted` | the class with the highest score | 1 |
| `second` | the class with the second highest score | 1 |
| `label` | the sample's own class | 1 |
| `top-5` | the five classes with the highest scores | 5 |
| `281`, `tabby` | a class by number or name | 1 |
| `A-vs-B` | score of A less score of B, each one of the above except `top-5` | 1 |
| `A-vs-others` | score of A less the mean score of all other classes, weighted by their softmax | 1 |
| `contrast` | the same as `predicted-vs-others` | 1 |
| `17@mask` | a class's score at the output's positions inside the sample's mask, for outputs (N, classes, H, W) | 1 |
| `17@predicted`, `17@box` | the same, at the positions predicted to be this class; inside the sample's boxes | 1 |
| `unit:17` | a unit of an embedding (N, D) | 1 |
| `similarity:FILE.npy` | the cosine of an embedding (N, D) and a vector | 1 |
| `concept:striped` | the projection of the outputs of the operator before the last on a concept's direction | 1 |
| `features.28:concept:striped` | the same at another operator, before its gate | 1 |
| `features.28:strongest` | the neuron of an operator with the largest sum over positions | 1 |
| `features.28:17` | a neuron of an operator after its gate, all its positions together | 1 |

The target of a model that returns one number for each sample (a binary or regression head) is that number.
"""

import difflib
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from patterns import Network, UserError, contrast
from ray_jobs.models.class_names import ClassNames, load_class_names

Labels = Sequence[int | None]
Regions = Callable[[Tensor], Tensor]  # from classes (N,) to the share of each position in the region, (N, H, W)
Pick = Callable[[Tensor, Labels], Tensor]  # from scores (N, classes) and labels to a class of each sample, int64 (N,)

AGAINST = "-vs-"
RANKS = {"predicted": 0, "second": 1}
WORDS = {*RANKS, "label"}
OTHERS = "others"
CONTRAST = "contrast"
STRONGEST = "strongest"
TOP = r"top-(\d+)"
PREDICTED = "predicted"
REGIONS = ("mask", PREDICTED, "box")
UNIT, SIMILARITY, CONCEPT = "unit:", "similarity:", "concept:"


@dataclass(frozen=True)
class Target:
    """The classes or neurons that are explained for each sample.

    Attributes:
        picks: The classes or neurons.
        operator: The operator at which the explained network ends; None: at the classes.
        against: Whether a single map explains the difference of two classes. Otherwise each class has its own map.
        against_others: Whether the map explains a class less the softmax-weighted mean of the others.
        needs_label: Whether samples without a label cannot be explained.
        region: Where the class's scores count, one of REGIONS; None: the output has no positions, or all count.
        embeds: Whether the output is an embedding and not a score for each class.
        vector: The vector, float64 (D,), whose cosine with the embedding is explained; None: a class or neuron is.
        direction: The direction of length 1, float64 (K,), on which the mean over positions of the operator's output
            before its gate is projected; None: another target.
    """

    picks: tuple[Pick, ...]
    operator: str | None = None
    against: bool = False
    against_others: bool = False
    needs_label: bool = False
    region: str | None = None
    embeds: bool = False
    vector: Tensor | None = None
    direction: Tensor | None = None

    def end(self, network: Network) -> Network:
        """Return the network whose output is explained: it ends at the target's operator, if there is one."""
        return network if self.operator is None else network.until(self.operator, after_gate=self.direction is None)

    @property
    def maps(self) -> int:
        """The number of maps of a sample for each method."""
        return 1 if self.against else len(self.picks)

    @property
    def needed_region(self) -> str | None:
        """The region that a sample must have, "mask" or "box"; None if the region comes from the scores."""
        return None if self.region == PREDICTED else self.region

    def pick_classes(self, scores: Tensor, labels: Labels) -> Tensor:
        """Return the classes, int64 (N, picks)."""
        return torch.stack([pick(scores, labels) for pick in self.picks], 1)

    def make_targets(self, scores: Tensor, labels: Labels, regions: Regions | None = None) -> Tensor:
        """Return the targets for `Explainer`: classes int64 (N,) or (N, T), or weights of the scores' shape.

        Args:
            scores: The network's output (N, K, …).
            labels: The labels of the samples.
            regions: The masks or boxes of the samples, if the target has a region of this kind.
        """
        if self.direction is not None:
            return self.weigh_by_direction(scores)
        if self.vector is not None:
            return self.weigh_by_vector(scores)
        classes = self.pick_classes(scores, labels)
        if self.region is not None:
            return self.weigh_by_region(scores, classes[:, 0], regions)
        if self.against:
            one, other = (torch.zeros_like(scores).scatter_(1, c[:, None], 1.0) for c in classes.unbind(1))
            return one - other
        if self.against_others:
            return contrast(scores, classes[:, 0])
        return classes[:, 0] if self.maps == 1 else classes

    def weigh_by_vector(self, embeddings: Tensor) -> Tensor:
        """Return the weights of the units whose weighted sum is the cosine; the embedding's norm is a constant factor.

        Args:
            embeddings: Shape (N, D).
        """
        assert self.vector is not None
        direction = (self.vector / self.vector.norm()).to(embeddings)
        return direction / embeddings.norm(dim=1, keepdim=True).clamp_min(torch.finfo(embeddings.dtype).tiny)

    def weigh_by_direction(self, outputs: Tensor) -> Tensor:
        """Return the weights of an operator's outputs whose weighted sum is their mean's projection on the direction.

        Args:
            outputs: Shape (N, K, …).
        """
        assert self.direction is not None
        weights = self.direction.to(outputs) / prod(outputs.shape[2:])
        return weights.view(1, -1, *[1] * (outputs.dim() - 2)).expand_as(outputs)

    def weigh_by_region(self, scores: Tensor, classes: Tensor, regions: Regions | None) -> Tensor:
        """Return weights of the scores' shape (N, K, H, W): the region's shares of positions at the class, 0 elsewhere.

        Args:
            scores: The network's output (N, K, H, W).
            classes: The classes (N,).
            regions: See `make_targets`.
        """
        if self.region == PREDICTED:
            shares = (scores.argmax(1) == classes[:, None, None]).to(scores.dtype)
        else:
            assert regions is not None
            shares = regions(classes).to(scores)
        index = classes[:, None, None, None].expand(-1, 1, *scores.shape[2:])
        return torch.zeros_like(scores).scatter_(1, index, shares[:, None])

    def score(self, scores: Tensor, classes: Tensor, regions: Regions | None = None) -> Tensor:
        """Return what each map explains: a class's score, a difference, a sum over positions, or a cosine.

        Args:
            scores: The network's output (N, K, …).
            classes: See `pick_classes`.
            regions: See `make_targets`.

        Returns:
            (N, maps).
        """
        if self.direction is not None:
            return (scores * self.weigh_by_direction(scores)).flatten(1).sum(1, keepdim=True)
        if self.vector is not None:
            return (scores * self.weigh_by_vector(scores)).sum(1, keepdim=True)
        if self.region is not None:
            return (scores * self.weigh_by_region(scores, classes[:, 0], regions)).flatten(1).sum(1, keepdim=True)
        values = scores.flatten(2).sum(2) if scores.dim() > 2 else scores
        if self.against_others:
            return (values * contrast(values, classes[:, 0])).sum(1, keepdim=True)
        values = values.gather(1, classes)
        return values[:, :1] - values[:, 1:] if self.against else values


def target_error(spec: str, what: str, remedy: str) -> UserError:
    """Return the error for a target."""
    return UserError(spec, what, remedy, "target")


def parse_target(spec: str, network: Network, names: ClassNames, vector: Sequence[float] = ()) -> Target:
    """Return the target that a text names.

    Args:
        spec: The text; see the table above.
        network: The network to explain.
        names: The names of its classes.
        vector: The vector of `similarity:FILE.npy`, or the direction of `OPERATOR:concept:NAME`.

    Raises:
        UserError: If the text means nothing for this network, or more than one thing.
    """
    operator, is_concept, _ = spec.partition(f":{CONCEPT}")
    if is_concept and operator in network.operators and len(vector) == network.operators[operator].neurons:
        direction = torch.tensor(vector, dtype=torch.float64)
        return Target((pick_class(0),), operator, direction=direction / direction.norm())
    operator, colon, neuron = spec.rpartition(":")
    if colon and operator in network.operators:
        if neuron == STRONGEST:
            return Target((pick_strongest,), operator)
        count = network.operators[operator].neurons
        if not neuron.isdecimal() or int(neuron) >= count:
            raise target_error(spec, f"no neuron {neuron!r}", f"{operator} has 0 to {count - 1}, and {STRONGEST}.")
        return Target((pick_class(int(neuron)),), operator)
    word, at, region = spec.rpartition("@")
    if at and region in REGIONS:
        return parse_region(word, region, spec, network, names)
    if len(network.output_shape) != 1:
        what = f"the model's outputs have the shape {network.output_shape}, and are not a score for each class"
        remedy = "Explain a neuron: OPERATOR:NEURON, see `patternnet plan`."
        if len(network.output_shape) == 3:
            remedy = f"Explain a class in a region: CLASS@{'|'.join(REGIONS)}; or a neuron: OPERATOR:NEURON."
        raise target_error(spec, what, remedy)
    if spec.startswith((UNIT, SIMILARITY)):
        return parse_embedding(spec, network.output_shape[0], vector)
    (classes,) = network.output_shape
    if match := re.fullmatch(TOP, spec):
        require_no_class(spec, spec, names)
        count = int(match[1])
        if not 1 <= count <= classes:
            raise target_error(spec, f"the model has {classes} classes", f"Choose top-1 to top-{classes}.")
        return Target(tuple(pick_rank(rank) for rank in range(count)))
    if classes == 1:
        if spec not in ("predicted", "label", "0"):
            what = "the model returns one number for each sample, and nothing else can be explained"
            raise target_error(spec, what, "Leave out `target`, or explain a neuron: OPERATOR:NEURON.")
        return Target((pick_class(0),))
    if spec == CONTRAST:
        require_no_class(CONTRAST, spec, names)
    words = split_pair(f"predicted{AGAINST}{OTHERS}" if spec == CONTRAST else spec, {name for name, _ in names})
    if against_others := words[1:] == [OTHERS]:
        require_no_class(OTHERS, spec, names)
        words = words[:1]
    picks = tuple(parse_word(word, spec, classes, names, network) for word in words)
    if len(words) == 2 and words[0] == words[1]:
        raise target_error(spec, "a class against itself is 0", "Name two classes.")
    return Target(picks, None, len(words) == 2, against_others, needs_label="label" in words)


def parse_region(word: str, region: str, spec: str, network: Network, names: ClassNames) -> Target:
    """Return the target `CLASS@REGION` of a network with outputs (N, classes, H, W).

    Raises:
        UserError: If the network has other outputs, or the word names no class.
    """
    if len(network.output_shape) != 3:
        what = f"the model's outputs have the shape {network.output_shape}, not (classes, H, W)"
        raise target_error(spec, what, "Explain a class without a region.")
    if word in RANKS:
        raise target_error(spec, f"{word!r} is no class of a whole image", "Name a class, its number, or `label`.")
    pick = parse_word(word, spec, network.output_shape[0], names, network)
    return Target((pick,), needs_label=word == "label", region=region)


def parse_embedding(spec: str, units: int, vector: Sequence[float]) -> Target:
    """Return the target `unit:NUMBER` or `similarity:FILE.npy` of a network with outputs (N, units).

    Raises:
        UserError: If there is no such unit, or the vector has another length.
    """
    if spec.startswith(SIMILARITY):
        if len(vector) != units:
            what = f"the vector has {len(vector)} numbers, and the model's outputs have {units}"
            raise target_error(spec, what, "Pass a vector of the same embedding.")
        return Target((pick_class(0),), embeds=True, vector=torch.tensor(vector, dtype=torch.float64))
    number = spec.removeprefix(UNIT)
    if not number.isdecimal() or int(number) >= units:
        raise target_error(spec, f"no unit {number!r}", f"The model's units are 0 to {units - 1}.")
    return Target((pick_class(int(number)),), embeds=True)


def split_pair(spec: str, names: Collection[str]) -> list[str]:
    """Split a target into its one or two words.

    Names of classes may contain `-vs-` themselves. So the target is split at the first `-vs-` for which both words are
    known. If there is no such `-vs-`, it is split at the first one.

    Args:
        spec: The target.
        names: The names of the classes.
    """
    if spec in names or AGAINST not in spec:
        return [spec]
    starts = [start for start in range(len(spec)) if spec.startswith(AGAINST, start)]
    pairs = [[spec[:start], spec[start + len(AGAINST) :]] for start in starts]
    return next((pair for pair in pairs if all(w in names or not needs_names(w) for w in pair)), pairs[0])


def parse_word(word: str, spec: str, classes: int, names: ClassNames, network: Network) -> Pick:
    """Return the pick that one word of a target names.

    Args:
        word: The word.
        spec: The whole target, for errors.
        classes: The number of classes.
        names: The names of the classes.
        network: The network, whose operators are suggested for a misspelled word.

    Raises:
        UserError: If the word names no class, or several.
    """
    if word in WORDS:
        require_no_class(word, spec, names)
    if word in RANKS:
        if RANKS[word] >= classes:
            raise target_error(spec, f"the model has {classes} classes", "Explain `predicted`.")
        return pick_rank(RANKS[word])
    if word == "label":
        return lambda scores, labels: torch.tensor(labels, device=scores.device)
    numbers = [int(word)] if word.isdecimal() else find_numbers(word, names)
    if not numbers:
        near = difflib.get_close_matches(word, [*dict(names), *network.operators])
        hint = f"Did you mean {', '.join(near)}?" if near else "Name a class, or its number; `classes` reads names."
        raise target_error(spec, f"{word!r} is no class", hint)
    if len(numbers) > 1:
        what = f"{word!r} is the name of the classes {', '.join(map(str, numbers))}"
        raise target_error(spec, what, "Give the number of the class instead of its name.")
    (number,) = numbers
    if number >= classes:
        raise target_error(spec, f"no class {number}", f"The model's classes are 0 to {classes - 1}.")
    return pick_class(number)


def find_numbers(name: str, names: ClassNames) -> list[int]:
    """Return the numbers of all classes that have a name."""
    return sorted({number for other, number in names if other == name})


def require_no_class(word: str, spec: str, names: ClassNames) -> None:
    """Raise UserError if a keyword of targets is also the name of a class."""
    if numbers := find_numbers(word, names):
        what = f"{word!r} is a keyword of targets, and the name of class {numbers[0]}"
        raise target_error(spec, what, "Give the number of the class, or leave out `classes`.")


def needs_names(spec: str) -> bool:
    """Return whether the names of classes are needed to parse a target."""
    known = WORDS | {OTHERS, CONTRAST}
    word, at, region = spec.rpartition("@")
    spec = word if at and region in REGIONS else spec
    if spec.startswith((UNIT, SIMILARITY, CONCEPT)) or f":{CONCEPT}" in spec:
        return False
    return not re.fullmatch(TOP, spec) and any(
        not word.isdecimal() and word not in known for word in spec.split(AGAINST)
    )


def load_target_names(target: str, spec: str, file: str | None) -> ClassNames:
    """Return the names of classes that may be needed to parse a target.

    A class may have the name of a keyword, such as `predicted`. So a file of names is also read if the target consists
    of keywords. Then only the names that equal one of these keywords are returned.

    Args:
        target: The target.
        spec: The model, whose library may know the names.
        file: A file of names; None if the user gave no file.
    """
    if needs_names(target):
        return load_class_names(spec, file)
    found = () if file is None else load_class_names(spec, file)
    return tuple((name, number) for name, number in found if name in (target, *target.split(AGAINST)))


def pick_rank(rank: int) -> Pick:
    """Return a pick of the class with the highest score (rank 0), the second highest, …; of ties, the lower number."""
    return lambda scores, _: scores.sort(dim=1, descending=True, stable=True).indices[:, rank]


def pick_class(number: int) -> Pick:
    """Return a pick of one class for all samples."""
    return lambda scores, _: torch.full(scores.shape[:1], number, device=scores.device)


def pick_strongest(scores: Tensor, _: Labels) -> Tensor:
    """Return the neuron of each sample with the largest sum over all positions, int64 (N,)."""
    return (scores.flatten(2).sum(2) if scores.dim() > 2 else scores).argmax(1)
