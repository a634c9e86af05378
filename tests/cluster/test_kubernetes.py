"""The definitions for Kubernetes: such as Kubernetes and KubeRay take, closed to the outside, running what they should.

No cluster is asked. Every check is also seen to fail, on a copy that is broken on purpose.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
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
pytestmark = pytest.mark.skipif(not BUILD, reason="neither kubectl nor kustomize is here to render the definitions")


@cache
def rendered(folder: Path) -> str:
    """What a folder defines, as JSON."""
    done = subprocess.run([*BUILD, str(folder)], capture_output=True, text=True, check=True)
    return json.dumps(list(yaml.safe_load_all(done.stdout)))


def objects(overlay: str) -> list[Object]:
    """What an overlay defines, as values that may be changed."""
    return json.loads(rendered(DEFINITIONS / "overlays" / overlay))


# --- What Kubernetes and KubeRay take


@cache
def definitions() -> dict[str, Object]:
    files = [json.loads((SCHEMAS / name).read_text()) for name in ("kubernetes.json", "kuberay.json")]
    return {name: schema for file in files for name, schema in file["$defs"].items()}


@cache
def validator(api: str, kind: str) -> Draft202012Validator | None:
    """Of the objects of a kind; None where there is no such kind among the schemas."""
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
    """What the schemas have against objects."""
    found = []
    for item in all_objects:
        if (of_kind := validator(item["apiVersion"], item["kind"])) is None:
            found.append(f"no {item['kind']} of {item['apiVersion']}")
        else:
            found += [f"{item['kind']} {e.json_path}: {e.message}" for e in of_kind.iter_errors(item)]
    return found


# --- What the objects consist of


def of_kind(all_objects: list[Object], *kinds: str) -> list[Object]:
    return [item for item in all_objects if item["kind"] in kinds]


def spec(all_objects: list[Object]) -> Object:
    """Of the nodes, whether they stand on their own or inside a job."""
    (owner,) = of_kind(all_objects, "RayCluster", "RayJob")
    return owner["spec"].get("rayClusterSpec", owner["spec"])


def job(all_objects: list[Object]) -> Object:
    """Of the job; nothing where there is none."""
    found = of_kind(all_objects, "RayJob")
    return found[0]["spec"] if found else {}


def groups(all_objects: list[Object]) -> list[Object]:
    """Head first, then workers."""
    return [spec(all_objects)["headGroupSpec"], *spec(all_objects)["workerGroupSpecs"]]


def pods(all_objects: list[Object]) -> list[Object]:
    """The pod templates: head, workers, submitter."""
    templates = [group["template"] for group in groups(all_objects)]
    return templates + ([job(all_objects)["submitterPodTemplate"]] if job(all_objects) else [])


def containers(all_objects: list[Object]) -> list[Object]:
    """Of all pods, with the one that KubeRay adds to the head for its autoscaler."""
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
    """A quantity of CPUs or of bytes."""
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
    """The words that a shell makes of a line."""
    command = [shell, "-c", rf"printf '%s\0' {line}"]
    done = subprocess.run(command, env={**os.environ, **given}, capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


def parsed(words: list[str]) -> dict[str, Any]:
    """What the program makes of a command; raises where it has no such command or option."""
    from ray_jobs.cli import app

    program, name, *options = words
    assert program == "patternnet"
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    return command.make_context(name, options).params


@cache
def ray_start_options() -> frozenset[str]:
    from ray.scripts.scripts import start

    return frozenset(option.removeprefix("--") for parameter in start.params for option in parameter.opts)


# --- Policies. Each is a promise; how it is kept; ways to break it.


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
    """A read-only root, mounts for all that Ray and torch write, and no mount without its volume."""
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
    told = [key for data in of_kind(all_objects, "ConfigMap") for key in data["data"]]
    return not any("value" in v and SECRET.search(v["name"]) for v in given) and not any(map(SECRET.search, told))


def token_is_asked_for(all_objects: list[Object]) -> bool:
    """Of every container, by its own variables, and of the operator and its autoscaler, by authOptions."""

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
    """To every pod; the operator to the dashboard of the head alone."""
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
    """To own pods, and elsewhere to named ports: names, HTTPS, from the head also Kubernetes' own."""
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
    """No credentials of Kubernetes in any container of ours; no roles but the one that KubeRay makes."""
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
        told, pod = group["rayStartParams"], group["template"]["spec"]
        (limits,) = [container["resources"]["limits"] for container in pod["containers"]]
        (shared,) = [volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == "shared-mem"]
        if group is not head and float(told["num-cpus"]) != amount(limits["cpu"]):
            return False
        if int(told["num-gpus"]) != int(limits.get("nvidia.com/gpu", "0")) or shared["medium"] != "Memory":
            return False
        if not int(told["object-store-memory"]) < amount(shared["sizeLimit"]) <= amount(limits["memory"]) / 2:
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
    """Whether a pod may be put on a node of these labels."""
    affinity = pod["spec"].get("affinity", {}).get("nodeAffinity", {})
    terms = affinity.get("requiredDuringSchedulingIgnoredDuringExecution", {}).get("nodeSelectorTerms")
    return terms is None or any(
        all((labels.get(e["key"]) in e["values"]) == (e["operator"] == "In") for e in term["matchExpressions"])
        for term in terms
    )


