"""The files for `ray up`: such as Ray and the clouds' interfaces take, with a head that stays, closed to the outside.

No cloud is asked. Every check is also seen to fail, on a copy that is broken on purpose.
"""

import json
import re
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator, Draft202012Validator, ValidationError

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "cluster" / "cloud"
CLOUDS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
PAGE = (ROOT / "docs" / "cloud.md").read_text()
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]

Config = dict[str, Any]


def config(cloud: str) -> Config:
    return yaml.safe_load((FOLDER / f"{cloud}.yaml").read_text())


def node(of: Config, name: str) -> Config:
    """What a node type asks of its cloud."""
    asked = of["available_node_types"][name]["node_config"]
    return asked.get("azure_arm_parameters", asked)


# --- What Ray and the clouds take


def seen_by_ray(of: Config) -> Config:
    """A file as `ray up` has it before it asks the cloud; raises what Ray has against it."""
    import ray.autoscaler
    from ray.autoscaler._private.util import prepare_config, validate_config

    # By itself Ray looks only after it has filled in its defaults, such as a name, for what is missing.
    schema = Path(ray.autoscaler.__path__[0]) / "ray-schema.json"
    Draft7Validator(json.loads(schema.read_text())).validate(of)
    full = prepare_config(of)
    validate_config(full)
    return full


@cache
def instance() -> Draft202012Validator:
    """Of Google's instances."""
    schema = json.loads((Path(__file__).parent / "schemas" / "compute.json").read_text())
    return Draft202012Validator({"$ref": "#/$defs/Instance", **schema})


def taken_by_aws(of: Config, name: str) -> None:
    import botocore.loaders
    import botocore.model
    import botocore.validate

    model = botocore.model.ServiceModel(botocore.loaders.Loader().load_service_model("ec2", "service-2"))
    shape = model.operation_model("RunInstances").input_shape
    asked = {**node(of, name), "MinCount": 1, "MaxCount": 1}
    if problems := botocore.validate.ParamValidator().validate(asked, shape).generate_report():
        raise ValueError(problems)
    market = asked.get("InstanceMarketOptions", {}).get("MarketType", "spot")
    options = shape.members["InstanceMarketOptions"].members["MarketType"].enum
    if market not in options:
        raise ValueError(f"{market} is none of {options}")


def taken_by_gcp(of: Config, name: str) -> None:
    instance().validate(node(of, name))


def taken_by_azure(of: Config, name: str) -> None:
    """By the template that Ray fills in: only its parameters, each of its type, and all that Ray does not give."""
    import ray.autoscaler._private._azure as azure

    template = json.loads((Path(azure.__path__[0]) / "azure-vm-template.json").read_text())["parameters"]
    by_ray = {
        "vmName",
        "vmTags",
        "vmCount",
        "msi",
        "nsg",
        "subnet",
        "zones",
        "provisionPublicIp",
        "adminUsername",
        "publicKey",
    }
    asked, kinds = node(of, name), {"string": str, "int": int, "bool": bool, "object": dict, "array": list}
    if unknown := set(asked) - set(template) - {"availability_zone"}:
        raise ValueError(f"unknown: {unknown}")
    if missing := {key for key, told in template.items() if "defaultValue" not in told} - by_ray - set(asked):
        raise ValueError(f"missing: {missing}")
    for key, value in asked.items():
        if not isinstance(value, kinds[template[key]["type"]]):
            raise ValueError(f"{key}: no {template[key]['type']}")
    if asked.get("priority", "Regular") not in ("Regular", "Low", "Spot"):
        raise ValueError("priority")


TAKEN: dict[str, Callable[[Config, str], None]] = {"aws": taken_by_aws, "gcp": taken_by_gcp, "azure": taken_by_azure}


def check(cloud: str, of: Config) -> None:
    """Raises what Ray or the cloud's interface has against a file."""
    seen_by_ray(of)
    for name in of["available_node_types"]:
        TAKEN[cloud](of, name)


@pytest.mark.parametrize("cloud", CLOUDS)
def test_ray_and_the_cloud_know_every_field(cloud: str) -> None:
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


@pytest.mark.parametrize(
    ("cloud", "how"),
    [(cloud, how) for cloud in CLOUDS for how in [*WRONG, *WRONG_IN[cloud]]],
    ids=lambda value: value.replace(" ", "-"),
)
def test_a_file_that_they_do_not_know_is_found(cloud: str, how: str) -> None:
    changed = config(cloud)
    (WRONG | WRONG_IN[cloud])[how](changed)
    with pytest.raises((ValueError, ValidationError)):
        check(cloud, changed)


