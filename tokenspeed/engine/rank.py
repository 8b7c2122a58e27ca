"""Ranks other than 0: `python -m tokenspeed.engine.rank FD LEVEL FORMAT`, started by rank 0, or by a launcher.

FD is its end of a socket pair, on which rank 0 says what it is (`ranks.Follow`); once the other end is closed this
process leaves, whatever it is doing. Exit status: 0, 2 for a configuration that cannot work, 1 for anything else.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import os
import signal
import socket
import sys
import threading
from typing import NoReturn

import msgspec
import uvloop

from tokenspeed.config import EngineConfig
from tokenspeed.engine.lockstep import Follower
from tokenspeed.engine.messages import Failed
from tokenspeed.engine.ranks import START_SECONDS, Follow
from tokenspeed.errors import ConfigError
from tokenspeed.executor.load import JOIN_SECONDS, LoadedExecutor, load_executor
from tokenspeed.logs import configure_logging
from tokenspeed.parallel.launched import Place

log = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1
"""Of Linux's prctl: the signal that this process gets when the one that started it dies."""


async def follow(loaded: LoadedExecutor) -> None:
    """Repeat what rank 0 does until it has ended. Raises `EOFError` when it died, `InvariantBroken` where this rank
    came to anything else, and whatever its own steps raise."""
    assert loaded.world is not None
    loop = asyncio.get_running_loop()
    arrived: asyncio.Queue[bytes | EOFError] = asyncio.Queue()
    receive = loaded.world.receive

    def listen() -> None:
        data: bytes | EOFError = b"-"
        while data:
            try:
                data = receive()
            except EOFError as error:
                loop.call_soon_threadsafe(arrived.put_nowait, error)
                return
            loop.call_soon_threadsafe(arrived.put_nowait, data)

    threading.Thread(target=listen, name="tokenspeed-lockstep", daemon=True).start()
    follower = Follower(loaded.executor, debug=os.environ.get("TOKENSPEED_DEBUG") == "1")

    async def repeat() -> None:
        while data := await arrived.get():
            if isinstance(data, EOFError):
                raise data
            await follower.follow(data)

    repeating = asyncio.create_task(repeat())
    await asyncio.wait({repeating, follower.broken}, return_when=asyncio.FIRST_COMPLETED)
    if follower.broken.done():
        repeating.cancel()
        follower.broken.result()
    repeating.result()


def run_rank(config: EngineConfig, place: Place, join_seconds: float) -> Failed | None:
    """Load this rank's share and follow rank 0 to its end; what went wrong, if anything did."""
    try:
        loaded = load_executor(config, None, place, join_seconds=join_seconds)
        log.info("%s", loaded.summary)
        gc.collect()
        gc.freeze()  # what was loaded lives until the end
        uvloop.run(follow(loaded))
    except ConfigError as error:
        return Failed(str(error), config=True)
    except EOFError as error:
        return Failed(f"rank 0 is gone: {error}", config=False)
    except Exception as error:
        # Not a rescue: whoever started this rank is told why it ends.
        log.exception("the rank ends")
        return Failed(f"{type(error).__name__}: {error}", config=False)
    loaded.executor.close()
    assert loaded.world is not None
    loaded.world.leave()
    return None


def run_launched(config: EngineConfig, place: Place, *, log_level: str, log_format: str) -> NoReturn:
    """Be a rank that a launcher has started, until it ends, and the process with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 decides when we end
    configure_logging(log_level, log_format, role=f"rank {place.rank}")
    failed = run_rank(config, place, JOIN_SECONDS)
    if failed is not None:
        log.error("%s", failed.error)
    _end(failed)


def _end(failed: Failed | None) -> NoReturn:
    """At once: threads of a collective that never ends must not keep the process."""
    logging.shutdown()
    sys.stdout.flush()
    os._exit(0 if failed is None else 2 if failed.config else 1)


def _leave_with(peer: socket.socket) -> None:
    """Wait in a thread until the other end of the socket is closed, and end the process then."""

    def watch() -> None:
        while peer.recv(4096):
            pass
        os._exit(0)

    threading.Thread(target=watch, name="tokenspeed-rank-0", daemon=True).start()


def main() -> None:
    """Entry point of a rank that rank 0 has started."""
    # A Ctrl-C in the terminal reaches the whole process group; rank 0 decides when we end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A process that is stopped does not see the end of a socket.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    peer = socket.socket(fileno=int(sys.argv[1]))
    with peer.makefile("rb") as stream:
        body = stream.read(int.from_bytes(stream.read(4), "little"))
    if not body:  # rank 0 has ended before it said anything
        _end(None)
    asked = msgspec.msgpack.decode(body, type=Follow)
    configure_logging(sys.argv[2], sys.argv[3], role=f"rank {asked.rank}")
    _leave_with(peer)
    failed = run_rank(asked.config, asked.place, START_SECONDS)
    if failed is not None:
        body = msgspec.msgpack.encode(failed)
        peer.sendall(len(body).to_bytes(4, "little") + body)
    _end(failed)


if __name__ == "__main__":
    main()
