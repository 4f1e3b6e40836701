"""`jaxslm serve`: the process around the application. SIGTERM and SIGINT drain it; a second one ends it at once."""

import atexit
import ipaddress
import json
import logging
import os
import sys
import time
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from jaxslm.serve.app import create_app
from jaxslm.serve.engine import Engine
from jaxslm.serve.errors import ApiError, error_body
from jaxslm.serve.gate import MAX_HEAD_BYTES
from jaxslm.serve.logs import log_to_stderr
from jaxslm.serve.service import Service
from jaxslm.serve.settings import Keys, ServeSettings, read_keys

ANSWER_S = 1.0
"""A request that is too slow gets its answer before the connection is cut."""

logger = logging.getLogger(__name__)


class Http(H11Protocol):
    """uvicorn's HTTP, with a limit on how long a request's head and body may take, and our body for broken requests."""

    read_timeout_s = 30.0
    _timer: Any = None

    def connection_made(self, transport: Any) -> None:
        """A client that connects has to say something."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """The clock runs from a request's first byte to its last."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the clock."""
        super().connection_lost(exc)
        self._stop_timer()

    def send_400_response(self, msg: str) -> None:
        """A request that is no HTTP, or whose head is too long."""
        body = json.dumps(error_body(ApiError(400, "invalid_http", msg), "")).encode()
        headers = [("content-type", "application/json"), ("connection", "close")]
        events = h11.Response(status_code=400, headers=headers, reason=b"Bad Request"), h11.Data(data=body)
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            for event in (*events, h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _watch(self) -> None:
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._stop_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(self.read_timeout_s, self._too_slow)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        if not self.transport.is_closing():
            self.transport.abort()


class Server(uvicorn.Server):
    """uvicorn's server, which on a signal first refuses new requests and answers those that it has accepted."""

    def __init__(self, engine: Engine) -> None:
        """Binds the address of the engine's settings; ends the process with code 1 if that cannot be."""
        settings = engine.settings
        app = create_app(engine)
        config = uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            http=type("Http", (Http,), {"read_timeout_s": settings.read_timeout_s + ANSWER_S}),
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
            timeout_graceful_shutdown=5,
        )
        super().__init__(config)
        self.service: Service = app.state.service
        self._drain_until: float | None = None
        self._socket = config.bind_socket()
        host, port = self._socket.getsockname()[:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def serve_until_signal(self) -> None:
        """Serves until SIGTERM or SIGINT, or, outside of the main thread, until `handle_exit`."""
        self.run(sockets=[self._socket])

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Starts draining; ends at once when it is called again."""
        if self._drain_until is not None:
            self.force_exit = self.should_exit = True
            self.config.timeout_graceful_shutdown = 0
            return
        self.service.engine.health.state = "draining"
        self._drain_until = time.monotonic() + self.service.settings.drain_s

    async def on_tick(self, counter: int) -> bool:
        """Ends when nothing is left to answer, or when the server will never be ready."""
        if self._drain_until is not None:
            self.service.out_of_time = time.monotonic() > self._drain_until
            if self.service.out_of_time or not self.service.admission.active.number:
                self.should_exit = True
        if self.service.engine.health.state == "failed":
            self.should_exit = True
        return await super().on_tick(counter)


def serve(settings: ServeSettings) -> dict[str, Any]:
    """Serves until a signal; returns what was done as a JSON-able dict.

    Raises:
        RuntimeError: warm-up failed; the log says why.
        InputError: the checkpoint, a key, the buckets or a URL breaks a rule.
        StoreUnavailable: store or cache does not answer.
    """
    log_to_stderr()
    keys = read_keys(settings.keys_file)
    engine = Engine(settings, keys)
    warn_if_open(keys, settings.host)
    server = Server(engine)
    logger.info("listening", extra={"fields": {"url": server.url, "model": engine.model.name}})
    start = time.monotonic()
    server.serve_until_signal()
    if engine.at_work:
        # XLA crashes if the interpreter is taken down around it. Exit handlers run last in, first out: before JAX's.
        atexit.register(_end_now)
    if engine.health.state == "failed":
        raise RuntimeError("warm-up failed")
    requests = sum(
        sample.value
        for metric in engine.metrics.requests.collect()
        for sample in metric.samples
        if sample.name.endswith("_total")
    )
    return {"url": server.url, "requests": int(requests), "seconds": round(time.monotonic() - start, 3)}


def _end_now() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def warn_if_open(keys: Keys, host: str) -> None:
    """Logs a warning if scores need no key and `host` is an address that other machines reach."""
    if not keys.api and not _is_loopback(host):
        logger.warning("no API keys: anyone who reaches %s may score", host)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
