"""The fit job: shards → moments → parts → patterns, each shard counted exactly once."""

from collections.abc import Sequence
from functools import partial

from patterns import Network, Observer, UserError, storage
from patterns.estimators import parsed, wanted
from ray_jobs import models, reduce
from ray_jobs.config import FitConfig, ModelConfig, Resources
from ray_jobs.gather import Gathering, GatherJob, part_files, read_ledger
from ray_jobs.ledger import Ledger
from ray_jobs.run import Run
from ray_jobs.session import connected


def observer(estimators: Sequence[str], network: Network) -> Observer:
    """What takes the moments that some estimators need."""
    return Observer(network, lambda operator: wanted(operator, estimators))


def fit(config: FitConfig, resources: Resources = Resources()) -> Run:  # noqa: B008 - frozen
    """Fit the patterns of a model to some shards, or go on with a fit that ended early.

    UserError where the configuration or the data are wrong, StoppedShortError where a signal came.
    """
    parsed(config.estimators)
    loaded = models.load(config.model)
    parsed(config.estimators, loaded.network.operators)
    run = Run(config.out)
    section = run.claim("fit", config, loaded)
    if section["status"] == "complete" and not section["missing"]:
        return run
    task = Gathering(config.model, config.shards, str(run.moments), config.batch_size, config.max_samples)
    job = GatherJob("fit", task, resources)
    with connected(resources):
        ledger = job.gather(partial(observer, config.estimators), loaded.digest)
        run.quarantine("fit", list(ledger.refused))
        job.reporter.line(f"solving for the patterns of {len(loaded.network.operators)} operators")
        reduce_to_patterns(run, ledger, loaded, config.estimators, config.estimators, config.seed)
    counted = {
        "shards": len(config.shards) - len(job.missing),
        "missing": job.missing,
        "samples": ledger.samples,
        "refused": len(ledger.refused),
    }
    run.record("fit", section | {"status": "complete", **counted, "seconds": round(job.seconds, 3)}, loaded)
    return run


def solve(folder: str, estimators: Sequence[str], resources: Resources = Resources()) -> Run:  # noqa: B008 - frozen
    """Add the patterns of further estimators to a finished fit, from its moments alone.

    UserError where the fit is not finished, its weights are not found, or its sums do not do.
    """
    parsed(estimators)
    run = Run(folder)
    section = run.job("fit", "Run `patternnet fit` to the end first.")
    loaded = models.load(ModelConfig(**run.fitted_model()))
    parsed(estimators, loaded.network.operators)
    if loaded.digest != section["options"]["weights"]:
        what = f"the fit's weights are {section['options']['weights']}, the model now has {loaded.digest}"
        raise UserError(folder, what, "Put the fit's weights back in their place.")
    taken = tuple(section["options"]["estimators"])
    for operator in loaded.network.operators.values():
        if not wanted(operator, estimators) <= wanted(operator, taken):
            what = f"a fit of {', '.join(taken)} took no sums of {operator.name} for {', '.join(estimators)}"
            raise UserError(folder, what, f"Fit with --estimators {','.join(estimators)}.")
    solved = tuple(dict.fromkeys((*section.get("solved", taken), *estimators)))
    with connected(resources):
        reduce_to_patterns(run, read_ledger(run.moments), loaded, solved, taken, section["options"]["seed"])
    run.record("fit", section | {"solved": solved}, loaded)
    return run


def reduce_to_patterns(
    run: Run, ledger: Ledger, loaded: models.Loaded, choices: Sequence[str], taken: Sequence[str], seed: int
) -> None:
    """Merge the parts that count, whose sums were taken for some estimators, and write the patterns of the choices."""
    operators = list(loaded.network.operators.values())
    solutions = reduce.solve_all(
        part_files(run.moments, ledger), operators, lambda op: wanted(op, taken), choices, seed
    )
    storage.save(run.folder, solutions, loaded.digest)
