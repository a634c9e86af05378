"""The Kubernetes definitions: valid for Kubernetes and KubeRay, closed to the outside, with valid commands.

No cluster is needed. Every check is also tested to fail on a broken copy.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.kubernetes_breaks import HEAD, OF_JOBS, POLICIES, WORKER, changed, policy, removed
from tests.cluster.kubernetes_objects import (
    BUILD,
    DEFINITIONS,
    JOBS,
    OVERLAYS,
    PAGE,
    ROOT,
    Object,
    arguments,
    complaints,
    containers,
    groups,
    job,
    objects,
    of_kind,
    parsed,
    pods,
    rendered,
)
from tests.cluster.kubernetes_policies import PREEMPTIBLE, Policy, lands_on

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not BUILD, reason="needs kubectl or kustomize to render the definitions"),
]


def breaks(table: dict[str, Policy], overlays: list[str]) -> Iterator[Any]:
    for overlay, (promise, of_promise) in product(overlays, table.items()):
        for how in of_promise.broken:
            yield pytest.param(overlay, of_promise, how, id=f"{overlay}: {promise}: {how}")


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("promise", [*POLICIES, *OF_JOBS])
def test_policy_holds(overlay: str, promise: str) -> None:
    assert (POLICIES | OF_JOBS)[promise].holds(objects(overlay))


@pytest.mark.parametrize(("overlay", "of_promise", "how"), [*breaks(POLICIES, OVERLAYS), *breaks(OF_JOBS, JOBS)])
def test_copy_that_breaks_a_policy_is_detected(overlay: str, of_promise: Policy, how: str) -> None:
    changed_copy = objects(overlay)
    of_promise.broken[how](changed_copy)
    assert not of_promise.holds(changed_copy)


# --- The schemas

# Ways to make a definition invalid: another value at a path, or another name of a field.
WRONG: dict[str, Callable[[list[Object]], Any]] = {
    "API version": lambda o: of_kind(o, "RayCluster", "RayJob")[0].update(apiVersion="ray.io/v2"),
    "kind": lambda o: of_kind(o, "RayCluster", "RayJob")[0].update(kind="RayBatch"),
    "kind of Kubernetes": lambda o: of_kind(o, "NetworkPolicy")[0].update(apiVersion="extensions/v1beta1"),
    "no spec": lambda o: of_kind(o, "RayCluster", "RayJob")[0].pop("spec") and None,
    "no head": removed("headGroupSpec"),
    "no template": removed("workerGroupSpecs/0/template"),
    "no group name": removed("workerGroupSpecs/0/groupName"),
    "no containers": removed(f"{WORKER}/containers"),
    "misspelt in KubeRay's": changed("enableIntreeAutoscaling", True),
    "misspelt in a group": changed("workerGroupSpecs/0/maxReplica", 4),
    "misspelt in a pod": changed(f"{HEAD}/securitycontext", {}),
    "misspelt in a container": changed(f"{WORKER}/containers/0/volumeMount", []),
    "misspelt in a volume": lambda o: pods(o)[0]["spec"]["volumes"][0]["emptyDir"].update(sizelimit="1Gi"),
    "misspelt in a policy": lambda o: policy(o, "nodes").update(ingres=[]),
    "number for text": changed("headGroupSpec/rayStartParams/num-cpus", 0),
    "text for number": changed("workerGroupSpecs/0/maxReplicas", "4"),
    "text for list": changed(f"{WORKER}/containers/0/command", "ray start"),
    "text for flag": changed(f"{HEAD}/automountServiceAccountToken", "false"),
    "null": changed(f"{HEAD}/securityContext/runAsUser", None),
    "no quantity": changed(f"{WORKER}/containers/0/resources/limits/memory", "24 GB"),
    "authentication": changed("authOptions/mode", "password"),
    "autoscaling": changed("autoscalerOptions", {"upscalingMode": "Fast"}),
    "port": lambda o: policy(o, "operator")["ingress"][0]["ports"][0].update(port=[8265]),
    "label": lambda o: of_kind(o, "Namespace")[0]["metadata"]["labels"].update(enforced=True),
}
WRONG_JOB: dict[str, Callable[[list[Object]], Any]] = {
    "misspelt in a job": lambda o: job(o).update(entryPoint="true"),
    "submission": lambda o: job(o).update(submissionMode="SshMode"),
    "retries": lambda o: job(o).update(backoffLimit="2"),
    "list for text": lambda o: job(o).update(entrypoint=["patternnet", "fit"]),
    "submitter": lambda o: job(o)["submitterPodTemplate"]["spec"].pop("containers"),
}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kubernetes_and_kuberay_accept_every_field(overlay: str) -> None:
    assert complaints(objects(overlay)) == []


@pytest.mark.parametrize(
    ("overlay", "how"),
    [*product(OVERLAYS, WRONG), *product(JOBS, WRONG_JOB)],
    ids=lambda value: value.replace(" ", "-"),
)
def test_invalid_definition_is_rejected(overlay: str, how: str) -> None:
    changed_copy = objects(overlay)
    (WRONG | WRONG_JOB)[how](changed_copy)
    assert complaints(changed_copy)


@pytest.mark.full
@pytest.mark.parametrize(("gpu", "spot", "storage"), product((False, True), (False, True), ("volume", "s3")))
def test_any_combination_of_components_is_valid(gpu: bool, spot: bool, storage: str, tmp_path: Path) -> None:
    parts = [name for name, wanted in (("gpu", gpu), ("spot", spot), (storage, True), ("fit", True)) if wanted]
    here = Path(os.path.relpath(DEFINITIONS, tmp_path))
    choice = {
        "namespace": "patternnet",
        "resources": [str(here / "base")],
        "components": [str(here / "components" / part) for part in parts],
        "images": [{"name": "patternnet-ray", "newName": "registry.example/patternnet-ray"}],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(choice))
    made = json.loads(rendered(tmp_path))
    assert complaints(made) == []
    assert [promise for promise, of_promise in (POLICIES | OF_JOBS).items() if not of_promise.holds(made)] == []
    (worker,) = groups(made)[1:]
    assert int(worker["rayStartParams"]["num-gpus"]) == gpu
    assert all(c["image"].endswith("-cuda" if gpu else "-cpu") for c in containers(made) if "image" in c)
    assert all(lands_on(worker["template"], {key: value}) for key, value in PREEMPTIBLE.items())
    assert lands_on(worker["template"], {}) is not spot


# --- The command


@pytest.mark.parametrize("overlay", JOBS)
def test_command_is_valid(overlay: str) -> None:
    all_objects = objects(overlay)
    words, (settings,) = arguments(all_objects), of_kind(all_objects, "ConfigMap")
    values, data = parsed(words), settings["data"]["DATA"]
    assert words[1] == overlay.partition("-")[0]
    (shards,) = values["shards"]
    assert re.fullmatch(re.escape(data) + r"/shards/\w+-\{\d+\.\.\d+\}\.tar", shards)  # no shell expanded the braces
    assert (values["out"] or values["patterns"]).startswith(f"{data}/runs/")


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ("--min-worker 4", "No such option"),
        ("--batch-size many", "valid integer"),
        ("--max-loss soon", "not a duration"),
        ("argument", "unexpected extra argument"),
    ],
)
def test_invalid_command_is_rejected(wrong: str, complaint: str) -> None:
    all_objects = objects(JOBS[0])
    job(all_objects)["entrypoint"] += f" {wrong}"
    with pytest.raises(Exception, match=complaint):
        parsed(arguments(all_objects))


def test_shell_expansion_of_braces_is_detected() -> None:
    all_objects = objects(JOBS[0])
    job(all_objects)["entrypoint"] = job(all_objects)["entrypoint"].replace('"', "")
    with pytest.raises(Exception, match="unexpected extra argument"):
        parsed(arguments(all_objects))


def test_explain_uses_the_run_of_the_fit() -> None:
    fit, explain = (parsed(arguments(objects(f"{name}-gpu-spot-s3"))) for name in ("fit", "explain"))
    assert explain["patterns"] == fit["out"]


# --- The page


def test_page_names_exactly_the_existing_parts() -> None:
    parts = {path.name for path in (DEFINITIONS / "components").iterdir()} - {"job"}
    values = set(re.findall(r"^\| `([\w-]+)` \|", PAGE, re.M))
    assert values == parts | set(OVERLAYS)
    for path in re.findall(r"cluster/kubernetes/(?:base|components|overlays)/[\w/.-]+", PAGE):
        assert (ROOT / path).exists(), path
