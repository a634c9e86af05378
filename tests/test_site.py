"""The site of the documentation builds without a warning: every link and anchor is valid."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_site_builds_in_strict_mode(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "index.html").exists()
