"""An actor that fails in every way. It imports nothing slow, since a process is started for each that is lost."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path


class BadItemError(Exception):
    """What a user can mend."""


class Actor:
    """Does what an item's name says, and keeps count of attempts in files."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.held = folder, []  # type: ignore[var-annotated]

    def describe(self) -> int:
        return os.getpid()

    def prepare(self) -> None:
        if (self.folder / "no-start").exists():
            raise RuntimeError("no such device")
        if (self.folder / "stop-at-start").exists():
            (self.folder / "stop-at-start").unlink()
            os.kill(os.getpid(), signal.SIGSTOP)

    def work(self, item: str, following: str | None) -> Iterator[int]:
        with (self.folder / "told").open("a") as told:
            told.write(f"{os.getpid()} {item} {following}\n")
        if following is not None and following.startswith("poison"):
            os.kill(os.getpid(), signal.SIGKILL)
        attempt = len(list(self.folder.glob(f"{item}@*")))
        (self.folder / f"{item}@{attempt}").touch()
        kind, _, number = item.partition("-")
        yield 1
        hopeless = number == "always" or attempt == 0
        if kind == "bad" and hopeless:
            self.held = []
            raise BadItemError(f"{item} cannot be read")
        if kind == "bug" and hopeless:
            raise RuntimeError("the device is lost")
        if kind in ("kill", "poison") and hopeless:
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "stop" and hopeless:
            os.kill(os.getpid(), signal.SIGSTOP)
        if kind == "some":
            time.sleep(0.3)
        if kind == "long":
            while not (self.folder / "grown").exists():
                time.sleep(0.1)
                yield 1
        if kind == "slow":
            for _ in range(20):
                time.sleep(0.1)
                yield 1
        self.held.append(item)
        yield 2

    def commit(self) -> list[str]:
        if (self.folder / "commit-takes").exists():
            time.sleep(float((self.folder / "commit-takes").read_text()))
        held, self.held = self.held, []
        return held
