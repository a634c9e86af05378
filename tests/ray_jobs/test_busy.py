"""Busy servers: they are asked again when they allow it, nothing is lost meanwhile, and a stop does not wait."""

import email.message
import errno
import io
import pickle
from collections import Counter
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from types import SimpleNamespace
from urllib.error import HTTPError

import botocore.exceptions
import pytest

from patterns import UserError
from ray_jobs.config.timing import Timing
from ray_jobs.engine import worker_pool
from ray_jobs.engine.worker_pool import Outcome
from ray_jobs.io import web
from ray_jobs.io.file_systems import to_user_error
from ray_jobs.io.pauses import find_pause
from ray_jobs.io.refusals import BusyError, find_refusal, parse_retry_after
from ray_jobs.io.web import call_patiently
from tests.ray_jobs.pool_jobs import PLAIN, WORKER, Clock, Recorder, in_process, run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Virtual time for the pool."""
    virtual = Clock()
    monkeypatch.setattr(worker_pool, "time", virtual)
    return virtual


def test_refused_item_is_tried_after_the_pause_and_its_worker_loses_nothing(tmp_path: Path, clock: Clock) -> None:
    times: list[float] = []

    class Timed(Recorder):
        def on_assigned(self, item: str, worker: WORKER) -> None:
            super().on_assigned(item, worker)
            times.append(clock.now)

    job = Timed(max_loss=1000.0, attempts=1, workers=1)
    assert run(job, [*PLAIN[:3], "busy-2", *PLAIN[3:]], in_process(tmp_path, clock)) == Outcome([], {})
    assert job.committed == Counter([*PLAIN, "busy-2"])
    assert Counter(job.attempted) == Counter([*PLAIN, *["busy-2"] * 3])  # no other item was done twice
    assert 6.0 <= clock.now < 9.0  # two pauses of three seconds, and at most a quarter more
    refused = job.attempted.index("busy-2")
    assert times[refused + 1] - times[refused] >= 3.0, "the worker that was refused asks for nothing meanwhile"


def test_stop_does_not_wait_for_a_pause(tmp_path: Path, clock: Clock) -> None:
    job = Recorder(max_loss=1000.0, workers=1)
    outcome = run(
        job, ["plain-1", "busy-always", "plain-2"], in_process(tmp_path, clock), stop=lambda: bool(job.errors)
    )
    assert sorted(outcome.undone) == ["busy-always", "plain-2"]
    assert job.committed == Counter(["plain-1"])
    assert clock.now < 1.0


def test_server_that_is_always_busy_is_given_up(tmp_path: Path, clock: Clock) -> None:
    job, timing = Recorder(attempts=2, workers=1), Timing(poll=0.05, back_off=0.01, max_waited=20.0)
    outcome = run(job, ["busy-always"], in_process(tmp_path, clock), timing=timing)
    assert list(outcome.failed) == ["busy-always"]
    assert 20.0 < clock.now < 60.0


def test_pauses_grow_are_bounded_and_are_never_shorter_than_the_server_asks() -> None:
    for attempt in range(12):
        growing = min(2.0**attempt, 600.0)
        assert growing <= find_pause(attempt, 0.0, 1.0, 600.0) <= 1.25 * growing
        assert find_pause(attempt, 30.0, 1.0, 600.0) >= 30.0
        assert find_pause(attempt, 1e9, 1.0, 600.0) <= 1.25 * 600.0
    assert len({find_pause(3, 0.0, 1.0, 600.0) for _ in range(10)}) == 10


def test_retry_after_is_seconds_or_a_date() -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    assert parse_retry_after(format_datetime(now + timedelta(seconds=90), usegmt=True), now) == 90
    assert parse_retry_after(format_datetime(now - timedelta(seconds=90), usegmt=True), now) == 0
    assert [parse_retry_after(text) for text in ("7", " 7 ", "", "-7", "soon", "Wed, 99 Foo")] == [7, 7, 0, 0, 0, 0]


def http_error(status: int, **headers: str) -> HTTPError:
    message = email.message.Message()
    for name, value in headers.items():
        message[name.replace("_", "-")] = value
    return HTTPError("http://h/a", status, "no", message, io.BytesIO())


def slow_down(status: int) -> Exception:
    answer = {"HTTPStatusCode": status, "HTTPHeaders": {"retry-after": "4"}}
    return botocore.exceptions.ClientError({"Error": {}, "ResponseMetadata": answer}, "GetObject")


def with_response(status: int) -> Exception:
    error = RuntimeError("of a client like requests or httpx")
    error.response = SimpleNamespace(status_code=status, headers={"Retry-After": "5"})  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (http_error(429, Retry_After="3"), (True, 3.0)),
        (http_error(429, RateLimit='"resolvers";r=0;t=170'), (True, 170.0)),
        (http_error(503), (True, 0.0)),
        (http_error(500), (False, 0.0)),
        (http_error(404), None),
        (slow_down(503), (True, 4.0)),
        (slow_down(502), (False, 4.0)),
        (slow_down(403), None),
        (with_response(429), (True, 5.0)),
        (OSError(errno.EBUSY, "Please reduce your request rate"), (True, 0.0)),
        (OSError(errno.EBUSY, "busy", "/mount"), None),
        (ValueError("429"), None),
    ],
)
def test_refusals_of_all_clients_are_recognized(error: Exception, expected: object) -> None:
    wrapped = RuntimeError("outer")
    wrapped.__cause__ = error
    assert find_refusal(error) == find_refusal(wrapped) == expected
    found = to_user_error(wrapped, "s3://bucket/a.tar")
    assert isinstance(found, BusyError) == (expected is not None)
    again = pickle.loads(pickle.dumps(found))
    assert vars(again) == vars(found)
    assert "\n" not in str(found)


def test_patient_call_waits_as_long_as_it_may() -> None:
    waits: list[float] = []
    answers = iter([http_error(429, Retry_After="10"), http_error(500), None])

    def ask() -> str:
        if error := next(answers):
            raise error
        return "answer"

    assert call_patiently(ask, 60.0, waits.append) == "answer"
    assert 10 <= waits[0] <= 12.5
    assert 2 <= waits[1] <= 2.5
    with pytest.raises(HTTPError):
        call_patiently(lambda: (_ for _ in ()).throw(http_error(500)), 1e9, waits.append)
    assert len(waits) == 2 + web.MAX_FAILURES
    del waits[2:]
    with pytest.raises(HTTPError):
        call_patiently(lambda: (_ for _ in ()).throw(http_error(429, Retry_After="10")), 5.0, waits.append)
    with pytest.raises(UserError, match="not busy"):
        call_patiently(lambda: (_ for _ in ()).throw(UserError("", "not busy", "")), 5.0, waits.append)
    assert len(waits) == 2
