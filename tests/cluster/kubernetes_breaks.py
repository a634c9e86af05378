"""The policies of the Kubernetes definitions with ways to break each of them."""

from collections.abc import Callable
from typing import Any

from tests.cluster.kubernetes_objects import Object, at, containers, job, of_kind, pods, spec
from tests.cluster.kubernetes_policies import (
    Policy,
    disks_are_written_where_they_may_be,
    drivers_node_stays,
    images_are_one_pinned,
    is_restricted,
    kubernetes_is_not_within_reach,
    memory_is_reserved,
    namespace_refuses_others,
    nothing_is_exposed,
    only_own_pods_and_the_operator_come_in,
    only_what_is_named_goes_out,
    probes_are_kuberays,
    ray_knows_its_options,
    rays_nodes_are_as_large_as_their_containers,
    retries_end,
    secrets_are_references,
    token_is_asked_for,
    what_is_named_is_there,
    workers_fit_their_nodes,
)


def changed(path: str, value: Any) -> Callable[[list[Object]], Any]:
    """Return a function that breaks the definition by another value at a path."""

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
            "with workers": changed("headGroupSpec/rayStartParams/num-cpus", "2"),
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
            "many": lambda o: job(o).update(backoffLimit=1000),
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
