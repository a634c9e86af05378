"""The fit job: shards → partial moments → patterns, each shard counted exactly once; and `solve` and `merge`."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from patterns import Network, Observer, Operator, Solution, UserError
from patterns.estimation import LARGEST_SHARE, TOP_TOKENS, parse_estimators, required_sums
from patterns.io import TraceOptions, pattern_specs, save_solutions
from patterns.moments import RequiredSums
from ray_jobs.config import AUTO, FitConfig, ModelConfig, Resources
from ray_jobs.data.concepts import ConceptLabels, load_concepts, require_one_sample
from ray_jobs.engine.ray_tasks import Tasks
from ray_jobs.engine.shard_worker import compile_batches, require_gpu_for_mode
from ray_jobs.io import object_store
from ray_jobs.jobs import reduction
from ray_jobs.jobs.fit.concepts import describe_concepts, describe_labels, merge_labels, write_concepts
from ray_jobs.jobs.fit.convergence_job import ConvergenceCriterion, ConvergingJob, select_criterion_estimators
from ray_jobs.jobs.fit.memory_plan import plan_passes
from ray_jobs.jobs.fit.position_pilot import describe_choice, resolve_positions
from ray_jobs.jobs.input_size import infer_input_size
from ray_jobs.jobs.job_session import JobSession, hold_run
from ray_jobs.jobs.moments_job import LABELED, MomentsJob, MomentsSpec, require_disjoint
from ray_jobs.models import loading
from ray_jobs.runs.ledger import Ledger
from ray_jobs.runs.moments_store import MomentsStore
from ray_jobs.runs.run_folder import Run, describe_difference, upgrade_options

# Options in which fits may differ and still be merged.
MAY_DIFFER = {"shards", "max_samples", "batch_size", "until_converged", "compile", "concepts"}


@dataclass(frozen=True)
class Pass:
    """One pass over the data.

    Attributes:
        operators: The names of the operators whose moments are taken.
        store: The folder of their partial moments.
    """

    operators: tuple[str, ...]
    store: MomentsStore


def list_passes(run: Run, network: Network, config: FitConfig) -> list[Pass]:
    """Return the passes of a fit: one, unless the moments of all operators exceed the workers' memory."""
    groups = plan_passes(network, config.estimators, config.memory, config.batch_size)
    folders = [run.moments] if len(groups) == 1 else [run.moments / f"pass-{i:02d}" for i in range(len(groups))]
    return [Pass(tuple(op.name for op in group), MomentsStore(at)) for group, at in zip(groups, folders)]


def make_observer(config: FitConfig, operators: Collection[str], network: Network, concepts: int = 0) -> Observer:
    """Return the observer that takes the moments of some operators, compiled if the config says so."""
    assert config.positions != AUTO, "resolve_positions comes first"
    observer = Observer(
        network, lambda op: required_sums(op, config.estimators), operators, config.positions, config.seed, concepts
    )
    if config.positions is None and not concepts:
        compile_batches(observer, config.compile, config.batch_size, network.like.device)
    return observer


def validate(config: FitConfig, resources: Resources) -> None:
    """Raise UserError if an estimator does not exist, or the mode of compilation needs a GPU and no worker gets one."""
    parse_estimators(config.estimators)
    require_gpu_for_mode(config.compile, resources)


