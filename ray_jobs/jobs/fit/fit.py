"""The fit job: shards → moments → parts → patterns, each shard counted exactly once."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from patterns import Network, Observer, Operator, UserError
from patterns.estimation import parsed, wanted
from patterns.io import save_in_turn, solution_specs, write_json
from ray_jobs.config import FitConfig, ModelConfig, Resources
from ray_jobs.engine.ray_session import connected
from ray_jobs.engine.ray_tasks import Tasks
from ray_jobs.engine.shard_worker import check_mode
from ray_jobs.io import object_store
from ray_jobs.jobs import reduction
from ray_jobs.jobs.fit.convergence_job import ConvergingJob, Until, waited_for
from ray_jobs.jobs.fit.memory_plan import passes
from ray_jobs.jobs.fit.position_pilot import settled
from ray_jobs.jobs.input_size import sized
from ray_jobs.jobs.moments_job import LEDGER, MomentsJob, MomentsSpec, apart, beside, read_ledger, read_refused
from ray_jobs.models import loading
from ray_jobs.runs.lease import hold_lease, tidy
from ray_jobs.runs.ledger import Ledger
from ray_jobs.runs.run_folder import Run, current, difference


@dataclass(frozen=True)
class Pass:
    """The operators whose moments were taken together, and where their parts are."""

    operators: tuple[str, ...]
    folder: object_store.Location

    @property
    def ledger(self) -> Ledger:
        """What counts of it."""
        return read_ledger(self.folder)


def planned(run: Run, network: Network, config: FitConfig) -> list[Pass]:
    """The passes over the data that a fit takes: one, unless the workers' memory is too small for all moments."""
    groups = passes(network, config.estimators, config.memory, config.batch_size)
    names = [tuple(op.name for op in group) for group in groups]
    folders = [run.moments] if len(names) == 1 else [run.moments / f"pass-{i:02d}" for i in range(len(names))]
    return [Pass(group, folder) for group, folder in zip(names, folders)]


def observer(config: FitConfig, operators: Collection[str], network: Network) -> Observer:
    """What takes the moments that some estimators need of some operators."""
    assert config.positions != "auto", "settled before"
    made = Observer(network, lambda op: wanted(op, config.estimators), operators, config.positions, config.seed)
    if config.compile is not None:
        made.compile(config.batch_size, config.compile)
    return made


def checked(config: FitConfig, resources: Resources) -> None:
    """UserError for estimators that there are not, and for what cannot be compiled."""
    parsed(config.estimators)
    check_mode(config.compile, resources)
    if config.compile is not None and config.positions is not None:
        what = "sums of drawn positions are not compiled"
        raise UserError("--compile", what, "Leave out this or --positions.")


def fit(config: FitConfig, resources: Resources = Resources(), retry_quarantined: bool = False) -> Run:  # noqa: B008 - frozen
    """Fit the patterns of a model to some shards, or go on with a fit that ended early.

    retry_quarantined: once all shards count, take up the samples that were refused, and these only.

    UserError where the configuration or the data are wrong, StoppedShortError where a signal came.
    """
    checked(config, resources)
    run = Run(config.out)
    config = replace(config, model=sized(config.model, config.shards, run.manifest().get("fit")))
    loaded = loading.load(config.model)
    config, why = settled(run, config, loaded)
    section = run.section("fit", config, loaded)
    finished = section["status"] == "complete" and not section["missing"]
    begun, done = section.get("rounds", 0), section.get("rounds_done", 0)
    if finished and begun == done:
        if not (retry_quarantined and section["refused"]):
            tidy(run)
            return run
        begun += 1
    parsed(config.estimators, loaded.network.operators)
    through = planned(run, loaded.network, config)
    with hold_lease(run, "fit") as beat, connected(resources) as tasks:
        check_mode(config.compile, resources)
        run.record("fit", section | {"rounds": begun, "rounds_done": done}, loaded)
        missing: dict[str, str] = {}
        seconds = 0.0
        for number, one in enumerate(through):
            name = "fit" if len(through) == 1 else f"fit, pass {number + 1} of {len(through)}"
            most = config.max_samples
            task = MomentsSpec(config.model, config.shards, str(one.folder), config.batch_size, most, begun)
            observe = partial(observer, config, one.operators)
            if config.until_converged is None:
                job = MomentsJob(name, beat, task, tasks, resources)
            else:
                operators = [loaded.network.operators[name] for name in one.operators]
                until = Until(config.until_converged, operators, waited_for(config.estimators), config.seed)
                job = ConvergingJob(name, beat, task, tasks, resources, until)
            if why is not None and number == 0:
                job.reporter.line(why)
            try:
                job.gather(observe, loaded.digests)
            finally:
                refused = quarantine(run, through, config.shards)
            if isinstance(job, ConvergingJob):
                section |= {"converged": job.sure}
            missing |= job.missing
            seconds += job.seconds
        job.reporter.line(f"solving for the patterns of {len(loaded.network.operators)} operators")
        section |= {"missing": missing, "rounds": begun, "rounds_done": begun}
        section["seconds"] = round(section.get("seconds", 0.0) + seconds, 3)
        finish(run, config, section | {"refused": refused}, through, loaded, tasks)
    return run


