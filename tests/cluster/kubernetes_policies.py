"""Policies of the Kubernetes definitions: a predicate for each."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.cluster.kubernetes_objects import (
    PAGE,
    TOKEN,
    Object,
    amount,
    arguments,
    containers,
    groups,
    job,
    of_kind,
    parsed,
    pods,
    ray_start_options,
    spec,
    variables,
)

# --- Policies: a predicate for each, and ways to break it.


@dataclass(frozen=True)
class Policy:
    holds: Callable[[list[Object]], bool]
    broken: dict[str, Callable[[list[Object]], Any]]


ALLOWED_VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}


def is_restricted(all_objects: list[Object]) -> bool:
    """The Pod Security Standard `restricted`, version 1.34."""
    for pod in (template["spec"] for template in pods(all_objects)):
        security = pod["securityContext"]
        if any(pod.get(name) for name in ("hostNetwork", "hostPID", "hostIPC")):
            return False
        if any(set(volume) - {"name"} - ALLOWED_VOLUMES for volume in pod["volumes"]):
            return False
        if security.get("runAsNonRoot") is not True or security.get("runAsUser") == 0:
            return False
        if security.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
            return False
    for container in containers(all_objects):
        security = container.get("securityContext", {})
        overridden = {"runAsNonRoot", "runAsUser", "seccompProfile", "procMount", "seLinuxOptions", "appArmorProfile"}
        if (
            security.get("privileged")
            or security.get("allowPrivilegeEscalation") is not False
            or overridden & set(security)
        ):
            return False
        if security.get("capabilities") != {"drop": ["ALL"]}:
            return False
        if any("hostPort" in port for port in container.get("ports", [])):
            return False
    return True


def namespace_refuses_others(all_objects: list[Object]) -> bool:
    (namespace,) = of_kind(all_objects, "Namespace")
    inside = {item["metadata"].get("namespace") for item in all_objects if item is not namespace}
    labels = namespace["metadata"]["labels"]
    return labels.get("pod-security.kubernetes.io/enforce") == "restricted" and inside == {
        namespace["metadata"]["name"]
    }


def disks_are_written_where_they_may_be(all_objects: list[Object]) -> bool:
    """The root is read-only, everything that Ray and torch write is mounted, and every mount has a volume."""
    for pod in pods(all_objects):
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        for container in pod["spec"]["containers"]:
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            needed = {"/tmp", "/home/patternnet"} | (
                {"/tmp/ray", "/dev/shm"} if container["name"].startswith("ray-") else set()
            )
            if not needed <= set(mounts) or not set(mounts.values()) <= set(volumes):
                return False
            if any("sizeLimit" not in volumes[mounts[path]]["emptyDir"] for path in needed):
                return False
    return all(c.get("securityContext", {}).get("readOnlyRootFilesystem") is True for c in containers(all_objects))


def memory_is_reserved(all_objects: list[Object]) -> bool:
    def same(resources: Object) -> bool:
        return "memory" in resources.get("limits", {}) and resources["limits"] == resources.get("requests")

    return all(same(container.get("resources", {})) for container in containers(all_objects))


def images_are_one_pinned(all_objects: list[Object]) -> bool:
    images = {container["image"] for container in containers(all_objects) if "image" in container}
    return len(images) == 1 and bool(re.fullmatch(r".+/patternnet-ray:\d+\.\d+\.\d+-(cpu|cuda)", images.pop()))


SECRET = re.compile(r"token|secret|password|credential|access_key", re.I)


def secrets_are_references(all_objects: list[Object]) -> bool:
    if of_kind(all_objects, "Secret"):
        return False
    given = [variable for container in containers(all_objects) for variable in container.get("env", [])]
    values = [key for data in of_kind(all_objects, "ConfigMap") for key in data["data"]]
    return not any("value" in v and SECRET.search(v["name"]) for v in given) and not any(map(SECRET.search, values))


def token_is_asked_for(all_objects: list[Object]) -> bool:
    """Every container requires the token by its variables, the operator and its autoscaler by authOptions."""

    def has_token(container: Object) -> bool:
        own = variables(container)
        wanted = {"secretKeyRef": {"name": TOKEN, "key": "auth_token"}}
        return (
            own.get("RAY_AUTH_MODE", {}).get("value") == "token"
            and own.get("RAY_AUTH_TOKEN", {}).get("valueFrom") == wanted
        )

    own = [container for pod in pods(all_objects) for container in pod["spec"]["containers"]]
    return all(map(has_token, own)) and spec(all_objects).get("authOptions") == {"mode": "token", "secretName": TOKEN}


def selects(selector: Object, labels: dict[str, str]) -> bool:
    assert set(selector) <= {"matchLabels"}
    return selector.get("matchLabels", {}).items() <= labels.items()


def written(rule: Object) -> str:
    return json.dumps(rule, sort_keys=True)


def only_own_pods_and_the_operator_come_in(all_objects: list[Object]) -> bool:
    """Own pods reach every pod; the operator reaches only the dashboard of the head."""
    policies = [item["spec"] for item in of_kind(all_objects, "NetworkPolicy")]
    if not any(
        p["podSelector"] == {}
        and set(p["policyTypes"]) == {"Ingress", "Egress"}
        and set(p) <= {"podSelector", "policyTypes"}
        for p in policies
    ):
        return False
    own = {"podSelector": {"matchLabels": {"app.kubernetes.io/name": "patternnet"}}}
    operator: Object = {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kuberay-system"}},
        "podSelector": {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}},
    }
    for pod in pods(all_objects):
        labels = pod["metadata"]["labels"]
        rules = [r for p in policies if selects(p["podSelector"], labels) for r in p.get("ingress", [])]
        wanted: list[Object] = [{"from": [own]}]
        if labels["app.kubernetes.io/component"] == "head":
            wanted.append({"from": [operator], "ports": [{"protocol": "TCP", "port": 8265}]})
        if sorted(map(written, rules)) != sorted(map(written, wanted)):
            return False
    return True


def only_what_is_named_goes_out(all_objects: list[Object]) -> bool:
    """Traffic leaves only to own pods and to the ports of DNS, HTTPS and, from the head, Kubernetes."""
    policies = [item["spec"] for item in of_kind(all_objects, "NetworkPolicy")]
    rules = [rule for policy in policies for rule in policy.get("egress", [])]
    return all(
        {port["port"] for port in rule["ports"]} <= {53, 443, 6443} if "ports" in rule else [*rule] == ["to"]
        for rule in rules
    )


def nothing_is_exposed(all_objects: list[Object]) -> bool:
    head = groups(all_objects)[0]
    return not of_kind(all_objects, "Ingress", "Service") and not {"enableIngress", "serviceType", "headService"} & set(
        head
    )


def kubernetes_is_not_within_reach(all_objects: list[Object]) -> bool:
    """Our containers have no Kubernetes credentials, and there is no role besides the one from KubeRay."""
    accounts = of_kind(all_objects, "ServiceAccount")
    if of_kind(all_objects, "Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding"):
        return False
    if any(
        item.get("automountServiceAccountToken") is not False
        for item in [*accounts, *(p["spec"] for p in pods(all_objects))]
    ):
        return False
    names = {account["metadata"]["name"] for account in accounts}
    if not {pod["spec"]["serviceAccountName"] for pod in pods(all_objects)} <= names:
        return False
    for pod in pods(all_objects):
        holding = {
            v["name"]
            for v in pod["spec"]["volumes"]
            for s in v.get("projected", {}).get("sources", [])
            if "serviceAccountToken" in s
        }
        if any(
            mount["name"] in holding for container in pod["spec"]["containers"] for mount in container["volumeMounts"]
        ):
            return False
    worker = groups(all_objects)[1]["template"]["spec"]["serviceAccountName"]
    return worker == "patternnet"  # KubeRay binds its role to the account of the head


def rays_nodes_are_as_large_as_their_containers(all_objects: list[Object]) -> bool:
    head, *workers = groups(all_objects)
    for group in (head, *workers):
        values, pod = group["rayStartParams"], group["template"]["spec"]
        (limits,) = [container["resources"]["limits"] for container in pod["containers"]]
        (shared,) = [volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == "shared-mem"]
        if group is not head and float(values["num-cpus"]) != amount(limits["cpu"]):
            return False
        if int(values["num-gpus"]) != int(limits.get("nvidia.com/gpu", "0")) or shared["medium"] != "Memory":
            return False
        if not int(values["object-store-memory"]) < amount(shared["sizeLimit"]) <= amount(limits["memory"]) / 2:
            return False
    return True


def ray_knows_its_options(all_objects: list[Object]) -> bool:
    return all(set(group["rayStartParams"]) <= ray_start_options() for group in groups(all_objects))


PREEMPTIBLE = {
    "karpenter.sh/capacity-type": "spot",
    "eks.amazonaws.com/capacityType": "SPOT",
    "cloud.google.com/gke-spot": "true",
    "kubernetes.azure.com/scalesetpriority": "spot",
}


def lands_on(pod: Object, labels: dict[str, str]) -> bool:
    """Return whether a pod can be scheduled on a node with these labels."""
    affinity = pod["spec"].get("affinity", {}).get("nodeAffinity", {})
    terms = affinity.get("requiredDuringSchedulingIgnoredDuringExecution", {}).get("nodeSelectorTerms")
    return terms is None or any(
        all((labels.get(e["key"]) in e["values"]) == (e["operator"] == "In") for e in term["matchExpressions"])
        for term in terms
    )


def drivers_node_stays(all_objects: list[Object]) -> bool:
    """Head and submitter run on permanent nodes, and the driver runs on the head without workers."""
    head, *_, last = pods(all_objects)
    staying = [head, last] if job(all_objects) else [head]
    if any(lands_on(pod, {key: value}) for pod in staying for key, value in PREEMPTIBLE.items()):
        return False
    annotations = head["metadata"]["annotations"]
    if annotations != {
        "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
        "karpenter.sh/do-not-disrupt": "true",
    }:
        return False
    elsewhere = {"entrypointNumCpus", "entrypointNumGpus", "entrypointResources"} & set(job(all_objects))
    return not elsewhere and groups(all_objects)[0]["rayStartParams"]["num-cpus"] == "0"


def probes_are_kuberays(all_objects: list[Object]) -> bool:
    probes = {"livenessProbe", "readinessProbe", "startupProbe"}
    recent = tuple(map(int, spec(all_objects)["rayVersion"].split("."))) >= (2, 53)
    return recent and not any(probes & set(container) for container in containers(all_objects))


def retries_end(all_objects: list[Object]) -> bool:
    of_job = job(all_objects)
    return not of_job or (
        0 < of_job["backoffLimit"] <= 3 and of_job.get("shutdownAfterJobFinishes") is True and "jobId" not in of_job
    )


def what_is_named_is_there(all_objects: list[Object]) -> bool:
    """Volumes and settings are defined here, and secrets are created by the page's commands."""
    known = {(item["kind"], item["metadata"]["name"]) for item in all_objects}
    known |= {("Secret", name) for name in re.findall(r"create secret generic (\S+)", PAGE)}
    named = {
        ("Secret", variable["valueFrom"]["secretKeyRef"]["name"])
        for c in containers(all_objects)
        for variable in c.get("env", [])
        if "valueFrom" in variable
    }
    for container in containers(all_objects):
        for source in container.get("envFrom", []):
            ((kind, values),) = source.items()
            named.add(({"secretRef": "Secret", "configMapRef": "ConfigMap"}[kind], values["name"]))
    claims = [
        v["persistentVolumeClaim"]["claimName"]
        for pod in pods(all_objects)
        for v in pod["spec"]["volumes"]
        if "persistentVolumeClaim" in v
    ]
    return named | {("PersistentVolumeClaim", claim) for claim in claims} <= known


def workers_fit_their_nodes(all_objects: list[Object]) -> bool:
    """Each node has one worker of the job, and the group is as large as the job requires."""
    if not job(all_objects):
        return True
    values, workers = parsed(arguments(all_objects)), groups(all_objects)[1:]
    gpus = {int(group["rayStartParams"]["num-gpus"]) for group in workers}
    cpus = {float(group["rayStartParams"]["num-cpus"]) for group in workers}
    wanted = values["gpus_per_worker"]
    one_each = cpus == {values["cpus_per_worker"]} and gpus in ({0}, {1}) and wanted is None
    room = sum(group["maxReplicas"] for group in workers)
    asked = spec(all_objects).get("enableInTreeAutoscaling") or all(g["replicas"] == g["maxReplicas"] for g in workers)
    return one_each and 0 < values["min_workers"] <= room and bool(asked)
