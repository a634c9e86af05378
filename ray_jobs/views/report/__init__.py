"""A run as one page of HTML that needs no network: see docs/report.md."""

from ray_jobs.views.report.page import write_report

__all__ = ["write_report"]