def quarantine(run: Run, through: Sequence[Pass], shards: Sequence[str]) -> int:
    """Write quarantine.parquet by what counts now; gives how many samples are refused."""
    rows = (row for one in through for row in read_refused(one.folder, one.ledger, shards))
    refused = list(dict.fromkeys(rows))
    run.quarantine("fit", refused)
    return len(refused)


def finish(
    run: Run,
    config: FitConfig,
    section: dict[str, Any],
    through: Sequence[Pass],
    loaded: loading.Loaded,
    tasks: Tasks,
) -> None:
    """From the parts that count to the patterns, and to a manifest that says so."""
    solved = tuple(section.get("solved", config.estimators))
    reduce_to_patterns(run, through, loaded, solved, config.estimators, config.seed, tasks)
    ledgers = [one.ledger for one in through]
    counted = {
        "shards": min(len(ledger.counted()) for ledger in ledgers),
        "samples": min(ledger.samples for ledger in ledgers),
    }
    run.record("fit", section | {"status": "complete", **counted}, loaded)


def reduce_to_patterns(
    run: Run,
    through: Sequence[Pass],
    loaded: loading.Loaded,
    choices: Sequence[str],
    taken: Sequence[str],
    seed: int,
    tasks: Tasks,
) -> None:
    """Merge the parts that count, whose sums were taken for some estimators, and write the patterns of the choices."""
    operators = list(loaded.network.operators.values())

    def sums(operator: Operator) -> Any:
        return wanted(operator, taken)

    parts = part_files(through)
    solutions = reduction.solve_all(parts, operators, sums, choices, seed, tasks)
    with object_store.published(run.folder) as folder:
        save_in_turn(folder, solution_specs(operators, choices), solutions, loaded.digest)


def part_files(through: Sequence[Pass]) -> dict[str, list[str]]:
    """The parts that count for each operator."""
    found: dict[str, list[str]] = {}
    for one in through:
        paths = [str(one.folder / part.file) for part in one.ledger.parts]
        found |= dict.fromkeys(one.operators, paths)
    return found


def fitted(run: Run) -> FitConfig:
    """The configuration of this folder's finished fit."""
    options = run.job("fit", "Run `patternnet fit` to the end first.")["options"]
    names = ("batch_size", "max_samples", "seed", "memory", "until_converged", "positions", "compile")
    same = {name: options.get(name) for name in names}
    model = ModelConfig(**run.fitted_model())
    return FitConfig(
        model=model,
        shards=tuple(options["shards"]),
        out=str(run.folder),
        estimators=tuple(options["estimators"]),
        **same,
    )


def of_the_fit(run: Run, config: FitConfig) -> loading.Loaded:
    """The model of a finished fit. UserError where its weights are not those of the fit any more."""
    loaded = loading.load(config.model)
    weights = run.manifest()["fit"]["options"]["weights"]
    if loaded.digest != weights:
        what = f"the fit's weights are {weights}, the model now has {loaded.digest}"
        raise UserError(str(run.folder), what, "Put the fit's weights back in their place.")
    return loaded


