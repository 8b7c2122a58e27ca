"""What every server program does: flags, ports, then everything else, and the exit status.

What is slow to import is imported last, so that a wrong flag or a taken port is told at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import ssl
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from socket import socket

from tokenspeed.entrypoints.flags import Program, ServerConfig, parse_flags
from tokenspeed.entrypoints.listen import bind, bind_unix
from tokenspeed.errors import ConfigError
from tokenspeed.logs import configure_logging
from tokenspeed.parallel.launched import Place, served_mesh

log = logging.getLogger(__name__)

EXIT_CONFIG = 2


def run(program: Program, arguments: Sequence[str] | None = None) -> int:
    """Serve until told to stop; the return value is the exit status. `arguments` None are the process's own."""
    config: ServerConfig | None = None
    try:
        config = parse_flags(sys.argv[1:] if arguments is None else arguments, os.environ, program)
        if config.explain_parallel:
            from tokenspeed.models.explain import explained_engine  # noqa: PLC0415

            print("\n".join(explained_engine(config.engine)))
            return 0
        served_mesh(config.engine.parallel, config.engine.tps_floor)
        place = Place.launched(os.environ)
        if place is not None and place.rank > 0:
            from tokenspeed.engine.rank import run_launched  # noqa: PLC0415

            run_launched(config.engine, place, log_level=config.log_level, log_format=config.log_format)
        configure_logging(config.log_level, config.log_format, role="api")
        tls = _tls(config)
        with _listening(config) as listener:
            import uvloop  # noqa: PLC0415

            from tokenspeed.entrypoints.life import serve  # noqa: PLC0415

            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                return runner.run(serve(config, listener, tls))
    except ConfigError as error:
        if config is not None and config.log_format == "json":
            log.critical("%s", error)
        else:
            print(f"tokenspeed: {error}", file=sys.stderr)
        return EXIT_CONFIG
    except KeyboardInterrupt:  # while the rest was being imported; later `serve` is told of signals
        return 128 + signal.SIGINT


@contextlib.contextmanager
def _listening(config: ServerConfig) -> Iterator[socket | None]:
    """The socket for HTTP, if there is to be one."""
    if not config.http:
        yield None
        return
    with contextlib.closing(bind_unix(config.uds) if config.uds else bind(config.host, config.port)) as listener:
        try:
            yield listener
        finally:
            if config.uds:
                Path(config.uds).unlink(missing_ok=True)


def _tls(config: ServerConfig) -> ssl.SSLContext | None:
    if config.ssl_certfile is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile)
    except OSError as error:
        raise ConfigError(
            f"--ssl-certfile {config.ssl_certfile}, --ssl-keyfile {config.ssl_keyfile}: {error}"
        ) from None
    return context