def drivers_node_stays(all_objects: list[Object]) -> bool:
    """Head and submitter are on no preemptible node, and Ray puts the driver on the head, with no worker beside it."""
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
    """Volumes and settings are defined, and Secrets made by the page's commands."""
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
            ((kind, told),) = source.items()
            named.add(({"secretRef": "Secret", "configMapRef": "ConfigMap"}[kind], told["name"]))
    claims = [
        v["persistentVolumeClaim"]["claimName"]
        for pod in pods(all_objects)
        for v in pod["spec"]["volumes"]
        if "persistentVolumeClaim" in v
    ]
    return named | {("PersistentVolumeClaim", claim) for claim in claims} <= known


def workers_fit_their_nodes(all_objects: list[Object]) -> bool:
    """One worker of the job to a node, and room for as many nodes as it asks for."""
    if not job(all_objects):
        return True
    told, workers = parsed(arguments(all_objects)), groups(all_objects)[1:]
    gpus = {int(group["rayStartParams"]["num-gpus"]) for group in workers}
    cpus = {float(group["rayStartParams"]["num-cpus"]) for group in workers}
    wanted = told["gpus_per_worker"]
    one_each = cpus == {told["cpus_per_worker"]} and gpus in ({0}, {1}) and wanted is None
    room = sum(group["maxReplicas"] for group in workers)
    asked = spec(all_objects).get("enableInTreeAutoscaling") or all(g["replicas"] == g["maxReplicas"] for g in workers)
    return one_each and 0 < told["min_workers"] <= room and bool(asked)


def changed(path: str, value: Any) -> Callable[[list[Object]], Any]:
    """A way to break the nodes: something else at a place in them."""

    def change(all_objects: list[Object]) -> None:
        *way, last = path.split("/")
        at(spec(all_objects), "/".join(way))[last if not last.isdigit() else int(last)] = value

    return change


def removed(path: str) -> Callable[[list[Object]], Any]:
    return lambda all_objects: at(spec(all_objects), path.rpartition("/")[0]).pop(path.rpartition("/")[2])


def without(kind: str, name: str) -> Callable[[list[Object]], Any]:
    def take_away(all_objects: list[Object]) -> None:
        all_objects[:] = [item for item in all_objects if (item["kind"], item["metadata"]["name"]) != (kind, name)]

    return take_away


def policy(all_objects: list[Object], name: str) -> Object:
    return next(item["spec"] for item in of_kind(all_objects, "NetworkPolicy") if item["metadata"]["name"] == name)


