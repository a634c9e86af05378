"""Optional packages: a missing package is one line that names the extra."""

import json
import sys
from pathlib import Path

import pytest

from patterns import UserError
from ray_jobs.io.extras import import_extra


def test_installed_module_is_returned_by_its_top_package() -> None:
    assert import_extra("some", "json.decoder", "csv") is json


def test_missing_package_names_the_extra_and_who_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "sklearn"]:  # of earlier tests
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(UserError) as caught:
        import_extra("atlas", "json", "sklearn.cluster", where="atlas", parameter="outputs")
    error = caught.value
    assert (error.where, error.what, error.parameter) == ("atlas", "scikit-learn is not installed", "outputs")
    assert "patternnet-ray[atlas]" in error.remedy


def test_package_that_fails_to_import_gives_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "halfway.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError) as caught:
        import_extra("some", "halfway")
    assert "halfway cannot be imported" in caught.value.what
    assert "no_such_dependency" in caught.value.what
