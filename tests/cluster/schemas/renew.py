"""Makes the schemas of this folder anew, from packages: see README.md.

pip download --no-deps --dest DIR kubernetes-validate==1.37.0 google-api-python-client==2.202.0 skypilot==0.14.1
python tests/cluster/schemas/renew.py DIR
"""

import importlib
import json
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

HERE = Path(__file__).parent
KUBERNETES = "v1.34.0"
# What the definitions consist of, and what KubeRay's refer to.
ROOTS = [
    "io.k8s.api.core.v1.ConfigMap",
    "io.k8s.api.core.v1.Namespace",
    "io.k8s.api.core.v1.PersistentVolumeClaim",
    "io.k8s.api.core.v1.PodTemplateSpec",
    "io.k8s.api.core.v1.Service",
    "io.k8s.api.core.v1.ServiceAccount",
    "io.k8s.api.networking.v1.NetworkPolicy",
]
REF = "$ref"
NUMBER = r"(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))"
# As KubeRay's CRDs have it; Kubernetes' own schema takes any string.
QUANTITY = {
    "anyOf": [
        {"type": "integer"},
        {
            "type": "string",
            "pattern": rf"^(\+|-)?{NUMBER}(([KMGTPE]i)|[numkMGTPE]|([eE](\+|-)?{NUMBER}))?$",
        },
    ]
}


def trimmed(schema: Any) -> Any:
    """A schema without descriptions, without what only Kubernetes reads, and without leave to put null anywhere."""
    if isinstance(schema, list):
        return [trimmed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept: dict[str, Any] = {}
    for name, value in schema.items():
        if name == "properties":  # whose names are fields', such as `description`
            kept[name] = {field: trimmed(of_field) for field, of_field in value.items()}
        elif name == "type" and isinstance(value, list):
            (kept[name],) = [kind for kind in value if kind != "null"]
        elif name not in ("description", "format") and not name.startswith("x-kubernetes"):
            kept[name] = trimmed(value)
    return kept


def references(schema: Any) -> Iterator[str]:
    """The names of the definitions that a schema refers to."""
    if isinstance(schema, dict):
        if isinstance(reference := schema.get(REF), str):
            yield reference.rsplit("/", 1)[-1]
        schema = list(schema.values())
    if isinstance(schema, list):
        for item in schema:
            yield from references(item)


def reachable(definitions: dict[str, Any], roots: list[str]) -> dict[str, Any]:
    """The definitions that the roots consist of, and these themselves."""
    found: dict[str, Any] = {}
    left = list(roots)
    while left:
        if (name := left.pop()) not in found:
            found[name] = trimmed(definitions[name])
            left += references(found[name])
    return dict(sorted(found.items()))


def write(name: str, definitions: dict[str, Any]) -> None:
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in definitions.items())
    (HERE / name).write_text('{"$defs": {\n' + lines + "\n}}\n")


def skypilot_schemas(wheel: Path) -> dict[str, Any]:
    """The schemas of a task and of its resources, from SkyPilot's module that makes them.

    Only this module is imported, with stand-ins for its parents and for a module that needs more packages.
    """
    with tempfile.TemporaryDirectory() as unpacked:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked)
        for name in ("sky", "sky.skylet", "sky.utils"):
            sys.modules[name] = ModuleType(name)
            sys.modules[name].__path__ = [str(Path(unpacked, *name.split(".")))]
        autostop = ModuleType("sky.skylet.autostop_lib")
        modes = SimpleNamespace(supported_modes=lambda: ["jobs_and_ssh", "jobs", "none"])
        vars(sys.modules["sky"])["__version__"], vars(autostop)["AutostopWaitFor"] = "0", modes
        sys.modules["sky.skylet.autostop_lib"] = vars(sys.modules["sky.skylet"])["autostop_lib"] = autostop
        schemas: Any = importlib.import_module("sky.utils.schemas")
        schemas._task_config_schema = lambda: {"type": "object"}  # the client's settings
        task, resources = schemas.get_task_schema(), schemas.get_resources_schema()
    task["properties"]["resources"] = {REF: "#/$defs/Resources"}
    for each in (task, resources):
        each.pop("$schema")
    for option in resources["properties"]["job_recovery"]["anyOf"]:  # a client lets through what a server refuses
        if option["type"] == "object":
            option["additionalProperties"] = False
    return {"Task": task, "Resources": resources}


def main(folder: Path) -> None:
    (wheel,) = folder.glob("kubernetes_validate-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        path = f"kubernetes_validate/kubernetes-json-schema/{KUBERNETES}-local-strict/_definitions.json"
        kubernetes = reachable(json.loads(archive.read(path))["$defs"], ROOTS)
    write("kubernetes.json", kubernetes | {"io.k8s.apimachinery.pkg.api.resource.Quantity": QUANTITY})
    (wheel,) = folder.glob("google_api_python_client-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        compute = json.loads(archive.read("googleapiclient/discovery_cache/documents/compute.v1.json"))
    instance = reachable(compute["schemas"], ["Instance"])
    for schema in instance.values():  # Google's API refuses unknown fields, and says so nowhere in its schemas
        schema["additionalProperties"] = False
        schema.pop("id", None)
    text = json.dumps(instance).replace(f'"{REF}": "', f'"{REF}": "#/$defs/')
    write("compute.json", json.loads(text))
    (wheel,) = folder.glob("skypilot-*.whl")
    write("skypilot.json", skypilot_schemas(wheel))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
