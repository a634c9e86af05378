"""`positions="auto"`: before a fit of many images starts, a few of them show how many positions it needs."""

import math
from contextlib import closing, suppress
from dataclasses import replace
from typing import Any

from torch import Tensor

from patterns import UserError
from patterns.estimation import FEWEST_GROUPS, choose_positions
from ray_jobs.config import AUTO, FitConfig
from ray_jobs.data.shard_reader import ShardReader, list_samples
from ray_jobs.engine.shard_worker import make_reader_config
from ray_jobs.jobs.fit.convergence_job import select_criterion_estimators
from ray_jobs.models.loading import AnyModel
from ray_jobs.runs.run_folder import Run

TOLERANCE = 0.01  # the relative standard error to reach, if the config sets none by `until_converged`
# Fits of fewer images take all positions: fewer positions would not reach the tolerance, and the time saved is short.
MANY = 5000
BATCHES, IMAGES = 8, 8  # the number of batches that are tried, and the images of each


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
    images = 0 if compiled else count_images(config)
    chosen: dict[str, Any] = {"positions": None, "images": images} | ({"compiled": True} if compiled else {})
    if images >= MANY and len(pilot := read_pilot(config, loaded)) >= FEWEST_GROUPS:
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


def count_images(config: FitConfig) -> int:
    """Return about how many images a fit will see, if all shards have as many as the first; 0 if it is unreadable."""
    limit = math.inf if config.max_samples is None else config.max_samples
    if limit < MANY:
        return int(limit)
    first = 0
    with suppress(UserError), closing(list_samples(config.shards[0])) as samples:
        first = sum(1 for _ in samples)
    return int(min(first * len(config.shards), limit))


def read_pilot(config: FitConfig, loaded: AnyModel) -> list[Tensor]:
    """Return batches from shards far apart, on the model's device."""
    shards = config.shards
    chosen = [shards[i] for i in sorted({n * len(shards) // BATCHES for n in range(BATCHES)})]
    each = math.ceil(BATCHES / len(chosen))
    reader_config = make_reader_config(loaded, IMAGES)
    batches: list[Tensor] = []
    for shard in chosen:
        with suppress(UserError):  # the fit itself will try the shard again, and report the error
            reader = ShardReader(shard, reader_config, each * IMAGES)
            batches += [batch.images.to(loaded.device) for batch in reader]
    return batches
