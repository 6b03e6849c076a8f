"""A server from its socket to its end: bind, load, say so, answer, stop on a signal.

The address is taken before the model is loaded, so that a wrong one costs nothing, and nobody is
let in before the model is there. SIGTERM and Ctrl-C stop it: no new connections, an answer for
every request that was taken, exit code 0. A second Ctrl-C doesn't wait.
"""

import contextlib
import json
import logging
import math
import signal
import socket
import time
from collections.abc import Callable, Iterator

from opfa.errors import RunError
from opfa.extras import importing
from opfa.inference.predictor import Options, Predictor
from opfa.serving.asking import example
from opfa.serving.connections import timed
from opfa.serving.hosts import for_this_machine, is_loopback
from opfa.serving.limits import Limits
from opfa.serving.results import Served
from opfa.serving.server import app_of
from opfa.serving.service import JSON, Service
from opfa.storage.files import named

with importing("opfa serve", "opfa[serve]"):
    from uvicorn import Config, Server

STOPS = (signal.SIGINT, signal.SIGTERM)
ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # where a client of this machine finds it
log = logging.getLogger(__name__)


class _Server(Server):
    """uvicorn's server, for which a stop on a signal is a success."""

    def __init__(self, config: Config, ready: Callable[[], object]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and say so."""
        await super().startup(sockets)
        self._ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop on a signal, without raising it again."""
        before = {number: signal.signal(number, self.handle_exit) for number in STOPS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def serve(model: str, options: Options, limits: Limits) -> Served:
    """Serve a model until a signal stops it; for the main thread. Raises `OpfaError` before."""
    with _bound(limits) as listening:
        service = Service(model, Predictor(model, options), limits)
        address = _address(listening, limits.host)
        if not is_loopback(listening.getsockname()[0]):
            log.warning("--host %s: others can reach it, and it has no login", limits.host)
        start = time.monotonic()
        config = config_of(service)
        _Server(config, lambda: _tell(service, address)).run([listening])
    return Served(
        model=model,
        address=address,
        requests=service.metrics.num_requests,
        answered=service.metrics.num_answered,
        examples=service.metrics.num_examples,
        seconds=time.monotonic() - start,
    )


def config_of(service: Service) -> Config:
    """uvicorn's configuration for a service; messages go where this program's go."""
    limits, app = service.limits, app_of(service)
    return Config(
        for_this_machine(app) if is_loopback(limits.host) else app,
        http=timed(limits.read_seconds, limits.answer_seconds),
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=math.ceil(limits.read_seconds + limits.answer_seconds),
    )


@contextlib.contextmanager
def _bound(limits: Limits) -> Iterator[socket.socket]:
    """A socket that has the address and doesn't listen yet."""
    where = f"--host {limits.host} --port {limits.port}"
    try:
        found = socket.getaddrinfo(limits.host, limits.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise RunError(f"{where}: no such address: {error}") from None
    family, kind, protocol, _, place = found[0]
    with socket.socket(family, kind, protocol) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(place)
        except OSError as error:
            raise RunError(f"{where}: can't be bound: {named(error.errno or 0)}") from None
        yield listening


def _address(listening: socket.socket, host: str) -> str:
    """Where a client of this machine finds it."""
    shown = ANYWHERE.get(host, host)
    shown = f"[{shown}]" if ":" in shown else shown
    return f"http://{shown}:{listening.getsockname()[1]}"


def _tell(service: Service, address: str) -> None:
    """What is served, where, and what to try."""
    about = service.about()
    log.info("%s (%s), in %s", service.name, about["kind"], about["runs_in"])
    log.info("%s answers; a page to try it is there too. Ctrl-C stops it", address)
    body = json.dumps({"inputs": example(service.predictor.task)}, ensure_ascii=False)
    quoted = body.replace("'", "'\\''")
    log.info("    curl %s/predict -H 'Content-Type: %s' -d '%s'", address, JSON, quoted)
