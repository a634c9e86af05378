"""The folder that `submit` sends to a cluster: what is left out, how large it is, and whether it is a project of uv."""

import heapq
import logging
import tomllib
from dataclasses import dataclass
from pathlib import Path

from ray._private import ray_constants
from ray._private.runtime_env import packaging

from patterns import UserError
from ray_jobs.units import format_bytes, format_counts

# Left out in addition to what .gitignore and .rayignore name: version control, environments, caches.
EXCLUDES = (
    ".git", ".hg", ".svn", ".venv", "venv", ".tox", ".nox", "node_modules", "__pycache__", ".mypy_cache", ".ruff_cache",
    ".pytest_cache", ".hypothesis", ".ipynb_checkpoints", ".cache", ".DS_Store",
)  # fmt: skip
MAX_UPLOAD = ray_constants.DASHBOARD_CLIENT_MAX_SIZE  # bytes of one request that the job server takes
ENTRY_BYTES = 300  # of an archive, for each file in addition to its content and twice its name
LISTED = 5  # large files in an error
LOCK, PROJECT = "uv.lock", "pyproject.toml"


@dataclass(frozen=True)
class Upload:
    """The files of a folder that Ray will pack.

    Attributes:
        sizes: The bytes of each file by its path in the folder.
    """

    sizes: dict[str, int]

    @property
    def size(self) -> int:
        """The bytes of the archive. Ray does not compress it."""
        return sum(size + 2 * len(name.encode()) + ENTRY_BYTES for name, size in self.sizes.items())

    def describe(self) -> str:
        """Return the number of files and their size as a text."""
        return f"{format_counts({'files': len(self.sizes)})}, {format_bytes(self.size)}"


def measure_upload(folder: str, limit: int = MAX_UPLOAD) -> Upload:
    """Return the files of a folder that Ray will pack, without those of `EXCLUDES`, .gitignore and .rayignore.

    Args:
        folder: The folder.
        limit: The bytes that may be sent.

    Raises:
        UserError: If the folder does not exist, or too much would be sent; the largest files are named.
    """
    root, where = Path(folder).absolute(), f"--working-dir {folder}"
    if not root.is_dir():
        raise UserError(where, "no such folder", "Pass an existing folder, or leave the option out.")
    sizes: dict[str, int] = {}

    def note(path: Path) -> None:
        if path.is_file():
            sizes[path.relative_to(root).as_posix()] = path.stat().st_size

    # Ray's own walk, which no public function offers, so that the same files are measured and sent.
    excludes = [packaging._get_excludes(root, list(EXCLUDES))]
    packaging._dir_travel(root, excludes, note, include_gitignore=True, logger=logging.getLogger("ray.none"))
    upload = Upload(sizes)
    if upload.size > limit:
        largest = heapq.nlargest(LISTED, sizes, key=lambda name: sizes[name])
        listed = ", ".join(f"{name} ({format_bytes(sizes[name])})" for name in largest)
        what = f"{upload.describe()} would be sent, but Ray takes at most {format_bytes(limit)}; the largest: {listed}"
        raise UserError(where, what, "Name what the job does not need in .gitignore or .rayignore.")
    return upload


def is_uv_project(folder: str) -> bool:
    """Return whether a folder holds a project of uv with a lock file."""
    return (Path(folder) / PROJECT).is_file() and (Path(folder) / LOCK).is_file()


def require_runnable_project(folder: str, ray_version: str) -> None:
    """Require that the environment of a project of uv can run this program on a cluster.

    Args:
        folder: The project.
        ray_version: The version of Ray on the cluster.

    Raises:
        UserError: If its lock lacks this program, or has another version of Ray.
    """
    where = str(Path(folder) / LOCK)
    try:
        packages = tomllib.loads(Path(where).read_text())["package"]
        versions = {package["name"]: package.get("version", "") for package in packages}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(where, f"not a lock file of uv ({error})", "Run uv lock.") from error
    if "patternnet-ray" not in versions:
        what = "the project does not depend on patternnet-ray"
        raise UserError(where, what, "Run uv add patternnet-ray, or pass --no-uv to use the cluster's environment.")
    if versions.get("ray") != ray_version:
        what = f"Ray {versions.get('ray', 'is missing')}, but the cluster runs {ray_version}"
        raise UserError(where, what, f"Run uv add 'ray[default]=={ray_version}', or pass --no-uv.")
