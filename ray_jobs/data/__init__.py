"""Data: shard specifications are resolved to shards, and shards are read as batches of decoded samples.

`verified_tar` is public: a stage for pipelines of webdataset.
"""

from typing import TYPE_CHECKING

from patterns.lazy import import_on_use

if TYPE_CHECKING:
    from ray_jobs.data.tar_reader import verified_tar

__all__ = ["verified_tar"]

__getattr__, __dir__ = import_on_use(__name__, {"ray_jobs.data.tar_reader": ["verified_tar"]})
