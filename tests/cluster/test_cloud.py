"""The files for `ray up`: valid for Ray and the clouds, with a permanent head, closed to the outside.

No cloud is needed. Every check is also tested to fail on a broken copy.
"""

import re
import subprocess
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from jsonschema import ValidationError

from tests.cluster.cloud_files import CLOUDS, PAGE, Config, check, config, node, seen_by_ray
from tests.cluster.cloud_policies import OF_AWS, POLICIES, Policy

pytestmark = pytest.mark.full


@pytest.mark.parametrize("cloud", CLOUDS)
def test_ray_and_the_cloud_accept_every_field(cloud: str) -> None:
    check(cloud, config(cloud))


WRONG: dict[str, Callable[[Config], Any]] = {
    "no name": lambda of: of.pop("cluster_name"),
    "no provider": lambda of: of.pop("provider"),
    "misspelt": lambda of: of.update(idle_timeout_minute=5),
    "misspelt in a node type": lambda of: of["available_node_types"]["worker"].update(max_worker=5),
    "misspelt in authentication": lambda of: of["auth"].update(user="ubuntu"),
    "text for number": lambda of: of.update(max_workers="16"),
    "text for list": lambda of: of.update(setup_commands="pip install ray"),
    "text for number of GPUs": lambda of: of["available_node_types"]["worker"]["resources"].update(GPU="one"),
    "no such head": lambda of: of.update(head_node_type="master"),
    "more than at most": lambda of: of["available_node_types"]["worker"].update(min_workers=17),
}
WRONG_IN: dict[str, dict[str, Callable[[Config], Any]]] = {
    "aws": {
        "misspelt in a node": lambda of: node(of, "worker").update(Instancetype="g6.2xlarge"),
        "number for text": lambda of: node(of, "head").update(ImageId=7),
        "text for list": lambda of: node(of, "head").update(SecurityGroupIds="sg-0"),
        "text for number in a disk": lambda of: node(of, "head")["BlockDeviceMappings"][0]["Ebs"].update(
            VolumeSize="200"
        ),
        "market": lambda of: node(of, "worker").update(InstanceMarketOptions={"MarketType": "cheap"}),
    },
    "gcp": {
        "misspelt in a node": lambda of: node(of, "worker").update(machinetype="g2-standard-8"),
        "a list for an object": lambda of: node(of, "worker").update(scheduling=[{"preemptible": True}]),
        "provisioning": lambda of: node(of, "worker")["scheduling"].update(provisioningModel="CHEAP"),
        "disks": lambda of: node(of, "head")["disks"][0].update(type="FLOPPY"),
    },
    "azure": {
        "misspelt in a node": lambda of: node(of, "worker").update(vmsize="Standard_NC8as_T4_v3"),
        "no size": lambda of: node(of, "head").pop("vmSize"),
        "number for text": lambda of: node(of, "head").update(imageSku=2204),
        "priority": lambda of: node(of, "worker").update(priority="Cheap"),
    },
}


@pytest.mark.full
@pytest.mark.parametrize(
    ("cloud", "how"),
    [(cloud, how) for cloud in CLOUDS for how in [*WRONG, *WRONG_IN[cloud]]],
    ids=lambda value: value.replace(" ", "-"),
)
def test_invalid_file_is_rejected(cloud: str, how: str) -> None:
    changed = config(cloud)
    (WRONG | WRONG_IN[cloud])[how](changed)
    with pytest.raises((ValueError, ValidationError)):
        check(cloud, changed)