def solve(folder: str, estimators: Sequence[str], resources: Resources = Resources()) -> Run:  # noqa: B008 - frozen
    """Add the patterns of further estimators to a finished fit, from its moments alone.

    UserError where the fit is not finished, its weights are not found, or its sums do not do.
    """
    parsed(estimators)
    run = Run(folder)
    config = fitted(run)
    loaded = of_the_fit(run, config)
    parsed(estimators, loaded.network.operators)
    for operator in loaded.network.operators.values():
        if not wanted(operator, estimators) <= wanted(operator, config.estimators):
            taken = ", ".join(config.estimators)
            what = f"a fit of {taken} took no sums of {operator.name} for {', '.join(estimators)}"
            raise UserError(folder, what, f"Fit with --estimators {','.join(estimators)}.")
    section = run.manifest()["fit"]
    solved = tuple(dict.fromkeys((*section.get("solved", config.estimators), *estimators)))
    through = planned(run, loaded.network, config)
    if not all(one.ledger.parts for one in through):
        raise UserError(folder, "its moments are gone", f"Fit again, with --estimators {','.join(solved)}.")
    with hold_lease(run, "solve"), connected(resources) as tasks:
        reduce_to_patterns(run, through, loaded, solved, config.estimators, config.seed, tasks)
        run.record("fit", section | {"solved": solved}, loaded)
    return run


# Options that fits may differ in and still be merged.
OF_ONES_OWN = {"shards", "max_samples", "batch_size", "until_converged", "compile"}


def merge(folders: Sequence[str], out: str, resources: Resources = Resources()) -> Run:  # noqa: B008 - frozen
    """One fit of several finished ones of other shards, as if it had seen all their data; no data is read.

    UserError where a fit is not finished, was done with other options or weights, or shares a shard with another.
    """
    runs = [Run(folder) for folder in folders]
    configs = [fitted(run) for run in runs]
    sections = [run.manifest()["fit"] for run in runs]
    listed = [current(section["options"], config) for section, config in zip(sections, configs)]
    alike = [{k: v for k, v in options.items() if k not in OF_ONES_OWN} for options in listed]
    for run, options in zip(runs, alike):
        if options != alike[0]:
            what = f"this fit was done with {difference(alike[0], options)} in comparison with {folders[0]}"
            raise UserError(str(run.folder), what, "Merge fits of the same options only.")
    apart((folder, config.shards) for folder, config in zip(folders, configs))
    shards = tuple(shard for config in configs for shard in config.shards)
    config = replace(configs[0], shards=shards, out=out, max_samples=None, until_converged=None)
    loaded = of_the_fit(runs[0], config)
    merged = Run(out)
    section = merged.section("fit", config, loaded)
    through = planned(merged, loaded.network, config)
    missing = {shard: reason for s in sections for shard, reason in s["missing"].items()}
    rounds = max(s.get("rounds_done", 0) for s in sections)
    section |= {"missing": missing, "merged": list(folders), "rounds": rounds, "rounds_done": rounds}
    with hold_lease(merged, "merge"), connected(resources) as tasks:
        merged.record("fit", section, loaded)
        for number, one in enumerate(through):
            ledger, first = Ledger(), 0
            for run, own in zip(runs, configs):
                source = planned(run, loaded.network, own)[number]
                for part in source.ledger.parts:
                    object_store.copy(source.folder / part.file, one.folder)
                    if part.refused:
                        object_store.copy(source.folder / beside(part.file), one.folder)
                    ledger = ledger.commit(replace(part, shards=tuple(first + shard for shard in part.shards)))
                first += len(own.shards)
            with object_store.published(one.folder) as folder:
                write_json(folder / LEDGER, ledger.to_json())
        refused = quarantine(merged, through, config.shards)
        finish(merged, config, section | {"refused": refused}, through, loaded, tasks)
    return merged
