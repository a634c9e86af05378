"""The command line: one clear line and exit status 2 for whatever a user can mend."""

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

from ray_jobs.cli.app import exit_status
from ray_jobs.studies.demo import prepare_photographs, prepare_weights
from tests.conftest import make_shards, write_tar

Complaint = Callable[..., str]
PREPARED = ["--image-size", "16", "--resize", "16", "--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25"]
WORKERS = ["--workers", "0"]


@pytest.fixture
def fit(model_spec: str, shards: list[str], tmp_path: Path) -> list[object]:
    """A good fit command, to be spoilt."""
    return [
        "fit", "--model", model_spec, "--out", tmp_path / "run", "--shards", shards[0], *PREPARED, *WORKERS,
    ]  # fmt: skip


def test_usage_errors_are_one_line(complaint: Complaint, fit: list[object]) -> None:
    assert "Missing option '--model'" in complaint("fit")
    assert "No such command 'fitt'" in complaint("fitt")
    assert "--batch-size" in complaint(*fit, "--batch-size", "many")
    assert "no estimator 'best'. Choose from identity, filter, random" in complaint(*fit, "--estimators", "best")
    assert "'--mean': 'a,b' is not a list of numbers" in complaint(*fit, "--mean", "a,b")


def test_a_model_that_is_not_there_is_named(complaint: Complaint, fit: list[object], tmp_path: Path) -> None:
    assert "torchvision has no model 'vgg61'. It has vgg" in complaint(*fit, "--model", "torchvision:vgg61")
    assert "timm has no model 'resnet5o'. It has resnet" in complaint(*fit, "--model", "timm:resnet5o")
    assert "not a model spec" in complaint(*fit, "--model", "resnet50")
    assert "cannot be imported" in complaint(*fit, "--model", "no.such:thing")
    assert "has no function 'nothing'" in complaint(*fit, "--model", "json:nothing")
    assert not (tmp_path / "run").exists()


def test_a_model_with_unsupported_operations_names_them_and_where(complaint: Complaint) -> None:
    line = complaint("plan", "--model", "timm:efficientnet_b0", "--weights", "random")
    assert "no pattern is defined for silu in bn1.act (norm_act.py:" in line
    assert "Supported are convolution" in line


def test_wrong_weights_are_named(complaint: Complaint, fit: list[object], tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(1)}, other)
    assert "tensors are missing, the first is 0.bias" in complaint(*fit, "--weights", other)
    pickled = tmp_path / "pickled.pt"
    torch.save({"a": Path("x")}, pickled)
    assert "not a state dict" in complaint(*fit, "--weights", pickled)
    assert "cannot be read" in complaint(*fit, "--weights", tmp_path / "none.pt")


def test_a_wrong_number_of_channels_is_said(complaint: Complaint, fit: list[object]) -> None:
    line = complaint(*fit, "--mean", "0.5", "--std", "0.5")
    assert "does not take an input of shape (1, 16, 16)" in line
    assert "Set --image-size, --mean and --std" in line


def test_shards_that_are_not_there_or_empty_are_named(complaint: Complaint, fit: list[object], tmp_path: Path) -> None:
    assert f"{tmp_path}/none.tar: no such shard" in complaint(*fit, "--shards", tmp_path / "none.tar")
    (tmp_path / "zero.tar").touch()
    assert "zero.tar: not a tar archive (it is empty)" in complaint(*fit, "--shards", tmp_path / "zero.tar")


def test_an_archive_without_samples_is_named(
    local_ray: None, complaint: Complaint, fit: list[object], tmp_path: Path
) -> None:
    empty = write_tar(tmp_path / "empty.tar", [])
    at = fit.index("--shards") + 1
    assert "empty.tar: a tar archive without a sample" in complaint(*fit[:at], empty, *fit[at + 1 :], "--retries", 0)


def test_a_run_without_one_good_sample_says_why(
    local_ray: None, complaint: Complaint, fit: list[object], tmp_path: Path
) -> None:
    bad = write_tar(tmp_path / "bad.tar", [{"__key__": "k", "txt": b"no image"}])
    at = fit.index("--shards") + 1
    line = complaint(*fit[:at], bad, *fit[at + 1 :])
    assert "none of the 1 samples can be used; k: neither an image" in line


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc").exists(), reason="needs a place that cannot be written")
def test_a_folder_that_cannot_be_written_is_named(complaint: Complaint, fit: list[object]) -> None:
    assert "/proc/run: cannot be written" in complaint(*fit, "--out", "/proc/run")


def test_changed_options_on_an_old_run_are_named(
    local_ray: None, complaint: Complaint, fit: list[object], tmp_path: Path, shards: list[str]
) -> None:
    assert exit_status([str(a) for a in fit]) == 0
    before = (tmp_path / "run" / "manifest.json").read_bytes()
    assert "begun with batch_size 32, now 8. Use the options" in complaint(*fit, "--batch-size", "8")
    assert "begun with 1 shards from" in complaint(*fit, "--shards", shards[1])
    assert (tmp_path / "run" / "manifest.json").read_bytes() == before