HEAD, WORKER = "headGroupSpec/template/spec", "workerGroupSpecs/0/template/spec"
SECRET_OBJECT = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}, "stringData": {"auth_token": "abc"}}
ROLE = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": {"name": "r"}, "rules": []}
INLINE = {"name": "RAY_AUTH_TOKEN", "value": "abc"}
POLICIES = {
    "no container gains privileges": Policy(
        is_restricted,
        {
            "privileged": changed(f"{WORKER}/containers/0/securityContext/privileged", True),
            "escalation": removed(f"{HEAD}/containers/0/securityContext/allowPrivilegeEscalation"),
            "capability": changed(
                f"{WORKER}/containers/0/securityContext/capabilities", {"drop": ["ALL"], "add": ["SYS_PTRACE"]}
            ),
            "root": changed(f"{HEAD}/securityContext/runAsUser", 0),
            "may be root": removed(f"{WORKER}/securityContext/runAsNonRoot"),
            "seccomp": removed(f"{HEAD}/securityContext/seccompProfile"),
            "host's network": changed(f"{WORKER}/hostNetwork", True),
            "host's folder": lambda o: pods(o)[0]["spec"]["volumes"].append({"name": "h", "hostPath": {"path": "/"}}),
            "host's port": changed(f"{HEAD}/containers/0/ports", [{"containerPort": 8265, "hostPort": 8265}]),
        },
    ),
    "the namespace refuses pods that gain privileges": Policy(
        namespace_refuses_others,
        {
            "baseline": lambda o: of_kind(o, "Namespace")[0]["metadata"]["labels"].update(
                {"pod-security.kubernetes.io/enforce": "baseline"}
            ),
            "elsewhere": lambda o: of_kind(o, "NetworkPolicy")[0]["metadata"].pop("namespace"),
        },
    ),
    "the root file system is read-only and all that is written has a sized mount": Policy(
        disks_are_written_where_they_may_be,
        {
            "root": removed(f"{WORKER}/containers/0/securityContext/readOnlyRootFilesystem"),
            "no /dev/shm": lambda o: pods(o)[1]["spec"]["containers"][0]["volumeMounts"].pop(3),
            "no volume": lambda o: pods(o)[0]["spec"]["volumes"].pop(0),
            "no limit": lambda o: pods(o)[0]["spec"]["volumes"][0]["emptyDir"].pop("sizeLimit"),
        },
    ),
    "what a container may use is reserved for it": Policy(
        memory_is_reserved,
        {
            "less": changed(f"{WORKER}/containers/0/resources/requests/memory", "1Gi"),
            "none": removed(f"{HEAD}/containers/0/resources"),
        },
    ),
    "all nodes run one image of a fixed version": Policy(
        images_are_one_pinned,
        {
            "latest": changed(f"{HEAD}/containers/0/image", "registry.example/patternnet-ray:latest"),
            "two": changed(f"{WORKER}/containers/0/image", "registry.example/patternnet-ray:0.1.0-cpu"),
            "no tag": lambda o: [c.update(image="registry.example/patternnet-ray") for c in containers(o)],
        },
    ),
    "no secret is written down": Policy(
        secrets_are_references,
        {
            "variable": lambda o: containers(o)[0]["env"].append(INLINE),
            "object": lambda o: o.append(SECRET_OBJECT),
            "setting": lambda o: of_kind(o, "ConfigMap")[0]["data"].update(AWS_SECRET_ACCESS_KEY="abc"),
        },
    ),
    "every process of Ray asks for the token, and has it": Policy(
        token_is_asked_for,
        {
            "mode": lambda o: containers(o)[1]["env"].pop(0),
            "disabled": lambda o: containers(o)[0]["env"][0].update(value="disabled"),
            "no token": lambda o: containers(o)[0]["env"].pop(1),
            "operator": removed("authOptions"),
            "another for the operator": changed("authOptions/secretName", "other"),
        },
    ),
    "only pods of the cluster and the operator reach it": Policy(
        only_own_pods_and_the_operator_come_in,
        {
            "open to all": lambda o: policy(o, "nodes")["ingress"].append({}),
            "open to the namespace": lambda o: policy(o, "nodes")["ingress"][0]["from"].append({"podSelector": {}}),
            "operator anywhere": lambda o: policy(o, "operator")["ingress"][0].pop("ports"),
            "nothing refused": without("NetworkPolicy", "nothing"),
            "a pod of other labels": lambda o: pods(o)[1]["metadata"]["labels"].update(
                {"app.kubernetes.io/name": "other"}
            ),
        },
    ),
    "only own pods, names and HTTPS are reached from it": Policy(
        only_what_is_named_goes_out, {"everything": lambda o: policy(o, "nodes")["egress"].append({})}
    ),
    "nothing is exposed outside of Kubernetes": Policy(
        nothing_is_exposed,
        {
            "load balancer": changed("headGroupSpec/serviceType", "LoadBalancer"),
            "ingress": changed("headGroupSpec/enableIngress", True),
        },
    ),
    "a job's code cannot ask Kubernetes for anything": Policy(
        kubernetes_is_not_within_reach,
        {
            "mounted": changed(f"{WORKER}/automountServiceAccountToken", True),
            "by default": lambda o: of_kind(o, "ServiceAccount")[0].pop("automountServiceAccountToken"),
            "a role": lambda o: o.append(ROLE),
            "no account": changed(f"{HEAD}/serviceAccountName", "default"),
            "the autoscaler's": changed(f"{WORKER}/serviceAccountName", "patternnet-autoscaler"),
        },
    ),
    "Ray's nodes offer what their containers have": Policy(
        rays_nodes_are_as_large_as_their_containers,
        {
            "CPUs": changed("workerGroupSpecs/0/rayStartParams/num-cpus", "8"),
            "GPUs": changed("workerGroupSpecs/0/rayStartParams/num-gpus", "2"),
            "objects": changed("workerGroupSpecs/0/rayStartParams/object-store-memory", "9000000000"),
        },
    ),
    "Ray knows the options that its nodes start with": Policy(
        ray_knows_its_options, {"misspelt": changed("headGroupSpec/rayStartParams/num-cpu", "0")}
    ),
    "the driver's node stays": Policy(
        drivers_node_stays,
        {
            "preemptible": removed(f"{HEAD}/affinity"),
            "one kind of them": lambda o: at(
                spec(o),
                f"{HEAD}/affinity/nodeAffinity/requiredDuringSchedulingIgnoredDuringExecution/nodeSelectorTerms/0/matchExpressions",
            ).pop(),
            "evicted": lambda o: pods(o)[0]["metadata"]["annotations"].popitem(),
            "beside workers": changed("headGroupSpec/rayStartParams/num-cpus", "2"),
        },
    ),
    "nodes are probed as KubeRay does it": Policy(
        probes_are_kuberays,
        {
            "own": changed(f"{HEAD}/containers/0/livenessProbe", {"exec": {"command": ["true"]}}),
            "old": changed("rayVersion", "2.52.0"),
        },
    ),
    "what is referred to is defined here or made by the page": Policy(
        what_is_named_is_there,
        {
            "secret": lambda o: containers(o)[0]["env"][1]["valueFrom"]["secretKeyRef"].update(name="another"),
            "secret of all variables": changed(f"{WORKER}/containers/0/envFrom", [{"secretRef": {"name": "another"}}]),
            "volume": lambda o: pods(o)[0]["spec"]["volumes"].append(
                {"name": "v", "persistentVolumeClaim": {"claimName": "another"}}
            ),
        },
    ),
}
OF_JOBS = {
    "retries come to an end, and take the nodes along": Policy(
        retries_end,
        {
            "endless": lambda o: job(o).update(backoffLimit=1000),
            "none": lambda o: job(o).update(backoffLimit=0),
            "nodes stay": lambda o: job(o).pop("shutdownAfterJobFinishes"),
            "the same job again": lambda o: job(o).update(jobId="patternnet"),
        },
    ),
    "each worker of the job has a node, and there may be as many as it asks for": Policy(
        workers_fit_their_nodes,
        {
            "half a node": lambda o: job(o).update(
                entrypoint=job(o)["entrypoint"].replace("per-worker 4", "per-worker 2")
            ),
            "too many": lambda o: job(o).update(
                entrypoint=job(o)["entrypoint"].replace("min-workers 4", "min-workers 40")
            ),
            "none asked for": lambda o: job(o).update(entrypoint=job(o)["entrypoint"].replace("--min-workers 4", "")),
            "two GPUs": changed("workerGroupSpecs/0/rayStartParams/num-gpus", "2"),
        },
    ),
    "the submitter is as closed as the nodes": Policy(
        lambda o: (
            is_restricted(o)
            and token_is_asked_for(o)
            and drivers_node_stays(o)
            and only_own_pods_and_the_operator_come_in(o)
        ),
        {
            "privileged": lambda o: job(o)["submitterPodTemplate"]["spec"]["containers"][0]["securityContext"].clear(),
            "no token": lambda o: job(o)["submitterPodTemplate"]["spec"]["containers"][0]["env"].pop(1),
            "preemptible": lambda o: job(o)["submitterPodTemplate"]["spec"].pop("affinity"),
            "other labels": lambda o: job(o)["submitterPodTemplate"]["metadata"]["labels"].popitem(),
            "driver elsewhere": lambda o: job(o).update(entrypointNumGpus=1),
        },
    ),
}


