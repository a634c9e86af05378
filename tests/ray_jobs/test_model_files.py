"""Models from files without code: exported programs and ONNX graphs."""

import io
import re
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision import models

from patterns import Solution, UserError, accumulate, solve, trace
from ray_jobs.config import ModelConfig
from ray_jobs.models import loading
from ray_jobs.models.model_files import load_model_file

INPUTS = torch.rand(3, 3, 12, 12)


def make_model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(576, 5)
    ).eval()


def export(model: nn.Module, size: int = 12) -> bytes:
    batch = torch.export.Dim("batch")
    program = torch.export.export(model.eval(), (torch.zeros(2, 3, size, size),), dynamic_shapes=({0: batch},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def export_onnx(model: nn.Module, size: int = 12) -> bytes:
    buffer = io.BytesIO()
    torch.onnx.export(
        model.eval(), (torch.zeros(2, 3, size, size),), buffer, dynamo=False, input_names=["x"], opset_version=17,
        dynamic_axes={"x": {0: "batch"}},
    )  # fmt: skip
    return buffer.getvalue()


def assert_same_patterns(found: Solution, expected: Solution) -> None:
    assert found.flags == expected.flags
    torch.testing.assert_close(dict(found.patterns), dict(expected.patterns), rtol=1e-4, atol=1e-5)


WRITERS = {"m.pt2": export, "m.onnx": export_onnx}


@pytest.mark.full
@pytest.mark.parametrize("name", WRITERS)
def test_model_of_a_file_has_the_operators_and_patterns_of_its_module(tmp_path: Path, name: str) -> None:
    model = make_model()
    (tmp_path / name).write_bytes(WRITERS[name](model))
    loaded = loading.load(ModelConfig(spec=str(tmp_path / name)))
    assert loaded.preprocessing.input_shape == (3, 12, 12)  # as the file states it
    network = trace(model, INPUTS[:2])
    torch.testing.assert_close(loaded.network.module(INPUTS), model(INPUTS), rtol=1e-5, atol=1e-6)
    for (own, op), (_, other) in zip(loaded.network.operators.items(), network.operators.items(), strict=True):
        found, expected = (
            solve(operator, accumulate(net, [INPUTS])[key], "linear,two-component")
            for key, operator, net in ((own, op, loaded.network), (other.name, other, network))
        )
        assert_same_patterns(found, expected)


# A small model of each family of torchvision's classifiers.
TORCHVISION = [
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3",
    "maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "resnet18", "resnext50_32x4d",
    "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11", "vit_b_16", "wide_resnet50_2",
]  # fmt: skip


def find_family(name: str) -> str:
    """Return the letters and the version that a name begins with."""
    found = re.match(r"[a-z]+(_v\d)?", name)
    assert found is not None
    return found[0]


def test_every_family_of_torchvision_has_a_model_in_the_test_of_programs() -> None:
    names = models.list_models(module=models)
    assert {find_family(name) for name in TORCHVISION} == {find_family(name) for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHVISION)
def test_programs_of_torchvision_have_the_operators_and_patterns_of_their_modules(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}  # which is slow
    model = models.get_model(name, **options).eval()
    size = 299 if name == "inception_v3" else 224
    images = torch.rand(2, 3, size, size)
    (tmp_path / "m.pt2").write_bytes(export(model, size))
    network = trace(model, images)
    loaded = loading.load(ModelConfig(spec=str(tmp_path / "m.pt2"))).network
    assert list(loaded.operators) == list(network.operators)
    found, expected = accumulate(loaded, [images]), accumulate(network, [images])
    for key, operator in network.operators.items():
        assert_same_patterns(solve(loaded.operators[key], found[key]), solve(operator, expected[key]))


def test_exported_program_for_one_batch_size_is_rejected(tmp_path: Path) -> None:
    torch.export.save(torch.export.export(make_model(), (INPUTS,)), tmp_path / "m.pt2")
    with pytest.raises(UserError, match="batches of 3 only"):
        loading.load(ModelConfig(spec=str(tmp_path / "m.pt2")))


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("content", [b"", b"\x00" * 99, b"PK\x03\x04 and no more", b"{}"])
def test_damaged_files_are_errors_that_name_them(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        load_model_file(str(tmp_path / name))
    assert error.value.where.endswith(name)


@pytest.mark.parametrize("length", [1 / 4, 1 / 2, 0.9])
@pytest.mark.parametrize("name", WRITERS)
def test_truncated_files_are_errors_that_name_them(tmp_path: Path, name: str, length: float) -> None:
    content = WRITERS[name](make_model())
    (tmp_path / name).write_bytes(content[: int(length * len(content))])
    with pytest.raises(UserError) as error:
        load_model_file(str(tmp_path / name))
    assert error.value.where.endswith(name)


class Harmful:
    """An object whose unpickling runs code."""

    def __reduce__(self) -> tuple[object, ...]:
        return exec, ("import ray_jobs; ray_jobs.harmed = True",)


def with_file(content: bytes, ending: str, data: bytes) -> bytes:
    """Return an exported program in which a file is replaced, or added."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w") as new:
        names = [name for name in old.namelist() if not name.endswith(ending)]
        for name in names:
            new.writestr(name, old.read(name))
        new.writestr(f"{names[0].partition('/')[0]}/{ending}", data)
    return buffer.getvalue()


def pickled() -> bytes:
    buffer = io.BytesIO()
    torch.save(Harmful(), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "ending",
    ["data/sample_inputs/model.pt", "data/weights/model.pt", "data/constants/model.pt", "data/constants/custom_obj_0",
     "data/constants/opaque_obj_0"],
)  # fmt: skip
def test_no_code_in_a_program_runs(tmp_path: Path, ending: str) -> None:
    (tmp_path / "m.pt2").write_bytes(with_file(export(make_model()), ending, pickled()))
    with pytest.raises(UserError) as caught:
        load_model_file(str(tmp_path / "m.pt2"))
    assert str(tmp_path / "m.pt2") in caught.value.where
    assert ("pickled object" if "_obj_" in ending else "Weights only load failed") in caught.value.what
    assert not hasattr(sys.modules["ray_jobs"], "harmed")


def test_weights_marked_as_pickles_do_not_run(tmp_path: Path) -> None:
    content = export(make_model())
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        ending = "data/weights/model_weights_config.json"
        (config,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith(ending))
    marked = with_file(content, ending, config.replace('"use_pickle": false', '"use_pickle": true').encode())
    (tmp_path / "m.pt2").write_bytes(with_file(marked, "data/weights/weight_0", pickled()))
    with pytest.raises(UserError) as caught:
        load_model_file(str(tmp_path / "m.pt2"))
    assert "Weights only load failed" in caught.value.what
    assert not hasattr(sys.modules["ray_jobs"], "harmed")


def test_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx2torch", None)
    (tmp_path / "m.onnx").write_bytes(b"")
    with pytest.raises(UserError) as error:
        load_model_file(str(tmp_path / "m.onnx"))
    assert "patternnet-ray[onnx]" in error.value.remedy
