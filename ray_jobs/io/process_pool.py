"""Processes that compute for one thread, because threads would wait for Python's lock.

`python -m ray_jobs.io.process_pool SOCKET MODULE` is the server of a pool. It imports a module once, which may take
seconds, and forks a process for every pair of pipes that it receives. A fork of the pool's own process could deadlock,
because it has threads. Requests and results go through pipes, so that no shared memory can be full or left behind.
"""

import ctypes
import fcntl
import io
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib import import_module
from queue import SimpleQueue
from typing import Any, NoReturn, TypeVar, cast

T = TypeVar("T")
U = TypeVar("U")

DEPTH = 3  # requests that a process has, so that it need not wait for the next one
ATTEMPTS = 3
TIMEOUT = 240.0  # seconds for a request, after which a process is replaced
ALONE = 1 / 4  # of it for an item that is tried alone: eight of them take less than `--stall-timeout` in all
START_TIMEOUT = 240.0  # seconds until a process is ready: the import may wait for a busy machine
PIPE_BYTES = 1 << 20  # what an ordinary user may ask for; less means more switches between processes
PR_SET_PDEATHSIG = 1  # of Linux's prctl.h
LOST = (OSError, EOFError, pickle.UnpicklingError)  # what the death or the silence of a process raises
ENVIRONMENT = {
    # glibc keeps freed memory. Otherwise it returns every image to the kernel and gets it back page by page.
    **{"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)},
    **{"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    "CUDA_VISIBLE_DEVICES": "",  # otherwise the user's code could take memory of the GPU in each process
}


class ProcessPool:
    """Processes that apply functions to items. They start when they are first used.

    A process that is killed or hangs is replaced, and its items are tried again one by one. An item is given up if its
    process hangs, or ends ATTEMPTS times. The processes end with this one, however it ends.

    Attributes:
        processes: The number of processes.

    Example:
        >>> with ProcessPool(1, "math") as pool:
        ...     list(pool.map(abs, lambda item, reason: 0, [[-1, -2], [3]]))
        [[1, 2], [3]]
    """

    def __init__(self, processes: int, module: str, timeout: float = TIMEOUT) -> None:
        """Prepare a pool.

        Args:
            processes: The number of processes.
            module: The module to import before any process is started.
            timeout: Seconds after which a process that gives no result is replaced.
        """
        self.processes, self._timeout = processes, timeout
        self._server = _Server(module)
        self._all: list[_Process] = []
        self._idle: list[list[_Process]] = []  # those of the maps that have ended

    def map(
        self, function: Callable[[T], U], lost: Callable[[T, str], U], parts: Iterable[Sequence[T]]
    ) -> Generator[list[U], None, None]:
        """Yield the results of a function for parts of some items, in order.

        Another map that runs at the same time uses other processes, because the first may wait for its items forever.

        Args:
            function: The function; it and its results are pickled. If it raises an exception, its process ends.
            lost: Makes the result of an item that is given up, from the item and the reason.
            parts: The parts; each goes to one process. At most DEPTH parts are held for each process.

        Raises:
            RuntimeError: If no process can be started.
        """
        processes = self._idle.pop() if self._idle else self._make_processes()
        waiting: deque[tuple[_Process, Sequence[T]]] = deque()
        try:
            for number, part in enumerate(parts):
                process = processes[number % len(processes)]
                process.send(function, part)
                waiting.append((process, part))
                if len(waiting) == DEPTH * len(processes):
                    yield self._receive(function, lost, waiting)
            while waiting:
                yield self._receive(function, lost, waiting)
        finally:
            for process, _ in waiting:  # its results are not wanted any more
                process.kill()
            self._idle.append(processes)

    @property
    def running(self) -> list[int]:
        """The process ids of the running processes."""
        return [process.pid for process in self._all if process.requests is not None]

    def __enter__(self) -> "ProcessPool":
        """Return the pool."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the processes."""
        for process in self._all:
            process.kill()
        self._server.close()

    def _make_processes(self) -> "list[_Process]":
        """Return new processes, which are not running yet."""
        made = [_Process(self._server, self._timeout) for _ in range(self.processes)]
        self._all += made
        return made

    def _receive(
        self, function: Callable[[T], U], lost: Callable[[T, str], U], waiting: "deque[tuple[_Process, Sequence[T]]]"
    ) -> list[U]:
        """Return the results of the first part that waits for its results."""
        process, part = waiting.popleft()
        try:
            return process.receive(self._timeout)
        except LOST:
            results = [self._try_alone(process, function, lost, item) for item in part]
            for other, behind in waiting:
                if other is process:
                    process.send(function, behind)
            return results

    def _try_alone(self, process: "_Process", function: Callable[[T], U], lost: Callable[[T, str], U], item: T) -> U:
        """Return the result of a function for one item, or of `lost`."""
        for _ in range(ATTEMPTS):  # something else may have killed the process
            try:
                process.send(function, [item])
                return process.receive(ALONE * self._timeout)[0]
            except TimeoutError:
                return lost(item, f"no result after {ALONE * self._timeout:g} s")
            except LOST:
                continue
        return lost(item, "its process was killed or crashed")


class _Process:
    """A process of a pool, which may not be running.

    Attributes:
        pid: Its process id; 0 until it is known.
        requests: The pipe to the process; None if it is not running.
        results: The pipe from the process.
        failed: Whether a request could not be sent, which the next call of `receive` reports.
    """

    def __init__(self, server: "_Server", timeout: float) -> None:
        self.server, self.timeout, self.failed = server, timeout, False
        self.pid, self.requests, self.results = 0, cast(Any, None), cast(Any, None)

    def send(self, function: Callable[[T], U], items: Sequence[T]) -> None:
        """Request the results of a function for some items; start the process if it is not running."""
        if self.failed:
            return
        if self.requests is None:
            self.start()
        try:
            send(self.requests, (pickle.dumps(function), items))
        except OSError:  # it has ended, or reads nothing, because an earlier item hangs
            self.kill()
            self.failed = True

    def receive(self, timeout: float) -> list[Any]:
        """Return the results of the oldest request; end the process and raise one of LOST if it fails."""
        try:
            if self.failed:
                raise EOFError
            self.results.raw.timeout = timeout
            return pickle.load(self.results)
        except LOST:
            self.kill()
            raise

    def start(self) -> None:
        """Start a process and wait until it is ready."""
        for _ in range(ATTEMPTS):
            (theirs, requests), (results, also_theirs) = open_pipe(), open_pipe()
            self.server.send([theirs, also_theirs])
            self.requests = _Requests(requests, self.timeout)
            self.results = io.BufferedReader(_Results(results, START_TIMEOUT))
            with suppress(*LOST):
                self.pid = pickle.load(self.results)
                return
            self.kill()
        raise RuntimeError(f"no process can import {self.server.module}; the log of this process has the reason")

    def kill(self) -> None:
        """End the process, if it is running."""
        if self.requests is not None:
            if self.pid:
                with suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGKILL)
            self.results.close()
            self.requests.close()
        self.pid, self.requests, self.failed = 0, None, False


class _Requests(io.FileIO):
    """A pipe that is written; TimeoutError is raised if nothing is read from it for some seconds."""

    def __init__(self, pipe: int, timeout: float) -> None:
        super().__init__(pipe, "wb")
        self.timeout, self.poll = timeout, select.poll()
        self.poll.register(pipe, select.POLLOUT)
        os.set_blocking(pipe, False)

    def write(self, data: Any) -> int:
        view, done = memoryview(data).cast("B"), 0
        while done < len(view):
            if not self.poll.poll(1000 * self.timeout):
                raise TimeoutError
            done += super().write(view[done:]) or 0
        return done


class _Results(io.FileIO):
    """A pipe that is read; TimeoutError is raised if nothing comes for some seconds."""

    def __init__(self, pipe: int, timeout: float) -> None:
        super().__init__(pipe)
        self.timeout, self.poll = timeout, select.poll()
        self.poll.register(pipe, select.POLLIN)

    def readinto(self, buffer: Any) -> int | None:
        if not self.poll.poll(1000 * self.timeout):
            raise TimeoutError
        return super().readinto(buffer)


def open_pipe() -> tuple[int, int]:
    """Return both ends of a large pipe."""
    ends = os.pipe()
    with suppress(OSError):  # the user has many pipes
        fcntl.fcntl(ends[0], fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    return ends


class _Server:
    """The server of a pool; it is started when it is first used, and again if it was killed."""

    def __init__(self, module: str) -> None:
        self.module, self.lock = module, threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None

    def send(self, pipes: Sequence[int]) -> None:
        """Let the server fork a process that reads requests from one pipe and writes results to another.

        These ends of the pipes are closed here.
        """
        with self.lock:
            try:
                if self.process is None or self.process.poll() is not None:
                    self.process = self.start()
                socket.send_fds(self.control, [b"+"], pipes)
            except ConnectionError:  # it was killed, and has closed its end, but may not be a zombie yet
                cast(Any, self.process).wait()  # the next attempt starts another one
            finally:
                for pipe in pipes:
                    os.close(pipe)

    def start(self) -> "subprocess.Popen[bytes]":
        """Start the server."""
        self.control, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", __name__, str(theirs.fileno()), self.module]
            environment = os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(sys.path)}
            return subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL)

    def close(self) -> None:
        """End the server, if it is running; its processes end with it."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.control.close()


def serve(control: socket.socket, module: str) -> None:
    """Import a module, then fork a process for each pair of pipes that is received, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the pool's own process decides when to end
    import_module(module)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel forgets the processes that have ended
    while True:
        message, pipes, _, _ = socket.recv_fds(control, 1, 2)
        if not message:
            return
        if os.fork() == 0:
            control.close()
            work(*pipes)
        for each in pipes:
            os.close(each)


def work(requests: int, results: int) -> NoReturn:
    """Apply the functions that are requested to their items, until the pipe is closed; then end this process."""
    status = 1
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # also in a function that never returns
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        waiting: SimpleQueue[Any] = SimpleQueue()
        known, function = b"", cast(Callable[[Any], Any], None)
        pipe, threads = os.fdopen(results, "wb"), ThreadPoolExecutor(2)
        send(pipe, os.getpid())
        # Threads read requests and write results meanwhile, so that neither end waits for the other.
        threads.submit(read_requests, requests, waiting)
        while (request := waiting.get()) is not None:
            if request[0] != known:  # a function may hold what it has loaded
                known, function = request[0], pickle.loads(request[0])
            threads.submit(send, pipe, [function(item) for item in request[1]])
        threads.shutdown()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def read_requests(requests: int, waiting: "SimpleQueue[Any]") -> None:
    """Put the requests of a pipe into a queue, then None."""
    with suppress(*LOST), open(requests, "rb") as pipe:
        while True:
            waiting.put(pickle.load(pipe))
    waiting.put(None)


def send(file: Any, value: object) -> None:
    """Write a value to a pipe."""
    pickle.dump(value, file, pickle.HIGHEST_PROTOCOL)
    file.flush()


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2])
