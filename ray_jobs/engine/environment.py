"""Environment of a Ray cluster that is started on this machine: a short folder for its sockets, and a token."""

import os
import secrets
from pathlib import Path

from patterns import UserError

# Ray appends /session_2026-01-01_00-00-00_123456_4194304/sockets/plasma_store.1 to its folder, and Linux allows 107
# bytes for the path of a socket.
MAX_FOLDER_BYTES = 107 - 66


def choose_temporary_folder() -> str | None:
    """Return the temporary folder for a Ray cluster that is started on this machine; None if Ray's default works.

    Job systems set TMPDIR to paths that are too long for sockets, or that do not exist on a node.

    Raises:
        UserError: If RAY_TMPDIR, which the user has set, cannot be used, or neither TMPDIR nor /tmp can.
    """
    if folder := os.environ.get("RAY_TMPDIR"):
        if problem := find_problem(Path(folder) / "ray"):
            raise UserError(f"RAY_TMPDIR={folder}", problem, "Set it to a short path on a local disk, such as /tmp.")
        return None
    folder = os.environ.get("TMPDIR")
    if not find_problem(Path(folder or "/tmp") / "ray"):
        return None
    if problem := find_problem(Path("/tmp/ray")):
        what = f"Ray can use neither this folder nor /tmp ({problem})"
        raise UserError(f"TMPDIR={folder or ''}", what, "Set RAY_TMPDIR to a short path on a local disk.")
    return "/tmp/ray"


def find_problem(folder: Path) -> str:
    """Return the reason why Ray cannot use a folder; empty if it can. Ray creates a folder that does not exist."""
    if (length := len(os.fsencode(folder))) > MAX_FOLDER_BYTES:
        return f"its path is too long for sockets by {length - MAX_FOLDER_BYTES} bytes"
    existing = next((each for each in (folder, *folder.parents) if each.exists()), Path("/"))
    if not existing.is_dir():
        return f"{existing} is a file"
    # A missing TMPDIR is a mistake of the job system; Ray would create it.
    if not folder.parent.exists() and not os.environ.get("RAY_TMPDIR"):
        return "it does not exist"
    return "" if os.access(existing, os.W_OK | os.X_OK) else f"{existing} is not writable"


def ensure_token() -> None:
    """Set RAY_AUTH_TOKEN to a random token if Ray cannot store its own token in the folder ~/.ray.

    Nothing is set if the user has chosen the mode of authentication or a token by RAY_AUTH_MODE, RAY_AUTH_TOKEN or
    RAY_AUTH_TOKEN_PATH.
    """
    if any(os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        return
    try:
        folder = Path.home() / ".ray"
        folder.mkdir(parents=True, exist_ok=True)
        kept = os.access(folder, os.W_OK | os.X_OK) or os.access(folder / "auth_token", os.R_OK)
    except (OSError, RuntimeError):  # RuntimeError: HOME is not set, and the user has no entry in the password file
        kept = False
    if not kept:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
