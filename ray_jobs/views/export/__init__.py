"""The samples of a run, with their maps and clusters, as a dataset of another tool: see docs/export.md."""

from ray_jobs.views.export.export import Done, write_export
from ray_jobs.views.export.formats import FORMATS

__all__ = ["FORMATS", "Done", "write_export"]