@pytest.mark.slow
def test_rays_launcher_starts_these_machines_in_a_simulated_ec2(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import boto3
    from moto import mock_aws
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    monkeypatch.setenv("HOME", str(tmp_path))  # where Ray puts the key that it makes
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
            asked = {**node(full, name), "ImageId": ec2.describe_images()["Images"][0]["ImageId"]}  # not its to resolve
            provider.create_node(asked, {"ray-node-kind": name, "ray-node-status": "starting"}, 1)
        started = [i for r in ec2.describe_instances()["Reservations"] for i in r["Instances"]]
        assert [(i["InstanceType"], i.get("InstanceLifecycle")) for i in started] == [
            ("m7i.xlarge", None),
            ("g6.2xlarge", "spot"),
        ]
        assert [[g["GroupId"] for g in i["SecurityGroups"]] for i in started] == [[group], [group]]


# --- Policies. Each is a promise; how it is kept; ways to break it.


@dataclass(frozen=True)
class Policy:
    holds: Callable[[Config], bool]
    broken: dict[str, Callable[[Config], Any]]


STARTS = ("head_start_ray_commands", "worker_start_ray_commands")


def started(of: Config) -> list[dict[str, str]]:
    """What Ray starts with, on the head and on workers: {"RAY_AUTH_MODE": "token", "--head": ""}."""
    found = []
    for commands in (of[name] for name in STARTS):
        (line,) = [command for command in commands if "ray start" in command]
        words = re.findall(r"^\w+=\S+|(?<=\s)(?:--[\w-]+(?:=\S+)?|[A-Z_]+=\S+)", line)
        found.append({name: value for name, _, value in (word.partition("=") for word in words)})
    return found


def head_stays(of: Config) -> bool:
    """Only workers are preemptible, and all of them are."""

    def preemptible(asked: Config) -> bool:
        market, scheduling = asked.get("InstanceMarketOptions", {}), asked.get("scheduling", {})
        return "spot" in (
            market.get("MarketType"),
            scheduling.get("provisioningModel", "").lower(),
            asked.get("priority", "").lower(),
        )

    return [preemptible(node(of, name)) for name in ("head", "worker")] == [False, True]


def driver_is_alone(of: Config) -> bool:
    return of["available_node_types"]["head"]["resources"]["CPU"] == 0 and started(of)[0].get("--num-cpus") == "0"


def token_is_asked_for(of: Config) -> bool:
    places = set(of["file_mounts"])
    return all(
        told.get("RAY_AUTH_MODE") == "token"
        and told.get("RAY_AUTH_TOKEN_PATH") in places
        and "RAY_AUTH_TOKEN" not in told
        for told in started(of)
    )


def dashboard_is_on_loopback(of: Config) -> bool:
    return started(of)[0].get("--dashboard-host") == "127.0.0.1"


def ray_knows_its_options(of: Config) -> bool:
    from ray.scripts.scripts import start

    known = {option for parameter in start.params for option in parameter.opts}
    return all({word for word in told if word.startswith("--")} <= known for told in started(of))


def versions_are_fixed(of: Config) -> bool:
    (line,) = [command for command in of["setup_commands"] if "patternnet-ray" in command]
    pair = re.search(r"^TORCH := (.+)$", (ROOT / "Makefile").read_text(), re.M)
    assert pair is not None
    return pair.group(1) in line and bool(re.search(rf"patternnet-ray(\[s3\])?=={re.escape(VERSION)}'", line))


def cost_is_bounded(of: Config) -> bool:
    return (
        0 < of["max_workers"] <= 64
        and 0 < of["idle_timeout_minutes"] <= 30
        and of["provider"]["cache_stopped_nodes"] is False
    )


def own_security_group(of: Config) -> bool:
    """In AWS, where Ray otherwise makes one that is open to the world."""
    return of["provider"]["type"] != "aws" or all(node(of, name).get("SecurityGroupIds") for name in ("head", "worker"))


def shell_understands(of: Config) -> bool:
    commands = [command for name in ("setup_commands", "head_setup_commands", *STARTS) for command in of[name]]
    return all(
        subprocess.run(["bash", "-n", "-c", command], capture_output=True).returncode == 0 for command in commands
    )


def in_start(old: str, new: str, which: int = 0) -> Callable[[Config], Any]:
    """A way to break the start of Ray: other words in it."""

    def change(of: Config) -> None:
        of[STARTS[which]] = [command.replace(old, new) for command in of[STARTS[which]]]

    return change


def in_setup(old: str, new: str) -> Callable[[Config], Any]:
    return lambda of: of.update(setup_commands=[command.replace(old, new) for command in of["setup_commands"]])


def spot_head(of: Config) -> None:
    asked: dict[str, Config] = {
        "aws": {"InstanceMarketOptions": {"MarketType": "spot"}},
        "gcp": {"scheduling": {"provisioningModel": "SPOT"}},
        "azure": {"priority": "Spot"},
    }
    node(of, "head").update(asked[of["provider"]["type"]])


POLICIES = {
    "the head stays and workers are preemptible": Policy(
        head_stays,
        {
            "head": spot_head,
            "worker": lambda of: [
                node(of, "worker").pop(key, None) for key in ("InstanceMarketOptions", "scheduling", "priority")
            ],
        },
    ),
    "no worker runs beside the driver": Policy(
        driver_is_alone,
        {
            "Ray": in_start("--num-cpus=0", ""),
            "autoscaler": lambda of: of["available_node_types"]["head"]["resources"].update(CPU=4),
        },
    ),
    "every process of Ray asks for the token in the file": Policy(
        token_is_asked_for,
        {
            "head": in_start("RAY_AUTH_MODE=token ", ""),
            "worker": in_start("RAY_AUTH_MODE=token ", "", 1),
            "disabled": in_start("MODE=token", "MODE=disabled"),
            "no file": lambda of: of["file_mounts"].clear(),
            "written down": in_start("TOKEN_PATH=~/ray-token", "TOKEN=abc"),
        },
    ),
    "the dashboard listens on loopback": Policy(dashboard_is_on_loopback, {"open": in_start("=127.0.0.1", "=0.0.0.0")}),
    "Ray knows the options that it starts with": Policy(
        ray_knows_its_options, {"misspelt": in_start("--num-cpus", "--cpus")}
    ),
    "versions are fixed": Policy(
        versions_are_fixed,
        {
            "torch": in_setup("torchvision==0.29.1", "torchvision"),
            "program": in_setup(f"=={VERSION}", ""),
            "older": in_setup(f"=={VERSION}", "==0.0.1"),
        },
    ),
    "cost is bounded": Policy(
        cost_is_bounded,
        {
            "many": lambda of: of.update(max_workers=10000),
            "idle": lambda of: of.update(idle_timeout_minutes=0),
            "disks": lambda of: (
                of["provider"].pop("cache_stopped_nodes") or of["provider"].update(cache_stopped_nodes=True)
            ),
        },
    ),
    "the shell understands the commands": Policy(shell_understands, {"quote": in_setup("'patternnet", "patternnet")}),
}
OF_AWS = {
    "the security group is one's own": Policy(
        own_security_group, {"Ray's": lambda of: node(of, "worker").pop("SecurityGroupIds")}
    )
}


def breaks() -> Iterator[Any]:
    for cloud, (promise, policy) in [*product(CLOUDS, POLICIES.items()), *product(["aws"], OF_AWS.items())]:
        for how in policy.broken:
            yield pytest.param(cloud, policy, how, id=f"{cloud}: {promise}: {how}")


@pytest.mark.parametrize("cloud", CLOUDS)
@pytest.mark.parametrize("promise", [*POLICIES, *OF_AWS])
def test_the_policy_holds(cloud: str, promise: str) -> None:
    assert (POLICIES | OF_AWS)[promise].holds(config(cloud))


@pytest.mark.parametrize(("cloud", "policy", "how"), breaks())
def test_a_copy_that_breaks_a_policy_is_found(cloud: str, policy: Policy, how: str) -> None:
    changed = config(cloud)
    policy.broken[how](changed)
    assert not policy.holds(changed)


@pytest.mark.parametrize("cloud", CLOUDS)
def test_the_clouds_differ_in_nothing_but_themselves(cloud: str) -> None:
    own = {"provider", "available_node_types", "setup_commands", "head_setup_commands"}
    assert {k: v for k, v in config(cloud).items() if k not in own} == {
        k: v for k, v in config("aws").items() if k not in own
    }


# --- The page


def test_the_page_names_every_file_and_what_its_machines_are() -> None:
    assert set(re.findall(r"cluster/cloud/(\w+)\.yaml", PAGE)) == set(CLOUDS)
    for cloud, name in product(CLOUDS, ("head", "worker")):
        asked = node(config(cloud), name)
        (size,) = {asked.get(key) for key in ("InstanceType", "machineType", "vmSize")} - {None}
        assert f"`{size}`" in PAGE, size


def test_the_commands_of_the_page_are_known_to_the_program() -> None:
    import typer

    from ray_jobs.cli import app

    group = typer.main.get_command(app)
    lines = re.findall(r"^.*-- patternnet ((?:.*\\\n)*.*)", PAGE, re.M)
    assert {line.split()[0] for line in lines} == {"fit", "explain"}
    for line in lines:
        words = subprocess.run(
            ["bash", "-c", rf"printf '%s\0' {line}"], capture_output=True, text=True, check=True
        ).stdout
        name, *options = words.split("\0")[:-1]
        told = group.commands[name].make_context(name, options).params  # type: ignore[attr-defined]
        assert told["cpus_per_worker"] == config("aws")["available_node_types"]["worker"]["resources"]["CPU"]
        assert 0 < told["min_workers"] <= config("aws")["max_workers"]
