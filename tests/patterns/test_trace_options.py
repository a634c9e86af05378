"""Explainers load from the file of patterns alone, which records how the model was traced."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from patterns import Explainer, UserError, accumulate, digest, save, solve, trace
from patterns.io import TraceOptions, write_json
from patterns.io.pattern_files import load_trace_options

pytestmark = pytest.mark.full


class Gelu(nn.Module):
    """A model that is traced only with options."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.hidden, self.scores = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(nn.functional.gelu(self.hidden(x))).softmax(1)


OPTIONS = TraceOptions((6,), pass_through=("gelu",), strip_softmax=True)


def saved_gelu(folder: Path, options: TraceOptions | None) -> Gelu:
    model = Gelu()
    network = trace(model, torch.zeros(2, 6), pass_through=OPTIONS.pass_through, strip_softmax=True)
    moments = accumulate(network, [torch.randn(20, 6)])
    solutions = {name: solve(op, moments[name]) for name, op in network.operators.items()}
    save(folder, solutions, digest(model), options)
    return model


@pytest.mark.parametrize("path_type", [str, Path])
def test_explainers_load_from_a_folder_with_only_the_file_of_patterns(tmp_path: Path, path_type: type) -> None:
    model = saved_gelu(tmp_path / "run", OPTIONS)
    (tmp_path / "only").mkdir()
    (tmp_path / "run" / "patterns.safetensors").rename(tmp_path / "only" / "patterns.safetensors")
    assert load_trace_options(tmp_path / "only") == OPTIONS
    explainer = Explainer.load(path_type(tmp_path / "only"), model)
    assert explainer.network.input_shape == (6,)
    assert explainer(torch.ones(2, 6), 0).maps["patternattribution"].shape == (2, 6)


def test_files_that_do_not_record_how_the_model_was_traced_still_load(tmp_path: Path) -> None:
    model = saved_gelu(tmp_path, None)
    with pytest.raises(UserError, match="how the model was traced") as caught:
        Explainer.load(tmp_path, model)
    assert (caught.value.where, caught.value.parameter) == (str(tmp_path), "example")
    assert load_trace_options(tmp_path, (6,)) == TraceOptions((6,))
    fit = {"model": {"pass_through": ["gelu"], "strip_softmax": True, "spec": "m"}}  # as fits of version 0.2 record it
    write_json(tmp_path / "manifest.json", {"model": {"input_shape": [6]}, "fit": fit})
    assert load_trace_options(tmp_path) == OPTIONS
    assert load_trace_options(tmp_path, (7,)).input_shape == (7,)
    assert Explainer.load(tmp_path, model).network.input_shape == (6,)


@pytest.mark.parametrize("manifest", ["", "[]", '{"fit": {}}', '{"fit": {"model": {}}, "model": {}}'])
def test_a_manifest_that_is_not_one_of_a_fit_is_rejected(tmp_path: Path, manifest: str) -> None:
    saved_gelu(tmp_path, None)
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(UserError, match="how the model was traced") as caught:
        load_trace_options(tmp_path)
    assert caught.value.where == str(tmp_path)
