"""Write an explainer as a model: a file that maps a batch of images to scores and maps, without this package."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from patterns import Explainer, UserError, export_program
from patterns.io import write_atomically
from ray_jobs.config import TargetConfig
from ray_jobs.io.object_store import fetch, locate
from ray_jobs.jobs.explain.targets import parse_target
from ray_jobs.jobs.method_job import describe_estimators, make_explainer, validate_settings
from ray_jobs.jobs.onnx_export import require_onnx, write_onnx
from ray_jobs.models.class_names import load_class_names, map_numbers_to_names
from ray_jobs.models.loading import TracedModel, open_model
from ray_jobs.runs.run_folder import Run
from ray_jobs.units import find_version

DESCRIPTION = "patternnet.json"  # the name of the description in the files
INPUT, SCORES = "images", "scores"  # the names of the input and of the first output


def export_model(config: TargetConfig, to: Path, classes: str | None = None) -> dict[str, Any]:
    """Write the explainer of a finished fit as a model.

    Args:
        config: The model, the methods and the target. There are no shards.
        to: The file. Its ending chooses the format: `.pt2`, a program of `torch.export`, or `.onnx`.
        classes: A file of class names for the description; None: those of the model's library.

    Returns:
        The description that the file holds: input, outputs, preprocessing, methods, target and digests.

    Raises:
        UserError: If the ending is unknown, the options do not fit the run, or ONNX lacks an operation.
    """
    if to.suffix not in WRITERS:
        raise UserError(str(to), "the file name has no known ending", f"Choose from {', '.join(WRITERS)}.", "to")
    if to.suffix == ".onnx":
        require_onnx()
    validate_settings(config)
    run = Run(config.patterns)
    run.require_job("fit", "Run `patternnet fit` to the end first.")
    model = open_model(config.model, run.folder).traced
    target = parse_target(config.target, model.network, config.classes, config.vector)
    if needed := target.needed_region or ("label" if target.needs_label else None):
        raise UserError("", f"the images have no {needed}", "Explain `predicted` or a class.", "target")
    network = target.end(model.network)
    explainer = make_explainer(config, model, network, {})
    program = export_program(explainer, config.methods, lambda scores: target.make_targets(scores, ()))
    description = describe(config, model, explainer, classes)
    write_atomically(to, lambda path: WRITERS[to.suffix](program, path, description))
    return description


def describe(config: TargetConfig, model: TracedModel, explainer: Explainer, classes: str | None) -> dict[str, Any]:
    """Return the description of an exported explainer."""
    network = explainer.network
    with fetch(locate(config.patterns) / "patterns.safetensors") as file:
        patterns = hashlib.sha256(file.read_bytes()).hexdigest()
    return {
        "input": {
            "name": INPUT,
            "shape": ["N", *network.input_shape],
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        "preprocessing": asdict(model.preprocessing),
        "outputs": [SCORES, *config.methods],
        "exponents": explainer.exponents,
        "target": config.target,
        "estimators": describe_estimators(config, network),
        "classes": map_numbers_to_names(load_class_names(config.model.spec, classes)),
        "model": {"spec": config.model.spec, "digest": model.digest, "constants": network.constants},
        "patterns": {"sha256": patterns},
        "versions": {name: find_version(name) for name in ("patternnet-ray", "torch")},
    }


def write_program(program: ExportedProgram, path: Path, description: dict[str, Any]) -> None:
    """Write a program of `torch.export` with its description as an extra file."""
    with open(path, "wb") as file:  # torch checks the ending of a path
        torch.export.save(program, file, extra_files={DESCRIPTION: json.dumps(description, indent=1)})


def write_onnx_model(program: ExportedProgram, path: Path, description: dict[str, Any]) -> None:
    """Write an ONNX graph with its description among its metadata."""
    text = {DESCRIPTION: json.dumps(description)}
    write_onnx(program, path, [INPUT], description["outputs"], text)


WRITERS: dict[str, Callable[[ExportedProgram, Path, dict[str, Any]], None]] = {
    ".pt2": write_program,
    ".onnx": write_onnx_model,
}
