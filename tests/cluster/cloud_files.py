"""The files for `ray up`, and what Ray and the clouds' interfaces object to in them."""

import json
import tomllib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft7Validator, Draft202012Validator

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "cluster" / "cloud"
CLOUDS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
PAGE = (ROOT / "docs" / "cloud.md").read_text()
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]

Config = dict[str, Any]


def config(cloud: str) -> Config:
    return yaml.safe_load((FOLDER / f"{cloud}.yaml").read_text())


def node(of: Config, name: str) -> Config:
    """Return the request of a node type to its cloud."""
    asked = of["available_node_types"][name]["node_config"]
    return asked.get("azure_arm_parameters", asked)


# --- Validity


def seen_by_ray(of: Config) -> Config:
    """Return a file as `ray up` completes it; raise if Ray rejects it."""
    import ray.autoscaler
    from ray.autoscaler._private.util import prepare_config, validate_config

    # Ray itself validates only after it has filled in defaults for missing fields.
    schema = Path(ray.autoscaler.__path__[0]) / "ray-schema.json"
    Draft7Validator(json.loads(schema.read_text())).validate(of)
    full = prepare_config(of)
    validate_config(full)
    return full


@cache
def instance() -> Draft202012Validator:
    """Return the validator of Google's instances."""
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
    """Check the parameters by the template that Ray fills in: known, of the right type, and complete."""
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
    if missing := {key for key, values in template.items() if "defaultValue" not in values} - by_ray - set(asked):
        raise ValueError(f"missing: {missing}")
    for key, value in asked.items():
        if not isinstance(value, kinds[template[key]["type"]]):
            raise ValueError(f"{key}: no {template[key]['type']}")
    if asked.get("priority", "Regular") not in ("Regular", "Low", "Spot"):
        raise ValueError("priority")


TAKEN: dict[str, Callable[[Config, str], None]] = {"aws": taken_by_aws, "gcp": taken_by_gcp, "azure": taken_by_azure}


def check(cloud: str, of: Config) -> None:
    """Raise if Ray or the cloud's interface rejects a file."""
    seen_by_ray(of)
    for name in of["available_node_types"]:
        TAKEN[cloud](of, name)