def breaks(table: dict[str, Policy], overlays: list[str]) -> Iterator[Any]:
    for overlay, (promise, of_promise) in product(overlays, table.items()):
        for how in of_promise.broken:
            yield pytest.param(overlay, of_promise, how, id=f"{overlay}: {promise}: {how}")


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("promise", [*POLICIES, *OF_JOBS])
def test_the_policy_holds(overlay: str, promise: str) -> None:
    assert (POLICIES | OF_JOBS)[promise].holds(objects(overlay))


@pytest.mark.parametrize(("overlay", "of_promise", "how"), [*breaks(POLICIES, OVERLAYS), *breaks(OF_JOBS, JOBS)])
def test_a_copy_that_breaks_a_policy_is_found(overlay: str, of_promise: Policy, how: str) -> None:
    changed_copy = objects(overlay)
    of_promise.broken[how](changed_copy)
    assert not of_promise.holds(changed_copy)


# --- The schemas

# A place in the nodes' definition, and what to do there: another value, or another name for the field.
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
def test_kubernetes_and_kuberay_know_every_field(overlay: str) -> None:
    assert complaints(objects(overlay)) == []


@pytest.mark.parametrize(
    ("overlay", "how"),
    [*product(OVERLAYS, WRONG), *product(JOBS, WRONG_JOB)],
    ids=lambda value: value.replace(" ", "-"),
)
def test_a_definition_that_they_do_not_know_is_found(overlay: str, how: str) -> None:
    changed_copy = objects(overlay)
    (WRONG | WRONG_JOB)[how](changed_copy)
    assert complaints(changed_copy)


