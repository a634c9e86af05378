"""`positions="auto"`: before a fit of many images starts, a few of them show how many positions it needs."""

import math
from contextlib import closing, nullcontext, suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

from torch import Tensor

from patterns import UserError
from patterns.estimation import FEWEST_GROUPS, choose_positions
from ray_jobs.config import AUTO, FitConfig
from ray_jobs.data.parquet_reader import is_parquet
from ray_jobs.data.selection import Selection, load_selection
from ray_jobs.data.shard_reader import ShardReader, ShardTask, list_samples
from ray_jobs.engine.shard_worker import make_reader_config
from ray_jobs.io.file_systems import is_url
from ray_jobs.io.web import PATIENCE, call_patiently
from ray_jobs.jobs.fit.convergence_job import select_criterion_estimators
from ray_jobs.models.loading import AnyModel
from ray_jobs.runs.run_folder import Run

TOLERANCE = 0.01  # the relative standard error to reach, if the config sets none by `until_converged`
# Fits of fewer images take all positions: fewer positions would not reach the tolerance, and the time saved is short.
MANY = 5000
BATCHES, IMAGES = 8, 8  # the number of batches that are tried, and the images of each
FEW = 2  # the number of shards that are tried if reading one means to download it


def resolve_positions(run: Run, config: FitConfig, loaded: AnyModel) -> tuple[FitConfig, dict[str, Any]]:
    """Replace `positions="auto"` by a number, which a resumed fit takes from its manifest.

    Args:
        run: The run's folder.
        config: The fit.
        loaded: The model.

    Returns:
        The fit with a number of positions, and what the number was chosen by, for the manifest; empty if the config
        or an earlier driver has chosen it.
    """
    if config.positions != AUTO:
        return config, {}
    begun = run.manifest().get("fit")
    if begun is not None:
        return replace(config, positions=begun["options"].get("positions")), {}
    compiled = config.compile not in (None, AUTO)
    selection = load_selection(config.keys, config.without_keys, config.shards)
    images = 0 if compiled else count_images(config, selection)
    chosen: dict[str, Any] = {"positions": None, "images": images} | ({"compiled": True} if compiled else {})
    if images >= MANY and len(pilot := read_pilot(config, loaded, selection)) >= FEWEST_GROUPS:
        tolerance = TOLERANCE if config.until_converged is None else config.until_converged
        estimators = select_criterion_estimators(config.estimators)
        found = choose_positions(loaded.network, pilot, images, tolerance, estimators, config.seed)
        chosen |= {"positions": found.positions, "tolerance": tolerance, "expected_error": float(f"{found.error:.3g}")}
    return replace(config, positions=chosen["positions"]), chosen


def describe_choice(chosen: dict[str, Any]) -> list[str]:
    """Return the line that says how many positions were chosen, and why; no line if they were not chosen now."""
    if not chosen:
        return []
    images = chosen["images"]
    if "tolerance" not in chosen:
        if not images:
            reason = "compiled sums need all" if chosen.get("compiled") else "the first shard cannot be read"
        elif images < MANY:
            reason = f"about {images} images are fewer than the {MANY} from which a fit draws positions"
        else:
            reason = f"too few of about {images} images could be read to choose a number"
        return [f"all positions of each image: {reason}"]
    error, tolerance = chosen["expected_error"], chosen["tolerance"]
    if chosen["positions"] is None:
        reason = f"with fewer, the expected standard error after about {images} images is {error:.2g}"
        return [f"all positions of each image: {reason}, and the tolerance is {tolerance:g}"]
    expected = f"the expected standard error after about {images} images is {error:.2g}, at most {tolerance:g}"
    return [f"{chosen['positions']} positions of each image: {expected}; --positions all takes all"]


def count_images(config: FitConfig, selection: Selection) -> int:
    """Return about how many images a fit will see, if all shards have as many as the first; 0 if it is unreadable."""
    limit = math.inf if config.max_samples is None else config.max_samples
    if selection.only is not None:
        return int(min(limit, sum(len(selection.only_of(shard) or ()) for shard in config.shards)))
    if limit < MANY:
        return int(limit)
    first = 0
    with suppress(UserError):
        first = call_patiently(partial(count_used, config.shards[0], selection), PATIENCE)
    return int(min(first * len(config.shards), limit))


def count_used(shard: str, selection: Selection) -> int:
    """Return how many samples of a shard a job with a selection uses. Raise UserError if the shard cannot be read."""
    task = ShardTask(shard, None, selection.only_of(shard), selection.skip_of(shard))
    with closing(list_samples(shard)) as samples:
        return sum(1 for sample in samples if task.uses(sample.key))


def read_pilot(config: FitConfig, loaded: AnyModel, selection: Selection) -> list[Tensor]:
    """Return batches from shards far apart, on the model's device."""
    shards = [shard for shard in config.shards if selection.only_of(shard) != frozenset()]
    tried = BATCHES if not all(is_url(shard) and is_parquet(shard) for shard in shards) else FEW
    chosen = [shards[i] for i in sorted({n * len(shards) // tried for n in range(tried)})]
    each = math.ceil(BATCHES / len(chosen))
    # As in a worker, a user's decoder that hangs or kills its process costs one sample.
    reader_config = make_reader_config(loaded, IMAGES, decoders=1 if loaded.config.decoder else 0)

    def read_first(shard: str) -> list[Tensor]:
        reader = ShardReader(shard, reader_config, None, selection.only_of(shard), selection.skip_of(shard))
        return [batch.images.to(loaded.device) for batch in islice(reader, each)]

    found: list[Tensor] = []
    with reader_config.pool or nullcontext():
        for shard in chosen:
            with suppress(UserError):  # the fit itself will try the shard again, and report the error
                found += call_patiently(partial(read_first, shard), PATIENCE)
    return found
