"""Paths, URLs and stores: names are normalized, and errors of stores say how to fix them."""

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from patterns import UserError
from ray_jobs.data.byte_streams import open_stream
from ray_jobs.data.shard_specs import list_shards
from ray_jobs.engine.environment import MAX_FOLDER_BYTES, choose_temporary_folder, ensure_token
from ray_jobs.io import file_systems
from ray_jobs.io.file_systems import MissingError, is_url, to_user_error
from ray_jobs.io.object_store import locate, normalize_location, require_writable
from tests.conftest import make_shards


@pytest.mark.parametrize(
    ("error", "where", "phrase"),
    [
        (ImportError("Please install gcsfs"), "gs://b/run", "pip install gcsfs"),
        (ImportError("no", name="paramiko"), "sftp://h/run", "pip install paramiko"),
        (ValueError("Protocol not known: foo"), "foo://b/run", "foo://"),
        (type("NoCredentialsError", (Exception,), {})("Unable to locate"), "s3://b/run", "credentials"),
        (PermissionError("Forbidden"), "s3://b/run", "credentials"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), "s3://b/run", "does not respond"),
        (TimeoutError("no answer"), "s3://b/run", "does not respond"),
        (OSError(errno.ENOSPC, "No space left on device"), "/run", "Free disk space"),
        (OSError(errno.EROFS, "Read-only file system"), "/run", "permissions"),
        (OSError(errno.ENAMETOOLONG, "File name too long"), "/run", "Check the path"),
        (OSError(errno.ELOOP, "Too many levels of symbolic links"), "/run", "Check the path"),
        (RuntimeError("odd\n in two lines"), "s3://b/run", "odd in two lines"),
    ],
)
def test_errors_of_file_systems_say_how_to_fix_them(error: Exception, where: str, phrase: str) -> None:
    found = to_user_error(error, where)
    assert found.where == where
    assert phrase in str(found)
    assert "\n" not in str(found)


def test_missing_file_and_unreachable_server_are_different_errors() -> None:
    assert isinstance(to_user_error(FileNotFoundError(errno.ENOENT, "no", "/a"), "/a"), MissingError)
    unreachable = FileNotFoundError("http://h/a")
    unreachable.__cause__ = ConnectionRefusedError("refused")
    assert not isinstance(to_user_error(unreachable, "http://h/a"), FileNotFoundError)


def test_server_that_never_responds_is_an_error_after_a_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_systems, "ANSWER_TIMEOUT", 0.3)
    # Without the timeout, the read would never end.
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(UserError, match="does not respond"):
        locate(f"http://127.0.0.1:{server.getsockname()[1]}/run/manifest.json").read_text()


def test_spellings_of_one_folder_are_one_location(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a b").mkdir()
    for where in ("~/a b/run", "a b/run/", f"file://{tmp_path}/a b/run", f"file:{tmp_path}/a%20b/run", "./a b//run"):
        assert str(locate(where)) == f"{tmp_path}/a b/run"
    assert str(locate("s3://bucket/run/")) == "s3://bucket/run"
    assert not is_url("a::b/x.tar")
    assert is_url("simplecache::s3://b/x.tar")


@pytest.mark.parametrize(
    ("where", "what"),
    [
        ("", "an empty path"),
        (" ", "an empty path"),
        ("s3:/bucket/run", "a single slash"),
        ("gs:/b", "a single slash"),
        ("http:/h/run", "a single slash"),
        ("~no-such-user/run", "home folder"),
    ],
)
def test_invalid_paths_are_an_error(where: str, what: str) -> None:
    with pytest.raises(UserError) as caught:
        normalize_location(where)
    assert where in caught.value.where
    assert what in caught.value.what


def test_output_folder_that_is_a_file_is_an_error_and_nothing_is_created(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for where in ("file", "file/below", "dangling", f"file/{'x' * 300}"):
        with pytest.raises(UserError) as caught:
            require_writable(tmp_path / where)
        assert caught.value.where == str(tmp_path / where)
    for where in ("https://host/run", "foo://b/run"):
        with pytest.raises(UserError) as caught:
            require_writable(where)
        assert caught.value.where == where
    assert require_writable(tmp_path / "link").local == tmp_path / "link"
    assert require_writable(tmp_path / "new" / "run").local == tmp_path / "new" / "run"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dangling", "file", "link", "real"]


@pytest.mark.parametrize(
    "spec", ["{0..3}", "{003..001}", "{000..010..5}", "{010..000..5}", "{3..1}", "x{a,b{c,d}}", "{a..e..2}"]
)
def test_braces_expand_as_in_bash(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.run(["bash", "-c", f"printf '%s\\n' {spec}.tar"], capture_output=True, text=True, check=True)
    for name in done.stdout.splitlines():
        (tmp_path / name).write_text("x")
    monkeypatch.chdir(tmp_path)
    assert [Path(shard).name for shard in list_shards([f"{spec}.tar"])] == done.stdout.splitlines()


@pytest.mark.parametrize(
    "name", ["a::b", "a[1]b", "a{b,c}d", "@at", "back\\slash", "pct%20x", "q?x", "#hash", "new\nline"]
)
def test_existing_folders_are_taken_literally(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_shards(tmp_path / name, 2, 1)
    monkeypatch.chdir(tmp_path)
    for spec in (f"{name}/train-{{000..001}}.tar", f"{name}/*.tar", f"{name}/train-00[01].tar"):
        assert list(list_shards([spec])) == made


@pytest.mark.parametrize("magic", [0x184D2A50, 0x184D2A5F])
def test_zstd_file_of_several_frames_is_read(magic: int, tmp_path: Path) -> None:
    data, zstd = Path(make_shards(tmp_path, 1, 2)[0]).read_bytes(), pa.Codec("zstd")
    skippable = magic.to_bytes(4, "little") + (5).to_bytes(4, "little") + b"hello"
    halves = [zstd.compress(half, asbytes=True) for half in (data[:3000], data[3000:])]
    packed = tmp_path / "packed.tar"
    packed.write_bytes(skippable + skippable.join(halves))
    with open_stream(str(packed)) as stream:
        assert stream.read() == data


def test_folder_of_ray_is_short_and_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 2 * MAX_FOLDER_BYTES)
    long.mkdir()
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    for unusable in (long, tmp_path / "none"):
        monkeypatch.setenv("TMPDIR", str(unusable))
        assert choose_temporary_folder() == "/tmp/ray"
    monkeypatch.setenv("TMPDIR", "/tmp")
    assert choose_temporary_folder() is None
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    with pytest.raises(UserError, match="RAY_TMPDIR"):
        choose_temporary_folder()


def test_token_is_created_if_home_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/proc/nowhere")
    ensure_token()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
    del os.environ["RAY_AUTH_TOKEN"]


@pytest.mark.parametrize("redirection", [">&-", "2>&-", "<&-", ">/dev/full", "| true"])
def test_standard_streams_may_be_closed(redirection: str) -> None:
    program = (
        "import sys; from ray_jobs.cli.standard_streams import secure; secure(); "
        "print('→ ρ'); print('ρ', file=sys.stderr)"
    )
    command = f'{sys.executable} -c "{program}" {redirection}'
    ascii_ = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=ascii_, check=False)
    assert ("No space left" in done.stderr) == (redirection == ">/dev/full")
    assert ("Traceback" in done.stderr) == (redirection == ">/dev/full")
    assert (done.returncode == 0) == (redirection != ">/dev/full")
