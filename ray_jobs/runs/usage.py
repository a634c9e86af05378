"""Usage of a cluster by a job: the hours of its workers, and their price."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ray_jobs.config.parsing import split_price
from ray_jobs.units import format_number

UNITS = {"worker-hour": "worker_hours", "gpu-hour": "device_hours", "cpu-hour": "cpu_hours"}


@dataclass(frozen=True)
class Usage:
    """Hours that the workers of a job held, from the start of each process to its end, with all lost work.

    Attributes:
        worker_hours: Hours of workers.
        device_hours: Hours of their GPUs; a worker with a quarter of a GPU counts a quarter.
        cpu_hours: Hours of their CPUs.

    Example:
        >>> Usage.of(7200.0, cpus=4, gpus=0.5).describe("2.5/gpu-hour")
        '2 worker-hours, 1 device-hours, cost 2.5 at 2.5/gpu-hour'
    """

    worker_hours: float = 0.0
    device_hours: float = 0.0
    cpu_hours: float = 0.0

    @classmethod
    def of(cls, seconds: float, cpus: float, gpus: float) -> "Usage":
        """Return the hours of workers that ran for `seconds` in all, each with `cpus` CPUs and `gpus` GPUs."""
        hours = seconds / 3600
        return cls(hours, gpus * hours, cpus * hours)

    @classmethod
    def read(cls, section: Mapping[str, Any]) -> "Usage":
        """Return the entry `usage` of a section of the manifest, or of a driver's progress; zeros if it lacks one."""
        found = section.get("usage", {})
        return cls(**{each.name: float(found.get(each.name, 0.0)) for each in fields(cls)})

    def __add__(self, other: "Usage") -> "Usage":
        """Return the sum."""
        return Usage(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values())))

    def __or__(self, other: "Usage") -> "Usage":
        """Return the larger of each value: of two records of one total, the later."""
        return Usage(*(max(a, b) for a, b in zip(asdict(self).values(), asdict(other).values())))

    def to_json(self) -> dict[str, float]:
        """Return the values for a file, to less than a second."""
        return {name: round(value, 5) for name, value in asdict(self).items()}

    def cost(self, price: str) -> float:
        """Return the cost at a price such as 2.5/gpu-hour."""
        amount, unit = split_price(price)
        return amount * float(getattr(self, UNITS[unit]))

    def describe(self, price: str | None = None) -> str:
        """Return a text; device-hours only if there were devices, and money only for a price."""
        words = [f"{format_number(self.worker_hours)} worker-hours"]
        if self.device_hours:
            words.append(f"{format_number(self.device_hours)} device-hours")
        if price is not None:
            words.append(f"cost {format_number(self.cost(price))} at {price}{self.explain_zero(price)}")
        return ", ".join(words)

    def explain_zero(self, price: str) -> str:
        """Return why a price of GPUs costs nothing: no worker has a GPU. Empty for other prices."""
        free = self.worker_hours > 0 and not self.device_hours and split_price(price)[1] == "gpu-hour"
        return " (no worker has a GPU)" if free else ""