@pytest.mark.parametrize(("gpu", "spot", "storage"), product((False, True), (False, True), ("volume", "s3")))
def test_any_choice_of_parts_is_a_definition(gpu: bool, spot: bool, storage: str, tmp_path: Path) -> None:
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


# --- What runs


@pytest.mark.parametrize("overlay", JOBS)
def test_the_command_is_one_of_the_program(overlay: str) -> None:
    all_objects = objects(overlay)
    words, (settings,) = arguments(all_objects), of_kind(all_objects, "ConfigMap")
    told, data = parsed(words), settings["data"]["DATA"]
    assert words[1] == overlay.partition("-")[0]
    (shards,) = told["shards"]
    assert re.fullmatch(re.escape(data) + r"/shards/\w+-\{\d+\.\.\d+\}\.tar", shards)  # no shell opened the braces
    assert (told["out"] or told["patterns"]).startswith(f"{data}/runs/")


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ("--min-worker 4", "No such option"),
        ("--batch-size many", "valid integer"),
        ("--log yaml", "'plain', 'json'"),
        ("argument", "unexpected extra argument"),
    ],
)
def test_a_command_that_the_program_does_not_know_is_found(wrong: str, complaint: str) -> None:
    all_objects = objects(JOBS[0])
    job(all_objects)["entrypoint"] += f" {wrong}"
    with pytest.raises(Exception, match=complaint):
        parsed(arguments(all_objects))


def test_a_shell_that_opens_braces_is_found() -> None:
    all_objects = objects(JOBS[0])
    job(all_objects)["entrypoint"] = job(all_objects)["entrypoint"].replace('"', "")
    with pytest.raises(Exception, match="unexpected extra argument"):
        parsed(arguments(all_objects))


def test_explanations_are_made_of_what_the_fit_left() -> None:
    fit, explain = (parsed(arguments(objects(f"{name}-gpu-spot-s3"))) for name in ("fit", "explain"))
    assert explain["patterns"] == fit["out"]


# --- The page


def test_the_page_names_every_part_and_nothing_else() -> None:
    parts = {path.name for path in (DEFINITIONS / "components").iterdir()} - {"job"}
    told = set(re.findall(r"^\| `([\w-]+)` \|", PAGE, re.M))
    assert told == parts | set(OVERLAYS)
    for path in re.findall(r"cluster/kubernetes/(?:base|components|overlays)/[\w/.-]+", PAGE):
        assert (ROOT / path).exists(), path
