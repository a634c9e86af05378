"""A server with the interface of the Hugging Face Hub that limits rates, and a store to which it redirects."""

import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

PAGE = 2  # entries of a listing at once
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_onlyForThisTest"
NAME = "org/data"


@dataclass
class Hub:
    """The state of the server.

    Attributes:
        folder: The files of the dataset org/data.
        refusals: How many requests for each path are refused before the first is answered.
        refusal: The status and the headers of a refusal.
        private: Whether the dataset needs the token.
        requests: The path and the header Authorization of each request.
    """

    folder: Path
    refusals: int = 0
    refusal: tuple[int, dict[str, str]] = (429, {"Retry-After": "1"})
    private: bool = False
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)
    endpoint: str = ""


class Handler(BaseHTTPRequestHandler):
    """Answer like the Hub, and below /store/ like the store of its files."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        token = self.headers.get("Authorization")
        hub.requests.append((self.path, token))
        hub.seen[self.path] += 1
        if path.startswith("/store/"):
            return self.answer(200, (hub.folder / path.removeprefix("/store/")).read_bytes())
        if hub.seen[self.path] <= hub.refusals:
            return self.answer(hub.refusal[0], b"{}", hub.refusal[1])
        if token is not None and token != f"Bearer {TOKEN}":
            return self.fail(401, "", "Invalid credentials in Authorization header")
        if f"/{NAME}" not in path or (hub.private and token is None):
            return self.fail(401, "RepoNotFound", "Repository not found")
        if path.startswith(f"/datasets/{NAME}/resolve/{COMMIT}/"):
            name = path.partition(f"{COMMIT}/")[2]
            port = self.server.server_address[1]
            return self.answer(302, b"", {"Location": f"http://localhost:{port}/store/{name}"})
        rest = path.removeprefix(f"/api/datasets/{NAME}")
        if rest.startswith(f"/tree/{COMMIT}"):
            return self.list_tree(rest.removeprefix(f"/tree/{COMMIT}").strip("/"))
        if rest in ("", "/revision/main", f"/revision/{COMMIT}", "/revision/refs/convert/parquet"):
            return self.answer(200, json.dumps({"id": NAME, "sha": COMMIT}).encode())
        return self.fail(404, "RevisionNotFound", "Invalid rev id")

    def list_tree(self, folder: str) -> None:
        files = sorted(p for p in (self.hub.folder / folder).rglob("*"))
        entries = [
            {"type": "directory" if p.is_dir() else "file", "path": p.relative_to(self.hub.folder).as_posix()}
            | {"size": p.stat().st_size, "oid": "0" * 40}
            for p in files
        ]
        if not entries:
            return self.fail(404, "EntryNotFound", "no such folder")
        start = int(parse_qs(urlsplit(self.path).query).get("cursor", ["0"])[0])
        link = f'<{self.hub.endpoint}{urlsplit(self.path).path}?recursive=True&cursor={start + PAGE}>; rel="next"'
        more = {"Link": link} if start + PAGE < len(entries) else {}
        return self.answer(200, json.dumps(entries[start : start + PAGE]).encode(), more)

    def fail(self, status: int, code: str, message: str) -> None:
        self.answer(status, b"{}", {"X-Error-Code": code, "X-Error-Message": message})

    def answer(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def hub_server(hub: Hub) -> Iterator[Hub]:
    """Serve a hub on this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
