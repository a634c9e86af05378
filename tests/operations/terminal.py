"""The commands and tables of docs/operations.md, and a terminal in which the tests run the commands."""

import contextlib
import io
import json
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from cluster.local import ROOT, LocalCluster
from ray_jobs.cli.app import exit_status
from tests.ray_jobs.runs import assert_same_patterns

PAGE = (ROOT / "docs" / "operations.md").read_text()
TOKEN = secrets.token_hex(32)
SHARDS, SAMPLES = 4, 6
PREPARED = "--image-size 16 --resize 16 --mean 0.5,0.5,0.5 --std 0.25,0.25,0.25 --batch-size 4"
# A shard that sends a signal to the driver, once, when it is first read.
SIGNALING = "'pipe:mkdir {once} 2>/dev/null && kill -{signal} $PPID; cat {shard}'"
# A shard that delays its job until the file `gate` exists.
LATE = "'pipe:for i in $(seq 1200); do [ -e {gate} ] && break; sleep 0.1; done; cat {shard}'"
# Commands that are run in this process if they need no cluster, because importing torch takes seconds.
JOBS = ("fit", "quality", "explain")
HERE = (*JOBS, "plan", "status", "report")


def section(title: str) -> str:
    """Return the text of a section."""
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#+ |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    assert found is not None, title
    return found[1]


def blocks(title: str) -> list[list[str]]:
    """Return the commands of a section by block."""
    return [block.strip().splitlines() for block in re.findall(r"```console\n(.*?)```", section(title), re.DOTALL)]


def commands(title: str) -> list[str]:
    """Return the commands of a section."""
    return [line for block in blocks(title) for line in block]


def rows(title: str) -> list[list[str]]:
    """Return the cells of a section's tables without their headers."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    kept = [line for line, below in zip(lines, [*lines[1:], ""]) if not {line[:4], below[:4]} & {"| --"}]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in kept]


@dataclass
class Terminal:
    """A shell that runs the commands of the page; `names` replace the words in capitals."""

    names: dict[str, object]
    cluster: LocalCluster | None = None
    env: dict[str, str] = field(default_factory=dict)

    def line(self, command: str) -> str:
        """Return a command with this test's names."""
        names = {**self.names, **({"http://HEAD:8265": self.cluster.dashboard} if self.cluster else {})}
        return re.sub("|".join(rf"(?<!\w){re.escape(n)}\b" for n in names), lambda m: str(names[m[0]]), command)

    def here(self, command: str) -> tuple[int, str]:
        """Run a command that needs no cluster; return its exit status and its output."""
        line, output = shlex.split(self.line(command)), io.StringIO()
        if line[0] != "patternnet" or line[1] not in HERE:
            process = self.start(command)
            return process.wait(), process.communicate()[0]
        alone = ["--workers", "0"] if line[1] in JOBS else []
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            status = exit_status([*line[1:], *alone])
        return status, output.getvalue()

    def start(self, *given: str) -> subprocess.Popen[str]:
        """Start commands in a shell without waiting for them."""
        attached = self.cluster.environment if self.cluster else {}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return subprocess.Popen(
            ["bash", "-c", "\n".join(["set -e", *map(self.line, given)])],
            env={**os.environ, **attached, "PATH": path, **self.env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def __call__(self, *given: str) -> tuple[int, str]:
        """Run commands in a shell; return the exit status and the output."""
        process = self.start(*given)
        output, _ = process.communicate(timeout=300)
        return process.returncode, output


def given(shards: list[str]) -> str:
    """Return the words after `--shards` on a command line."""
    return " --shards ".join(shards) + " --allow-pipes"


def signaling(plain: list[str], folder: Path, name: str) -> str:
    """Return shards of which the third sends a signal to the driver, once."""
    striking = SIGNALING.format(once=folder / "signaled", signal=name, shard=plain[2])
    return given([*plain[:2], striking, *plain[3:]])


def late(plain: list[str], folder: Path) -> str:
    """Return shards of which the third waits for a file `gate` in a folder."""
    return given([*plain[:2], LATE.format(gate=folder / "gate", shard=plain[2]), *plain[3:]])


def assert_complete(terminal: Terminal, undisturbed: Path, name: str = "RUN") -> None:
    """Assert that the run is complete and has the patterns of the undisturbed fit."""
    run = Path(str(terminal.names[name]))
    done = json.loads((run / "manifest.json").read_text())["fit"]
    assert (done["status"], done["samples"], done["missing"]) == ("complete", SHARDS * SAMPLES, {})
    assert_same_patterns(run, undisturbed)


def other_version(folder: Path) -> dict[str, str]:
    """Return the environment of another version of this program with the same options."""
    for name in ("patterns", "ray_jobs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "patternnet_ray-9.9.dist-info").mkdir()
    (folder / "patternnet_ray-9.9.dist-info" / "METADATA").write_text("Name: patternnet-ray\nVersion: 9.9\n")
    return {"PYTHONPATH": str(folder)}
