"""A small web server for the slider, of the standard library alone; local by default.

It answers only requests that name this machine as their host and come from its own page, so that
another page in the same browser cannot use the model.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

from spectrim.errors import InputError, OutputError, SpectrimError
from spectrim.serve.slider.engine import BusyError, Engine

LARGEST_REQUEST = 2**20
"""Bytes of a request's body: a prompt of any sensible length."""

MOST_SKIPPED = 64 * LARGEST_REQUEST
SKIPPED_AT_A_TIME = 2**16

LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; " + (
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'"
)

logger = logging.getLogger(__name__)


class SliderServer(ThreadingHTTPServer):
    """Serves one engine; `serve_forever` until `shutdown`.

    Attributes:
        engine: answers the requests.
        url: to open in a browser.
    """

    daemon_threads = True

    def __init__(self, engine: Engine, *, host: str = "127.0.0.1", port: int = 7860):
        self.engine = engine
        self.names = LOCAL_NAMES | {host}
        self.open_to_all = host in ("0.0.0.0", "::", "")  # noqa: S104 (the user's own choice)
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise OutputError(f"cannot listen on {host}:{port}: {error}; try --port") from error

    @property
    def url(self) -> str:
        """Where the page is."""
        host, port = self.server_address[:2]
        return f"http://{host!s}:{port}/"


class _Handler(BaseHTTPRequestHandler):
    """One request."""

    server: SliderServer
    server_version = "spectrim"
    sys_version = ""

    def do_GET(self) -> None:
        """The page, or what it needs to draw itself."""
        if not self._welcome():
            return
        if self.path == "/":
            page = files("spectrim.serve.slider").joinpath("page.html").read_bytes()
            self._send(HTTPStatus.OK, page, "text/html; charset=utf-8")
        elif self.path == "/facts":
            self._json(HTTPStatus.OK, self.server.engine.facts())
        else:
            self._json(HTTPStatus.NOT_FOUND, {"error": "there is nothing here"})

    def do_POST(self) -> None:
        """A size, a measurement, a folder to write, or a stream of continuations."""
        if not self._welcome():
            return
        engine = self.server.engine
        try:
            asked = self._asked()
            if self.path == "/size":
                self._json(HTTPStatus.OK, engine.size(asked.get("keep", 1.0)))
            elif self.path == "/measure":
                self._json(HTTPStatus.OK, engine.measure(asked.get("keep", 1.0)))
            elif self.path == "/save":
                self._json(HTTPStatus.OK, engine.save(asked.get("keep", 1.0)))
            elif self.path == "/continue":
                self._stream(
                    engine.continuations(
                        asked.get("prompt", ""), asked.get("keep", 1.0), asked.get("tokens", 60)
                    )
                )
            else:
                self._json(HTTPStatus.NOT_FOUND, {"error": "there is nothing here"})
        except BusyError as error:
            self._json(HTTPStatus.CONFLICT, {"busy": str(error)})
        except SpectrimError as error:
            self._json(HTTPStatus.BAD_REQUEST, {"error": str(error)})
        except ConnectionError:
            logger.debug("the reader of %s has gone", self.path)

    def _welcome(self) -> bool:
        """Whether the request is for this machine and from our own page."""
        host = self.headers.get("Host", "")
        origin = self.headers.get("Origin")
        ours = self.server.open_to_all or _name(f"//{host}") in self.server.names
        if ours and (origin is None or urlsplit(origin).netloc == host):
            return True
        self._json(HTTPStatus.FORBIDDEN, {"error": "only the page of this server may ask"})
        return False

    def _asked(self) -> dict[str, Any]:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > LARGEST_REQUEST:
            self._skip(int(length) if length.isdecimal() else 0)
            raise InputError(
                f"a request of {length or 'unknown'} bytes is not read; at most {LARGEST_REQUEST}"
            )
        try:
            asked = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            raise InputError(f"the request is not JSON: {error}") from error
        if not isinstance(asked, dict):
            raise InputError("the request is no JSON object")
        return asked

    def _skip(self, length: int) -> None:
        """Read a body that is refused, up to a limit: browsers hear nothing before they have sent.

        What is longer than that loses its connection.
        """
        left = min(length, MOST_SKIPPED)
        while left > 0:
            read = len(self.rfile.read(min(left, SKIPPED_AT_A_TIME)))
            left = left - read if read else 0

    def _stream(self, events: Iterator[dict[str, Any]]) -> None:
        """One JSON object per line, each as soon as it exists."""
        # The first event comes before the headers, so that a refusal has its own status.
        first = next(events)
        try:
            self._head(HTTPStatus.OK, "application/x-ndjson")
            self._line(first)
            for event in events:
                self._line(event)
        except SpectrimError as error:
            self._line({"error": str(error)})
        finally:
            events.close()  # type: ignore[attr-defined]

    def _line(self, event: dict[str, Any]) -> None:
        self.wfile.write(json.dumps(event).encode() + b"\n")
        self.wfile.flush()

    def _json(self, status: HTTPStatus, data: dict[str, Any]) -> None:
        self._send(status, json.dumps(data).encode(), "application/json")

    def _send(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self._head(status, kind, len(body))
        self.wfile.write(body)

    def _head(self, status: HTTPStatus, kind: str, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are logged at debug level, not printed."""
        logger.debug(format, *args)


def _name(address: str) -> str | None:
    """The host of an address without its port; None where it is malformed."""
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None
