"""Forecasts of pilots against the fits that follow: `python -m benchmarks.forecasting [--write docs]`.

Each round runs the pilot of `patternnet plan --shards`, and then the fit with the same options on the same machine.
"""

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.pages import Cell, Table, make_parser, save_results
from benchmarks.timing import write_photographs
from ray_jobs.config import FitConfig, ModelConfig, Resources
from ray_jobs.jobs.fit.cost_pilot import Forecast, plan_cost
from ray_jobs.jobs.fit.fit import fit

SPEC, SIZE, BATCH = "torchvision:resnet18", 96, 16
SHARDS, REPEATED = 24, 3  # shards of the 20 photographs, each several times
COLUMNS = {
    "round": "{:.0f}",
    "workers": "{:.0f}",
    "time ÷ forecast": "{:.2f}",
    "interval ÷ forecast": "{:.2f} to {:.2f}",
    "worker-hours ÷ forecast": "{:.2f}",
    "bytes kept ÷ forecast": "{:.2f}",
    "load before": "{:.1f}",
}


@dataclass(frozen=True)
class Compared:
    """A forecast and what the fit then took.

    Attributes:
        forecast: The forecast.
        seconds: Time of the fit, from the call to its return.
        worker_hours: Hours of its workers.
        kept: Bytes in its folder.
        load: Processes that ran or waited in the minute before, as `uptime` shows them.
    """

    forecast: Forecast
    seconds: float
    worker_hours: float
    kept: int
    load: float

    def row(self, number: int, workers: int) -> list[Cell]:
        """Return the row of the table."""
        expected = self.forecast.seconds
        return [
            number,
            workers,
            self.seconds / expected.value,
            [expected.low / expected.value, expected.high / expected.value],
            self.worker_hours / self.forecast.usage[1].worker_hours,
            self.kept / self.forecast.kept,
            self.load,
        ]


def compare(shards: Sequence[str], folder: Path, workers: int) -> Compared:
    """Run a pilot and then the fit.

    Args:
        shards: The shards.
        folder: A folder for the runs.
        workers: The number of workers; 0 is this process.
    """
    load = os.getloadavg()[0]
    model = ModelConfig(spec=SPEC, weights="random", image_size=SIZE, resize=SIZE)
    config = FitConfig(model=model, shards=tuple(shards), out=str(folder / "run"), batch_size=BATCH, positions=None)
    resources = Resources(workers=workers)
    _, forecast = plan_cost(replace(config, out=str(folder / "pilot")), resources)
    begun = time.monotonic()
    run = fit(config, resources)
    seconds = time.monotonic() - begun
    kept = sum(file.stat().st_size for file in (folder / "run").rglob("*") if file.is_file())
    return Compared(forecast, seconds, run.manifest()["fit"]["usage"]["worker_hours"], kept, load)


def main() -> None:
    """Compare in several rounds, and write the table of `forecast`."""
    parser = make_parser("benchmarks.forecasting", __doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="0: this process")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as data:
        shards = [write_photographs(Path(data) / f"{n:02d}.tar", SIZE, SIZE, REPEATED) for n in range(SHARDS)]
        for number in range(1, options.rounds + 1):
            with tempfile.TemporaryDirectory() as folder:
                rows.append(compare(shards, Path(folder), options.workers).row(number, options.workers))
            print(rows[-1], flush=True)
    table = Table(COLUMNS, rows)
    print(table.render())
    if options.write:
        save_results(options.write, "forecast", table)


if __name__ == "__main__":
    main()
