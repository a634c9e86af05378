"""`positions="auto"`: before a fit starts, a few images of shards far apart show how many positions it needs."""

import math
from contextlib import closing, suppress
from dataclasses import replace

from torch import Tensor

from patterns import UserError
from patterns.estimation import FEWEST_GROUPS, positions_needed
from ray_jobs.config import FitConfig
from ray_jobs.data.shard_reader import ShardReader, read_shard
from ray_jobs.engine.shard_worker import make_reader_config
from ray_jobs.jobs.fit.convergence_job import select_criterion_estimators
from ray_jobs.models.loading import LoadedModel
from ray_jobs.runs.run_folder import Run

AUTO = "auto"
TOLERANCE = 0.05  # the relative standard error to reach, if the config sets none by `until_converged`
BATCHES, IMAGES = 8, 16  # the number of batches that are tried, and the images of each


def resolve_positions(run: Run, config: FitConfig, loaded: LoadedModel) -> tuple[FitConfig, str | None]:
    """Replace `positions="auto"` by a number, which a resumed fit takes from its manifest.

    Args:
        run: The run's folder.
        config: The fit.
        loaded: The model.

    Returns:
        The fit with a number of positions, and the reason for it if it was chosen now.
    """
    if config.positions != AUTO:
        return config, None
    begun = run.manifest().get("fit")
    if begun is not None:
        return replace(config, positions=begun["options"].get("positions")), None
    tolerance = TOLERANCE if config.until_converged is None else config.until_converged
    pilot, images = read_pilot(config, loaded)
    estimators = select_criterion_estimators(config.estimators)
    positions = None
    if len(pilot) >= FEWEST_GROUPS:
        positions = positions_needed(loaded.network, pilot, images, tolerance, estimators, config.seed)
    number = "all" if positions is None else positions
    reason = f"{number} positions of each image: for a relative standard error of {tolerance:g} after ~{images} images"
    return replace(config, positions=positions), reason


def read_pilot(config: FitConfig, loaded: LoadedModel) -> tuple[list[Tensor], int]:
    """Return batches from shards far apart, and an estimate of the images that the fit will see.

    The estimate assumes that all shards have as many samples as the first shard.
    """
    shards = config.shards
    chosen = [shards[i] for i in sorted({n * len(shards) // BATCHES for n in range(BATCHES)})]
    each = math.ceil(BATCHES / len(chosen))
    reader_config = make_reader_config(loaded, IMAGES)
    batches: list[Tensor] = []
    for shard in chosen:
        with suppress(UserError):  # the fit itself will try the shard again, and report the error
            reader = ShardReader(shard, reader_config, each * IMAGES)
            batches += [batch.images.to(loaded.device) for batch in reader]
    first = 0
    with suppress(UserError), closing(read_shard(chosen[0])) as samples:
        first = sum(1 for _ in samples)
    images = first * len(shards)
    return batches, images if config.max_samples is None else min(images, config.max_samples)
