"""The load generator against a real server: what is refused is counted, and no latency."""

from __future__ import annotations

import itertools
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from streams.bench.http_load import drive

_NUMBER = itertools.count()


class _EverySecondRefused(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        body = b'{"model_version": "v1"}'
        self.send_response(200 if next(_NUMBER) % 2 else 503)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_latencies_are_those_of_answers() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _EverySecondRefused) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            outcome = drive("127.0.0.1", server.server_port, [b"{}"], rate=200, seconds=0.2, connections=2)
        finally:
            server.shutdown()
    assert outcome.errors == {} and outcome.statuses == {200: 20, 503: 20}
    assert len(outcome.seconds) == 20 and outcome.versions == {"v1": 20}
