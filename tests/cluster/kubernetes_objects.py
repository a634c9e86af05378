"""The objects that the Kubernetes definitions render to, and the command that they run."""

import json
import os
import re
import shlex
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import typer
import yaml
from jsonschema import Draft202012Validator

ROOT = Path(__file__).parents[2]
DEFINITIONS = ROOT / "cluster" / "kubernetes"
SCHEMAS = Path(__file__).parent / "schemas"
OVERLAYS = sorted(path.name for path in (DEFINITIONS / "overlays").iterdir())
JOBS = [name for name in OVERLAYS if not name.startswith("cluster")]
PAGE = (ROOT / "docs" / "kubernetes.md").read_text()
TOKEN = "patternnet-token"
MEMORY = {"Mi": 1 << 20, "Gi": 1 << 30}

Object = dict[str, Any]

BUILD = next(
    (
        [path, *more]
        for name, *more in (["kubectl", "kustomize"], ["kustomize", "build"])
        if (path := shutil.which(name))
    ),
    [],
)


@cache
def rendered(folder: Path) -> str:
    """Return the rendered objects of a folder as JSON."""
    done = subprocess.run([*BUILD, str(folder)], capture_output=True, text=True, check=True)
    return json.dumps(list(yaml.safe_load_all(done.stdout)))


def objects(overlay: str) -> list[Object]:
    """Return the objects of an overlay; the caller may change them."""
    return json.loads(rendered(DEFINITIONS / "overlays" / overlay))


# --- Validity


@cache
def definitions() -> dict[str, Object]:
    files = [json.loads((SCHEMAS / name).read_text()) for name in ("kubernetes.json", "kuberay.json", "kueue.json")]
    return {name: schema for file in files for name, schema in file["$defs"].items()}


@cache
def validator(api: str, kind: str) -> Draft202012Validator | None:
    """Return the validator of a kind of objects; None if the schemas do not have the kind."""
    for name in definitions():
        group, version, of = name.removeprefix("io.k8s.api.").rsplit(".", 2)
        if of == kind and api in (
            f"{group}/{version}",
            f"{group}.k8s.io/{version}",
            version if group == "core" else None,
        ):
            return Draft202012Validator({"$ref": f"#/$defs/{name}", "$defs": definitions()})
    return None


def complaints(all_objects: list[Object]) -> list[str]:
    """Return the errors of objects by their schemas."""
    found = []
    for item in all_objects:
        if (of_kind := validator(item["apiVersion"], item["kind"])) is None:
            found.append(f"no {item['kind']} of {item['apiVersion']}")
        else:
            found += [f"{item['kind']} {e.json_path}: {e.message}" for e in of_kind.iter_errors(item)]
    return found


# --- Parts of the objects


def of_kind(all_objects: list[Object], *kinds: str) -> list[Object]:
    return [item for item in all_objects if item["kind"] in kinds]


def spec(all_objects: list[Object]) -> Object:
    """Return the cluster's spec, which may be part of a job."""
    (owner,) = of_kind(all_objects, "RayCluster", "RayJob")
    return owner["spec"].get("rayClusterSpec", owner["spec"])


def job(all_objects: list[Object]) -> Object:
    """Return the job's spec; empty if there is no job."""
    found = of_kind(all_objects, "RayJob")
    return found[0]["spec"] if found else {}


def groups(all_objects: list[Object]) -> list[Object]:
    """Return the groups of nodes, the head first."""
    return [spec(all_objects)["headGroupSpec"], *spec(all_objects)["workerGroupSpecs"]]


def pods(all_objects: list[Object]) -> list[Object]:
    """Return the pod templates of head, workers and submitter."""
    templates = [group["template"] for group in groups(all_objects)]
    return templates + ([job(all_objects)["submitterPodTemplate"]] if job(all_objects) else [])


def containers(all_objects: list[Object]) -> list[Object]:
    """Return the containers of all pods and of the autoscaler that KubeRay adds to the head."""
    found = [
        item
        for pod in pods(all_objects)
        for kind in ("initContainers", "containers")
        for item in pod["spec"].get(kind, [])
    ]
    return found + (
        [spec(all_objects)["autoscalerOptions"]] if spec(all_objects).get("enableInTreeAutoscaling") else []
    )


def variables(container: Object) -> dict[str, Object]:
    return {variable["name"]: variable for variable in container.get("env", [])}


def amount(quantity: str) -> float:
    """Parse a quantity of CPUs or bytes."""
    number, unit = re.fullmatch(r"([\d.]+)(\D*)", quantity).groups()  # type: ignore[union-attr]
    return float(number) * {"": 1, "m": 0.001, **MEMORY}[unit]


def at(value: Any, path: str) -> Any:
    for step in filter(None, path.split("/")):
        value = value[int(step) if step.isdigit() else step]
    return value


# --- The command, as it arrives at the program


def arguments(all_objects: list[Object]) -> list[str]:
    """The program's arguments, after the submitter's shell, Ray's client and the shell of Ray's job.

    KubeRay puts the entrypoint behind `ray job submit … --` in a line for Bash, whose variables are the submitter's;
    Ray joins what it gets by shlex, and runs that in a shell on the head.
    """
    (data,) = of_kind(all_objects, "ConfigMap")
    sent = opened("bash", f"{job(all_objects)['entrypoint'].strip()} ;", data["data"])
    return opened("sh", shlex.join(sent), {})


def opened(shell: str, line: str, given: dict[str, str]) -> list[str]:
    """Return the words of a line after a shell has parsed it."""
    command = [shell, "-c", rf"printf '%s\0' {line}"]
    done = subprocess.run(command, env={**os.environ, **given}, capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


def parsed(words: list[str]) -> dict[str, Any]:
    """Parse a command as the program does; raise if the command or an option is unknown."""
    from ray_jobs.cli.app import make_app

    program, name, *options = words
    assert program == "patternnet"
    command = typer.main.get_command(make_app()).commands[name]  # type: ignore[attr-defined]
    return command.make_context(name, options).params


@cache
def ray_start_options() -> frozenset[str]:
    from ray.scripts.scripts import start

    return frozenset(option.removeprefix("--") for parameter in start.params for option in parameter.opts)
