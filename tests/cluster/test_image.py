"""The Dockerfile: its lint, its locks, and the system that its steps build."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import MODEL, make_shards

ROOT = Path(__file__).parents[2]
IMAGE = ROOT / "cluster" / "image"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = ("s3", "timm", "zarr", "serve")


def steps(dockerfile: str) -> list[tuple[str, str]]:
    """Return the instructions of a Dockerfile: ("RUN", command)."""
    plain = re.sub(r"^\s*#.*\n", "", dockerfile, flags=re.M).replace("\\\n", "")
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in plain.splitlines() if line)]


STEPS = steps((IMAGE / "Dockerfile").read_text())


def said(word: str) -> list[str]:
    """Return the arguments of all instructions with this name."""
    return [rest for name, rest in STEPS if name == word]


def locked(variant: str) -> dict[str, str]:
    """Return the versions of a lock's packages; every package has a hash."""
    found = {}
    for block in re.split(r"^(?=[A-Za-z])", (IMAGE / f"requirements-{variant}.txt").read_text(), flags=re.M)[1:]:
        name, _, version = block.split()[0].partition("==")
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", block), block
        found[canonicalize_name(name)] = version
    return found


def test_dockerfile_has_no_lint() -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "hadolint", IMAGE / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_image_is_pinned_and_unprivileged_and_requires_a_token() -> None:
    assert re.search(r"BASE=python:3\.11\.\d+-slim-bookworm@sha256:[0-9a-f]{64}$", "\n".join(said("ARG")), re.M)
    assert said("FROM") == ["${BASE} AS build", "${BASE}"]
    assert said("USER") == ["1000:1000"]
    assert "RAY_AUTH_MODE=token" in "".join(said("ENV"))
    assert all("--no-cache-dir" in run for command in said("RUN") for run in re.findall(r"pip install.*", command))


@pytest.mark.parametrize("variant", ["cuda", "cpu"])
def test_make_tags_the_image_by_version_and_variant(variant: str) -> None:
    command = ["make", "--dry-run", "image", f"VARIANT={variant}"]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"--tag patternnet-ray:{PROJECT['version']}-{variant} --build-arg VARIANT={variant} " in output
    assert f"--build-arg VERSION={PROJECT['version']} " in output


@pytest.mark.parametrize("variant", ["cuda", "cpu"])
def test_locks_satisfy_pyproject(variant: str) -> None:
    lock = locked(variant)
    groups = [PROJECT["dependencies"], *(PROJECT["optional-dependencies"][extra] for extra in EXTRAS)]
    needed = {Requirement(text) for group in groups for text in group}
    elsewhere = {"torch", "torchvision"} if variant == "cpu" else set()  # in the versions of the other lock
    for requirement in needed:
        version = (locked("cuda") if requirement.name in elsewhere else lock)[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), requirement
    assert elsewhere.isdisjoint(lock)


def test_cpu_lock_is_the_cuda_lock_without_cuda() -> None:
    cuda, cpu = locked("cuda"), locked("cpu")
    assert cpu.items() < cuda.items()
    assert not [name for name in cpu if re.match(r"torch|nvidia|cuda|triton", name)]
    dropped = r"torch(vision)?|triton|(nvidia|cuda)-.*"
    assert [name for name in cuda.keys() - cpu.keys() if not re.fullmatch(dropped, name)] == []


@pytest.mark.parametrize("variant", ["cuda", "cpu", "build"])
def test_no_lock_names_an_index(variant: str) -> None:
    assert not re.search(r"://|index-url|find-links|trusted-host", (IMAGE / f"requirements-{variant}.txt").read_text())


@dataclass
class System:
    """A folder with a whole Debian, the environment of its commands, and the parts of this machine that they see.

    Its mounts live in a namespace of the command, so that none is left however that ends.
    """

    root: Path
    env: dict[str, str] = field(default_factory=dict)
    seen: list[Path] = field(default_factory=list)

    def run(self, command: str) -> None:
        """Run a step of the build: as root, with this machine's network."""
        self._enter([], ["chroot", self.root], command)

    def run_locked_down(self, command: str, data: Path) -> str:
        """Run a command as in a container: uid 1000, read-only root, two writable folders, own network."""
        root = shlex.quote(str(self.root))
        mounts = [
            "ip link set lo up",
            f"mount --bind {root} {root}",
            f"mount -o remount,bind,ro {root}",
            f"mount -t tmpfs -o mode=1777 none {root}/tmp",
            f"mount -t tmpfs -o uid=1000,gid=1000 none {root}/home/patternnet",
            f"mount --bind {shlex.quote(str(data))} {root}/mnt",
        ]
        return self._enter(mounts, ["chroot", "--userspec=1000:1000", self.root], command, "--net")

    def _enter(self, mounts: list[str], into: list[str | Path], command: str, *apart: str) -> str:
        for name in ("dev", "proc", "dev/shm"):
            mounts.append(
                f"mount -t proc proc {self.root}/proc" if name == "proc" else f"mount --bind /{name} {self.root}/{name}"
            )
        mounts += [f"mount --bind {path} {self.root}{path}" for path in self.seen]
        env = [f"{name}={value}" for name, value in {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **self.env}.items()]
        inside = shlex.join(["exec", *map(str, into), "env", "-i", *env, "/bin/sh", "-ec", command])
        apart = ("unshare", "--mount", "--pid", "--fork", "--kill-child", *apart)
        done = subprocess.run(
            [*apart, "sh", "-ec", "\n".join([*mounts, inside])],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout[-5000:]}"
        return done.stdout


