"""An atlas as a page that needs no network, with a page for each class if there are many: see docs/atlas.md."""

from ray_jobs.views.atlas.page import write_atlas

__all__ = ["write_atlas"]
