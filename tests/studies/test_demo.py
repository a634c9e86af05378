"""The demonstration says which package is missing."""

import importlib.util
from pathlib import Path

import pytest

from ray_jobs.cli.app import exit_status
from ray_jobs.studies.demo import PACKAGES


@pytest.mark.parametrize("package", PACKAGES)
def test_missing_package_is_one_line_before_anything_is_downloaded(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    assert exit_status(["demo", "--out", str(tmp_path / "demo"), "--workers", "0"]) == 2
    line = capsys.readouterr().err
    assert package in line
    assert "patternnet-ray[demo]" in line
    assert line.count("\n") == 1
    assert not (tmp_path / "demo").exists()