def fit(config: FitConfig, resources: Resources = Resources(), retry_quarantined: bool = False) -> Run:  # noqa: B008 - frozen
    """Fit the patterns of a model, or resume a fit that ended early.

    Args:
        config: The fit.
        resources: The workers, and the limits on failures.
        retry_quarantined: Whether the rejected samples of a finished fit are tried again, and only these.

    Returns:
        The run.

    Raises:
        UserError: If the configuration or the data are wrong.
        StoppedShortError: If a signal stopped the fit.
    """
    validate(config, resources)
    run, labels = Run(config.out), load_concepts(config.concepts, config.shards)
    config = replace(config, model=infer_input_size(config.model, config.shards, run.manifest().get("fit")))
    loaded = loading.open_model(config.model, run.folder)
    config, choice = resolve_positions(run, config, loaded)
    session = JobSession("fit", config, loaded)
    begun, done = (session.section.get(name, 0) for name in ("rounds", "rounds_done"))
    if session.finished and begun == done:
        if not (retry_quarantined and session.section["refused"]):
            return session.close()
        begun += 1
    parse_estimators(config.estimators, loaded.network.operators)
    passes = list_passes(run, loaded.network, config)
    recorded: dict[str, Any] = {"positions": choice} if choice else {}
    if labels is not None:
        recorded["concepts"] = describe_labels(labels, session.section.get("concepts"), config.out)
    with session.work(resources, config.compile, rounds=begun, rounds_done=done, **recorded):
        missing: dict[str, str] = {}
        seconds = session.section.get("seconds", 0.0)
        for number, each in enumerate(passes):
            job = make_job(session, config, resources, passes, number, labels)
            for line in (*describe_choice(choice), *loaded.traced.describe()) if number == 0 else ():
                job.reporter.log(line)
            try:
                observe = partial(make_observer, config, each.operators, concepts=len(labels.names) if labels else 0)
                job.gather(observe, loaded.traced)
            finally:
                rejected = write_quarantine(run, passes, config.shards)
            if isinstance(job, ConvergingJob):
                session.section["converged"] = job.converged
            missing |= job.missing
            seconds += job.seconds
        job.reporter.log(f"solving for the patterns of {len(loaded.network.operators)} operators")
        session.section |= {"missing": missing, "rounds_done": begun, "refused": rejected, "seconds": round(seconds, 3)}
        finish(session, config, passes)
        for line in (*describe_outliers(session.section), *describe_concepts(session.section)):
            job.reporter.log(line)
    return run


def make_job(
    session: JobSession,
    config: FitConfig,
    resources: Resources,
    passes: Sequence[Pass],
    number: int,
    labels: ConceptLabels | None = None,
) -> MomentsJob:
    """Return the job of a pass."""
    one = passes[number]
    name = "fit" if len(passes) == 1 else f"fit, pass {number + 1} of {len(passes)}"
    rounds = session.section["rounds"]
    limits = config.batch_size, config.max_samples
    spec = MomentsSpec(config.shards, one.store, *limits, rounds, session.selection, labels)
    if config.until_converged is None:
        return MomentsJob(name, session.heartbeat, spec, session.tasks, resources)
    operators = [session.loaded.network.operators[name] for name in one.operators]
    estimators = select_criterion_estimators(config.estimators)
    criterion = ConvergenceCriterion(config.until_converged, operators, estimators, config.seed)
    return ConvergingJob(name, session.heartbeat, spec, session.tasks, resources, criterion)


def write_quarantine(run: Run, passes: Sequence[Pass], shards: Sequence[str]) -> int:
    """Write quarantine.parquet from the ledgers, and return the number of rejected samples."""
    rows = (row for each in passes for row in each.store.read_rejected(each.store.read_ledger(), shards))
    rejected = list(dict.fromkeys(rows))
    run.write_quarantine("fit", rejected)
    return len(rejected)


def finish(session: JobSession, config: FitConfig, passes: Sequence[Pass]) -> None:
    """Write the patterns, and add the numbers of shards and samples to the section."""
    solved = tuple(session.section.get("solved", config.estimators))
    session.section |= write_patterns(session.run, config, passes, session.loaded, solved, session.tasks)
    ledgers = [each.store.read_ledger() for each in passes]
    session.section |= {
        "shards": min(len(ledger.counted_shards()) for ledger in ledgers),
        "samples": min(ledger.samples for ledger in ledgers),
    }
    if concepts := session.section.get("concepts"):
        concepts |= write_concepts(session.run, passes, session.loaded.network, concepts["names"])


