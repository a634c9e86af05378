"""Policies of the files for `ray up`, with ways to break each of them."""

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.cluster.cloud_files import ROOT, VERSION, Config, node


@dataclass(frozen=True)
class Policy:
    holds: Callable[[Config], bool]
    broken: dict[str, Callable[[Config], Any]]


STARTS = ("head_start_ray_commands", "worker_start_ray_commands")


def started(of: Config) -> list[dict[str, str]]:
    """Return the options and variables of `ray start` on the head and on workers."""
    found = []
    for commands in (of[name] for name in STARTS):
        (line,) = [command for command in commands if "ray start" in command]
        words = re.findall(r"^\w+=\S+|(?<=\s)(?:--[\w-]+(?:=\S+)?|[A-Z_]+=\S+)", line)
        found.append({name: value for name, _, value in (word.partition("=") for word in words)})
    return found


def head_stays(of: Config) -> bool:
    """All workers are preemptible, and the head is not."""

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
        values.get("RAY_AUTH_MODE") == "token"
        and values.get("RAY_AUTH_TOKEN_PATH") in places
        and "RAY_AUTH_TOKEN" not in values
        for values in started(of)
    )


def dashboard_is_on_loopback(of: Config) -> bool:
    return started(of)[0].get("--dashboard-host") == "127.0.0.1"


def ray_knows_its_options(of: Config) -> bool:
    from ray.scripts.scripts import start

    known = {option for parameter in start.params for option in parameter.opts}
    return all({word for word in values if word.startswith("--")} <= known for values in started(of))


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
    """AWS only: otherwise Ray creates a security group that is open to the world."""
    return of["provider"]["type"] != "aws" or all(node(of, name).get("SecurityGroupIds") for name in ("head", "worker"))


def shell_understands(of: Config) -> bool:
    commands = [command for name in ("setup_commands", "head_setup_commands", *STARTS) for command in of[name]]
    return all(
        subprocess.run(["bash", "-n", "-c", command], capture_output=True).returncode == 0 for command in commands
    )


def in_start(old: str, new: str, which: int = 0) -> Callable[[Config], Any]:
    """Return a function that replaces words in the start of Ray."""

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
    "no worker runs on the driver's node": Policy(
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
