"""`--positions auto`: a few images of shards far apart, before the fit starts, say how many positions it needs."""

import math
from contextlib import closing, suppress
from dataclasses import replace

from torch import Tensor

from patterns import UserError
from patterns.estimation import FEWEST_GROUPS, positions_needed
from ray_jobs.config import FitConfig
from ray_jobs.data.shard_reader import ShardReader, read_shard
from ray_jobs.jobs.fit.convergence_job import waited_for
from ray_jobs.models.loading import Loaded
from ray_jobs.runs.run_folder import Run

AUTO = "auto"
TOLERANCE = 0.05  # the relative standard error that is aimed at, unless --until-converged says another
BATCHES, IMAGES = 8, 16  # batches of the pilot, and images of each


def settled(run: Run, config: FitConfig, loaded: Loaded) -> tuple[FitConfig, str | None]:
    """The same fit with a number of positions, and why that, where it was found just now.

    A fit that was begun before keeps to its number.
    """
    if config.positions != AUTO:
        return config, None
    begun = run.manifest().get("fit")
    if begun is not None:
        return replace(config, positions=begun["options"].get("positions")), None
    tolerance = TOLERANCE if config.until_converged is None else config.until_converged
    pilot, images = tried(config, loaded)
    choices = waited_for(config.estimators)
    positions = None
    if len(pilot) >= FEWEST_GROUPS:
        positions = positions_needed(loaded.network, pilot, images, tolerance, choices, config.seed)
    told = "all" if positions is None else positions
    why = f"{told} positions of each image: for patterns sure to {tolerance:g} after about {images} images"
    return replace(config, positions=positions), why


def tried(config: FitConfig, loaded: Loaded) -> tuple[list[Tensor], int]:
    """Batches from shards far apart, and about how many images the fit will see: as if all shards had the first's."""
    shards = config.shards
    chosen = [shards[i] for i in sorted({n * len(shards) // BATCHES for n in range(BATCHES)})]
    each = math.ceil(BATCHES / len(chosen))
    batches: list[Tensor] = []
    for shard in chosen:
        with suppress(UserError):  # the fit itself will try it again, and say what is wrong
            reader = ShardReader(shard, loaded.preprocessing, IMAGES, loaded.dtype, each * IMAGES)
            batches += [batch.images.to(loaded.device) for batch in reader]
    first = 0
    with suppress(UserError), closing(read_shard(chosen[0])) as samples:
        first = sum(1 for _ in samples)
    images = first * len(shards)
    return batches, images if config.max_samples is None else min(images, config.max_samples)
