"""What the environment of a Ray that is started here must be: a short folder for sockets, and a token."""

import os
import secrets
from pathlib import Path

from patterns import UserError

# Ray puts /session_2026-01-01_00-00-00_123456_4194304/sockets/plasma_store.1 behind its folder, and Linux takes 107
# bytes for the path of a socket.
MAX_FOLDER_BYTES = 107 - 66


def choose_temporary_folder() -> str | None:
    """Return a folder for a Ray that is started here; None if Ray's own choice will do.

    Job systems set TMPDIR to paths that are too long for sockets, or that a node lacks. UserError if RAY_TMPDIR, which
    the user has set, cannot be used, or no folder can.
    """
    if named := os.environ.get("RAY_TMPDIR"):
        if problem := find_problem(Path(named) / "ray"):
            raise UserError(f"RAY_TMPDIR={named}", problem, "Set it to a short path on a local disk, such as /tmp.")
        return None
    named = os.environ.get("TMPDIR")
    if not find_problem(Path(named or "/tmp") / "ray"):
        return None
    if problem := find_problem(Path("/tmp/ray")):
        what = f"neither it nor /tmp can be used by Ray ({problem})"
        raise UserError(f"TMPDIR={named or ''}", what, "Set RAY_TMPDIR to a short path on a local disk.")
    return "/tmp/ray"


def find_problem(folder: Path) -> str:
    """Return why Ray cannot put its files into a folder, which it makes if it is missing; empty if it can."""
    if (length := len(os.fsencode(folder))) > MAX_FOLDER_BYTES:
        return f"its path is too long for sockets by {length - MAX_FOLDER_BYTES} bytes"
    there = next((each for each in (folder, *folder.parents) if each.exists()), Path("/"))
    if not there.is_dir():
        return f"{there} is a file"
    # A folder of TMPDIR that is not there is a mistake; Ray would make it.
    if not folder.parent.exists() and not os.environ.get("RAY_TMPDIR"):
        return "it does not exist"
    return "" if os.access(there, os.W_OK | os.X_OK) else f"{there} is not writable"


def ensure_token() -> None:
    """Give a Ray that is started here a token of its own, if it cannot keep one in the home folder, as it does."""
    if any(os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        return
    try:
        folder = Path.home() / ".ray"
        folder.mkdir(parents=True, exist_ok=True)
        kept = os.access(folder, os.W_OK | os.X_OK) or os.access(folder / "auth_token", os.R_OK)
    except (OSError, RuntimeError):  # RuntimeError: no HOME, and no user of this number
        kept = False
    if not kept:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