def test_a_signal_before_there_is_anything_to_commit_is_a_stop_like_any_other(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import time\n\n\ndef model():\n    print('here', flush=True)\n    time.sleep(60)\n"
    )
    command = [sys.executable, "-m", "ray_jobs", "plan", "--model", f"{tmp_path}/slow.py:model"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        process.terminate()
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (3, "patternnet: interrupted; run the same command again to resume\n")


def test_a_run_of_a_version_without_some_option_goes_on_with_its_default_alone(
    local_ray: None, complaint: Complaint, fit: list[object], tmp_path: Path
) -> None:
    assert exit_status([str(a) for a in fit]) == 0
    path = tmp_path / "run" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["fit"]["options"]["positions"], manifest["fit"]["options"]["mean"]
    path.write_text(json.dumps(manifest))
    assert "begun with mean None, now [0.5, 0.5, 0.5]" in complaint(*fit)
    manifest["fit"]["options"]["mean"] = [0.5, 0.5, 0.5]
    path.write_text(json.dumps(manifest))
    assert "begun with positions None, now 3" in complaint(*fit, "--positions", 3)
    assert exit_status([str(a) for a in fit]) == 0


def test_patterns_of_other_weights_are_refused(
    local_ray: None, complaint: Complaint, fit: list[object], tmp_path: Path, shards: list[str], model_spec: str
) -> None:
    explain = ["explain", "--patterns", tmp_path / "run", "--shards", shards[0], *WORKERS]
    assert "holds no finished fit" in complaint(*explain)
    assert exit_status([str(a) for a in fit]) == 0
    from ray_jobs.models.factories import load_custom_model

    state = load_custom_model(model_spec).state_dict()
    state["0.bias"] = state["0.bias"] + 1
    save_file(state, tmp_path / "other.safetensors")
    line = complaint(*explain, "--weights", tmp_path / "other.safetensors")
    assert "these patterns were fitted for weights sha256:" in line
    assert "no method 'saliency'" in complaint(*explain, "--methods", "saliency")
    assert "'best' is no class" in complaint(*explain, "--target", "best")
    assert not (tmp_path / "run" / "explanations").exists()


def test_the_program_of_a_shell_ends_with_status_2_and_no_traceback() -> None:
    command = [sys.executable, "-m", "ray_jobs", "fit", "--model", "torchvision:none", "--shards", "x", "--out", "y"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("patternnet: ")


def test_solve_and_merge_are_commands(
    local_ray: None, fit: list[object], model_spec: str, shards: list[str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str], complaint: Complaint,
) -> None:  # fmt: skip
    run, other = str(tmp_path / "run"), str(tmp_path / "other")
    assert exit_status([str(a) for a in fit]) == 0
    assert exit_status(["solve", run, "--estimators", "filter"]) == 0
    assert "filter. Patterns: " in capsys.readouterr().out
    assert "no estimator 'none'" in complaint("solve", run, "--estimators", "none")
    options = ["--model", model_spec, "--shards", shards[1], "--out", other, *WORKERS, *PREPARED]
    assert exit_status(["fit", *map(str, options)]) == 0
    assert exit_status(["merge", run, other, "--out", str(tmp_path / "both")]) == 0
    assert "merge: 12 samples of 2 shards" in capsys.readouterr().out
    assert "each needs shards of its own" in complaint("merge", run, run, "--out", tmp_path / "no")
    shutil.rmtree(tmp_path / "run" / "moments")
    assert f"{run}: its moments are gone. Fit again, with --estimators" in complaint(
        "solve", run, "--estimators", "random"
    )


def test_plan_says_where_several_gates_make_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m.py").write_text(
        "import torch\nfrom torch import nn\n\n\nclass Fork(nn.Module):\n    def __init__(self):\n"
        "        super().__init__()\n        self.conv = nn.Conv2d(3, 4, 3)\n        self.fc = nn.Linear(4, 2)\n\n"
        "    def forward(self, x):\n        y = self.conv(x)\n"
        "        return self.fc((y.relu() + nn.functional.relu6(y)).mean((2, 3)))\n"
    )
    assert exit_status(["plan", "--model", f"{tmp_path}/m.py:Fork", *PREPARED]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert "several, so none" in rows["conv"]
    assert "several" not in rows["fc"]


def test_plan_says_what_a_model_needs_before_data_is_read(model_spec: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(["plan", "--model", model_spec, *PREPARED]) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert "0 < z < 6" in rows["0"]
    assert "addition" in rows["addition.0"]
    assert "0 < z < inf" in rows["addition.0"]
    assert "6 operators" in out or "7 operators" in out


def test_packed_folders_keep_images_and_classes(tmp_path: Path) -> None:
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
        name = unquote(sample["__key__"])
        folder = name.partition("/")[0]
        assert sample["jpg"] == (tmp_path / "images" / f"{name}.jpg").read_bytes()
        assert sample["cls"] == {"cat": b"0", "dog": b"1"}[folder]


def test_the_demos_model_knows_its_photographs(tmp_path: Path) -> None:
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