def write_patterns(
    run: Run,
    config: FitConfig,
    passes: Sequence[Pass],
    loaded: loading.AnyModel,
    estimators: Sequence[str],
    tasks: Tasks,
) -> dict[str, Any]:
    """Merge the partial moments that count, and write the patterns of some estimators.

    The patterns that presets need are written too, unless the fit has no sums for them.

    Returns:
        The section's entries `top_token_shares` and `outliers`; see `record_outliers`.
    """
    operators = list(loaded.network.operators.values())

    def find_sums(operator: Operator) -> RequiredSums:
        return required_sums(operator, config.estimators)

    files: dict[str, list[str]] = {}
    for each in passes:
        files |= dict.fromkeys(each.operators, each.store.list_files())
    if all(required_sums(operator, "default") <= find_sums(operator) for operator in operators):
        estimators = *estimators, "default"
    solutions = reduction.solve_all(files, operators, find_sums, estimators, config.seed, tasks)
    model = loaded.config
    options = TraceOptions(loaded.network.input_shape, tuple(model.pass_through), model.strip_softmax)
    found: dict[str, Any] = {"top_token_shares": {}, "outliers": []}
    with object_store.publish(run.folder) as folder:
        noted = record_outliers(solutions, found)
        save_solutions(folder, pattern_specs(operators, estimators), noted, loaded.digest, options)
    return found


def record_outliers(solutions: Iterable[tuple[str, Solution]], found: dict[str, Any]) -> Iterator[tuple[str, Solution]]:
    """Yield solutions, and record the additions of tokens among them.

    Args:
        solutions: Operator names and solutions.
        found: `top_token_shares` receives the share of Σ‖y‖² that the tokens with the largest norms hold, by addition;
            `outliers` the additions where it is so large that they got the pattern of `filter`.
    """
    for name, solution in solutions:
        if solution.top_share is not None:
            found["top_token_shares"][name] = solution.top_share
        if solution.has_outliers:
            found["outliers"].append(name)
        yield name, solution


def describe_outliers(section: Mapping[str, Any]) -> list[str]:
    """Return a line on the additions of a fit that have outlier tokens; no line if there are none.

    Args:
        section: The fit's section of the manifest.
    """
    names, shares = section.get("outliers", []), section.get("top_token_shares", {})
    if not names:
        return []
    listed = ", ".join(f"{name} ({shares[name]:.1%})" for name in names[:5])
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return [
        f"{TOP_TOKENS:.1%} of the tokens hold more than {LARGEST_SHARE:.0%} of Σ‖y‖² in {listed}{more}; "
        "the terms of these additions get equal parts (the pattern of filter)"
    ]


def load_fit(run: Run) -> FitConfig:
    """Return the config of a folder's finished fit."""
    options = run.require_job("fit", "Run `patternnet fit` to the end first.")["options"]
    names = ("batch_size", "max_samples", "seed", "memory", "until_converged", "positions", "compile", "concepts")
    return FitConfig(
        model=ModelConfig(**run.read_fitted_model()),
        shards=tuple(options["shards"]),
        out=str(run.folder),
        estimators=tuple(options["estimators"]),
        **{name: options.get(name) for name in names},
    )


def load_fitted_model(run: Run, config: FitConfig) -> loading.AnyModel:
    """Return the model of a finished fit.

    Raises:
        UserError: If its weights have changed since the fit.
    """
    loaded = loading.open_model(config.model, run.folder)
    weights = run.manifest()["fit"]["options"]["weights"]
    if loaded.digest != weights:
        what = f"the fit's weights are {weights}, the model now has {loaded.digest}"
        raise UserError(str(run.folder), what, "Restore the weights of the fit.")
    return loaded


