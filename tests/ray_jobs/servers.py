"""HTTP server with the faults of real servers."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Handler(BaseHTTPRequestHandler):
    """Respond to /FAULT/NAME with the file NAME of the server's folder, never with a range, and with the fault."""

    protocol_version = "HTTP/1.1"
    folder: Path
    ended: threading.Event
    requested: list[str]

    def do_GET(self) -> None:
        self.requested.append(self.path)
        fault, name = self.path.partition("?")[0].lstrip("/").split("/", 1)
        if fault in ("404", "500") or (fault == "once" and self.requested.count(self.path) == 1):
            return self.send_error(int(fault) if fault.isdigit() else 500)
        if fault == "moved":
            self.send_response(302)
            self.send_header("Location", f"/plain/{name}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        data = (self.folder / name).read_bytes()
        self.send_response(200)
        half = len(data) // 2 // 512 * 512
        if fault.startswith("chunked"):
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for start in range(0, half if fault == "chunked-cut" else len(data), 5000):
                piece = data[start : start + 5000]
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            if fault == "chunked":
                self.wfile.write(b"0\r\n\r\n")
        elif fault.startswith("unsized"):
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(data[:half] if fault == "unsized-cut" else data)
        else:
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if fault == "dripping":
                for byte in data:
                    self.wfile.write(bytes([byte]))
                    if self.ended.wait(0.02):
                        break
            self.wfile.write(data if fault in ("plain", "once") else data[:half])
            if fault == "stalled":
                self.wfile.flush()
                self.ended.wait()
        self.close_connection = fault not in ("plain", "once", "chunked")
        return None

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def http_server(folder: Path, requested: list[str] | None = None) -> Iterator[str]:
    """Serve the files of a folder on this machine and yield the address; `requested` receives the paths of requests."""
    ended, requested = threading.Event(), [] if requested is None else requested
    handler = type("Bound", (Handler,), {"folder": folder, "ended": ended, "requested": requested})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    ended.set()
    server.shutdown()
    server.server_close()
    thread.join()
