"""A web server on 127.0.0.1; a tiny case and its manifest."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from medcook.data.case import Case
from medcook.data.manifests import Facts, Manifest


class Server:
    """Files by path; knows HTTP Range, can break off after a number of bytes, and remembers what it was asked."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str | None]] = []
        self.break_after: int | None = None
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                server.answer(self)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        wanted = handler.headers.get("Range")
        self.requests.append((handler.path, wanted))
        body = self.files.get(handler.path)
        if body is None:
            return handler.send_error(404)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        handler.send_response(206 if wanted else 200)
        handler.send_header("Content-Length", str(len(body) - start))
        handler.end_headers()
        rest = body[start:]
        if self.break_after is not None:
            rest, self.break_after = rest[: self.break_after], None
            handler.wfile.write(rest)
            handler.wfile.flush()
            handler.connection.close()
        else:
            handler.wfile.write(rest)


@pytest.fixture
def server():
    running = Server()
    yield running
    running.http.shutdown()
    running.http.server_close()


@pytest.fixture
def manifest() -> Manifest:
    """The manifest of a set with the classes 0 and 1."""
    return Manifest(
        name="tiny",
        title="Tiny",
        modality="none",
        dimensions=2,
        classes={0: "background", 1: "disc"},
        licence="none",
        terms="none",
        citation="none",
        source="none",
        access="open",
        reader="tiny",
        facts=Facts(label_values=[0, 1], foreground_in_every_case=True),
    )


@pytest.fixture
def case() -> Case:
    """A case that the manifest allows."""
    label = np.zeros((4, 5), np.uint8)
    label[1:3, 1:3] = 1
    return Case(image=np.ones((1, 4, 5), np.float32), label=label, case_id="one", patient_id="p1")
