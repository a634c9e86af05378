"""The fit job: shards → moments → parts → patterns, each shard counted exactly once."""

import shutil
from collections.abc import Sequence
from functools import partial
from typing import Any

from patterns import Network, Observer, UserError, storage
from patterns.estimators import parsed, wanted
from patterns.storage import write_aside, write_json
from ray_jobs import models, reduce
from ray_jobs.config import FitConfig, ModelConfig, Resources
from ray_jobs.gather import Gathering, GatherJob, apart, part_files, read_ledger
from ray_jobs.ledger import Ledger
from ray_jobs.run import Run, difference
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
    job = GatherJob("fit", run.folder, task, resources)
    with connected(resources):
        ledger = job.gather(partial(observer, config.estimators), loaded.digest)
        job.reporter.line(f"solving for the patterns of {len(loaded.network.operators)} operators")
        done = {"missing": job.missing, "seconds": round(job.seconds, 3)}
        finish(run, config, section | done, ledger, loaded)
    return run


def finish(run: Run, config: FitConfig, section: dict[str, Any], ledger: Ledger, loaded: models.Loaded) -> None:
    """From the parts that count to the patterns, and to a manifest that says so."""
    run.quarantine("fit", list(ledger.refused))
    reduce_to_patterns(run, ledger, loaded, config.estimators, config.estimators, config.seed)
    counted = {"shards": len(ledger.shards), "samples": ledger.samples, "refused": len(ledger.refused)}
    run.record("fit", section | {"status": "complete", **counted}, loaded)


def merge(folders: Sequence[str], out: str, resources: Resources = Resources()) -> Run:  # noqa: B008 - frozen
    """One fit of several finished ones of other shards, as if it had seen all their data; no data is read.

    UserError where a fit is not finished, was done with other options or weights, or shares a shard with another.
    """
    runs = [Run(folder) for folder in folders]
    sections = [run.job("fit", "Run `patternnet fit` to the end first.") for run in runs]
    alike = [{k: v for k, v in s["options"].items() if k not in OF_ONES_OWN} for s in sections]
    for run, options in zip(runs, alike):
        if options != alike[0]:
            what = f"this fit was done with {difference(alike[0], options)} in comparison with {folders[0]}"
            raise UserError(str(run.folder), what, "Merge fits of the same options only.")
    apart({folder: section["options"]["shards"] for folder, section in zip(folders, sections)})
    first = sections[0]["options"]
    config = FitConfig(
        ModelConfig(**runs[0].fitted_model()),
        tuple(shard for section in sections for shard in section["options"]["shards"]),
        out,
        first["batch_size"],
        tuple(first["estimators"]),
        seed=first["seed"],
    )
    loaded = models.load(config.model)
    if loaded.digest != first["weights"]:
        what = f"the fits' weights are {first['weights']}, the model now has {loaded.digest}"
        raise UserError(folders[0], what, "Put the fits' weights back in their place.")
    merged = Run(out)
    section = merged.claim("fit", config, loaded)
    ledger = Ledger()
    for run in runs:
        for part in read_ledger(run.moments).parts:
            write_aside(merged.moments / part.file, partial(shutil.copyfile, run.moments / part.file))
            ledger = ledger.commit(part)
    write_json(merged.moments / "ledger.json", ledger.to_json())
    missing = {shard: reason for s in sections for shard, reason in s["missing"].items()}
    with connected(resources):
        finish(merged, config, section | {"missing": missing, "merged": list(folders)}, ledger, loaded)
    return merged


# Options that fits may differ in and still be merged.
OF_ONES_OWN = {"shards", "max_samples", "batch_size"}


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