@pytest.mark.slow
def test_launcher_of_ray_starts_these_machines_in_a_simulated_ec2(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import boto3
    from moto import mock_aws
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    monkeypatch.setenv("HOME", str(tmp_path))  # Ray writes a generated key there
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "simulated")
    of = config("aws")
    with mock_aws():
        ec2, iam = (boto3.client(service, of["provider"]["region"]) for service in ("ec2", "iam"))
        vpc = ec2.describe_vpcs()["Vpcs"][0]["VpcId"]
        group = ec2.create_security_group(GroupName="own", Description="own", VpcId=vpc)["GroupId"]
        for name in ("patternnet-head", "patternnet-worker"):
            iam.create_instance_profile(InstanceProfileName=name)
        for name in ("head", "worker"):
            node(of, name)["SecurityGroupIds"] = [group]
        full = bootstrap_aws(seen_by_ray(of))
        found = AWSNodeProvider.fillout_available_node_types_resources(full)["available_node_types"]
        assert found["worker"]["resources"].items() >= {"CPU": 8, "GPU": 1, "accelerator_type:L4": 1}.items()
        provider = AWSNodeProvider(full["provider"], full["cluster_name"])
        for name in ("head", "worker"):
            asked = {**node(full, name), "ImageId": ec2.describe_images()["Images"][0]["ImageId"]}
            provider.create_node(asked, {"ray-node-kind": name, "ray-node-status": "starting"}, 1)
        started = [i for r in ec2.describe_instances()["Reservations"] for i in r["Instances"]]
        assert [(i["InstanceType"], i.get("InstanceLifecycle")) for i in started] == [
            ("m7i.xlarge", None),
            ("g6.2xlarge", "spot"),
        ]
        assert [[g["GroupId"] for g in i["SecurityGroups"]] for i in started] == [[group], [group]]


# --- Policies: a predicate for each, and ways to break it.


def breaks() -> Iterator[Any]:
    for cloud, (promise, policy) in [*product(CLOUDS, POLICIES.items()), *product(["aws"], OF_AWS.items())]:
        for how in policy.broken:
            yield pytest.param(cloud, policy, how, id=f"{cloud}: {promise}: {how}")


@pytest.mark.parametrize("cloud", CLOUDS)
@pytest.mark.parametrize("promise", [*POLICIES, *OF_AWS])
def test_policy_holds(cloud: str, promise: str) -> None:
    assert (POLICIES | OF_AWS)[promise].holds(config(cloud))


@pytest.mark.parametrize(("cloud", "policy", "how"), breaks())
def test_copy_that_breaks_a_policy_is_detected(cloud: str, policy: Policy, how: str) -> None:
    changed = config(cloud)
    policy.broken[how](changed)
    assert not policy.holds(changed)


@pytest.mark.parametrize("cloud", CLOUDS)
def test_clouds_differ_only_in_their_own_fields(cloud: str) -> None:
    own = {"provider", "available_node_types", "setup_commands", "head_setup_commands"}
    assert {k: v for k, v in config(cloud).items() if k not in own} == {
        k: v for k, v in config("aws").items() if k not in own
    }


# --- The page


def test_page_names_every_file_and_its_machines() -> None:
    assert set(re.findall(r"cluster/cloud/(\w+)\.yaml", PAGE)) == set(CLOUDS)
    for cloud, name in product(CLOUDS, ("head", "worker")):
        asked = node(config(cloud), name)
        (size,) = {asked.get(key) for key in ("InstanceType", "machineType", "vmSize")} - {None}
        assert f"`{size}`" in PAGE, size


def test_commands_of_the_page_are_valid() -> None:
    import typer

    from ray_jobs.cli.app import make_app

    group = typer.main.get_command(make_app())
    lines = re.findall(r"^.*-- patternnet ((?:.*\\\n)*.*)", PAGE, re.M)
    assert {line.split()[0] for line in lines} == {"fit", "explain"}
    for line in lines:
        words = subprocess.run(
            ["bash", "-c", rf"printf '%s\0' {line}"], capture_output=True, text=True, check=True
        ).stdout
        name, *options = words.split("\0")[:-1]
        values = group.commands[name].make_context(name, options).params  # type: ignore[attr-defined]
        assert values["cpus_per_worker"] == config("aws")["available_node_types"]["worker"]["resources"]["CPU"]
        assert 0 < values["min_workers"] <= config("aws")["max_workers"]