def package_sources() -> tuple[dict[str, str], list[Path]]:
    """Return pip's package sources of this machine as environment variables, and the folders and files they name."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    settings = dict(re.findall(r"^\S*?([\w-]+)='(.*)'$", listed.stdout, re.M))
    wanted = ("index-url", "extra-index-url", "find-links", "trusted-host", "proxy", "cert", "timeout")
    kept = {key: settings[key] for key in wanted if key in settings}
    paths = [Path(word.removeprefix("file://")) for value in kept.values() for word in value.split()]
    # An index in a folder links to neighboring files.
    folders = [path.parent if path.name == "simple" else path for path in paths if path.is_absolute() and path.exists()]
    return {f"PIP_{key.upper().replace('-', '_')}": value for key, value in kept.items()}, folders


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """The system that the Dockerfile's steps build from the Debian release of its base image."""
    for tool in ("debootstrap", "unshare", "ip"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}")
    if os.geteuid() != 0:
        pytest.skip("needs root, for chroot")
    scratch = tmp_path_factory.mktemp("image")
    if shutil.disk_usage(scratch).free < 20 << 30:
        pytest.skip("needs 20 GB of disk")
    built = System(scratch / "root")
    try:
        build(built)
        yield built
    finally:
        shutil.rmtree(scratch)


def build(system: System) -> None:
    """Run the Dockerfile's steps, both stages in one root, with Debian's Python instead of the base image's."""
    (release,) = re.findall(r"slim-(\w+)@", "".join(said("ARG")))
    targets = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(RELEASE) $(REPO_URI)", "Created-By: Packages"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    mirror = dict(line.split() for line in targets.stdout.splitlines())[release]
    bootstrap = ["debootstrap", "--variant=minbase", "--include=python3,python3-venv", release]
    subprocess.run([*bootstrap, system.root, mirror], check=True, stdout=subprocess.DEVNULL)
    settings, system.seen = package_sources()
    for path in system.seen:
        here = system.root / path.relative_to("/")
        here.parent.mkdir(parents=True, exist_ok=True)
        here.mkdir(exist_ok=True) if path.is_dir() else here.touch()
    arguments = dict(text.split("=", 1) for text in said("ARG") if not text.startswith("BASE="))
    for word, rest in STEPS:
        if word == "RUN":
            system.env |= settings | arguments
            system.run(rest)
        elif word == "ENV":
            path = system.env.get("PATH", "/usr/local/bin:/usr/bin:/bin")
            system.env |= dict(pair.replace("${PATH}", path).split("=", 1) for pair in shlex.split(rest))
        elif word == "COPY" and not rest.startswith("--from"):
            source, target = rest.split()
            copy(source, system.root / target.strip("/"))
    system.env = {k: v for k, v in system.env.items() if k not in settings | arguments}


def copy(source: str, target: Path) -> None:
    """Copy files of this repository that .dockerignore admits."""
    allowed = [line[1:] for line in (IMAGE / "Dockerfile.dockerignore").read_text().split() if line.startswith("!")]
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for file in map(Path, listed.stdout.splitlines()):
        if file.parts[0] in allowed and (ROOT / file).exists() and (source == "." or file.match(source)):
            there = target / (file if source == "." else file.name)
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / file, there)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of uid 1000 with a model and shards."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "model.py").write_text(MODEL)
    make_shards(folder, 2, 6)
    for path in (folder, *folder.iterdir()):
        os.chown(path, 1000, 1000)
    return folder


FIT = (
    "fit --model /mnt/model.py:small --weights random --shards '/mnt/*.tar' "
    "--image-size 16 --resize 16 --mean 0.5,0.5,0.5 --std 0.25,0.25,0.25"
)


@pytest.mark.slow
def test_system_built_from_the_dockerfile_runs_a_fit(system: System, data: Path) -> None:
    said = system.run_locked_down("patternnet --version; id -u; pwd; touch /opt/x || true", data)
    assert f"patternnet {PROJECT['version']}" in said
    assert "Read-only file system" in said
    assert "12 samples of 2 shards" in system.run_locked_down(f"patternnet {FIT} --out /mnt/run --workers 0", data)


@pytest.mark.slow
def test_login_shell_finds_the_programs(system: System, data: Path) -> None:
    said = system.run_locked_down("bash -lc 'command -v patternnet ray python wget'", data)
    assert said.split() == [
        *(f"/opt/patternnet/bin/{name}" for name in ("patternnet", "ray", "python")),
        "/usr/bin/wget",
    ]


@pytest.mark.slow
def test_ray_in_the_image_requires_a_token_and_runs_a_fit_on_a_read_only_root(system: System, data: Path) -> None:
    start = "export RAY_AUTH_TOKEN=$(printf %064d 1); ray start --head --num-cpus=2 --include-dashboard=false"
    fit = f"patternnet {FIT} --out /mnt/by-ray --workers 1 --address auto"
    asked = "ray status >/dev/null && echo accepted; RAY_AUTH_TOKEN=$(printf %064d 2) ray status 2>&1 || echo rejected"
    said = system.run_locked_down(f"{start}; {fit}; {asked}; ray stop", data)
    assert "12 samples of 2 shards" in said
    assert re.search(r"^accepted$.*[Ii]nvalid.*token.*^rejected$", said, re.M | re.S), said


@pytest.mark.slow
def test_bill_of_materials_lists_the_lock(system: System) -> None:
    bill = json.loads((system.root / "opt/patternnet/sbom.cdx.json").read_text())
    assert bill["bomFormat"] == "CycloneDX"
    assert bill["metadata"]["component"]["name"] == PROJECT["name"]
    listed = {canonicalize_name(part["name"]): part["version"] for part in bill["components"]}
    assert locked("cuda").items() <= listed.items()
