"""The command line: one line and exit status 2 for everything that the user can fix."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from safetensors.torch import save_file

from patterns import UserError
from patterns.estimation import resolve_estimators
from ray_jobs.cli.app import COMMANDS, exit_status, make_app
from ray_jobs.cli.typer_options import name_flags
from ray_jobs.config import ModelConfig
from ray_jobs.models import loading
from ray_jobs.studies.demo import prepare_photographs, prepare_weights
from tests.conftest import make_shards, write_tar

Complaint = Callable[..., str]
PREPARED = ["--image-size", "16", "--resize", "16", "--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25"]
WORKERS = ["--workers", "0"]
FORK = """
import torch
from torch import nn


class Fork(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        y = self.conv(x)
        return self.fc((y.relu() + nn.functional.relu6(y)).mean((2, 3)))
"""


@pytest.fixture
def fit(model_spec: str, shards: list[str], tmp_path: Path) -> list[object]:
    """A valid fit command, for tests that make it invalid."""
    return [
        "fit", "--model", model_spec, "--out", tmp_path / "run", "--shards", shards[0], *PREPARED, *WORKERS,
    ]  # fmt: skip


def user_error(*arguments: object) -> UserError:
    """Return the error with which a command fails."""
    with pytest.raises(UserError) as caught:
        make_app()([str(argument) for argument in arguments], prog_name="patternnet", standalone_mode=False)
    return caught.value


def test_usage_errors_are_one_line(complaint: Complaint, fit: list[object]) -> None:
    assert "'--model'" in complaint("fit")
    assert "'fitt'" in complaint("fitt")
    assert "--batch-size" in complaint(*fit, "--batch-size", "many")
    assert "'a,b' is not a list of numbers" in complaint(*fit, "--mean", "a,b")


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *(("--memory", each) for each in ("16Q", "infG", "1e400", "nan", "abcG", "-1G", "0.5", "")),
        *(("--max-loss", each) for each in ("9x", "infs", "1e400h", "nans", "abcs", "-1s", "")),
    ],
)
def test_amount_that_is_not_finite_is_a_usage_error_of_its_option(
    complaint: Complaint, fit: list[object], flag: str, value: str
) -> None:
    line = complaint(*fit, f"{flag}={value}")
    assert f"'{flag}'" in line
    assert f"{value!r} is not a " in line


def test_unknown_estimator_is_reported_with_the_known_ones(fit: list[object]) -> None:
    error = user_error(*fit, "--estimators", "best")
    assert error.parameter == "estimators"
    assert "'best'" in error.what
    assert "two-component" in error.remedy


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ("torchvision:vgg61", "vgg16"),
        ("timm:resnet5o", "resnet50"),
        ("resnet50", "resnet50"),
        ("no.such:thing", "no.such"),
        ("json:nothing", "nothing"),
    ],
)
def test_missing_model_is_named(complaint: Complaint, fit: list[object], tmp_path: Path, spec: str, named: str) -> None:
    line = complaint(*fit, "--model", spec)
    assert spec in line
    assert named in line
    assert not (tmp_path / "run").exists()


def test_unsupported_operation_is_named_with_its_place(complaint: Complaint, tmp_path: Path) -> None:
    file = tmp_path / "tanh.py"
    layers = "nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(784, 2)"
    file.write_text(f"from torch import nn\n\n\ndef net():\n    return nn.Sequential({layers})\n")
    line = complaint("plan", "--model", f"{file}:net", "--image-size", "16")
    assert "no pattern is defined for tanh in 1 (" in line
    assert "--pass-through tanh" in line


@pytest.mark.full
def test_plan_says_what_explanations_take_as_constants(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(["plan", "--model", "timm:test_efficientnet", "--weights", "random"]) == 0
    printed = capsys.readouterr().out
    assert "taken as constants in explanations: 11 smooth gates, 2 factors of products" in printed
    assert "silu" in printed


def test_wrong_weights_are_named(complaint: Complaint, fit: list[object], tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(1)}, other)
    assert "0.bias" in complaint(*fit, "--weights", other)
    pickled = tmp_path / "pickled.pt"
    torch.save({"a": Path("x")}, pickled)
    assert "state dict" in complaint(*fit, "--weights", pickled)
    assert str(tmp_path / "none.pt") in complaint(*fit, "--weights", tmp_path / "none.pt")


def test_wrong_number_of_channels_is_reported(complaint: Complaint, fit: list[object]) -> None:
    line = complaint(*fit, "--mean", "0.5", "--std", "0.5")
    assert "(1, 16, 16)" in line
    assert "--mean" in line


def test_missing_and_empty_shards_are_named(complaint: Complaint, fit: list[object], tmp_path: Path) -> None:
    assert f"{tmp_path}/none.tar" in complaint(*fit, "--shards", tmp_path / "none.tar")
    (tmp_path / "zero.tar").touch()
    line = complaint(*fit, "--shards", tmp_path / "zero.tar")
    assert "zero.tar" in line
    assert "empty" in line


def test_archive_without_samples_is_named(
    local_ray: None, complaint: Complaint, fit: list[object], tmp_path: Path
) -> None:
    empty = write_tar(tmp_path / "empty.tar", [])
    at = fit.index("--shards") + 1
    assert "empty.tar" in complaint(*fit[:at], empty, *fit[at + 1 :], "--retries", 0)


def test_run_without_one_usable_sample_says_why(
    local_ray: None, complaint: Complaint, fit: list[object], tmp_path: Path
) -> None:
    bad = write_tar(tmp_path / "bad.tar", [{"__key__": "k", "txt": b"no image"}])
    at = fit.index("--shards") + 1
    line = complaint(*fit[:at], bad, *fit[at + 1 :])
    assert "none of the 1 samples" in line
    assert "k: neither an image" in line


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc").exists(), reason="needs a folder that cannot be written")
def test_folder_that_cannot_be_written_is_named(complaint: Complaint, fit: list[object]) -> None:
    assert "/proc/run" in complaint(*fit, "--out", "/proc/run")


def test_changed_options_of_an_old_run_are_named(
    local_ray: None, complaint: Complaint, fit: list[object], tmp_path: Path, shards: list[str]
) -> None:
    assert exit_status([str(a) for a in fit]) == 0
    before = (tmp_path / "run" / "manifest.json").read_bytes()
    assert "batch_size 32, now 8" in complaint(*fit, "--batch-size", "8")
    assert "1 shards from" in complaint(*fit, "--shards", shards[1])
    assert (tmp_path / "run" / "manifest.json").read_bytes() == before


@pytest.mark.full
def test_signal_before_anything_can_be_committed_stops_with_status_3(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import time\n\n\ndef model():\n    print('here', flush=True)\n    time.sleep(60)\n"
    )
    command = [sys.executable, "-m", "ray_jobs", "plan", "--model", f"{tmp_path}/slow.py:model"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        process.terminate()
        _, err = process.communicate(timeout=60)
    assert process.returncode == 3
    assert err.startswith("patternnet: interrupted")
    assert err.count("\n") == 1


def test_run_of_a_version_without_an_option_resumes_with_its_default_only(
    local_ray: None, complaint: Complaint, fit: list[object], tmp_path: Path
) -> None:
    assert exit_status([str(a) for a in fit]) == 0
    path = tmp_path / "run" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["fit"]["options"]["positions"], manifest["fit"]["options"]["mean"]
    path.write_text(json.dumps(manifest))
    assert "mean None, now [0.5, 0.5, 0.5]" in complaint(*fit)
    manifest["fit"]["options"]["mean"] = [0.5, 0.5, 0.5]
    path.write_text(json.dumps(manifest))
    assert "positions None, now 3" in complaint(*fit, "--positions", 3)
    assert exit_status([str(a) for a in fit]) == 0


def test_patterns_of_other_weights_are_rejected(
    local_ray: None, complaint: Complaint, fit: list[object], tmp_path: Path, shards: list[str], model_spec: str
) -> None:
    explain = ["explain", "--patterns", tmp_path / "run", "--shards", shards[0], *WORKERS]
    assert "holds no finished fit" in complaint(*explain)
    assert exit_status([str(a) for a in fit]) == 0
    from ray_jobs.models.factories import load_custom_model

    state = load_custom_model(model_spec).state_dict()
    state["0.bias"] = state["0.bias"] + 1
    save_file(state, tmp_path / "other.safetensors")
    assert "weights sha256:" in complaint(*explain, "--weights", tmp_path / "other.safetensors")
    assert "'best'" in complaint(*explain, "--target", "best")
    assert not (tmp_path / "run" / "explanations").exists()


@pytest.mark.full
def test_errors_name_the_flags_of_the_command(
    complaint: Complaint, fit: list[object], tmp_path: Path, shards: list[str]
) -> None:
    assert exit_status([str(a) for a in fit]) == 0
    explain = ["explain", "--patterns", tmp_path / "run", "--shards", shards[0], *WORKERS]
    for flag, value, parameter in [
        ("--methods", "saliency", "methods"),
        ("--set", "smoothgrad.nothing=1", "settings"),
        ("--output", "npy,bmp", "outputs"),
        ("--output", "", "outputs"),
        ("--reduce-channels", "mean", "reduction"),
        ("--precision", "float8", "precision"),
        ("--compile", "fastest", "compile"),
    ]:
        assert user_error(*explain, flag, value).parameter == parameter
        line = complaint(*explain, flag, value)
        assert line.startswith(f"patternnet: {flag}: ")
        assert "`" not in line
    line = complaint(*fit, "--compile", "default", "--positions", 3)
    assert line.startswith("patternnet: --compile: ")
    assert "--positions" in line
    assert "--evaluate" in complaint("quality", "--patterns", tmp_path / "run", "--shards", shards[0])
    assert not (tmp_path / "run" / "explanations").exists()


def test_parameters_are_replaced_by_the_flags_of_the_command_alone() -> None:
    text = "Pass `pass_through=gelu`, `size=56`, `settings` or `estimators`; `size_` and `random` stay."
    in_fit = "Pass --pass-through gelu, `size=56`, `settings` or --estimators; `size_` and `random` stay."
    in_explain = "Pass `pass_through=gelu`, --map-size 56, --set or --estimators; `size_` and `random` stay."
    assert name_flags(text, COMMANDS["fit"].flags()) == in_fit
    assert name_flags(text, COMMANDS["explain"].flags()) == in_explain
    assert name_flags("`spec` and `model` and `run`", COMMANDS["plan"].flags()) == "--model and --model and `run`"
    assert name_flags("`run`", COMMANDS["status"].flags()) == "RUN"


@pytest.mark.full
def test_deprecated_flags_still_work_with_a_warning(
    fit: list[object], tmp_path: Path, shards: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert exit_status([str(a) for a in fit]) == 0
    capsys.readouterr()
    common = ["--patterns", str(run), "--shards", shards[1], *WORKERS]
    explain = ["explain", *common, "--methods", "gradient", "--output", "npy"]
    assert exit_status([*explain, "--resize", "8"]) == 0
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("patternnet: --")]
    assert "--resize" in warning
    assert "--map-size" in warning
    assert exit_status([*explain, "--map-size", "8"]) == 0  # the same job, so nothing is left to do
    assert exit_status(["quality", *common, "--shards", shards[2], "--gram-positions", "3"]) == 0
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("patternnet: --")]
    assert "--gram-positions" in warning
    assert "use --positions" in warning
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["explain"]["options"]["size"] == 8
    assert manifest["quality"]["options"]["positions"] == 3


@pytest.mark.full
def test_program_in_a_shell_ends_with_status_2_and_no_traceback() -> None:
    command = [sys.executable, "-m", "ray_jobs", "fit", "--model", "torchvision:none", "--shards", "x", "--out", "y"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("patternnet: ")


def test_solve_and_merge_continue_finished_fits(
    local_ray: None, fit: list[object], model_spec: str, shards: list[str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str], complaint: Complaint,
) -> None:  # fmt: skip
    run, other = str(tmp_path / "run"), str(tmp_path / "other")
    assert exit_status([str(a) for a in fit]) == 0
    assert exit_status(["solve", run, "--estimators", "filter"]) == 0
    assert "filter. Patterns: " in capsys.readouterr().out
    assert "'none'" in complaint("solve", run, "--estimators", "none")
    options = ["--model", model_spec, "--shards", shards[1], "--out", other, *WORKERS, *PREPARED]
    assert exit_status(["fit", *map(str, options)]) == 0
    assert exit_status(["merge", run, other, "--out", str(tmp_path / "both")]) == 0
    assert "merge: 12 samples of 2 shards" in capsys.readouterr().out
    assert run in complaint("merge", run, run, "--out", tmp_path / "no")
    shutil.rmtree(tmp_path / "run" / "moments")
    line = complaint("solve", run, "--estimators", "random")
    assert f"{run}: its moments" in line
    assert "--estimators" in line


@pytest.mark.full
def test_plan_names_operators_with_several_gates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m.py").write_text(FORK)
    assert exit_status(["plan", "--model", f"{tmp_path}/m.py:Fork", *PREPARED]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert "several" in rows["conv"]
    assert "several" not in rows["fc"]


def test_plan_shows_operators_and_gates_without_data(model_spec: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(["plan", "--model", model_spec, *PREPARED]) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert "0 < z < 6" in rows["0"]
    assert "addition" in rows["addition.0"]
    assert "0 < z < inf" in rows["addition.0"]
    assert "6 operators;" in out


def test_plan_names_the_estimators_of_explanations(
    model_spec: str, capsys: pytest.CaptureFixture[str], complaint: Complaint
) -> None:
    def estimators(*words: str) -> dict[str, str]:
        assert exit_status(["plan", "--model", model_spec, *PREPARED, *words]) == 0
        lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(" ")]
        assert lines[0][-2:] == ["explained", "by"]
        return {line[0]: line[-1] for line in lines[1:]}

    network = loading.load(ModelConfig(spec=model_spec, image_size=16)).network
    assert estimators() == estimators("--preset", "class-specific") == resolve_estimators(network, "default")
    assert {"identity", "two-component-own-mean"} == set(estimators().values())
    assert estimators("--preset", "paper") == dict.fromkeys(network.operators, "two-component")
    assert "class-specific" in complaint("plan", "--model", model_spec, *PREPARED, "--preset", "papers")


def test_packed_folder_keeps_images_and_classes(tmp_path: Path) -> None:
    from ray_jobs.data.shard_reader import read_shard

    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(3):
            data = next(iter(read_shard(make_shards(tmp_path / f"{name}{i}", 1, 1, seed=i)[0]))).files["jpg"]
            (tmp_path / "images" / name / f"v1.{i}.jpg").write_bytes(data)
    assert exit_status(["pack", str(tmp_path / "images"), str(tmp_path / "out"), "--per-shard", "4"]) == 0
    samples = [s for path in sorted((tmp_path / "out").glob("*.tar")) for s in read_shard(str(path))]
    assert len(samples) == 6
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == {"0": "cat", "1": "dog"}
    for sample in samples:
        name = unquote(sample.key)
        folder = name.partition("/")[0]
        assert sample.files["jpg"] == (tmp_path / "images" / f"{name}.jpg").read_bytes()
        assert sample.files["cls"] == {"cat": b"0", "dog": b"1"}[folder]


@pytest.mark.slow
def test_model_of_the_demo_classifies_its_photographs(tmp_path: Path) -> None:
    from ray_jobs.config import ModelConfig
    from ray_jobs.data.image_decoding import decode
    from ray_jobs.models import loading

    weights = prepare_weights(tmp_path / "weights.safetensors")
    files = sorted(prepare_photographs(tmp_path / "photographs").rglob("*.jpg"))
    loaded = loading.load(ModelConfig(spec="timm:tf_efficientnet_lite0", weights=str(weights)))
    images = torch.stack([decode({"jpg": f.read_bytes()}, loaded.preprocessing) for f in files])
    with torch.no_grad():
        predicted = loaded.network.module(images).argmax(1).tolist()
    assert sum(p == int(f.parent.name) for p, f in zip(predicted, files)) == 18
