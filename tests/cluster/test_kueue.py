"""The definition for Kueue: queued, of a fixed size, and as Kueue's webhook admits it.

That it is valid and keeps the policies of all definitions is tested with the others (`test_kubernetes.py`).
"""

from collections.abc import Callable
from typing import Any

import pytest

from tests.cluster.kubernetes_objects import BUILD, OVERLAYS, Object, complaints, groups, job, objects, of_kind, spec

QUEUE = "kueue.x-k8s.io/queue-name"
QUEUED = [name for name in OVERLAYS if "kueue" in name]
MAX_GROUPS = 7  # of workers; Kueue counts at most eight sets of pods

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not BUILD, reason="needs kubectl or kustomize to render the definitions"),
]


def waits_in_its_queue(all_objects: list[Object]) -> bool:
    """The job names a queue of its own namespace, which belongs to a quota."""
    (owner,), queues = of_kind(all_objects, "RayJob"), of_kind(all_objects, "LocalQueue")
    names = {(queue["metadata"]["name"], queue["metadata"]["namespace"]) for queue in queues}
    wanted = owner["metadata"].get("labels", {}).get(QUEUE), owner["metadata"]["namespace"]
    return wanted in names and all(queue["spec"]["clusterQueue"] for queue in queues)


def is_admitted(all_objects: list[Object]) -> bool:
    """What Kueue's webhook demands of a job with a queue."""
    of_job, workers = job(all_objects), groups(all_objects)[1:]
    fixed = all(group["replicas"] == group["minReplicas"] == group["maxReplicas"] for group in workers)
    return (
        of_job.get("shutdownAfterJobFinishes") is True
        and "clusterSelector" not in of_job
        and not of_job.get("suspend")
        and not spec(all_objects).get("enableInTreeAutoscaling")
        and "autoscalerOptions" not in spec(all_objects)
        and len(workers) <= MAX_GROUPS
        and all(group["groupName"] != "head" for group in workers)
        and fixed
    )


def counts_what_it_takes(all_objects: list[Object]) -> bool:
    """Every container says what it takes, because Kueue counts nothing else."""
    pods = [group["template"] for group in groups(all_objects)] + [job(all_objects)["submitterPodTemplate"]]
    asked = [container["resources"]["requests"] for pod in pods for container in pod["spec"]["containers"]]
    return all({"cpu", "memory"} <= set(each) for each in asked)


HOLDS = (waits_in_its_queue, is_admitted, counts_what_it_takes)


def owner(all_objects: list[Object]) -> Object:
    return of_kind(all_objects, "RayJob")[0]


BROKEN: dict[str, Callable[[list[Object]], Any]] = {
    "no label": lambda o: owner(o)["metadata"].pop("labels"),
    "another queue": lambda o: owner(o)["metadata"]["labels"].update({QUEUE: "other"}),
    "no queue": lambda o: o.remove(of_kind(o, "LocalQueue")[0]),
    "another namespace": lambda o: of_kind(o, "LocalQueue")[0]["metadata"].update(namespace="default"),
    "autoscaler": lambda o: spec(o).update(enableInTreeAutoscaling=True),
    "range of workers": lambda o: groups(o)[1].update(minReplicas=0),
    "cluster that stays": lambda o: job(o).update(shutdownAfterJobFinishes=False),
    "suspended for ever": lambda o: job(o).update(suspend=True),
    "no request": lambda o: groups(o)[1]["template"]["spec"]["containers"][0]["resources"]["requests"].pop("cpu"),
}
INVALID: dict[str, Callable[[list[Object]], Any]] = {
    "old version": lambda o: of_kind(o, "LocalQueue")[0].update(apiVersion="kueue.x-k8s.io/v1alpha1"),
    "misspelt": lambda o: of_kind(o, "LocalQueue")[0]["spec"].update(clusterqueue="batch"),
    "no quota": lambda o: of_kind(o, "LocalQueue")[0]["spec"].pop("clusterQueue"),
    "no name": lambda o: of_kind(o, "LocalQueue")[0]["spec"].update(clusterQueue="Batch Queue"),
}


@pytest.mark.parametrize("overlay", QUEUED)
def test_job_is_queued_and_admitted(overlay: str) -> None:
    assert all(holds(objects(overlay)) for holds in HOLDS)


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("overlay", QUEUED)
def test_copy_that_breaks_a_rule_is_detected(overlay: str, how: str) -> None:
    changed = objects(overlay)
    BROKEN[how](changed)
    assert not all(holds(changed) for holds in HOLDS)


@pytest.mark.parametrize("how", INVALID)
@pytest.mark.parametrize("overlay", QUEUED)
def test_invalid_queue_is_rejected(overlay: str, how: str) -> None:
    changed = objects(overlay)
    INVALID[how](changed)
    assert complaints(changed)
