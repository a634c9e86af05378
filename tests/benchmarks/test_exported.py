"""Exported explainers of networks of different families, by torch and by ONNX Runtime."""

import importlib.util
from pathlib import Path

import pytest

from benchmarks.exported import NETWORKS, measure

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs onnx, onnxscript and onnxruntime",
)


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_files_of_a_network_agree_with_the_explainer_and_are_small(name: str, tmp_path: Path) -> None:
    found = measure(name, tmp_path, rounds=0)
    assert found.lacks == ""
    assert found.error < 1e-5
    assert found.onnx_median < 1e-5
    assert found.onnx_error < 2e-2  # in some images, rounding opens or closes a gate: AlexNet, 1.2e-2
    assert max(found.size, found.onnx_size) < 2.1