def solve(folder: str, estimators: Sequence[str], resources: Resources = Resources()) -> Run:  # noqa: B008 - frozen
    """Add the patterns of further estimators to a finished fit; only its moments are read.

    Args:
        folder: The run's folder or URL.
        estimators: The further estimators.
        resources: The workers, and the limits on failures.

    Returns:
        The run.

    Raises:
        UserError: If the fit is not finished, its weights have changed, or it lacks sums that an estimator needs.
    """
    parse_estimators(estimators)
    run = Run(folder)
    config = load_fit(run)
    loaded = load_fitted_model(run, config)
    parse_estimators(estimators, loaded.network.operators)
    for operator in loaded.network.operators.values():
        if not required_sums(operator, estimators) <= required_sums(operator, config.estimators):
            fitted = ", ".join(config.estimators)
            what = f"a fit of {fitted} has no sums of {operator.name} for {', '.join(estimators)}"
            raise UserError(folder, what, f"Fit with --estimators {','.join(estimators)}.", "estimators")
    section = run.manifest()["fit"]
    solved = tuple(dict.fromkeys((*section.get("solved", config.estimators), *estimators)))
    passes = list_passes(run, loaded.network, config)
    if not all(each.store.read_ledger().entries for each in passes):
        raise UserError(folder, "its moments are gone", f"Fit again, with --estimators {','.join(solved)}.")
    with hold_run(run, "solve", resources) as (_, tasks):
        found = write_patterns(run, config, passes, loaded, solved, tasks)
        run.record("fit", section | {"solved": solved, **found}, loaded)
    return run


def merge(folders: Sequence[str], out: str, resources: Resources = Resources()) -> Run:  # noqa: B008 - frozen
    """Combine finished fits of different shards into one fit of all their data, without reading the data.

    Args:
        folders: The folders or URLs of the fits.
        out: The folder or URL of the result.
        resources: The workers, and the limits on failures.

    Returns:
        The run in `out`.

    Raises:
        UserError: If a fit is not finished, has other options or weights, or shares a shard with another.
    """
    runs = [Run(folder) for folder in folders]
    configs = [load_fit(run) for run in runs]
    sections = [run.manifest()["fit"] for run in runs]
    upgraded = [upgrade_options(section["options"], config) for section, config in zip(sections, configs)]
    common = [{k: v for k, v in options.items() if k not in MAY_DIFFER} for options in upgraded]
    for run, options in zip(runs, common):
        if options != common[0]:
            what = f"this fit was done with {describe_difference(common[0], options)} in comparison with {folders[0]}"
            remedy = "Merge fits of the same options only."
            if options.get("positions") != common[0].get("positions"):
                remedy += (
                    " --positions auto depends on the number of images; pass --positions all, or 16, to both fits."
                )
            raise UserError(str(run.folder), what, remedy)
    concepts = merge_labels([section.get("concepts") for section in sections], folders)
    require_disjoint((folder, config.shards) for folder, config in zip(folders, configs))
    shards = tuple(shard for config in configs for shard in config.shards)
    config = replace(configs[0], shards=shards, out=out, max_samples=None, until_converged=None)
    session = JobSession("fit", config, load_fitted_model(runs[0], config=configs[0]))
    network = session.loaded.network
    passes = list_passes(session.run, network, config)
    sources = [list_passes(run, network, own) for run, own in zip(runs, configs)]
    missing = {shard: reason for section in sections for shard, reason in section["missing"].items()}
    rounds = max(section.get("rounds_done", 0) for section in sections)
    recorded = {"missing": missing, "merged": list(folders), "rounds": rounds, "rounds_done": rounds}
    recorded |= {"concepts": concepts} if concepts else {}
    with session.work(resources, lease="merge", **recorded):
        for number, each in enumerate(passes):
            ledger, first = Ledger(), 0
            for source, own in zip(sources, configs):
                store = source[number].store
                for entry in store.read_ledger().entries:
                    each.store.copy_from(store, entry)
                    ledger = ledger.commit(replace(entry, shards=tuple(first + shard for shard in entry.shards)))
                first += len(own.shards)
            if len({section["concepts"]["digest"] for section in sections if concepts}) == 1:  # fits of the same labels
                require_one_sample(each.store.add_up(ledger.entries, LABELED), out)
            each.store.write_ledger(ledger)
        session.section["refused"] = write_quarantine(session.run, passes, shards)
        finish(session, config, passes)
    return session.run
