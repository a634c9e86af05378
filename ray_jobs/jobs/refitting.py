"""Patterns of a network with random weights, for the measures that fit the patterns again."""

import torch

from patterns import CHOICES, Network, Observer, Operator, UserError, save
from patterns import solve as solve_operator
from patterns.estimation import required_sums
from patterns.evaluation import randomize, trained_operators
from ray_jobs.config import EvaluateConfig
from ray_jobs.data.samples import derive_seed
from ray_jobs.data.selection import Selection
from ray_jobs.data.shard_reader import ShardReader
from ray_jobs.engine.shard_worker import make_reader_config
from ray_jobs.io.object_store import Location, publish
from ray_jobs.models.loading import TracedModel
from ray_jobs.runs.run_folder import list_solved

POSITIONS = 16  # of each image that a refit samples


def randomize_share(network: Network, share: float, seed: int) -> Network:
    """Return the network with random weights in a share of the trained operators, counted from the last one.

    Args:
        network: The network.
        share: The share, in [0, 1]. At least one operator is randomized.
        seed: The seed of the weights.
    """
    names = list(reversed(trained_operators(network)))
    return randomize(network, names[: max(1, round(share * len(names)))], torch.Generator().manual_seed(seed))


def refit(config: EvaluateConfig, model: TracedModel, selection: Selection, folder: Location) -> None:
    """Fit patterns of the network with random weights in all operators, unless the folder has them already.

    The driver does this, on the first `refit_samples` selected samples of the shards in their order, so that the
    patterns do not depend on the workers. They have the rows of the run that is evaluated.

    Args:
        config: The evaluation.
        model: The trained model.
        selection: The samples of the evaluation.
        folder: Where patterns.safetensors is written.

    Raises:
        UserError: If the shards have no sample that can be used.
    """
    if (folder / "patterns.safetensors").exists():
        return
    network = randomize_share(model.network, 1.0, config.seed)
    solved = list_solved(config.patterns)

    def choices(operator: Operator) -> list[str]:
        rows = set(solved.get(operator.name, ()))
        return [name for name, pair in CHOICES.items() if pair[0] and set(pair[operator.gate is None]) <= rows]

    operators = {name: op for name, op in network.operators.items() if choices(op)}
    observer = Observer(network, lambda op: required_sums(op, choices(op)), operators, POSITIONS, config.seed)
    left = config.refit_samples
    reader_config = make_reader_config(model, config.batch_size)
    for shard in config.shards:
        only = selection.only_of(shard)
        if not left or only == frozenset():
            continue
        for batch in ShardReader(shard, reader_config, only=only, skip=selection.skip_of(shard)):
            seeds = [derive_seed(key) for key in batch.keys[:left]]
            observer.update(batch.images[:left].to(network.like), seeds)
            left -= len(seeds)
            if not left:
                break
    if left == config.refit_samples:
        raise UserError(config.shards[0], "no shard has a sample for the refit", "Check --shards.")
    moments = observer.moments()
    solutions = {name: solve_operator(op, moments[name], choices(op), config.seed) for name, op in operators.items()}
    with publish(folder) as local:
        save(local, solutions, model.digest)
