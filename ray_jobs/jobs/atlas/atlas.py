"""The atlas job: rows of every sample of some shards → summaries of classes, clusters and channels."""

from collections.abc import Sequence
from typing import Any

from patterns import UserError
from patterns.attribution import parse_method
from ray_jobs.config import AtlasConfig, Resources
from ray_jobs.engine.shard_worker import require_gpu_for_mode
from ray_jobs.jobs.atlas.clustering import import_clustering
from ray_jobs.jobs.atlas.reduction import reduce_rows
from ray_jobs.jobs.atlas.rows import describe_cost
from ray_jobs.jobs.atlas.stored_maps import StoredMapsWorker, measure_stored_rows, require_explanations
from ray_jobs.jobs.atlas.worker import AtlasWorker, measure_rows, validate_target
from ray_jobs.jobs.job_session import JobSession, run_job
from ray_jobs.jobs.method_job import describe_estimators, validate_methods, validate_settings
from ray_jobs.jobs.per_shard_job import validate_sample_count, write_shard_files
from ray_jobs.runs.run_folder import Run

ROWS = "atlas"  # folder of the rows in the run


def validate(config: AtlasConfig, resources: Resources = Resources()) -> None:  # noqa: B008 - frozen
    """Raise UserError if options do not fit each other, a package is missing, or compiling needs a GPU."""
    if len(config.methods) != 1:
        raise UserError("", f"an atlas has one method, not {len(config.methods)}", "Pass one method.", "methods")
    if config.explanations is not None and config.cluster_by == "channels":
        what = "stored maps have no relevance of channels"
        raise UserError("", what, "Leave out `explanations`, or cluster by maps.", "cluster_by")
    if config.cluster_operator is not None and config.cluster_by != "channels":
        what = "samples are clustered by maps, so no operator is used"
        raise UserError("", what, "Leave it out, or cluster by channels.", "cluster_operator")
    import_clustering()
    validate_settings(config)
    method = parse_method(config.methods[0])
    if config.explanations is None and (method.backward is None or not method.is_attribution):
        what = f"{config.methods[0]} has no relevance of channels"
        raise UserError("", what, "Pass patternattribution or gradient-x-input.", "methods")
    require_gpu_for_mode(config.compile, resources)


def atlas(config: AtlasConfig, resources: Resources = Resources()) -> Run:  # noqa: B008 - frozen
    """Describe a dataset by the explanations of its samples, or resume a job that ended early; see `run_job`."""
    validate(config, resources)
    return run_job("atlas", config, resources, describe_shards)


def describe_shards(session: JobSession, config: AtlasConfig, resources: Resources) -> None:
    """Describe the samples of shards, and summarize classes, clusters and channels."""
    run, model = session.run, session.loaded.traced
    validate_target(config, model)
    stored = config.explanations is not None
    shape = measure_stored_rows(config, model) if stored else measure_rows(config, model)
    if config.cluster_operator is not None and config.cluster_operator not in shape.channels:
        what = f"the channels of {config.cluster_operator!r} are not recorded"
        raise UserError(
            "", what, f"Choose from {', '.join(shape.channels)}, or add it to `operators`.", "cluster_operator"
        )
    if config.cluster_by == "channels" and not shape.channels:
        raise UserError("", "no channels are recorded", "Name operators by `operators`.", "cluster_by")
    if stored:
        recorded: dict[str, Any] = {"scales": {}, "estimators": describe_estimators(config, model.network)}
        require_explanations(config, session.section | recorded)
    else:
        recorded = validate_methods(config, model, model.network, session.section)
    with session.work(resources, config.compile, **recorded):
        worker = StoredMapsWorker if stored else AtlasWorker
        message = describe_cost(shape, config.max_samples)
        done = write_shard_files(session, config, resources, ROWS, message, worker, model, recorded["scales"])
        files: Sequence[str] = [str(each.folder / each.rows) for each in done]
        found = reduce_rows(files, shape, config, run.folder, session.tasks)
        validate_sample_count(session, found["samples"], resources)
        session.section |= found
